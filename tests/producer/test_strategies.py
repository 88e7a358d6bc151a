"""Strategies deliver whole batches, account for everything they start, and stop with the cause when they cannot."""

import asyncio
import contextlib
import itertools
import json
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_loop import AgentLoop, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.errors import BufferClosedError, ReplayBufferError, ResumeRequiredError
from producer import (
    AsyncProduceStrategy,
    ProducedBatch,
    Producer,
    ProduceStrategy,
    PromptSampler,
    ReplayPromptSampler,
    SyncProduceStrategy,
    TaskManager,
    TrainingTask,
    zero_variance,
)
from producer.errors import DatasetError, FailureBudgetError, ProducerError
from producer.issue import Load

TASK = "math"
STRATEGIES: list[Callable[..., ProduceStrategy]] = [SyncProduceStrategy, AsyncProduceStrategy]


def rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [10 + index % 40], "answer": index} for index in range(n)]


def sampler_of(buffer: ReplayBuffer, n: int = 50, group_size: int = 2) -> ReplayPromptSampler:
    return ReplayPromptSampler(rows(n), buffer, group_size=group_size, shuffle=False)


def loop_of(engine: SimulatedEngine, **options: Any) -> SingleTurnAgentLoop:
    return SingleTurnAgentLoop(
        engine, sampling=SamplingParams(max_tokens=64, seed=1), **{"reward": lambda state: 1.0, "back_off": 0.0, **options}
    )


def offsets(groups: Collection[RolloutGroup]) -> list[int]:
    return [group.position.offset for group in groups if group.position is not None]


def accounted_for(metrics: dict[str, float]) -> bool:
    ended = ("completed", "interrupted", "filtered", "failed")
    return metrics["produce/started"] == sum(metrics[f"produce/{status}"] for status in ended)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


class Counting(SimulatedEngine):
    """Counts requests and the most that were in flight at once."""

    requests = 0
    most = 0

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        self.requests += 1
        self.most = max(self.most, len(self._requests) + 1)
        return await super().generate(*arguments, **named)


# -- which groups -----------------------------------------------------------------------------------------------


async def test_sync_makes_exactly_the_first_groups(buffer: ReplayBuffer) -> None:
    async with Counting(lengths=5) as engine:
        batch = await SyncProduceStrategy(buffer).produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)
    assert offsets(batch.groups) == [0, 1]
    assert engine.requests == 4
    assert (batch.step, batch.metrics["produce/started"]) == (1, 2)
    assert {group.status for group in batch.groups} == {Status.CONSUMED}
    assert (await buffer.audit()).drawn == {TASK: 2}


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_batch_that_lies_in_the_buffer_costs_no_request_and_no_draw(
    buffer: ReplayBuffer, strategy: Callable[..., ProduceStrategy]
) -> None:
    for group_id in (1, 2):
        state = RolloutState(group_id, 0, TASK, Status.COMPLETED, prompt_ids=[5], finish_reason="stop", score=1.0, reward=1.0)
        state.append([7], logprobs=[-0.1], version=0)
        await buffer.put(RolloutGroup(group_id, [state], TASK))
    async with Counting(lengths=5) as engine:
        batch = await strategy(buffer).produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)
    assert [group.group_id for group in batch.groups] == [1, 2]
    assert engine.requests == 0
    assert (await buffer.audit()).drawn == {TASK: 2}
    assert batch.metrics["produce/started"] == 0


async def test_the_filtered_is_replaced_and_the_interrupted_comes_first_next_time(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=20) as engine:

        class InterruptedOnce(SingleTurnAgentLoop):
            done = False

            async def generate(self, state: RolloutState) -> RolloutState:
                if state.row["answer"] == 1 and not self.done:
                    self.done = True
                    await self.interrupt([state.group_id])
                return await super().generate(state)

        def reject_first(group: RolloutGroup) -> str | None:
            return "too easy" if group.rollouts[0].row["answer"] == 0 else None

        loop = InterruptedOnce(engine, reward=lambda state: 1.0)
        strategy, sampler = SyncProduceStrategy(buffer, group_filter=reject_first), sampler_of(buffer)
        batch = await strategy.produce_batch(loop, sampler, 2, TASK)
        assert offsets(batch.groups) == [2, 3]
        assert accounted_for(batch.metrics)
        (filtered,) = await buffer.query(status=Status.FILTERED)
        assert (offsets([filtered]), filtered.filter_reason) == ([0], "too easy")
        assert offsets(await buffer.query(status=Status.INTERRUPTED)) == [1]
        assert offsets((await strategy.produce_batch(loop, sampler, 2, TASK)).groups) == [1, 4]


