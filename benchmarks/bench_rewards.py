"""What a `RewardSet` costs beside a plain function: `python -m benchmarks.bench_rewards` prints tables.

    python -m benchmarks.bench_rewards [--rollouts 4000] [--rounds 5]

Rollouts that are whole are judged, in groups of 8 by an agent loop, 64 groups at once. What is compared is the processor time of
all threads for a rollout, in rounds of random order; the functions themselves do next to nothing. A second table is of checks in
processes, by the clock: what a check costs in a worker that is there, and in one that is started for it.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agent_loop import AgentLoop, RewardFunction, RewardSet
from agent_loop.rewards.processes import ProcessReward
from benchmarks.workload import in_rounds, print_table, ratios, scratch, spread
from buffer import RolloutGroup, RolloutState

MEMBERS, AT_ONCE = 8, 64


class Whole(AgentLoop):
    """Its rollouts are whole from the start: only judging is left."""

    async def generate(self, state: RolloutState) -> RolloutState:
        """Never called."""
        raise NotImplementedError


async def plain(state: RolloutState) -> float:
    """A function on the event loop."""
    return 0.5


def threaded(state: RolloutState) -> float:
    """A function on a thread."""
    return 0.5


async def of_group(group: RolloutGroup) -> list[float]:
    """A function of a group."""
    return [0.5] * len(group.rollouts)


def contenders() -> dict[str, dict[str, Any]]:
    """By name, what an agent loop judges by."""
    three = dict.fromkeys("abc", plain)
    return {
        "async function": {"reward": plain},
        "async function, again": {"reward": plain},
        "a set of it": {"reward": RewardSet({"a": plain})},
        "a set of three, by source": {"reward": RewardSet(three, recipes={"sums": {"a": 1.0, "b": 0.5, "c": 0.1}})},
        "function on a thread": {"reward": threaded},
        "a set of it, on a thread": {"reward": RewardSet({"a": threaded})},
        "group function": {"group_reward": of_group},
        "a set of it, of the group": {"reward": RewardSet({"a": RewardFunction(of_group, of_group=True)})},
    }


CHECK = """
def check(sample):
    return sample["text"] == sample["row"]["answer"]
"""

BASELINES = {
    "async function": "async function",
    "async function, again": "async function",
    "a set of it": "async function",
    "a set of three, by source": "async function",
    "function on a thread": "function on a thread",
    "a set of it, on a thread": "function on a thread",
    "group function": "group function",
    "a set of it, of the group": "group function",
}


def groups_of(rollouts: int) -> list[RolloutGroup]:
    """Whole, and not judged."""
    row = {"prompt_ids": [1, 2], "data_source": "sums", "answer": "42"}
    groups = []
    for group_id in range(rollouts // MEMBERS):
        states = [RolloutState(group_id, index, row=row, prompt_ids=[1, 2], text="42", finish_reason="stop") for index in range(MEMBERS)]
        groups.append(RolloutGroup(group_id, states))
    return groups


def judging(rollouts: int, options: dict[str, Any]) -> Callable[[], Awaitable[float]]:
    """Processor seconds a rollout."""

    async def run() -> float:
        loop, groups, slots = Whole(**options), groups_of(rollouts), asyncio.Semaphore(AT_ONCE)

        async def one(group: RolloutGroup) -> None:
            async with slots:
                await loop.generate_group(group)

        began = time.process_time()
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(one(group))
        seconds = time.process_time() - began
        assert all(state.reward is not None for group in groups for state in group.rollouts)
        return seconds / rollouts

    return run


def checking(checks: int, **options: Any) -> Callable[[], Awaitable[float]]:
    """Seconds a check, one after the other."""

    async def run() -> float:
        states = [group.rollouts[0] for group in groups_of(checks * MEMBERS)]
        with scratch() as folder:
            (Path(folder) / "bench_check.py").write_text(CHECK)
            async with ProcessReward("bench_check:check", workers=1, path=[folder], **options) as reward:
                began = time.perf_counter()
                for state in states:
                    await reward(state)
                return (time.perf_counter() - began) / checks

    return run


async def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    took = await in_rounds({name: judging(given.rollouts, options) for name, options in contenders().items()}, given.rounds)
    rows = [
        (
            name,
            spread(own, ".0f", 1e6),
            spread(ratios(own, took[BASELINES[name]])),
            spread([a - b for a, b in zip(own, took[BASELINES[name]], strict=True)], ".0f", 1e6),
        )
        for name, own in took.items()
    ]
    print_table(["judging a rollout", "processor time, us", "of the plain one", "more, us"], rows)
    took = await in_rounds({"in a worker that is there": checking(200), "in one of its own": checking(10, max_checks=1)}, given.rounds)
    print_table(["a check in a process", "ms"], [(name, spread(own, ".2f", 1e3)) for name, own in took.items()])


if __name__ == "__main__":
    asyncio.run(main())
