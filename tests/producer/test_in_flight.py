"""What runs beyond its batch: kept running or stopped, never too stale when handed out, never more than allowed at once."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.base import EngineLoad
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from agent_loop.errors import EngineDeadError
from buffer import Fifo, ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import (
    AdaptiveLimit,
    AsyncProduceStrategy,
    PromptSampler,
    RedundantMembers,
    ReplayPromptSampler,
    SyncProduceStrategy,
    Watchdog,
    make_experience,
)
from producer.errors import ProducerError, StalledError

TASK = "math"


def sampler_of(buffer: ReplayBuffer, n: int = 500, group_size: int = 2) -> ReplayPromptSampler:
    rows = [{"prompt_ids": [10 + index % 40], "answer": index} for index in range(n)]
    return ReplayPromptSampler(rows, buffer, group_size=group_size, shuffle=False)


def loop_of(engine: SimulatedEngine, **options: Any) -> SingleTurnAgentLoop:
    return SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=64, seed=1), **{"reward": lambda state: 1.0, **options})


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


class Gated(SimulatedEngine):
    """Holds every request of the prompts named until it is let go; counts what is in flight."""

    def __init__(self, *held: int, **options: Any) -> None:
        super().__init__(**{"lengths": 4, **options})
        self.held, self.go = set(held), asyncio.Event()
        self.most = self.requests = 0

    async def generate(self, prompt_ids: Any, *arguments: Any, **named: Any) -> Any:
        self.requests += 1
        self.most = max(self.most, len(self._requests) + 1)
        if int(prompt_ids[0]) in self.held:
            await self.go.wait()
        return await super().generate(prompt_ids, *arguments, **named)


# -- kept in flight ----------------------------------------------------------------------------------------------


async def test_what_is_kept_runs_on_while_the_trainer_trains_and_no_token_is_sampled_twice(buffer: ReplayBuffer) -> None:
    async with Gated(10) as engine:
        async with AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight="keep") as strategy:
            sampler, loop = sampler_of(buffer), loop_of(engine)
            first = await strategy.produce_batch(loop, sampler, 2, TASK)
            assert 0 not in [group.position.offset for group in first.groups if group.position]
            assert await buffer.count(TASK, Status.RUNNING) >= 1
            engine.go.set()
            await buffer.wait_for(TASK, Status.COMPLETED, 4, timeout=20)  # as many as it runs ahead, without a batch asked for
            requests = engine.requests
            second = await strategy.produce_batch(loop, sampler, 2, TASK)
            assert 0 in [group.position.offset for group in second.groups if group.position]
            assert engine.requests >= requests
        assert (await buffer.counts(TASK))[Status.RUNNING] == 0
    slow = next(group for group in second.groups if group.position == (0, 0))
    assert [(state.interruptions, state.attempts) for state in slow.rollouts] == [(0, 0)] * 2
    assert (await buffer.audit()).ok


async def test_leaving_the_strategy_stops_and_stores_what_it_kept(buffer: ReplayBuffer) -> None:
    async with Gated(10, 11) as engine:
        async with AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight="keep", interrupt_timeout=0.05) as strategy:
            await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)
        counts = await buffer.counts(TASK)
    assert (counts[Status.RUNNING], counts[Status.PENDING]) == (0, 0)
    assert counts[Status.INTERRUPTED] >= 2


async def test_keeping_needs_an_owner_and_only_one(buffer: ReplayBuffer) -> None:
    strategy = AsyncProduceStrategy(buffer, in_flight="keep")
    async with Gated() as engine:
        with pytest.raises(ProducerError, match="async with strategy"):
            await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)
        async with strategy:
            with pytest.raises(ProducerError, match="entered already"):
                await strategy.__aenter__()
            assert len((await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)).groups) == 2
        async with strategy:  # again, after it was left
            assert len((await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)).groups) == 2


async def test_an_engine_that_dies_between_two_batches_is_the_error_of_the_next_and_leaves_the_trainer_alone(buffer: ReplayBuffer) -> None:
    dead = False

    def fail(request_id: str, attempt: int) -> Exception | None:
        return EngineDeadError("fell off the bus") if dead else None

    async with Gated(10, fail=fail) as engine:
        async with AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight="keep") as strategy:
            sampler, loop = sampler_of(buffer), loop_of(engine)
            await strategy.produce_batch(loop, sampler, 2, TASK)
            dead = True
            engine.go.set()
            await buffer.wait_for(TASK, Status.INTERRUPTED, timeout=20)
            with pytest.raises(EngineDeadError, match="fell off the bus"):
                await strategy.produce_batch(loop, sampler, 5, TASK)
        counts = await buffer.counts(TASK)
    assert (counts[Status.RUNNING], counts[Status.FAILED]) == (0, 0)


async def test_a_batch_that_is_cancelled_keeps_nothing_running_and_the_next_one_works(buffer: ReplayBuffer) -> None:
    strategy = AsyncProduceStrategy(buffer, staleness_threshold=0.0, in_flight="keep", interrupt_timeout=0.05)
    async with Gated(10) as engine, strategy:
        sampler, loop = sampler_of(buffer), loop_of(engine)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(strategy.produce_batch(loop, sampler, 2, TASK), 0.2)
        assert await buffer.count(TASK, Status.RUNNING) == 0
        engine.go.set()
        assert len((await strategy.produce_batch(loop, sampler, 2, TASK)).groups) == 2


# -- the bound on staleness -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    bound=st.integers(0, 4),
    threshold=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    in_flight=st.sampled_from(["keep", "interrupt"]),
    batch_size=st.integers(1, 5),
    slots=st.sampled_from([1, 4, 64]),
    limit=st.sampled_from([None, 2, 7]),
)
def test_waiting_keeps_the_bound_and_nothing_expires(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    bound: int,
    threshold: float,
    in_flight: Any,
    batch_size: int,
    slots: int,
    limit: int | None,
) -> None:
    async def run() -> None:
        url = f"sqlite:///{tmp_path_factory.mktemp('run') / 'run.db'}"
        lengths = lognormal_lengths(8, 1.0, longest=60, seed=seed)
        async with ReplayBuffer.open(url) as buffer, SimulatedEngine(lengths=lengths, slots=slots) as engine:
            options: dict[str, Any] = {"in_flight": in_flight, "max_in_flight": limit}
            async with AsyncProduceStrategy(buffer, staleness_threshold=threshold, max_staleness=bound, **options) as strategy:
                sampler, loop = sampler_of(buffer), loop_of(engine)
                for step in range(1, 7):
                    batch = await strategy.produce_batch(loop, sampler, batch_size, TASK)
                    assert len(batch.groups) == batch_size
                    assert max(group.staleness(engine.version) or 0 for group in batch.groups) <= bound
                    for _ in range(seed >> step & 7):
                        await asyncio.sleep(0)  # the trainer trains
                    await engine.update_weights({"seed": step}, engine.version + 1)
            transitions = [change for group in await buffer.query(limit=500) for change in await buffer.history(group.group_id)]
            assert Counter(change.target for change in transitions)[Status.EXPIRED] == 0
            assert (await buffer.audit()).ok

    asyncio.run(run())


async def stale_groups(buffer: ReplayBuffer, *versions: list[int]) -> None:
    """A completed group for each of `versions`, one member whose tokens carry them."""
    for group_id, sampled in enumerate(versions, 1):
        state = RolloutState(group_id, 0, TASK, Status.COMPLETED, prompt_ids=[5], finish_reason="stop", score=1.0, reward=1.0)
        state.append([7] * len(sampled), logprobs=[-0.1] * len(sampled), version=sampled)
        await buffer.put(RolloutGroup(group_id, [state], TASK))


@pytest.mark.parametrize("on_stale", ["wait", "expire"])
async def test_what_is_too_stale_all_the_same_expires_and_runs_again(buffer: ReplayBuffer, on_stale: Any) -> None:
    await stale_groups(buffer, [0, 4], [4, 4])
    async with Gated() as engine:
        await engine.update_weights({"seed": 1}, 5)
        strategy = AsyncProduceStrategy(buffer, max_staleness=3, on_stale=on_stale)
        batch = await strategy.produce_batch(loop_of(engine), sampler_of(buffer, group_size=1), 2, TASK)
    assert sorted(group.group_id for group in batch.groups) == [1, 2]
    assert sorted(group.staleness(5) or 0 for group in batch.groups) == [0, 1]
    assert engine.requests == 2, "the expired one, and one more over the batch"


async def test_masked_tokens_are_not_trained_on_and_only_a_member_without_a_fresh_one_runs_again(buffer: ReplayBuffer) -> None:
    await stale_groups(buffer, [0, 4], [0, 0])
    async with Gated() as engine:
        await engine.update_weights({"seed": 1}, 5)
        strategy = SyncProduceStrategy(buffer, max_staleness=3, on_stale="mask")
        batch = await strategy.produce_batch(loop_of(engine), sampler_of(buffer, group_size=1), 2, TASK)
    masks = {group.group_id: group.rollouts[0].loss_mask.tolist() for group in batch.groups}
    assert masks == {1: [0, 1], 2: [1, 1, 1, 1]}
    assert engine.requests == 1
    stored = await buffer.get(1)
    assert stored.rollouts[0].loss_mask.tolist() == [1, 1], "what is stored keeps its mask"


async def test_with_expire_a_kept_group_that_got_too_stale_is_stopped_and_begins_anew(buffer: ReplayBuffer) -> None:
    async with (
        Gated(10, lengths=30) as engine,
        AsyncProduceStrategy(
            buffer, staleness_threshold=1.0, in_flight="keep", max_staleness=1, on_stale="expire", interrupt_timeout=0.05
        ) as strategy,
    ):
        sampler, loop = sampler_of(buffer, group_size=1), loop_of(engine)
        for step in range(1, 5):
            batch = await strategy.produce_batch(loop, sampler, 2, TASK)
            assert max(group.staleness(engine.version) or 0 for group in batch.groups) <= 1
            await engine.update_weights({"seed": step}, engine.version + 1)
            engine.go.set()
    assert (await buffer.audit()).ok


async def test_waiting_hands_out_the_stalest_first_and_refuses_another_order(buffer: ReplayBuffer) -> None:
    with pytest.raises(ValueError, match=r"on_stale='wait' needs StalestFirst"):
        AsyncProduceStrategy(buffer, max_staleness=2, policy=Fifo())
    await stale_groups(buffer, [5], [3], [4])
    async with Gated() as engine:
        await engine.update_weights({"seed": 1}, 5)
        batch = await AsyncProduceStrategy(buffer, max_staleness=3).produce_batch(loop_of(engine), sampler_of(buffer), 1, TASK)
    assert [group.group_id for group in batch.groups] == [2]


# -- how many at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2, 5, 8])
async def test_no_more_rollouts_are_in_flight_than_allowed_and_no_fewer_than_fit(buffer: ReplayBuffer, limit: int) -> None:
    async with Gated(lengths=lognormal_lengths(10, 1.0, longest=60)) as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=3.0, max_in_flight=limit)
        await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 8, TASK)
    assert engine.most == limit - limit % 2, "groups of two"


async def test_a_limit_that_lets_no_group_run_is_refused(buffer: ReplayBuffer) -> None:
    async with Gated() as engine:
        with pytest.raises(ValueError, match=r"max_in_flight=1 lets no group of 2 rollouts run"):
            await AsyncProduceStrategy(buffer, max_in_flight=1).produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"in_flight": "drop"}, "in_flight='drop'"),
        ({"on_stale": "drop"}, "on_stale='drop'"),
        ({"max_in_flight": 0}, "max_in_flight=0"),
        ({"max_in_flight": 1.5}, "max_in_flight=1.5"),
        ({"tail_batch_trigger_size": -2}, "tail_batch_trigger_size=-2"),
        ({"tail_batch_candidate_step": 0}, "tail_batch_candidate_step=0"),
    ],
)
async def test_bad_options_are_refused_at_construction(buffer: ReplayBuffer, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AsyncProduceStrategy(buffer, **options)


# -- tail batches ----------------------------------------------------------------------------------------------------


async def left_behind(buffer: ReplayBuffer, n: int) -> None:
    for group_id in range(901, 901 + n):
        states = [RolloutState(group_id, index, TASK, Status.EXPIRED, prompt_ids=[5], row={"answer": -1}) for index in range(2)]
        await buffer.put(RolloutGroup(group_id, states, TASK))


@pytest.mark.parametrize(("trigger", "tail"), [(0, True), (1, True), (2, True), (3, False), (-1, False)])
async def test_a_tail_batch_runs_what_was_left_behind_and_issues_nothing_beside_it(buffer: ReplayBuffer, trigger: int, tail: bool) -> None:
    await left_behind(buffer, 2)
    async with Gated() as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, tail_batch_trigger_size=trigger)
        batch = await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)
    if tail:
        assert [group.group_id for group in batch.groups] == [901, 902]
        assert batch.metrics["produce/started"] == 2
    else:
        assert batch.metrics["produce/started"] > 2
    if trigger == 3:
        assert await buffer.count(TASK, Status.EXPIRED) == 2, "they wait for a batch of their own"


async def test_a_plain_prompt_sampler_has_no_tail(buffer: ReplayBuffer) -> None:
    await left_behind(buffer, 2)
    rows = [{"prompt_ids": [10 + index]} for index in range(40)]
    async with Gated() as engine:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, tail_batch_trigger_size=1)
        batch = await strategy.produce_batch(loop_of(engine), PromptSampler(rows, 2), 2, TASK)
    assert batch.metrics["produce/started"] > 2


class Loaded(Gated):
    """Says how loaded it is, and remembers the most that waited."""

    longest_queue = 0

    def load(self) -> EngineLoad:
        self.longest_queue = max(self.longest_queue, self.waiting)
        return EngineLoad(self.running, self.waiting, 0)


async def test_an_adaptive_limit_fills_the_engine_and_keeps_its_queue_short(buffer: ReplayBuffer) -> None:
    limit = AdaptiveLimit(smallest=2, largest=400, increase=2.0)
    async with Loaded(lengths=lognormal_lengths(10, 1.0, longest=60), slots=16) as engine:
        await AsyncProduceStrategy(buffer, staleness_threshold=3.0, max_in_flight=limit).produce_batch(
            loop_of(engine), sampler_of(buffer), 120, TASK
        )
    assert 16 <= engine.most <= 60, "without a limit it were 960"
    assert engine.longest_queue <= 32


async def test_an_adaptive_limit_does_not_rise_before_a_rollout_has_ended(buffer: ReplayBuffer) -> None:
    class NeverQueues(Gated):
        """Says that it keeps up, whatever it is given: one that is asked before its requests have reached it."""

        begun = asyncio.Event()

        def load(self) -> EngineLoad:
            return EngineLoad(self.requests, 0, 0)

        async def generate(self, *arguments: Any, **named: Any) -> Any:
            if self.requests == 3:
                self.begun.set()
            return await super().generate(*arguments, **named)

    async with NeverQueues(*range(10, 50)) as engine, asyncio.TaskGroup() as tasks:
        strategy = AsyncProduceStrategy(buffer, max_in_flight=AdaptiveLimit(smallest=4, increase=2.0))
        batch = tasks.create_task(strategy.produce_batch(loop_of(engine), sampler_of(buffer), 40, TASK))
        await engine.begun.wait()
        for _ in range(20):  # more would be drawn by one of these transactions
            await buffer.cursor(TASK)
        at_first = engine.requests
        engine.go.set()
        await batch
    assert at_first <= 8, "it looks when production begins, when a batch is asked for, and when rollouts end"


# -- stalls ----------------------------------------------------------------------------------------------------------

NERVOUS = Watchdog(factor=1.0, least_seconds=0.02, first_seconds=0.02)


async def test_a_stall_is_raised_with_the_rollouts_that_run_and_where_they_stand(buffer: ReplayBuffer) -> None:
    async with Gated(11) as engine:
        strategy = SyncProduceStrategy(buffer, watchdog=NERVOUS, on_stall="raise", interrupt_timeout=0.05)
        with pytest.raises(StalledError, match=r"task 'math' has stalled: no group ended for .* 2 rollouts run: math-2-0 \(0 tokens, for"):
            await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)
    counts = await buffer.counts(TASK)
    assert (counts[Status.COMPLETED], counts[Status.INTERRUPTED], counts[Status.RUNNING]) == (1, 1, 0)


async def test_a_stall_is_warned_of_and_says_what_is_being_judged(buffer: ReplayBuffer, caplog: pytest.LogCaptureFixture) -> None:
    go = asyncio.Event()

    async def reward(state: RolloutState) -> float:
        await go.wait()
        return 1.0

    class LetGo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            go.set()

    handler = LetGo()
    logging.getLogger("producer.production").addHandler(handler)
    try:
        async with Gated() as engine:
            strategy = SyncProduceStrategy(buffer, watchdog=NERVOUS)
            assert len((await strategy.produce_batch(loop_of(engine, reward=reward), sampler_of(buffer), 2, TASK)).groups) == 2
    finally:
        logging.getLogger("producer.production").removeHandler(handler)
    assert "(4 tokens, being judged, for" in caplog.text


# -- redundant members -----------------------------------------------------------------------------------------------


async def test_redundant_members_are_stopped_when_enough_have_completed_and_only_those_are_trained_on(buffer: ReplayBuffer) -> None:
    slow = {"math-1-0", "math-2-0"}

    def lengths(request: Any) -> int:
        return 10_000 if request.session_id in slow else 5

    async with SimulatedEngine(lengths=lengths, max_length=20_000) as engine:
        strategy = SyncProduceStrategy(buffer, redundant=RedundantMembers(1, bias="accept"))
        loop = SingleTurnAgentLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=15_000, seed=1))
        batch = await strategy.produce_batch(loop, sampler_of(buffer, group_size=3), 2, TASK)
    for group in batch.groups:
        assert [state.left_out for state in group.rollouts] == [True, False, False]
        assert [state.response_ids.size for state in group.rollouts] == [0, 5, 5]
    assert (await buffer.audit(payloads=True)).ok
    experience = make_experience(batch.groups)
    assert experience.metrics["rollouts"] == 4


async def test_redundant_members_stay_with_an_interrupted_group(buffer: ReplayBuffer) -> None:
    """Stopped before enough have completed, it goes on with those that had, and drops the slowest in the end."""
    judged = asyncio.Event()

    async def reward(state: RolloutState) -> float:
        judged.set()
        return 1.0

    def lengths(request: Any) -> int:
        return 3 if request.session_id.endswith("-0") else 10_000

    async with SimulatedEngine(lengths=lengths, max_length=20_000) as engine:
        loop = SingleTurnAgentLoop(engine, reward=reward, sampling=SamplingParams(max_tokens=15_000, seed=1))
        strategy = SyncProduceStrategy(buffer, redundant=RedundantMembers(1, bias="accept"))
        producing = asyncio.create_task(strategy.produce_batch(loop, sampler_of(buffer, group_size=3), 1, TASK))
        await judged.wait()
        producing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await producing
        (stopped,) = await buffer.query(status=Status.INTERRUPTED)
        batch = await strategy.produce_batch(loop, sampler_of(buffer, group_size=3), 1, TASK)
    assert [group.group_id for group in batch.groups] == [stopped.group_id]
    assert sum(state.left_out for state in batch.groups[0].rollouts) == 1


async def test_redundant_members_need_a_group_to_be_dropped_from_and_no_judge_of_the_whole(buffer: ReplayBuffer) -> None:
    strategy = SyncProduceStrategy(buffer, redundant=RedundantMembers(2, bias="accept"))
    async with Gated() as engine:
        with pytest.raises(ValueError, match="a group of 2 with extra=2 would train on none"):
            await strategy.produce_batch(loop_of(engine), sampler_of(buffer), 2, TASK)
        judged = SingleTurnAgentLoop(engine, group_reward=lambda group: [1.0] * len(group.rollouts))
        with pytest.raises(ValueError, match="group_reward judges as a whole"):
            await strategy.produce_batch(judged, sampler_of(buffer, group_size=4), 2, TASK)
    with pytest.raises(TypeError, match="redundant=2"):
        SyncProduceStrategy(buffer, redundant=2)  # type: ignore[arg-type]