async def test_async_runs_the_interrupted_first_and_holds_its_limit(buffer: ReplayBuffer) -> None:
    kept = [RolloutState(999, index, TASK, Status.INTERRUPTED, prompt_ids=[5], row={"answer": -1}) for index in range(2)]
    await buffer.put(RolloutGroup(999, kept, TASK))
    order: list[int] = []

    class Ordered(SingleTurnAgentLoop):
        async def generate_group(self, group: RolloutGroup) -> RolloutGroup:
            order.append(group.group_id)
            return await super().generate_group(group)

    async with Counting(lengths=lognormal_lengths(8, 1.0, longest=60)) as engine:
        loop = Ordered(engine, sampling=SamplingParams(max_tokens=64))
        batch = await AsyncProduceStrategy(buffer, staleness_threshold=1.0).produce_batch(loop, sampler_of(buffer), 2, TASK)
    assert order[0] == 999
    assert engine.most <= 4 * 2
    assert len(order) <= 4 + 1, "at most 4 completed or in flight, and none is issued once two are completed"
    assert len(batch.groups) == 2
    assert accounted_for(batch.metrics)


async def test_nine_completed_of_ten_start_at_most_five_more(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=5) as engine:
        strategy, sampler, loop = SyncProduceStrategy(buffer), sampler_of(buffer, group_size=1), loop_of(engine)
        await strategy.produce_batch(loop, sampler, 9, TASK, step=1)
        await buffer.resume(step=0)
        over = AsyncProduceStrategy(buffer, staleness_threshold=0.4)
        batch = await over.produce_batch(loop, sampler, 10, TASK)
    assert 1 <= batch.metrics["produce/started"] <= 5


async def test_over_issuing_keeps_the_tokens_of_the_slow_and_goes_on_with_them(buffer: ReplayBuffer) -> None:
    slow_length = 4000  # tokens; many times what is sampled while a quick group is stored

    def script(prompt: Any) -> list[int]:
        return [63] * (slow_length if prompt[0] == 10 else 3) + [0]

    sizes: list[int] = []

    class Watching(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            if state.group_id == 1:
                sizes.append(int(state.response_ids.size))
            return await super().generate(state)

    async with SimulatedEngine(script=script, max_length=10_000) as engine:
        loop = Watching(engine, sampling=SamplingParams(max_tokens=5000))
        strategy, sampler = AsyncProduceStrategy(buffer, staleness_threshold=1.0), sampler_of(buffer, n=40, group_size=1)
        batches: list[ProducedBatch] = []
        while not any(group.position == (0, 0) for batch in batches for group in batch.groups):
            batches.append(await strategy.produce_batch(loop, sampler, 2, TASK))
    assert sizes[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(sizes)), sizes
    slow = next(group for batch in batches for group in batch.groups if group.position == (0, 0))
    assert slow.rollouts[0].response_ids.tolist() == [63] * slow_length + [0]
    assert slow.rollouts[0].interruptions == len(sizes) - 1 > 0


async def test_without_partial_rollout_the_unfinished_begin_anew(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=lambda request: 10**5 if request.prompt_ids[0] == 10 else 2, max_length=10**6) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, enable_partial_rollout=False)
        loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=10**5))
        await strategy.produce_batch(loop, sampler_of(buffer, group_size=1), 1, TASK)
    (interrupted,) = await buffer.query(status=Status.INTERRUPTED)
    assert interrupted.rollouts[0].response_ids.size == 0
    assert interrupted.rollouts[0].interruptions == 1


