"""What the buffer's benchmarks have in common: groups, rounds in random order, and tables of medians."""

import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from buffer import Position, RolloutGroup, RolloutState, Status

T = TypeVar("T")
K = TypeVar("K")

MEMBERS, TOKENS = 8, 1024


def make_group(
    group_id: int, *, task_name: str = "bench", tokens: int = TOKENS, words: int = 200, version: int = 3, status: Status = Status.COMPLETED
) -> RolloutGroup:
    """A group as an agent loop leaves it: text, turns, scores, tokens of one policy version, a row of a dataset."""
    row = {"prompt": "A train leaves at noon. " * 8, "answer": "42", "source": "bench"}
    prompt_ids = np.arange(64)
    rollouts = [
        RolloutState(group_id, index, task_name, Status.COMPLETED, row=row, prompt=row["prompt"], prompt_ids=prompt_ids)
        for index in range(MEMBERS)
    ]
    noise = np.random.default_rng(group_id)
    for rollout in rollouts:
        rollout.append(noise.integers(0, 150_000, tokens), logprobs=-noise.random(tokens, np.float32), version=version)
        rollout.text, rollout.finish_reason, rollout.score, rollout.reward = "So the answer is 42. " * words, "stop", 1.0, 1.0
        rollout.status = status
    return RolloutGroup(group_id, rollouts, task_name, Position(0, group_id))


class Database:
    """Names files for databases in a folder that goes away at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._n = folder, 0

    def new(self) -> Path:
        """A path at which nothing lies."""
        self._n += 1
        return self._folder / f"{self._n}.db"

    def drop(self, path: Path) -> None:
        """Delete what a contender wrote, so that the disk's cache holds the next one's."""
        for file in self._folder.glob(f"{path.name}*"):
            file.unlink()


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder on the disk that `TMPDIR` names."""
    return tempfile.TemporaryDirectory(prefix="millrace-bench-")


async def in_rounds(contenders: dict[K, Callable[[], Awaitable[T]]], rounds: int) -> dict[K, list[T]]:
    """What each gave in each round, in an order of its own a round: what else the machine does falls on all. The first warms up."""
    gave: dict[K, list[T]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name in random.sample(list(contenders), len(contenders)):
            gave[name].append(await contenders[name]())
    return {name: own[1:] for name, own in gave.items()}


def ratios(own: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Round by round."""
    return [mine / theirs for mine, theirs in zip(own, baseline, strict=True)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Of all values, the smallest that so many of them do not exceed."""
    return float(np.percentile(values, percent, method="higher"))


def spread(values: Sequence[float], form: str = ".2f", scale: float = 1.0) -> str:
    """The median with the least and the most."""
    return f"{statistics.median(values) * scale:{form}} ({min(values) * scale:{form}} to {max(values) * scale:{form}})"


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A markdown table."""
    print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
