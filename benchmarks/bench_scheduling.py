"""What scheduling costs: event-loop time a rollout at 10 000 in flight, and whether memory stays flat over 100 000.

    python -m benchmarks.bench_scheduling [--in-flight 10000] [--batches 10] [--mode keep] [--calm]

The engine decodes nothing: it answers 2500 requests a second with 16 tokens each, in random order, so that
members of a group end far apart, and checkpoints of running groups are part of the cost. With `--mode interrupt` all that is in
flight at the end of a batch is stopped, and started again for the next. What the engine costs by itself is measured
by bare `generate` calls and subtracted. The buffer is on disk; its writer has a thread of its own.
Time is what the event loop's thread computed (`time.thread_time`), so that other programs on the machine matter little.
"""

import argparse
import asyncio
import gc
import random
import statistics
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.base import Completion, Engine, OnTokens, PauseMode, WeightSource
from benchmarks.workload import print_table, scratch
from buffer import ReplayBuffer, RolloutState
from producer import AsyncProduceStrategy, ReplayPromptSampler

GROUP_SIZE, TOKENS, TICK, A_TICK = 8, 16, 0.01, 25
PARAMS = SamplingParams(max_tokens=256)
PROMPT = np.arange(32, dtype=np.int32)


class Instant(Engine):
    """Holds requests, and answers any `A_TICK` of them every `TICK` seconds."""

    max_length, vocab_size, eos_token_ids = 4096, 64, frozenset({0})  # type: ignore[assignment]

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._random = random.Random(0)
        self._futures: dict[str, asyncio.Future[str]] = {}
        self._ticking = False
        self.most = self.answered = 0
        ids = np.ones(TOKENS, np.int32)
        self._arrays = ids, np.full(TOKENS, -0.5, np.float32), np.zeros(TOKENS, np.int32)

    async def open(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Nothing to stop."""

    async def generate(
        self,
        prompt_ids: Sequence[int] | NDArray[np.int32],
        params: SamplingParams,
        *,
        request_id: str,
        session_id: str | None = None,
        media: Sequence[Any] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        """Wait to be chosen."""
        loop = asyncio.get_running_loop()
        future = self._futures[request_id] = loop.create_future()
        self._waiting.append(request_id)
        self.most = max(self.most, len(self._futures))
        if not self._ticking:
            self._ticking = True
            loop.call_later(TICK, self._tick, loop)
        try:
            reason: Any = await future
        finally:
            del self._futures[request_id]
        if reason == "abort":
            return Completion(*(array[:0] for array in self._arrays), reason)
        self.answered += 1
        whole = Completion(*self._arrays, reason)
        if on_tokens is not None:
            on_tokens(whole)
        return whole

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(A_TICK, len(self._waiting))):
            chosen = self._random.randrange(len(self._waiting))
            self._waiting[chosen], self._waiting[-1] = self._waiting[-1], self._waiting[chosen]
            self._end(self._waiting.pop(), "stop")
        self._ticking = bool(self._waiting)
        if self._ticking:
            loop.call_later(TICK, self._tick, loop)

    def _end(self, request_id: str, reason: str) -> None:
        future = self._futures.get(request_id)
        if future is not None and not future.done():
            future.set_result(reason)

    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """Answer these at once, with nothing."""
        for request_id in list(self._futures) if request_ids is None else request_ids:
            self._end(request_id, "abort")

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Not used."""

    async def resume(self) -> None:
        """Not used."""

    async def _load_weights(self, source: WeightSource, version: int) -> None:
        """Not used."""

    async def health(self) -> None:
        """Always well."""


class Rows:
    """A dataset that makes its rows when asked, as those on disk do."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt_ids": PROMPT.tolist(), "answer": index}


async def reward(state: RolloutState) -> float:
    """A judgement that costs nothing."""
    return float(state.index % 2)


async def bare(rollouts: int) -> float:
    """Microseconds a request of the engine by itself, all of them at once."""
    async with Instant() as engine, asyncio.TaskGroup() as tasks:
        began = time.thread_time()
        requests = [tasks.create_task(engine.generate(PROMPT, PARAMS, request_id=str(n))) for n in range(rollouts)]
        await asyncio.wait(requests)
        return (time.thread_time() - began) / rollouts * 1e6


def resident() -> float:
    """This process's memory now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def produced(url: str, in_flight: int, batches: int, mode: Literal["keep", "interrupt"]) -> tuple[list[float], list[float], int]:
    """After each batch, microseconds of the loop for each rollout answered so far and MB resident, and the most requests in flight."""
    batch_size = in_flight // GROUP_SIZE
    costs, sizes = [], []
    async with ReplayBuffer.open(url) as buffer, Instant() as engine:
        loop = SingleTurnAgentLoop(engine, reward=reward, sampling=PARAMS)
        sampler = ReplayPromptSampler(Rows(), buffer, group_size=GROUP_SIZE)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight=mode, max_in_flight=in_flight, progress=False)
        async with strategy:
            computed = 0.0
            for _ in range(batches):
                began = time.thread_time()
                batch = await strategy.produce_batch(loop, sampler, batch_size, "bench")
                computed += time.thread_time() - began
                costs.append(computed / engine.answered * 1e6)  # of all so far: how much of a batch an earlier one left over varies
                await buffer.commit(batch.step)
                del batch
                gc.collect()
                sizes.append(resident())
        assert (await buffer.audit()).ok
    return costs, sizes, engine.most


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--in-flight", type=int, default=10_000)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--mode", choices=["keep", "interrupt"], default="keep")
    parser.add_argument("--calm", action="store_true", help="with gc.set_threshold(10_000, 50, 20)")
    args = parser.parse_args()
    if args.calm:
        gc.set_threshold(10_000, 50, 20)
    engine = statistics.median(asyncio.run(bare(args.in_flight)) for _ in range(3))
    with scratch() as folder:
        costs, sizes, most = asyncio.run(produced(f"sqlite:///{folder}/run.db", args.in_flight, args.batches, args.mode))
    print(f"groups of {GROUP_SIZE}, {args.in_flight} rollouts a batch; at most {most} in flight")
    print(f"the engine by itself takes {engine:.0f} us a rollout")
    rows = [
        [str((n + 1) * args.in_flight), f"{cost - engine:.0f}", f"{size:.0f}"]
        for n, (cost, size) in enumerate(zip(costs, sizes, strict=True))
    ]
    print_table(["rollouts delivered", "event loop so far, us a rollout, without the engine's", "resident, MB"], rows)


if __name__ == "__main__":
    main()
