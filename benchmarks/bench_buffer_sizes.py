"""What grows with the buffer and what does not: count, take, expire, open and resume, from 1 000 groups on.

    python -m benchmarks.bench_buffer_sizes [--largest 100000] [--rounds 5]

Each size is a database of its own, of groups of 8 members. Most have no tokens; those that `take` hands out with payloads have
64 KiB, and 1 % a round are stale, with 16 tokens a member. Sizes and questions come in random order, each round anew.

To open and resume means: a copy of the database whose process died with 64 groups running and a batch of 64 consumed, until
`resume` has given them back.
"""

import argparse
import asyncio
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.large import Kind, make_large, no_tokens, of_64_kib
from benchmarks.workload import Database, in_rounds, make_group, print_table, scratch, spread
from buffer import ReplayBuffer, Status

BATCH, COUNTS, FRESH = 64, 200, 1000
TAKES = {"plain": "take(64), no payloads", "tokens": "take(64), payloads of 64 KiB"}


def kinds(size: int, rounds: int) -> list[Kind]:
    """What a database of so many groups holds, `size` in all."""
    stale = [Kind(make_group(1, task_name="plain", tokens=16, words=2, version=n), size // 100, {}) for n in range(rounds)]
    running = Kind(
        make_group(1, task_name="plain", tokens=0, words=0, status=Status.PENDING), BATCH, {"status": "'running'", "owner": "'dead'"}
    )
    consumed = {"status": "'consumed'", "consumed_step": "2", "consumed_seq": "i", "take": "1", "owner": "'dead'"}
    # What runs comes last: the next opening releases it.
    others = [Kind(of_64_kib("tokens"), rounds * BATCH, {}), *stale, Kind(no_tokens("plain"), BATCH, consumed), running]
    rest = size - sum(kind.n for kind in others)
    if rest < rounds * BATCH:
        raise SystemExit(f"{size} groups are too few for {rounds} rounds of batches of {BATCH}")
    return [Kind(no_tokens("plain"), rest, {}), *others]


class Run:
    """A buffer of one size, and what is asked of it."""

    def __init__(self, files: Database, path: Path, size: int) -> None:
        self.size, self._files, self._path = size, files, path
        self._url = f"sqlite:///{path}"
        self._step, self._expired = 1, 0
        self.cpu: dict[str, list[float]] = {}

    async def __aenter__(self) -> "Run":
        self.buffer = await ReplayBuffer.open(self._url).__aenter__()
        await self.buffer.resume(step=1)
        self.other = await ReplayBuffer.open(self._url, read_only=True).__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.other.close()
        await self.buffer.close()

    async def count(self) -> float:
        return await _seconds_of_a_count(self.buffer)

    async def count_beside(self) -> float:
        return await _seconds_of_a_count(self.other)

    async def take_plain(self) -> float:
        return await self._take("plain")

    async def take_tokens(self) -> float:
        return await self._take("tokens")

    async def _take(self, task_name: str) -> float:
        self._step += 1
        began, used = time.perf_counter(), time.process_time()
        taken = await self.buffer.take(task_name, BATCH, step=self._step)
        seconds, used = time.perf_counter() - began, time.process_time() - used
        assert len(taken) == BATCH
        self.cpu.setdefault(task_name, []).append(used)
        return seconds

    async def expire(self) -> float:
        """Seconds a group that expires: those of one more version are stale each time."""
        self._expired += 1
        began = time.perf_counter()
        n = await self.buffer.expire("plain", version=FRESH, max_staleness=FRESH - self._expired)
        assert n == self.size // 100
        return (time.perf_counter() - began) / n

    async def open_and_resume(self) -> float:
        """Seconds until a copy of the database of a process that died can be taken from."""
        copy = self._files.new()
        shutil.copy(self._path, copy)
        buffer = ReplayBuffer.open(f"sqlite:///{copy}")
        try:
            began = time.perf_counter()
            await buffer.__aenter__()
            report = await buffer.resume(step=1)
            seconds = time.perf_counter() - began
            assert (report.rewound, report.released) == (BATCH, BATCH)
            return seconds
        finally:
            await buffer.close()
            self._files.drop(copy)


async def _seconds_of_a_count(buffer: ReplayBuffer) -> float:
    began = time.perf_counter()
    for _ in range(COUNTS):
        await buffer.count("plain", Status.COMPLETED)
    return (time.perf_counter() - began) / COUNTS


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=100_000, help="sizes go up to this in steps of ten")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= options.largest]
    with scratch() as name:
        files = Database(Path(name))
        runs = [await _made(files, size, options.rounds + 1) for size in sizes]
        measured = await in_rounds({("open and resume", run.size): run.open_and_resume for run in runs}, options.rounds)
        for run in runs:
            await run.__aenter__()
        measured |= await in_rounds({key: ask for run in runs for key, ask in questions(run).items()}, options.rounds)
        for run in runs:
            await run.__aexit__()
    for task_name, name in TAKES.items():
        # The first round warms up.
        measured |= {(f"{name}, CPU of all threads", run.size): run.cpu[task_name][1:] for run in runs}
    print_sizes(measured, sizes)


async def _made(files: Database, size: int, rounds: int) -> Run:
    began, path = time.perf_counter(), files.new()
    async with ReplayBuffer.open(f"sqlite:///{path}") as buffer:
        await buffer.commit(step=1, version=FRESH)
    await make_large(path, kinds(size, rounds))
    if size <= 10_000:
        async with ReplayBuffer.open(f"sqlite:///{path}", read_only=True) as buffer:
            report = await buffer.audit(payloads=size <= 1000)
            assert report.ok, report.problems
    print(f"{size} groups made in {time.perf_counter() - began:.0f} s: {path.stat().st_size / 2**20:.0f} MiB", flush=True)
    return Run(files, path, size)


def questions(run: Run) -> dict[tuple[str, int], Callable[[], Awaitable[float]]]:
    """What is asked of a buffer in each round."""
    named = {
        "count": run.count,
        "count, from another process's view": run.count_beside,
        TAKES["plain"]: run.take_plain,
        TAKES["tokens"]: run.take_tokens,
        "expire 1 %, a group that expires": run.expire,
    }
    return {(name, run.size): ask for name, ask in named.items()}


def print_sizes(measured: dict[tuple[str, int], list[float]], sizes: list[int]) -> None:
    """One row a question, one column a size; the last says by how much the largest buffer is slower than the smallest."""
    rows = []
    for name in dict.fromkeys(name for name, _ in measured):
        own = [measured[name, size] for size in sizes]
        growth = statistics.median(own[-1]) / statistics.median(own[0])
        rows.append([name, *(spread(seconds, ".3f", 1e3) for seconds in own), f"{growth:.2f}"])
    print_table(["ms", *(f"{size:,} groups" for size in sizes), "largest over smallest"], rows)


if __name__ == "__main__":
    asyncio.run(main())
