"""`Producer` produces while the trainer trains, runs ahead no further than it may, and tells the trainer of every failure at once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from agent_loop.errors import EngineDeadError, WeightUpdateError
from buffer import ReplayBuffer, RolloutState, Status
from producer import AsyncProduceStrategy, ProducedBatch, Producer, ReplayPromptSampler, SyncProduceStrategy
from producer.errors import FailureBudgetError, ProducerError

TASK = "math"


def sampler_of(buffer: ReplayBuffer, n: int = 500, group_size: int = 2) -> ReplayPromptSampler:
    rows = [{"prompt_ids": [10 + index % 40], "answer": index} for index in range(n)]
    return ReplayPromptSampler(rows, buffer, group_size=group_size, shuffle=False)


def loop_of(engine: SimulatedEngine, **options: Any) -> SingleTurnAgentLoop:
    return SingleTurnAgentLoop(
        engine, sampling=SamplingParams(max_tokens=400, seed=1), **{"reward": lambda state: 1.0, "back_off": 0.0, **options}
    )


def producer_of(buffer: ReplayBuffer, engine: SimulatedEngine, *, loop: Any = None, **options: Any) -> Producer:
    strategy = AsyncProduceStrategy(buffer, **{"staleness_threshold": 1.0, **options})
    return Producer(strategy, loop or loop_of(engine), sampler_of(buffer), TASK)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


def offsets(batch: ProducedBatch) -> list[int]:
    return [group.position.offset for group in batch.groups if group.position is not None]


async def take_some(producer: Producer, n: int, size: int) -> list[ProducedBatch]:
    batches = []
    async for batch in producer.batches(size):
        batches.append(batch)
        if len(batches) == n:
            return batches
    raise AssertionError


async def test_batches_come_one_after_the_other_and_every_prompt_is_in_one_group(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=lognormal_lengths(8, 1.0, longest=60)) as engine, producer_of(buffer, engine) as producer:
        batches = await take_some(producer, 5, 3)
    assert [batch.step for batch in batches] == [1, 2, 3, 4, 5]
    drawn = [offset for batch in batches for offset in offsets(batch)]
    assert len(drawn) == len(set(drawn)) == 15
    counts = await buffer.counts(TASK)
    assert counts[Status.RUNNING] == 0  # what it was just drawing may be pending
    assert sum(counts.values()) == max(group.position.offset for group in await buffer.query(limit=100) if group.position) + 1


async def test_nothing_is_generated_before_a_batch_is_asked_for(buffer: ReplayBuffer) -> None:  # case 32
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine):
        for _ in range(50):
            await asyncio.sleep(0)
        assert (await buffer.audit()).drawn == {}


async def test_it_runs_ahead_up_to_its_limit_while_the_trainer_trains_and_wakes_without_being_asked(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine) as producer:
        await producer.next_batch(3)
        assert await buffer.wait_for(TASK, Status.COMPLETED, 6, timeout=20) == 6
        for _ in range(200):
            await asyncio.sleep(0)
        counts = await buffer.counts(TASK)
        assert (counts[Status.COMPLETED], counts[Status.RUNNING], counts[Status.CONSUMED]) == (6, 0, 3)


async def test_with_a_bound_of_nothing_it_waits_for_the_new_weights(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine, max_staleness=0) as producer:
        for version in range(1, 4):
            batch = await producer.next_batch(3)
            assert {group.staleness(engine.version) for group in batch.groups} == {0}
            for _ in range(100):
                await asyncio.sleep(0)
            assert await buffer.count(TASK, Status.RUNNING) == await buffer.count(TASK, Status.COMPLETED) == 0
            async with producer.update_weights({"seed": version}, version):
                pass


async def test_a_synchronous_strategy_can_run_in_the_background_too(buffer: ReplayBuffer) -> None:
    async with (
        SimulatedEngine(lengths=4) as engine,
        Producer(SyncProduceStrategy(buffer), loop_of(engine), sampler_of(buffer), TASK) as producer,
    ):
        assert [offsets(batch) for batch in await take_some(producer, 3, 2)] == [[0, 1], [2, 3], [4, 5]]


# -- failures --------------------------------------------------------------------------------------------------------


async def test_an_engine_that_dies_reaches_the_waiting_consumer_as_it_was_raised(buffer: ReplayBuffer) -> None:
    failure, requests = EngineDeadError("the GPU fell off the bus"), 0

    def die(request_id: str, attempt: int) -> Exception | None:
        nonlocal requests
        requests += 1
        return failure if requests == 9 else None

    async with SimulatedEngine(lengths=20, fail=die) as engine, producer_of(buffer, engine) as producer:
        with pytest.raises(EngineDeadError, match="fell off the bus"):
            await asyncio.wait_for(take_some(producer, 50, 4), 30)
    counts = await buffer.counts(TASK)
    assert counts[Status.RUNNING] == counts[Status.FAILED] == 0


async def test_what_fails_while_nobody_waits_is_told_to_whoever_asks_next_and_once(buffer: ReplayBuffer) -> None:
    class Broken(SingleTurnAgentLoop):
        broken = False

        async def generate_group(self, group: Any) -> Any:
            if self.broken:
                raise ZeroDivisionError("a bug")
            return await super().generate_group(group)

    async with SimulatedEngine(lengths=4) as engine:
        loop = Broken(engine, reward=lambda state: 1.0)
        async with producer_of(buffer, engine, loop=loop) as producer:
            await producer.next_batch(2)
            await buffer.wait_for(TASK, Status.COMPLETED, 4, timeout=20)
            loop.broken = True
            await producer.next_batch(2)
            await buffer.wait_for(TASK, Status.INTERRUPTED, timeout=20)
            with pytest.raises(ZeroDivisionError, match="a bug"):
                await producer.next_batch(4)
            loop.broken = False
            assert len((await producer.next_batch(4)).groups) == 4


async def test_what_nobody_was_told_is_raised_when_the_producer_is_left(buffer: ReplayBuffer) -> None:
    dead = False

    def fail(request_id: str, attempt: int) -> Exception | None:
        return EngineDeadError("fell off the bus") if dead else None

    async def leave_it_dying(engine: SimulatedEngine) -> None:
        nonlocal dead
        async with producer_of(buffer, engine) as producer:
            await producer.next_batch(2)
            await buffer.wait_for(TASK, Status.COMPLETED, 4, timeout=20)
            dead = True
            await producer.next_batch(2)
            await buffer.wait_for(TASK, Status.INTERRUPTED, timeout=20)

    async with SimulatedEngine(lengths=4, fail=fail) as engine:
        with pytest.raises(EngineDeadError, match="fell off the bus"):
            await leave_it_dying(engine)
    assert await buffer.count(TASK, Status.RUNNING) == 0


async def test_a_budget_that_is_spent_ends_it_with_the_cause(buffer: ReplayBuffer) -> None:
    def rejects(group: Any) -> str:
        return "never good enough"

    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine, group_filter=rejects) as producer:
        with pytest.raises(FailureBudgetError, match=r"max_filtered=16.*never good enough"):
            await producer.next_batch(2)


async def test_a_consumer_that_is_cancelled_leaves_production_running(buffer: ReplayBuffer) -> None:
    go = asyncio.Event()

    async def reward(state: RolloutState) -> float:
        await go.wait()
        return 1.0

    async with SimulatedEngine(lengths=4) as engine:
        async with producer_of(buffer, engine, loop=loop_of(engine, reward=reward)) as producer:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(producer.next_batch(2), 0.2)
            assert await buffer.count(TASK, Status.RUNNING) == 4
            go.set()
            assert len((await producer.next_batch(2)).groups) == 2
        assert await buffer.count(TASK, Status.RUNNING) == 0


async def test_two_consumers_at_once_and_a_producer_that_was_not_entered_are_refused(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine:
        producer = producer_of(buffer, engine)
        with pytest.raises(ProducerError, match="not entered"):
            await producer.next_batch(2)
        async with producer, asyncio.TaskGroup() as tasks:
            first = tasks.create_task(producer.next_batch(2))
            await asyncio.sleep(0)
            with pytest.raises(ProducerError, match="waited for already"):
                await producer.next_batch(2)
        assert len(first.result().groups) == 2


# -- weights ---------------------------------------------------------------------------------------------------------


async def under_way(engine: SimulatedEngine) -> None:
    """Until two batches' rollouts run."""
    for _ in range(100_000):
        if engine.running == 8:
            return
        await asyncio.sleep(0)
    raise AssertionError("they never run")


