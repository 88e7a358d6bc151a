"""What producing costs beside sampling: `python -m benchmarks.bench_produce` prints a table of rollouts a second.

The same requests run over the same simulated engine bare (`generate` under one `asyncio.gather`) and through
`produce_batch`, which draws, runs, judges, stores and takes them. The engine has no model and spends a turn of the
event loop a token, so the difference is what the library itself costs on the event loop's thread.
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer import ReplayBuffer, RolloutState
from producer import AsyncProduceStrategy, ProduceStrategy, ReplayPromptSampler, SyncProduceStrategy

BATCHES, BATCH_SIZE, GROUP_SIZE, MEDIAN = 4, 32, 8, 64
PARAMS = SamplingParams(max_tokens=512, seed=0)


def engine() -> SimulatedEngine:
    """Long-tailed responses of 64 tokens in the median."""
    return SimulatedEngine(lengths=lognormal_lengths(MEDIAN, 0.6, longest=512), slots=512)


async def reward(state: RolloutState) -> float:
    """A judgement that costs nothing."""
    return float(state.index % 2)


async def bare() -> int:
    """The requests alone, a batch at a time; gives how many."""
    async with engine() as simulated:
        for batch in range(BATCHES):
            names = [f"{batch}-{n}" for n in range(BATCH_SIZE * GROUP_SIZE)]
            await asyncio.gather(*(simulated.generate([10, 11], PARAMS.replace(seed=n), request_id=name) for n, name in enumerate(names)))
    return BATCHES * BATCH_SIZE * GROUP_SIZE


async def produced(strategy: Callable[[ReplayBuffer], ProduceStrategy], url: str) -> int:
    """The same through `produce_batch`; gives how many rollouts were delivered."""
    rows = [{"prompt_ids": [10, 11], "answer": n} for n in range(10_000)]
    async with ReplayBuffer.open(url) as buffer, engine() as simulated:
        loop = SingleTurnAgentLoop(simulated, reward=reward, sampling=PARAMS)
        sampler = ReplayPromptSampler(rows, buffer, group_size=GROUP_SIZE)
        producing = strategy(buffer)
        batches = [await producing.produce_batch(loop, sampler, BATCH_SIZE, "bench") for _ in range(BATCHES)]
    return sum(len(group.rollouts) for batch in batches for group in batch.groups)


def timed(work: Coroutine[Any, Any, int]) -> tuple[int, float, float]:
    """(rollouts, seconds, seconds that this thread computed): the last is the event loop's."""

    async def measured() -> tuple[int, float, float]:
        began, computed = time.perf_counter(), time.thread_time()
        return await work, time.perf_counter() - began, time.thread_time() - computed

    return asyncio.run(measured())


def main() -> None:
    """Print the table; the best of three runs each, in turns, so that a busy machine is unfair to none."""
    with tempfile.TemporaryDirectory() as folder:
        paths = (Path(folder) / f"{n}.db" for n in range(100))
        cases: dict[str, Callable[[], Awaitable[int] | Any]] = {
            "bare `generate` under `gather`": bare,
            "`SyncProduceStrategy`": lambda: produced(SyncProduceStrategy, f"sqlite:///{next(paths)}"),
            "`AsyncProduceStrategy`, threshold 0.5": lambda: produced(AsyncProduceStrategy, f"sqlite:///{next(paths)}"),
        }
        runs = {name: [timed(case()) for _ in range(1)] for name, case in cases.items()}
        for _ in range(2):
            for name, case in cases.items():
                runs[name].append(timed(case()))
    base = min(loop / n for n, _, loop in runs["bare `generate` under `gather`"])
    print(f"{BATCHES} batches of {BATCH_SIZE} groups of {GROUP_SIZE}, responses of {MEDIAN} tokens in the median (log-normal).\n")
    print("| | rollouts/s | event loop, ms a rollout | ratio to bare |\n| --- | ---: | ---: | ---: |")
    for name, results in runs.items():
        rate, loop = max(n / seconds for n, seconds, _ in results), min(loop / n for n, _, loop in results)
        print(f"| {name} | {rate:,.0f} | {loop * 1e3:.3f} | {loop / base:.2f} |")


if __name__ == "__main__":
    main()
