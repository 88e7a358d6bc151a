"""What a durable put costs, beside raw SQLite writing the same bytes in the same run.

    python -m benchmarks.bench_buffer

Prints a markdown table. The baseline is `executemany` of the groups' array bytes into one table, with the buffer's
settings of the file, committing as often; it is measured twice, and the second against the first is the noise.
"""

import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from buffer import Position, ReplayBuffer, RolloutGroup, RolloutState, Status, database
from buffer.codec import encode_group

GROUPS, MEMBERS, TOKENS, PRODUCERS, ROUNDS = 400, 8, 1024, 32, 5


def make_group(group_id: int) -> RolloutGroup:
    """A completed group as an agent loop leaves it: text, turns, scores, tokens of one policy version."""
    row = {"prompt": "A train leaves at noon. " * 8, "answer": "42", "source": "bench"}
    rollouts = [
        RolloutState(group_id, index, "bench", Status.COMPLETED, row=row, prompt=row["prompt"], prompt_ids=np.arange(64))
        for index in range(MEMBERS)
    ]
    noise = np.random.default_rng(group_id)
    for rollout in rollouts:
        rollout.append(noise.integers(0, 150_000, TOKENS), logprobs=-noise.random(TOKENS, np.float32), version=3)
        rollout.text, rollout.finish_reason, rollout.score, rollout.reward = "So the answer is 42. " * 200, "stop", 1.0, 1.0
    return RolloutGroup(group_id, rollouts, "bench", Position(0, group_id))


def raw_puts(folder: Path, groups: list[RolloutGroup], per_commit: int) -> float:
    """Seconds for `sqlite3.executemany` of the same bytes, `per_commit` rows a transaction."""
    blobs = [(group.group_id, (encoded := encode_group(group)).prompt + encoded.extras, encoded.arrays) for group in groups]
    connection = sqlite3.connect(folder / f"raw{time.perf_counter_ns()}.db", isolation_level=None)
    for setting in database.file_settings("NORMAL"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute("CREATE TABLE groups (id INTEGER PRIMARY KEY, words TEXT, arrays BLOB)")
    began = time.perf_counter()
    for start in range(0, len(blobs), per_commit):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO groups VALUES (?, ?, ?)", blobs[start : start + per_commit])
        connection.execute("COMMIT")
    seconds = time.perf_counter() - began
    connection.close()
    return seconds


async def buffer_puts(folder: Path, groups: list[RolloutGroup], producers: int) -> float:
    """Seconds until every group is durable, put by so many producers, each awaiting one put at a time."""
    waiting: Iterator[RolloutGroup] = iter(groups)

    async def produce(buffer: ReplayBuffer) -> None:
        for group in waiting:
            await buffer.put(group)

    async with ReplayBuffer.open(f"sqlite:///{folder}/put{time.perf_counter_ns()}.db") as buffer:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(producers):
                tasks.create_task(produce(buffer))
        return time.perf_counter() - began


def loop_time_of_a_put(groups: list[RolloutGroup]) -> float:
    """Seconds of the event loop's thread a put takes before it waits: what other coroutines feel."""
    began = time.thread_time()
    for group in groups:
        encode_group(group)
    return (time.thread_time() - began) / len(groups)


async def asks(folder: Path, groups: list[RolloutGroup]) -> dict[str, list[float]]:
    """Seconds of `take(64)` and `count` in a buffer of these groups."""
    seconds: dict[str, list[float]] = {"take(64)": [], "count": []}
    async with ReplayBuffer.open(f"sqlite:///{folder}/asks.db") as buffer:
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                tasks.create_task(buffer.put(group))
        for step in range(1, ROUNDS + 1):
            began = time.perf_counter()
            await buffer.take("bench", 64, step=step)
            seconds["take(64)"].append(time.perf_counter() - began)
        for _ in range(200):
            began = time.perf_counter()
            await buffer.count("bench", Status.COMPLETED)
            seconds["count"].append(time.perf_counter() - began)
    return seconds


def measure(rounds: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Puts a second of each way, taken in turns, so that what else the machine does falls on all."""
    rates: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(1 + ROUNDS):
        for name, seconds in rounds.items():
            rates[name].append(GROUPS / seconds())
    return {name: own[1:] for name, own in rates.items()}  # the first round warms up


def main() -> None:
    """Measure and print."""
    groups = [make_group(n) for n in range(1, GROUPS + 1)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = measure(
            {
                "raw SQLite, 32 a commit": lambda: raw_puts(folder, groups, PRODUCERS),
                "raw SQLite, 32 a commit, again": lambda: raw_puts(folder, groups, PRODUCERS),
                "buffer, 32 producers": lambda: asyncio.run(buffer_puts(folder, groups, PRODUCERS)),
                "raw SQLite, 1 a commit": lambda: raw_puts(folder, groups, 1),
                "raw SQLite, 1 a commit, again": lambda: raw_puts(folder, groups, 1),
                "buffer, 1 producer": lambda: asyncio.run(buffer_puts(folder, groups, 1)),
            }
        )
        other = asyncio.run(asks(folder, groups))
    other["event loop's share of a put"] = [loop_time_of_a_put(groups) for _ in range(ROUNDS)]
    print_rates(rates)
    print(f"\n| of {GROUPS} groups of {MEMBERS} x {TOKENS} tokens | median | worst |\n| --- | --- | --- |")
    for what, seconds in other.items():
        print(f"| {what} | {1e3 * statistics.median(seconds):.2f} ms | {1e3 * max(seconds):.2f} ms |")


def print_rates(rates: dict[str, list[float]]) -> None:
    """The table of durable puts, each way against its baseline round by round."""
    print("| durable puts | groups/s, median (least to most) | of the baseline, median (least to most) |\n| --- | --- | --- |")
    for name, own in rates.items():
        baseline = rates["raw SQLite, 32 a commit" if "32" in name else "raw SQLite, 1 a commit"]
        ratios = [mine / theirs for mine, theirs in zip(own, baseline, strict=True)]
        print(f"| {name} | {_spread(own, '.0f')} | {_spread(ratios, '.2f')} |")


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
