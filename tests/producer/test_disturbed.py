"""Whatever is cancelled, closed, raises or hangs around production: it is told at once, nothing is lost, and the next batch works."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from agent_loop.engines.base import Completion
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer import ReplayBuffer, Status
from producer import AsyncProduceStrategy, Producer, SyncProduceStrategy
from tests.producer.test_background import TASK, loop_of, offsets, producer_of, sampler_of
from tests.producer.test_strategies import run_and_cancel


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


# -- cancelled -------------------------------------------------------------------------------------------------------


class CancelsItsCaller(ReplayBuffer):
    """Cancels the task that asks for a batch right after the n-th of its answers has come."""

    left = 0
    caller: "asyncio.Task[Any] | None" = None

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("next_step", "check_take", "account", "count", "counts", "expire", "oldest_versions", "take", "claim"):
            return found

        async def call(*arguments: Any, **named: Any) -> Any:
            answer = await found(*arguments, **named)
            self.left -= 1
            if self.left == 0 and self.caller is not None:
                self.caller.cancel()
            return answer

        return call


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("n", range(1, 16))
async def test_the_first_batch_may_be_cancelled_anywhere_and_the_next_is_produced(url: str, kept: bool, n: int) -> None:
    async with CancelsItsCaller(url) as buffer, SimulatedEngine(lengths=4) as engine:
        sampler, loop, strategy = sampler_of(buffer), loop_of(engine), AsyncProduceStrategy(buffer, in_flight="keep", max_staleness=2)
        async with strategy, Producer(strategy, loop, sampler, TASK) as producer:

            def ask() -> Awaitable[Any]:
                return strategy.produce_batch(loop, sampler, 2, TASK) if kept else producer.next_batch(2)

            buffer.left = n
            task = buffer.caller = asyncio.ensure_future(ask())
            await asyncio.wait([task], timeout=30)
            assert task.done()
            buffer.left = 0
            assert len((await asyncio.wait_for(ask(), 30)).groups) == 2
        assert (await buffer.audit()).ok


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bound", [None, 1])
async def test_batches_updates_pauses_and_ends_may_be_cancelled_anywhere(buffer: ReplayBuffer, seed: int, bound: int | None) -> None:
    chance, delivered = random.Random(seed), list[int]()

    async def update(mode: Any) -> None:
        async with producer.update_weights({"seed": chance.randrange(99)}, mode=mode):
            pass

    async def pause() -> None:
        async with producer.paused():
            await asyncio.sleep(0)

    async def cut_short(work: Any) -> Any:
        return await asyncio.wait_for(run_and_cancel(work, [int(2 ** chance.uniform(0, 9)) - 1 for _ in range(chance.randint(1, 3))]), 30)

    async with SimulatedEngine(lengths=lognormal_lengths(10, 1.0, longest=60, seed=seed), slots=8) as engine:
        async with producer_of(buffer, engine, max_staleness=bound) as producer:
            other: list[Callable[[], Any]] = [lambda: update("keep"), lambda: update("wait"), lambda: update("abort"), pause]
            for step in range(1, 25):
                batch = await cut_short(producer.next_batch(3, step=step))
                delivered += offsets(batch) if batch else []
                await cut_short(chance.choice([*other, producer.drain, producer.close])())
                await buffer.cursor(TASK)
                assert (await buffer.counts(TASK))[Status.CONSUMED] == len(delivered)
                assert (await buffer.audit()).ok
            delivered += offsets(await asyncio.wait_for(producer.next_batch(3, step=99), 30))
        assert (await buffer.counts(TASK))[Status.RUNNING] == 0
    assert len(delivered) == len(set(delivered))


# -- ended early -----------------------------------------------------------------------------------------------------


class EndsEarly(SimulatedEngine):
    """Ends its first requests by itself, at once, without a token."""

    left = 0

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        if self.left:
            self.left -= 1
            return Completion.of([], [], 0, "abort")
        return await super().generate(*arguments, **named)


@pytest.mark.parametrize("strategy", [SyncProduceStrategy, AsyncProduceStrategy])
@pytest.mark.parametrize("early", [1, 2, 4, 8])
@pytest.mark.parametrize("bound", [None, 0, 1, 2])
async def test_others_run_in_place_of_what_ended_early_whatever_the_bound(
    buffer: ReplayBuffer, strategy: Any, early: int, bound: int | None
) -> None:
    async with EndsEarly(lengths=6) as engine:
        engine.left = early
        producing, sampler, loop = strategy(buffer, max_staleness=bound), sampler_of(buffer), loop_of(engine)
        for step in (1, 2, 3):
            batch = await asyncio.wait_for(producing.produce_batch(loop, sampler, 2, TASK), 30)
            assert len(batch.groups) == 2
            await engine.update_weights({"seed": step}, step)
    assert (await buffer.counts(TASK))[Status.INTERRUPTED] + (await buffer.counts(TASK))[Status.COMPLETED] <= 4
