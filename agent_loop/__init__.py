"""How one rollout comes to be: engines that speak tokens, agent loops that speak turns, rewards that judge.

Engines are imported from their own modules (`agent_loop.engines.vllm`, ...), so that none is loaded unasked.
"""

from agent_loop.agent_loop import AgentLoop
from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Capabilities, Completion, Engine, EngineLoad, TopLogprobs, TopTokens
from agent_loop.rewards import Judgement, RewardFunction, RewardSet, RewardStatistics, trl_reward
from agent_loop.sampler import Sampler
from agent_loop.sampler_registry import create_sampler, register_sampler
from agent_loop.samples import SampledSequence, SampleResponse
from agent_loop.sampling import SamplingParams
from agent_loop.single_turn import SingleTurnAgentLoop
from agent_loop.tool_calls import BadCall, ToolCall
from agent_loop.tool_use import ToolUseAgentLoop
from agent_loop.tools import Tool

__all__ = [
    "Adapter",
    "AgentLoop",
    "BadCall",
    "Capabilities",
    "Completion",
    "Engine",
    "EngineLoad",
    "Judgement",
    "RewardFunction",
    "RewardSet",
    "RewardStatistics",
    "SampleResponse",
    "SampledSequence",
    "Sampler",
    "SamplingParams",
    "SingleTurnAgentLoop",
    "Tool",
    "ToolCall",
    "ToolUseAgentLoop",
    "TopLogprobs",
    "TopTokens",
    "create_sampler",
    "register_sampler",
    "trl_reward",
]
