"""The parts of production are refused where they are given if they are none, and not in the midst of it."""

from agent_loop import AgentLoop
from producer.prompts import PromptSampler


def check_parts(agent_loop: object, sampler: object) -> None:
    """`TypeError` where one of them is none."""
    check_loop(agent_loop)
    if not isinstance(sampler, PromptSampler):
        raise TypeError(f"sampler={sampler!r:.80} is no PromptSampler; pass ReplayPromptSampler(dataset, buffer, group_size=...)")


def check_loop(agent_loop: object) -> None:
    """`TypeError` where it is none."""
    if not isinstance(agent_loop, AgentLoop):
        raise TypeError(
            f"agent_loop={agent_loop!r:.80} is no AgentLoop; pass SingleTurnAgentLoop(engine, tokenizer, ...), or one of your own"
        )