async def test_a_loop_without_an_engine_is_produced_with(buffer: ReplayBuffer) -> None:
    class Echo(AgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            state.append([1, 2], logprobs=[-0.1, -0.2], version=0)
            state.finish_reason = "stop"
            return state

    batch = await AsyncProduceStrategy(buffer).produce_batch(Echo(reward=lambda state: 0.5), sampler_of(buffer), 3, TASK)
    assert [state.reward for group in batch.groups for state in group.rollouts] == [0.5] * 6


async def test_a_plain_prompt_sampler_is_durable_too(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine:
        batch = await SyncProduceStrategy(buffer).produce_batch(loop_of(engine), PromptSampler(rows(5), 2, shuffle=False), 3, TASK)
    assert offsets(batch.groups) == [0, 1, 2]
    assert (await buffer.audit()).drawn == {TASK: 3}


# -- steps, metrics, arguments ----------------------------------------------------------------------------------


async def test_steps_count_up_by_default(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=2) as engine:
        strategy, sampler, loop = SyncProduceStrategy(buffer), sampler_of(buffer), loop_of(engine)
        steps = [(await strategy.produce_batch(loop, sampler, 1, TASK, step=step)).step for step in (None, None, 7, None)]
    assert steps == [1, 2, 7, 8]


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_metrics_are_finite_numbers_that_any_logger_takes(buffer: ReplayBuffer, strategy: Callable[..., ProduceStrategy]) -> None:
    async with SimulatedEngine(lengths=lognormal_lengths(6, 1.0, longest=60)) as engine:
        batch = await strategy(buffer).produce_batch(loop_of(engine), sampler_of(buffer), 3, TASK)
    assert all(type(value) in (int, float) and math.isfinite(value) for value in batch.metrics.values())
    assert json.loads(json.dumps(batch.metrics)) == batch.metrics
    assert accounted_for(batch.metrics)
    counts = await buffer.counts(TASK)
    assert {name: batch.metrics[f"buffer/{name}"] for name in Status} == counts
    lengths = [state.response_ids.size for group in batch.groups for state in group.rollouts]
    assert batch.metrics["batch/response_tokens_max"] == max(lengths)
    assert batch.metrics["produce/tokens"] >= sum(lengths)


@pytest.mark.parametrize(
    "options", [{"max_failed": -1}, {"max_filtered": -1}, {"interrupt_timeout": -1.0}], ids=lambda given: next(iter(given))
)
async def test_bad_options_are_refused_at_construction(buffer: ReplayBuffer, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SyncProduceStrategy(buffer, **options)


@pytest.mark.parametrize("batch_size", [0, -1])
async def test_no_batch_is_refused(buffer: ReplayBuffer, batch_size: int) -> None:
    async with SimulatedEngine(lengths=2) as engine:
        with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
            await SyncProduceStrategy(buffer).produce_batch(loop_of(engine), sampler_of(buffer), batch_size, TASK)


async def test_a_loop_that_was_never_initialised_is_named(buffer: ReplayBuffer) -> None:
    class Forgetful(AgentLoop):
        def __init__(self) -> None:
            pass

        async def generate(self, state: RolloutState) -> RolloutState:
            return state

    with pytest.raises(TypeError, match=r"Forgetful.__init__ does not call super\(\).__init__"):
        await SyncProduceStrategy(buffer).produce_batch(Forgetful(), sampler_of(buffer), 1, TASK)
    assert (await buffer.audit()).drawn == {}


async def test_two_batches_of_one_task_at_once_are_refused(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=5) as engine:
        strategy, sampler, loop = SyncProduceStrategy(buffer), sampler_of(buffer), loop_of(engine)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(strategy.produce_batch(loop, sampler, 2, TASK))
            await asyncio.sleep(0)
            with pytest.raises(ProducerError, match="being produced already"):
                await strategy.produce_batch(loop, sampler, 2, TASK)
        assert len(first.result().groups) == 2


async def test_two_tasks_share_one_strategy_at_once(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=5) as engine:
        strategy, loop = AsyncProduceStrategy(buffer), loop_of(engine)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(strategy.produce_batch(loop, sampler_of(buffer), 3, name, step=1)) for name in ("a", "b")]
    assert [offsets(task.result().groups) for task in tasks] == [[0, 1, 2], [0, 1, 2]]


async def test_a_forgotten_resume_is_refused_before_anything_is_sampled(url: str) -> None:
    async with SimulatedEngine(lengths=2) as engine:
        async with ReplayBuffer.open(url) as first:
            await SyncProduceStrategy(first).produce_batch(loop_of(engine), sampler_of(first), 1, TASK)
        async with ReplayBuffer.open(url) as second:
            with pytest.raises(ResumeRequiredError, match="resume"):
                await SyncProduceStrategy(second).produce_batch(loop_of(engine), sampler_of(second), 2, TASK)
            assert (await second.audit()).drawn == {TASK: 1}


# -- failures ---------------------------------------------------------------------------------------------------


async def test_one_of_eight_that_raises_leaves_the_other_seven(buffer: ReplayBuffer) -> None:
    class OneRaises(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            if state.row["answer"] == 3:
                raise LookupError("no such tool")
            return await super().generate(state)

    async with SimulatedEngine(lengths=4) as engine:
        strategy = SyncProduceStrategy(buffer)
        batch = await strategy.produce_batch(OneRaises(engine, back_off=0.0), sampler_of(buffer, group_size=1), 8, TASK)
    assert offsets(batch.groups) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert (batch.metrics["produce/failed"], batch.metrics["produce/started"]) == (1, 9)
    (failed,) = await buffer.query(status=Status.FAILED)
    assert failed.rollouts[0].error == "LookupError: no such tool"
    assert failed.rollouts[0].attempts == 3


def always_fails(request_id: str, attempt: int) -> Exception:
    return EngineError("out of memory")


def rejects_all(group: RolloutGroup) -> str:
    return "never good enough"


def always_raises(state: RolloutState) -> float:
    raise KeyError("answer_key")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("engine", "loop", "options", "cause", "spent"),
    [
        ({"fail": always_fails}, {}, {}, r"failed \(max_failed=2\).*EngineError: out of memory", 3),
        ({"fail": always_fails}, {}, {"max_failed": 0}, r"\d groups .* failed \(max_failed=0\)", 1),
        ({}, {}, {"group_filter": rejects_all}, r"filtered \(max_filtered=16\).*never good enough", 17),
        ({}, {}, {"group_filter": rejects_all, "max_filtered": 1}, r"max_filtered=1", 2),
        ({}, {"reward": None}, {"group_filter": zero_variance}, r"no member has a score", 17),
        ({}, {"reward": lambda state: 1}, {"group_filter": zero_variance}, r"all scores are equal: \[1.0\]", 17),
        ({}, {"reward": always_raises}, {}, r"reward always_raises raised KeyError: 'answer_key'", 3),
        ({}, {"reward": lambda state: math.nan}, {}, r"reward <lambda> gave nan", 3),
    ],
)
async def test_what_cannot_succeed_ends_within_its_budget_naming_the_cause(
    buffer: ReplayBuffer,
    strategy: Callable[..., ProduceStrategy],
    engine: dict[str, Any],
    loop: dict[str, Any],
    options: dict[str, Any],
    cause: str,
    spent: int,
) -> None:
    async with SimulatedEngine(lengths=3, **engine) as simulated:
        with pytest.raises(FailureBudgetError, match=cause):
            await strategy(buffer, **options).produce_batch(loop_of(simulated, **loop), sampler_of(buffer), 2, TASK)
    counts = await buffer.counts(TASK)
    assert counts[Status.RUNNING] == counts[Status.COMPLETED] == 0
    assert spent <= counts[Status.FAILED] + counts[Status.FILTERED] <= spent + 3, "those that ended while the rest was stopped, too"


async def test_an_engine_that_ends_everything_early_does_not_use_up_the_dataset(buffer: ReplayBuffer) -> None:
    class Aborting(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            state.finish_reason = "abort"
            return state

    async with SimulatedEngine(lengths=3) as engine:
        with pytest.raises(FailureBudgetError, match=r"interrupted \(max_interrupted=32\).*ended it early"):
            await SyncProduceStrategy(buffer).produce_batch(Aborting(engine), sampler_of(buffer), 2, TASK)
    assert (await buffer.counts(TASK))[Status.INTERRUPTED] <= 2 * 16 + 2


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_dead_engine_is_raised_at_once_with_its_cause(buffer: ReplayBuffer, strategy: Callable[..., ProduceStrategy]) -> None:
    failure, requests = EngineDeadError("the GPU fell off the bus"), 0
    failure.__cause__ = OSError("Xid 79")

    def die(request_id: str, attempt: int) -> Exception | None:
        nonlocal requests
        requests += 1
        return failure if requests == 7 else None

    async with SimulatedEngine(lengths=20, fail=die) as engine:
        with pytest.raises(EngineDeadError, match="the GPU fell off the bus") as caught:
            await strategy(buffer).produce_batch(loop_of(engine), sampler_of(buffer), 6, TASK)
    causes: list[BaseException | None] = [caught.value, caught.value.__cause__]
    assert any(isinstance(cause, OSError) for cause in causes) or causes[1] is failure
    counts = await buffer.counts(TASK)
    assert counts[Status.RUNNING] == counts[Status.FAILED] == 0
    assert counts[Status.INTERRUPTED] >= 6


async def test_an_engine_that_was_never_opened_is_a_bug_and_fails_no_prompt(buffer: ReplayBuffer) -> None:
    with pytest.raises(EngineClosedError, match="async with"):
        await SyncProduceStrategy(buffer).produce_batch(loop_of(SimulatedEngine(lengths=3)), sampler_of(buffer), 2, TASK)
    counts = await buffer.counts(TASK)
    assert (counts[Status.FAILED], counts[Status.INTERRUPTED]) == (0, 2)


def filter_raises(group: RolloutGroup) -> str | None:
    raise ZeroDivisionError("mean of nothing")


def filter_says_true(group: RolloutGroup) -> Any:
    return True


def filter_says_false(group: RolloutGroup) -> Any:
    return False


@pytest.mark.parametrize(
    ("group_filter", "error", "text"),
    [
        (filter_raises, ZeroDivisionError, "mean of nothing"),
        (filter_says_true, TypeError, "filter_says_true returned True"),
        (filter_says_false, TypeError, "returned False; it must return None to keep"),
    ],
)
async def test_a_broken_filter_is_raised_and_no_group_passes_it_unfiltered(
    buffer: ReplayBuffer, group_filter: Any, error: type[Exception], text: str
) -> None:
    async with Counting(lengths=4) as engine:
        sampler = sampler_of(buffer)
        with pytest.raises(error, match=text):
            await SyncProduceStrategy(buffer, group_filter=group_filter).produce_batch(loop_of(engine), sampler, 2, TASK)
        counts = await buffer.counts(TASK)
        assert (counts[Status.COMPLETED], counts[Status.INTERRUPTED], counts[Status.RUNNING]) == (0, 2, 0)
        kept = sum(state.finished for group in await buffer.query() for state in group.rollouts)
        requests = engine.requests
        batch = await SyncProduceStrategy(buffer, group_filter=lambda group: None).produce_batch(loop_of(engine), sampler, 2, TASK)
        assert offsets(batch.groups) == [0, 1]
        assert engine.requests - requests == 4 - kept, "what was finished is judged again, and not sampled again"


@pytest.mark.parametrize("wanted", [0, -1])
async def test_a_strategy_that_starts_nothing_is_an_error_and_no_endless_wait(buffer: ReplayBuffer, wanted: int) -> None:
    class Idle(ProduceStrategy):
        def to_issue(self, load: Load) -> int:
            return wanted

    async with SimulatedEngine(lengths=2) as engine:
        with pytest.raises(ProducerError, match=f"Idle.to_issue said {wanted}"):
            await Idle(buffer).produce_batch(loop_of(engine), sampler_of(buffer), 1, TASK)


async def test_a_bad_row_under_way_stops_what_runs_and_keeps_it(buffer: ReplayBuffer) -> None:
    data = [*rows(3), {"question": "?"}, *rows(3)]
    sampler = ReplayPromptSampler(data, buffer, group_size=1, shuffle=False)
    async with SimulatedEngine(lengths=lambda request: 2 if request.prompt_ids[0] == 10 else 60) as engine:
        with pytest.raises(DatasetError, match="row 3"):
            await AsyncProduceStrategy(buffer, staleness_threshold=0.0).produce_batch(loop_of(engine), sampler, 4, TASK)
    counts = await buffer.counts(TASK)
    assert counts[Status.RUNNING] == 0
    assert (await buffer.audit()).drawn == {TASK: 3}


async def test_a_buffer_closed_under_way_is_an_error_and_no_hang(url: str) -> None:
    async with SimulatedEngine(lengths=40) as engine:
        async with ReplayBuffer.open(url) as buffer:
            closing = closed_after(10, buffer)
            loop = loop_of(engine, reward=closing)
            with pytest.raises((BufferClosedError, ReplayBufferError)):
                await SyncProduceStrategy(buffer).produce_batch(loop, sampler_of(buffer), 20, TASK)
        assert engine.running == engine.waiting == 0
        async with ReplayBuffer.open(url) as again:
            assert (await again.audit()).ok
            await again.resume(step=0)
            batch = await SyncProduceStrategy(again).produce_batch(loop_of(engine), sampler_of(again), 20, TASK)
            assert sorted(offsets(batch.groups)) == list(range(20))


def closed_after(n: int, buffer: ReplayBuffer) -> Any:
    judged = 0

    async def reward(state: RolloutState) -> float:
        nonlocal judged
        judged += 1
        if judged == n:
            await buffer.close()
        return 1.0

    return reward


# -- interruption and cancellation ------------------------------------------------------------------------------


async def test_a_rollout_that_ignores_interruption_is_cancelled_and_kept_as_interrupted(buffer: ReplayBuffer) -> None:
    class Deaf(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            if state.row["answer"] == 0:
                state.append([1], logprobs=[-0.5], version=0)
                await asyncio.Event().wait()
            return await super().generate(state)

    async with SimulatedEngine(lengths=3) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, interrupt_timeout=0.05)
        batch = await strategy.produce_batch(Deaf(engine), sampler_of(buffer, group_size=1), 2, TASK)
    assert 0 not in offsets(batch.groups)
    assert accounted_for(batch.metrics)
    (deaf,) = (group for group in await buffer.query(status=Status.INTERRUPTED) if group.position == (0, 0))
    assert deaf.rollouts[0].response_ids.tolist() == [1]


async def test_an_engine_whose_interrupt_hangs_does_not_hold_up_the_batch(buffer: ReplayBuffer) -> None:
    class Stuck(SimulatedEngine):
        async def interrupt(self, request_ids: Any = None) -> None:
            if request_ids is not None:
                await asyncio.Event().wait()
            await super().interrupt(request_ids)

    async with Stuck(lengths=lambda request: 3 if request.prompt_ids[0] == 10 else 10**3) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, interrupt_timeout=0.05)
        loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=2000))
        batch = await strategy.produce_batch(loop, sampler_of(buffer, group_size=1), 1, TASK)
    assert accounted_for(batch.metrics)
    assert (await buffer.counts(TASK))[Status.RUNNING] == 0


