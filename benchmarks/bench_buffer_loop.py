"""What sustained writes leave of the event loop: its time a put, and how late it runs what is due.

    python -m benchmarks.bench_buffer_loop [--groups 2000] [--rounds 5]

32 producers put groups of 8 x 1024 tokens. Time of a put is processor time of the loop's thread within `ReplayBuffer.put`,
before and after it waits. Time of the thread is all of it while they put, with what asyncio does for tasks and futures.
A ticker asks to be woken in a millisecond, again and again: how much later it is, is the lag. Without writes it is the control.
"""

import argparse
import asyncio
import time
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workload import Database, in_rounds, make_group, percentile, print_table, scratch, spread
from buffer import ReplayBuffer, RolloutGroup

PRODUCERS, GROUPS, TICK = 32, 64, 0.001


class Loop(NamedTuple):
    """Seconds of processor a put, seconds of the loop's thread a put, and the lags."""

    put: float
    thread: float
    lags: list[float]


class Timed:
    """Awaits a coroutine; counts the processor time of this thread within it, and not while it waits."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._work, self.seconds = work, 0.0

    def __await__(self) -> Generator[Any, Any, None]:
        while True:
            began = time.thread_time()
            try:
                waits_for = self._work.send(None)
            except StopIteration:
                return
            finally:
                self.seconds += time.thread_time() - began
            yield waits_for


async def tick(lags: list[float], until: asyncio.Event) -> None:
    """Note how late each wake-up is."""
    while not until.is_set():
        due = time.perf_counter() + TICK
        await asyncio.sleep(TICK)
        lags.append(time.perf_counter() - due)


async def writing(files: Database, groups: list[RolloutGroup], n: int) -> Loop:
    """`n` puts; a group that was put is put again under a new id, so that few lie in memory."""
    path, left, spent, lags, done = files.new(), iter(range(1, n + 1)), list[float](), list[float](), asyncio.Event()

    async def produce(buffer: ReplayBuffer) -> None:
        for group_id in left:
            group = renamed(groups[group_id % len(groups)], group_id)
            put = Timed(buffer.put(group))
            await put
            spent.append(put.seconds)

    async with ReplayBuffer.open(f"sqlite:///{path}") as buffer, asyncio.TaskGroup() as around:
        around.create_task(tick(lags, done))
        began = time.thread_time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(PRODUCERS):
                tasks.create_task(produce(buffer))
        thread = (time.thread_time() - began) / n
        done.set()
    files.drop(path)
    return Loop(sum(spent) / n, thread, lags)


def renamed(group: RolloutGroup, group_id: int) -> RolloutGroup:
    """The same group with another id and position."""
    rollouts = [rollout.detached() for rollout in group.rollouts]
    for rollout in rollouts:
        rollout.group_id = group_id
    return RolloutGroup(group_id, rollouts, group.task_name)


async def idle() -> Loop:
    """The lag of a loop that has nothing else to do."""
    lags: list[float] = []
    done = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tick(lags, done))
        await asyncio.sleep(0.5)
        done.set()
    return Loop(0.0, 0.0, lags)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=2000, help="put a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    groups = [make_group(n) for n in range(1, GROUPS + 1)]
    with scratch() as name:
        files = Database(Path(name))
        rounds = await in_rounds({"idle": idle, "32 producers": lambda: writing(files, groups, options.groups)}, options.rounds)
    head = ["event loop", "put, us of its thread", "all of its thread, us a put", "lag p50, ms", "lag p99, ms"]
    print_table(head, [[name, *_cells(own)] for name, own in rounds.items()])


def _cells(own: list[Loop]) -> list[str]:
    busy = [spread([loop.put for loop in own], ".0f", 1e6), spread([loop.thread for loop in own], ".0f", 1e6)] if own[0].put else ["", ""]
    return busy + [spread([percentile(loop.lags, p) for loop in own], ".2f", 1e3) for p in (50, 99)]


if __name__ == "__main__":
    asyncio.run(main())
