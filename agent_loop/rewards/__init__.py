"""Rewards: plain functions of a finished rollout or of its whole group, and sets of them with weights.

What asks a server, a model or other processes is imported from its own module (`agent_loop.rewards.remote`, `.classifier`,
`.processes`), so that none is loaded unasked.
"""

from agent_loop.rewards.judgement import Judgement
from agent_loop.rewards.judging import REWARD_THREADS, GroupReward, Reward, by_kind, judge, judge_group
from agent_loop.rewards.reward_function import RewardFunction
from agent_loop.rewards.reward_set import RewardSet
from agent_loop.rewards.statistics import RewardStatistics
from agent_loop.rewards.trl import trl_reward

__all__ = [
    "REWARD_THREADS",
    "GroupReward",
    "Judgement",
    "Reward",
    "RewardFunction",
    "RewardSet",
    "RewardStatistics",
    "by_kind",
    "judge",
    "judge_group",
    "trl_reward",
]