async def run_and_cancel(work: Any, turns: list[int]) -> Any:
    """Run `work`, cancel it after each of these numbers of turns of the loop; its result, or None where it was cancelled."""
    task = asyncio.create_task(work)
    for n in turns:
        for _ in range(n):
            if task.done():
                break
            await asyncio.sleep(0)
        task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_anywhere_everything_is_stored_and_the_next_batch_works(
    buffer: ReplayBuffer, strategy: Callable[..., ProduceStrategy], times: int, seed: int
) -> None:
    chance = random.Random(f"{seed}/{times}")
    delivered: list[int] = []
    async with SimulatedEngine(lengths=lognormal_lengths(10, 1.0, longest=60, seed=seed), slots=8) as engine:
        producing, loop, sampler = strategy(buffer), loop_of(engine), sampler_of(buffer, n=5000, group_size=2)
        before = asyncio.all_tasks()
        for step in range(1, 16):
            turns = [int(2 ** chance.uniform(0, 9)) - 1, *(chance.randint(0, 6) for _ in range(times - 1))]
            batch = await run_and_cancel(producing.produce_batch(loop, sampler, 3, TASK, step=step), turns)
            assert asyncio.all_tasks() == before
            assert engine.running == engine.waiting == 0
            await buffer.cursor(TASK)  # a second cancellation ends the waiting for the writer, not the writing
            counts = await buffer.counts(TASK)
            assert counts[Status.RUNNING] == counts[Status.FAILED] == 0
            delivered += offsets(batch.groups) if batch else []
            assert counts[Status.CONSUMED] == len(delivered), "what was consumed was delivered"
            assert (await buffer.audit()).ok
        last = await producing.produce_batch(loop, sampler, 3, TASK, step=99)
        assert len(last.groups) == 3
        delivered += offsets(last.groups)
    assert len(delivered) == len(set(delivered))