class Versions(SimulatedEngine):
    """Notes at which version each request began."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.began: list[int] = []

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        self.began.append(self.version)
        return await super().generate(*arguments, **named)


@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
async def test_weights_are_updated_in_flight_and_no_group_starts_meanwhile(buffer: ReplayBuffer, mode: Any) -> None:
    async with Versions(lengths=300, max_length=1000) as engine, producer_of(buffer, engine) as producer:
        await producer.start(2)
        await under_way(engine)
        for _ in range(20):
            await asyncio.sleep(0)
        async with producer.update_weights({"seed": 1}, 1, mode=mode):
            begun = len(engine.began)
            assert engine.running + engine.waiting == (8 if mode == "keep" else 0)
            assert await buffer.count(TASK, Status.INTERRUPTED) == (4 if mode == "abort" else 0)
            for _ in range(100):
                await asyncio.sleep(0)
            assert len(engine.began) == begun
        batch = await producer.next_batch(2)
    versions = [state.versions for group in batch.groups for state in group.rollouts]
    assert all((version[:-1] <= version[1:]).all() for version in versions)
    seen = {(int(version[0]), int(version[-1])) for version in versions}
    assert seen == ({(0, 0)} if mode == "wait" else {(0, 1)})
    assert {state.response_ids.size for group in batch.groups for state in group.rollouts} == {300}


async def test_an_adapter_is_trained_in_the_background_and_every_token_says_which_version_sampled_it(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(max_length=1000) as engine:
        adapters = {0: await engine.add_adapter("math", {"seed": 0})}
        loop = loop_of(engine, adapter="math")
        assert loop.engine is not None
        async with producer_of(buffer, engine, loop=loop, max_staleness=1) as producer:
            batches = []
            for version in range(1, 5):
                batches.append(await producer.next_batch(2))
                assert {group.staleness(version - 1) for group in batches[-1].groups} <= {0, 1}
                async with producer.update_weights({"seed": version}):
                    adapters[version] = engine.check_adapter("math")
            batches.append(await producer.next_batch(2))
        assert (engine.version, loop.engine.version, [adapter.version for adapter in adapters.values()]) == (0, 4, [0, 1, 2, 3, 4])
        seen = set()
        for state in [state for batch in batches for group in batch.groups for state in group.rollouts]:
            assert state.prompt_ids is not None
            prompt, response = state.prompt_ids.tolist(), state.response_ids.tolist()
            for version in set(state.versions.tolist()):
                expected = engine.reference_logprobs(prompt, response, 0, adapter=adapters[version])
                np.testing.assert_allclose(state.logprobs, np.where(state.versions == version, expected, state.logprobs), atol=1e-5)
                seen.add(version)
        assert (min(seen), max(seen) >= 3) == (0, True)


async def test_an_update_that_fails_leaves_production_going_on(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine) as producer:
        await producer.next_batch(2)
        with pytest.raises(WeightUpdateError):
            async with producer.update_weights({"no": "seed"}):
                raise AssertionError("unreachable")
        with pytest.raises(LookupError, match="mine"):
            async with producer.update_weights():
                raise LookupError("mine")
        assert engine.version == 0
        assert [len(batch.groups) for batch in await take_some(producer, 3, 2)] == [2, 2, 2]


async def test_an_update_under_way_is_no_hindrance_to_a_batch_that_is_whole(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine) as producer:
        await producer.next_batch(2)
        await buffer.wait_for(TASK, Status.COMPLETED, 4, timeout=20)
        async with producer.update_weights():
            assert len((await asyncio.wait_for(producer.next_batch(2), 20)).groups) == 2


async def test_draining_lets_what_runs_end_and_starts_nothing_more(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=100, max_length=1000) as engine, producer_of(buffer, engine) as producer:
        await producer.start(2)
        await under_way(engine)
        await producer.drain()
        counts = await buffer.counts(TASK)
        assert (counts[Status.COMPLETED], counts[Status.INTERRUPTED], counts[Status.RUNNING]) == (4, 0, 0)
        assert len((await producer.next_batch(2)).groups) == 2


async def test_paused_no_group_starts(buffer: ReplayBuffer) -> None:
    async with Versions(lengths=4) as engine, producer_of(buffer, engine) as producer:
        await producer.next_batch(2)
        async with producer.paused():
            begun = len(engine.began)
            await buffer.wait_for(TASK, Status.COMPLETED, 1, timeout=20)
            for _ in range(200):
                await asyncio.sleep(0)
            assert len(engine.began) == begun
        assert len((await producer.next_batch(2)).groups) == 2


@pytest.mark.parametrize("arguments", [{"mode": "drop"}, {"mode": None}])
async def test_an_unknown_mode_is_refused(buffer: ReplayBuffer, arguments: Any) -> None:
    async with SimulatedEngine(lengths=4) as engine, producer_of(buffer, engine) as producer:
        with pytest.raises(ValueError, match="mode="):
            async with producer.update_weights(**arguments):
                pass
