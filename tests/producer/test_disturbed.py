"""Whatever is cancelled, closed, raises or hangs around production: it is told at once, nothing is lost, and the next batch works."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from agent_loop.engines.base import Completion
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import lognormal_lengths
from agent_loop.errors import EngineError
from buffer import ReplayBuffer, RolloutState, Status
from buffer.inline import InlineReplayBuffer
from producer import AsyncProduceStrategy, Producer, ReplayPromptSampler, SyncProduceStrategy, TaskManager, TrainingTask, Watchdog
from producer.errors import ProducerError
from producer.simulate import virtual_time
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


# -- between finding a batch whole and taking it ---------------------------------------------------------------------


class Meanwhile(ReplayBuffer):
    """Does something each time the counts are read, which is right before a batch is taken, `left` times."""

    left = 0
    meanwhile: Callable[[], Awaitable[Any]]

    async def counts(self, task_name: str) -> dict[Status, int]:
        if self.left:
            self.left -= 1
            await self.meanwhile()
        return await super().counts(task_name)


@pytest.mark.parametrize("producer", ["stop", "keep", "background"])
async def test_weights_that_are_updated_right_before_a_batch_is_taken_count(url: str, producer: str) -> None:
    async with Meanwhile(url) as buffer, SimulatedEngine(lengths=6) as engine:
        buffer.meanwhile = lambda: engine.update_weights({"seed": 1}, engine.version + 1)
        strategy = AsyncProduceStrategy(buffer, max_staleness=0, in_flight="keep" if producer == "keep" else "interrupt")
        sampler, loop = sampler_of(buffer), loop_of(engine)
        async with strategy, Producer(strategy, loop, sampler, TASK) as background:
            for _ in range(3):
                buffer.left = 1
                asked = background.next_batch(2) if producer == "background" else strategy.produce_batch(loop, sampler, 2, TASK)
                batch = await asyncio.wait_for(asked, 30)
                assert [group.staleness(engine.version) for group in batch.groups] == [0, 0]


async def test_two_producers_of_one_task_never_hand_out_less_than_a_batch(url: str) -> None:
    async with Meanwhile(url) as buffer, SimulatedEngine(lengths=lognormal_lengths(8, 1.0, longest=60)) as engine:
        others: list[int] = []

        async def take() -> None:
            others.extend(group.group_id for group in await buffer.take(TASK, 100, step=1))

        buffer.meanwhile, buffer.left = take, 2
        async with producer_of(buffer, engine) as producer:
            batch = await asyncio.wait_for(producer.next_batch(4), 30)
        assert len(batch.groups) == 4
        assert len(others) >= 8
        assert not set(others) & {group.group_id for group in batch.groups}


# -- held ------------------------------------------------------------------------------------------------------------


async def some_turns() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def test_pauses_and_updates_may_be_nested(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine) as producer, asyncio.timeout(30):
        await producer.next_batch(2)
        async with producer.paused(), producer.update_weights({"seed": 1}), producer.paused():
            started = sum((await buffer.counts(TASK)).values())
            await some_turns()
            assert sum((await buffer.counts(TASK)).values()) == started
        assert engine.version == 1
        assert len((await producer.next_batch(2)).groups) == 2


async def test_what_would_wait_for_the_end_of_an_update_in_its_own_block_is_refused(buffer: ReplayBuffer) -> None:
    async def once_more(owner: Producer | TaskManager) -> None:
        async with owner.update_weights():
            raise AssertionError("unreachable")

    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine) as producer, asyncio.timeout(30):
        loop, rows = loop_of(engine), [{"prompt_ids": [1]}]
        manager = TaskManager(buffer, [TrainingTask("other", loop, ReplayPromptSampler(rows, buffer, 2), SyncProduceStrategy(buffer))])
        async with producer.update_weights():
            for call in (once_more(producer), producer.next_batch(2), producer.drain()):
                with pytest.raises(ProducerError, match="after the block"):
                    await call
        async with manager.update_weights():
            for call in (once_more(manager), manager.produce_batch(2), manager.evaluate("eval", rows, loop)):
                with pytest.raises(ProducerError, match="after the block"):
                    await call
        assert len((await producer.next_batch(2)).groups) == len((await manager.produce_batch(2)).groups) == 2


async def test_a_batch_that_becomes_whole_during_a_pause_wakes_whoever_waits(buffer: ReplayBuffer) -> None:
    go = asyncio.Event()

    async def reward(state: RolloutState) -> float:
        await go.wait()
        return 1.0

    async with (
        SimulatedEngine(lengths=4) as engine,
        producer_of(buffer, engine, loop=loop_of(engine, reward=reward)) as producer,
        asyncio.timeout(30),
        asyncio.TaskGroup() as tasks,
    ):
        waiting = tasks.create_task(producer.next_batch(2))
        await buffer.wait_for(TASK, Status.RUNNING, 4, timeout=20)
        async with producer.paused():
            go.set()
            assert len((await waiting).groups) == 2


async def test_production_that_begins_during_an_update_starts_nothing_before_its_end(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine) as producer, asyncio.TaskGroup() as tasks:
        async with producer.update_weights({"seed": 1}):
            waiting = tasks.create_task(producer.next_batch(2))
            await some_turns()
            await buffer.cursor(TASK)
            assert sum((await buffer.counts(TASK)).values()) == 0
            assert not waiting.done()
        assert len((await asyncio.wait_for(waiting, 30)).groups) == 2


@pytest.mark.parametrize("hangs", [True, False])
async def test_an_engine_that_hangs_or_fails_after_it_has_paused_goes_on(buffer: ReplayBuffer, hangs: bool) -> None:
    class Half(SimulatedEngine):
        async def pause(self, mode: Any = "abort") -> None:
            await super().pause(mode)
            if hangs:
                await asyncio.Event().wait()
            raise EngineError("some of the workers did not answer")

    async with Half(lengths=4) as engine, producer_of(buffer, engine) as producer:
        await producer.next_batch(2)
        with pytest.raises(TimeoutError if hangs else EngineError):
            async with asyncio.timeout(0.2), producer.update_weights({"seed": 1}):
                raise AssertionError("unreachable")
        for _ in range(3):
            assert len((await asyncio.wait_for(producer.next_batch(2), 30)).groups) == 2


def test_a_long_update_is_no_stall_and_the_silence_is_counted_from_its_end(url: str) -> None:
    async def main() -> None:
        costs = CostModel(tokens_per_second=10.0)
        async with InlineReplayBuffer.open(url) as buffer, SimulatedEngine(lengths=300, costs=costs) as engine:
            async with producer_of(buffer, engine, watchdog=Watchdog(first_seconds=60.0), on_stall="raise") as producer:
                await producer.start(2)
                await asyncio.sleep(10)
                async with producer.update_weights({"seed": 1}):
                    await asyncio.sleep(55)
                batch = await producer.next_batch(2)
            assert {tuple(set(state.versions.tolist())) for group in batch.groups for state in group.rollouts} == {(0, 1)}

    virtual_time.run(main())