class CancelsItsCaller(ReplayBuffer):
    """Cancels the task that produces right after the n-th of its answers has come."""

    left = 0
    caller: "asyncio.Task[None] | None" = None

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in ("next_step", "check_take", "last_step", "count", "counts", "take", "claim", "draw", "start", "put", "release"):
            return found

        async def call(*arguments: Any, **named: Any) -> Any:
            answer = await found(*arguments, **named)
            self.left -= 1
            if self.left == 0 and self.caller is not None:
                self.caller.cancel()
            return answer

        return call


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_cancelled_after_any_answer_of_the_buffer_what_is_consumed_was_delivered(
    url: str, strategy: Callable[..., ProduceStrategy]
) -> None:
    delivered: list[ProducedBatch] = []

    async def produce_and_keep(*arguments: Any) -> None:
        delivered.append(await producing.produce_batch(*arguments))

    async with CancelsItsCaller(url) as buffer, SimulatedEngine(lengths=4) as engine:
        producing, loop, sampler = strategy(buffer), loop_of(engine), sampler_of(buffer)
        for n in range(1, 20):
            buffer.left = n
            task = buffer.caller = asyncio.create_task(produce_and_keep(loop, sampler, 2, TASK))
            await asyncio.wait([task])
            buffer.left = 0
            assert task.cancelled() or task.exception() is None
            assert (await buffer.counts(TASK))[Status.CONSUMED] == 2 * len(delivered)
            assert (await buffer.counts(TASK))[Status.RUNNING] == 0
            assert (await buffer.audit()).ok
    assert 2 <= len(delivered) < 19, "both were seen: batches cut short, and batches delivered"


async def test_cancelling_keeps_the_tokens_sampled_so_far(buffer: ReplayBuffer) -> None:
    under_way = asyncio.Event()

    class Watched(SimulatedEngine):
        async def generate(self, *arguments: Any, **named: Any) -> Any:
            tokens = 0

            def count(piece: Any) -> None:
                nonlocal tokens
                tokens += len(piece.token_ids)
                if tokens == 5:
                    under_way.set()

            return await super().generate(*arguments, **{**named, "on_tokens": count})

    async with Watched(lengths=10**4, max_length=10**5) as engine:
        loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=10**4))
        task = asyncio.create_task(SyncProduceStrategy(buffer).produce_batch(loop, sampler_of(buffer), 2, TASK))
        await under_way.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    kept = await buffer.query(status=Status.INTERRUPTED)
    assert len(kept) == 2
    assert all(state.response_ids.size >= 4 for group in kept for state in group.rollouts)


# -- whatever happens -------------------------------------------------------------------------------------------


class Disturbed(SimulatedEngine):
    """Interrupts or pauses itself now and then, as weight updates from outside would."""

    def __init__(self, chance: random.Random, rate: float, **options: Any) -> None:
        super().__init__(**options)
        self._chance, self._disturbance = chance, rate

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        if self._chance.random() < self._disturbance:
            match self._chance.randrange(4):
                case 0:
                    await self.interrupt()
                case 1:
                    await self.interrupt(self._chance.sample(sorted(self._requests), len(self._requests) // 2))
                case 2:
                    await self.pause("abort")
                    await self.resume()
                case _:
                    await self.pause("keep")
                    await self.update_weights({"seed": 1}, self.version + 1)
                    await self.resume()
        return await super().generate(*arguments, **named)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    batch_size=st.integers(1, 6),
    group_size=st.integers(1, 3),
    threshold=st.none() | st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    failures=st.sampled_from([0.0, 0.1]),
    filtered=st.sampled_from([0.0, 0.2]),
    disturbance=st.sampled_from([0.0, 0.1]),
    partial=st.booleans(),
    slots=st.sampled_from([1, 4, 64]),
)
def test_after_every_batch_everything_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    batch_size: int,
    group_size: int,
    threshold: float | None,
    failures: float,
    filtered: float,
    disturbance: float,
    partial: bool,
    slots: int,
) -> None:
    chance = random.Random(seed)
    url = f"sqlite:///{tmp_path_factory.mktemp('run') / 'run.db'}"

    def fail(request_id: str, attempt: int) -> Exception | None:
        return EngineError("503") if chance.random() < failures else None

    def group_filter(group: RolloutGroup) -> str | None:
        return "by chance" if chance.random() < filtered else None

    async def run() -> None:
        lengths = lognormal_lengths(8, 1.0, longest=60, seed=seed)
        async with ReplayBuffer.open(url) as buffer, Disturbed(chance, disturbance, lengths=lengths, fail=fail, slots=slots) as engine:
            options: dict[str, Any] = {
                "group_filter": group_filter,
                "enable_partial_rollout": partial,
                "max_failed": 1000,
                "max_filtered": 1000,
            }
            strategy = (
                SyncProduceStrategy(buffer, **options)
                if threshold is None
                else AsyncProduceStrategy(buffer, staleness_threshold=threshold, **options)
            )
            sampler, loop = sampler_of(buffer, n=10_000, group_size=group_size), loop_of(engine, reward=lambda state: chance.random())
            delivered: list[int] = []
            for step in range(1, 5):
                batch = await strategy.produce_batch(loop, sampler, batch_size, TASK)
                assert (len(batch.groups), batch.step) == (batch_size, step)
                delivered += [group.group_id for group in batch.groups]
                assert accounted_for(batch.metrics), batch.metrics
                counts, audit = await buffer.counts(TASK), await buffer.audit()
                assert audit.ok, audit.problems
                assert counts[Status.RUNNING] == counts[Status.PENDING] == 0
                assert counts[Status.CONSUMED] == len(delivered) == len(set(delivered))
                assert engine.running == engine.waiting == 0
                check_members(batch.groups, group_size)
                if not partial:
                    interrupted = [state for group in await buffer.query(status=Status.INTERRUPTED) for state in group.rollouts]
                    assert all(state.response_ids.size == 0 for state in interrupted if not state.finished)

    asyncio.run(run())


def check_members(groups: Collection[RolloutGroup], group_size: int) -> None:
    for group in groups:
        assert len(group.rollouts) == group_size
        for state in group.rollouts:
            assert state.finished
            assert state.score is not None
            sizes = {array.size for array in (state.response_ids, state.logprobs, state.loss_mask, state.versions)}
            assert len(sizes) == 1
            assert 0 < state.response_ids.size <= 64


# -- refused before the work, stored whatever it is ----------------------------------------------------------------


async def test_a_step_that_cannot_be_taken_is_refused_before_anything_is_sampled(buffer: ReplayBuffer) -> None:
    async with Counting(lengths=5) as engine:
        strategy, loop = SyncProduceStrategy(buffer), loop_of(engine)
        await strategy.produce_batch(loop, sampler_of(buffer), 2, TASK, step=7)
        await buffer.commit(7)
        asked = engine.requests
        for step in (0, 1.5, "a", 7, 2**70):
            with pytest.raises(ValueError, match="step"):
                await strategy.produce_batch(loop, sampler_of(buffer), 2, TASK, step=step)  # type: ignore[arg-type]
        assert engine.requests == asked
        other = await strategy.produce_batch(loop, sampler_of(buffer), 2, "other")
        assert other.step == 8, "a committed step is over for every task"


class Spoiling(SingleTurnAgentLoop):
    """Leaves the first prompt's rollouts in a state that no buffer can store."""

    def __init__(self, *arguments: Any, spoil: Callable[[RolloutState], None], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._spoil = spoil

    async def generate(self, state: RolloutState) -> RolloutState:
        state = await super().generate(state)
        if state.row["answer"] == 0:
            self._spoil(state)
        return state


def _text(state: RolloutState) -> None:
    state.text = b"\xff"  # type: ignore[assignment]


def _metrics(state: RolloutState) -> None:
    state.metrics = {"x": {1, 2}}  # type: ignore[dict-item]


def _lengths(state: RolloutState) -> None:
    state.logprobs = state.logprobs[:1]


def _identity(state: RolloutState) -> None:
    state.index = 99


@pytest.mark.parametrize("spoil", [_text, _metrics, _lengths, _identity])
async def test_a_rollout_that_cannot_be_stored_is_a_failed_one(buffer: ReplayBuffer, spoil: Callable[[RolloutState], None]) -> None:
    async with SimulatedEngine(lengths=5) as engine:
        loop = Spoiling(engine, reward=lambda state: 1.0, spoil=spoil, back_off=0.0)
        batch = await SyncProduceStrategy(buffer).produce_batch(loop, sampler_of(buffer), 2, TASK)
    assert offsets(batch.groups) == [1, 2]
    assert accounted_for(batch.metrics)
    (failed,) = await buffer.query(status=Status.FAILED)
    assert offsets([failed]) == [0]
    assert failed.rollouts[0].error
    assert await buffer.count(TASK, Status.RUNNING) == 0
    assert (await buffer.audit()).ok


async def test_a_slow_judge_of_a_surplus_group_does_not_hold_the_batch_up(buffer: ReplayBuffer) -> None:
    judged: list[int] = []
    never = asyncio.Event()

    async def judge(state: RolloutState) -> float:
        judged.append(state.row["answer"])
        if state.row["answer"] >= 2 and judged.count(state.row["answer"]) == 1:
            await never.wait()
        return 1.0

    async with Counting(lengths=5) as engine:
        strategy, sampler = AsyncProduceStrategy(buffer, staleness_threshold=1.0, interrupt_timeout=3600), sampler_of(buffer, group_size=1)
        loop = loop_of(engine, reward=judge, reward_timeout=3600.0)
        batch = await strategy.produce_batch(loop, sampler, 2, TASK)
        assert offsets(batch.groups) == [0, 1]
        waiting = await buffer.query(status=Status.INTERRUPTED)
        assert {group.rollouts[0].finish_reason for group in waiting} == {"stop"}
        asked = engine.requests
        again = await SyncProduceStrategy(buffer).produce_batch(loop, sampler, len(waiting), TASK)
        assert {group.group_id for group in again.groups} == {group.group_id for group in waiting}
        assert engine.requests == asked, "only the judging is repeated"


async def test_a_loop_that_holds_a_cancellation_back_is_named(buffer: ReplayBuffer, caplog: pytest.LogCaptureFixture) -> None:
    let_go = asyncio.Event()

    class Stubborn(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            while state.row["answer"] == 1 and not let_go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await let_go.wait()
            return await super().generate(state)

    class LetGo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            let_go.set()

    handler = LetGo()
    logging.getLogger("producer.flight").addHandler(handler)
    try:
        async with SimulatedEngine(lengths=5) as engine:
            strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, interrupt_timeout=0.05)
            batch = await strategy.produce_batch(Stubborn(engine), sampler_of(buffer, group_size=1), 1, TASK)
    finally:
        logging.getLogger("producer.flight").removeHandler(handler)
    assert offsets(batch.groups) == [0]
    assert "holds CancelledError back" in caplog.text
    assert await buffer.count(TASK, Status.RUNNING) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_failed": "3"},
        {"max_filtered": -1},
        {"interrupt_timeout": float("nan")},
        {"max_interrupted": True},
        {"staleness_threshold": "0.5"},
        {"max_staleness": 1.5},
        {"max_failed": 2.5},
        {"interrupt_timeout": None},
        {"enable_partial_rollout": "no"},
        {"progress": "no"},
        {"group_filter": "zero_variance"},
        {"policy": "fifo"},
    ],
    ids=str,
)
async def test_bad_bounds_are_refused_at_construction(buffer: ReplayBuffer, arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        AsyncProduceStrategy(buffer, **arguments)


async def test_parts_that_are_none_are_refused_by_name_before_anything_runs(buffer: ReplayBuffer) -> None:
    async with Counting(lengths=5) as engine:
        strategy, loop, sampler = SyncProduceStrategy(buffer), loop_of(engine), sampler_of(buffer)
        for parts, name in (
            ((None, sampler), "agent_loop=None"),
            ((engine, sampler), "agent_loop="),
            ((loop, [{"prompt": "a"}]), "sampler="),
        ):
            with pytest.raises(TypeError, match=name):
                await strategy.produce_batch(*parts, 2, TASK)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=name):
                Producer(strategy, *parts, TASK)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=name):
                TaskManager(buffer, [TrainingTask(TASK, *parts, strategy)])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="strategy=None"):
            TaskManager(buffer, [TrainingTask(TASK, loop, sampler, None)])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="weights="):
            TaskManager(buffer, [TrainingTask(TASK, loop, sampler, strategy)], weights={TASK: 1.0})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="buffer=None"):
            ReplayPromptSampler([{"prompt": "a"}], None)  # type: ignore[arg-type]
        for options in ({"seed": "1"}, {"shuffle": "no"}):
            with pytest.raises((ValueError, TypeError), match=next(iter(options))):
                ReplayPromptSampler([{"prompt": "a"}], buffer, **options)
    assert engine.requests == 0


async def test_a_strategy_needs_a_buffer_and_a_whole_batch(buffer: ReplayBuffer) -> None:
    with pytest.raises(TypeError, match="ReplayBuffer"):
        SyncProduceStrategy(None)  # type: ignore[arg-type]
    async with Counting(lengths=5) as engine:
        with pytest.raises(ValueError, match=r"batch_size=2.5"):
            await SyncProduceStrategy(buffer).produce_batch(loop_of(engine), sampler_of(buffer), 2.5, TASK)  # type: ignore[arg-type]
    assert engine.requests == 0
