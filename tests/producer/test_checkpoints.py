"""Running groups are checkpointed so often that a crash costs no more than the interval, and a checkpoint is in nobody's way."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import Decoder, FillerPolicy, Request, Step, lognormal_lengths
from agent_loop.errors import first_error
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.errors import DatabaseError, LeaseLostError
from producer import AsyncProduceStrategy, ProduceStrategy, ReplayPromptSampler, SyncProduceStrategy
from producer.checkpoints import Checkpointer, Interval, Unsaved
from producer.errors import FailureBudgetError
from producer.simulate import virtual_time

TASK = "math"
STRATEGIES: list[Callable[..., ProduceStrategy]] = [SyncProduceStrategy, AsyncProduceStrategy]


# -- what is due ------------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, 1e6)


@given(
    st.integers(0, 10_000),
    NUMBERS,
    st.none() | NUMBERS,
    st.none() | st.integers(1, 5000),
    st.none() | st.floats(0.001, 1e6),
)
def test_a_group_is_due_at_half_of_what_may_be_lost_or_soon_after_a_member_ended(
    tokens: int, since: float, ended: float | None, most_tokens: int | None, most_seconds: float | None
) -> None:
    at = Unsaved(since, tokens, ended).due_at(Interval(most_tokens, most_seconds))
    if most_tokens is not None and tokens >= most_tokens / 2:
        assert at == -math.inf
    else:
        bounds = [] if most_seconds is None else [since + most_seconds / 2]
        bounds += [] if ended is None else [ended + 1.0]
        assert at == min(bounds, default=math.inf)


@given(st.integers(1, 10_000))
def test_what_an_engine_holds_back_is_small_beside_the_interval(tokens: int) -> None:
    assert 1 <= Interval(tokens, None).piece_tokens <= max(1, tokens / 8)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"checkpoint_tokens": 0}, ValueError),
        ({"checkpoint_tokens": 2.5}, ValueError),
        ({"checkpoint_seconds": 0}, ValueError),
        ({"checkpoint_seconds": math.nan}, ValueError),
        ({"checkpoint_seconds": "1"}, ValueError),
    ],
)
async def test_bad_intervals_are_refused_by_name(buffer: ReplayBuffer, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        SyncProduceStrategy(buffer, **arguments)


# -- the checkpointer, in virtual time --------------------------------------------------------------------------


class Slow:
    """In place of a buffer: a checkpoint is durable when it returns, `seconds` later; knows what is."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self.durable: dict[str, RolloutState] = {}
        self.written: list[tuple[float, int]] = []
        self.under_way: set[int] = set()
        self.most = 0
        self.wrong: list[str] = []
        self._asked_this_turn = False

    def _next_turn(self) -> None:
        self._asked_this_turn = False

    async def checkpoint(self, group: RolloutGroup) -> None:
        # Collected: an error raised here would be taken for one of the group's content.
        self.wrong += ["not running"] if group.status is not Status.RUNNING else []
        self.wrong += ["two in one turn of the event loop, which copying many would hold up"] if self._asked_this_turn else []
        self.wrong += ["two of one group at once"] if group.group_id in self.under_way else []
        self._asked_this_turn = True
        asyncio.get_running_loop().call_soon(self._next_turn)
        self.under_way.add(group.group_id)
        self.most = max(self.most, len(self.under_way))
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self.under_way.discard(group.group_id)
        self.written.append((asyncio.get_running_loop().time(), group.group_id))
        self.durable |= {state.rollout_id: state for state in group.rollouts}

    def tokens(self, rollout_id: str) -> int:
        return self.durable[rollout_id].response_ids.size if rollout_id in self.durable else 0


class Losing:
    """A policy that knows at each token how many a rollout would lose if the process died now."""

    def __init__(self, sink: Slow, length: int) -> None:
        self._inner = FillerPolicy(length)
        self.vocab_size, self.eos_token_ids = self._inner.vocab_size, self._inner.eos_token_ids
        self.sink, self.worst = sink, 0

    def start(self, request: Request, params: SamplingParams) -> Decoder:
        decode, begun = self._inner.start(request, params), request.ids.size

        def step(context: Sequence[int], weights: int) -> Step:
            lost = len(context) + 1 - begun - self.sink.tokens(str(request.session_id))
            self.worst = max(self.worst, lost)
            return decode(context, weights)

        return step


def groups_of(n: int, size: int = 2) -> list[RolloutGroup]:
    return [
        RolloutGroup(g, [RolloutState(g, i, TASK, Status.RUNNING, prompt_ids=[10]) for i in range(size)], TASK) for g in range(1, n + 1)
    ]


async def run_checkpointed(
    engine: SimulatedEngine, sink: Slow, interval: Interval, groups: list[RolloutGroup], *, keep_tokens: bool = True, reward: Any = None
) -> None:
    """The groups through an agent loop beside a checkpointer, as a strategy runs them."""
    async with engine:
        loop = SingleTurnAgentLoop(engine, reward=reward, sampling=SamplingParams(max_tokens=3000))

        async def one(group: RolloutGroup) -> None:
            await loop.generate_group(group)
            checkpoints.forget(group.group_id)

        def lost(group_id: int, reason: str) -> None:
            raise AssertionError(reason)

        buffer = cast(ReplayBuffer, sink)
        async with Checkpointer(buffer, loop, interval, keep_tokens=keep_tokens, lost=lost) as checkpoints, asyncio.TaskGroup() as tasks:
            for group in groups:
                checkpoints.watch(group)
                tasks.create_task(one(group))
        assert not loop._watchers
        assert not sink.wrong
        assert {group.status for group in groups} == {Status.COMPLETED}


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 200), st.floats(1, 200), st.floats(0, 0.25), st.integers(1, 6))
def test_never_more_than_the_interval_of_tokens_is_not_durable(most: int, rate: float, share: float, groups: int) -> None:
    # A write takes up to a quarter of the interval's tokens, and one that began just before a round waits for it as well.
    sink = Slow(share / 2 * most / rate)
    losing = Losing(sink, 600)
    virtual_time.run(
        run_checkpointed(SimulatedEngine(policy=losing, tokens_per_second=rate), sink, Interval(most, None), groups_of(groups))
    )
    assert 0 < losing.worst <= most


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 100), st.integers(1, 200))
def test_never_more_than_the_interval_of_seconds_is_not_durable(most: float, rate: int) -> None:
    sink = Slow(most / 100)
    losing = Losing(sink, 300)
    virtual_time.run(run_checkpointed(SimulatedEngine(policy=losing, tokens_per_second=rate), sink, Interval(None, most), groups_of(2)))
    # A token more for where the clock fell, and those that the engine holds back until a piece is whole.
    assert 0 < losing.worst <= most * rate + 1 + 16


def test_groups_that_decode_in_step_are_written_together() -> None:
    sink = Slow(0.01)
    virtual_time.run(run_checkpointed(SimulatedEngine(lengths=400, tokens_per_second=50), sink, Interval(128, None), groups_of(12)))
    assert sink.most >= 11, "the first is written at once, the others by then are due"
    by_group = [sum(group_id == g for _, group_id in sink.written) for g in range(1, 13)]
    assert set(by_group) <= {5, 6}, "400 tokens, 64 at a time"


def test_a_slow_writer_does_not_slow_the_loop_down() -> None:
    def seconds(sink: Slow) -> float:
        async def timed() -> float:
            await run_checkpointed(SimulatedEngine(lengths=500, tokens_per_second=50), sink, Interval(50, 1.0), groups_of(4))
            return asyncio.get_running_loop().time()

        return virtual_time.run(timed())

    assert seconds(Slow(1000.0)) == pytest.approx(seconds(Slow(0.0))), "leaving waits for no write"


def test_finished_siblings_are_stored_with_their_scores_within_two_seconds_in_one_write() -> None:
    sink = Slow()
    lengths = {"math-1-0": 50, "math-1-1": 70, "math-1-2": 2000}
    engine = SimulatedEngine(lengths=lambda request: lengths[str(request.session_id)], tokens_per_second=50)
    virtual_time.run(run_checkpointed(engine, sink, Interval(4000, None), groups_of(1, 3), reward=lambda_reward))
    ((at, _),) = sink.written
    assert 2.0 <= at <= 2.0 + 0.1
    states = [sink.durable[name] for name in lengths]
    assert [state.status for state in states] == [Status.COMPLETED] * 2 + [Status.RUNNING]
    assert [state.score for state in states] == [50.0, 70.0, None]
    assert 90 <= states[2].response_ids.size <= 100


async def lambda_reward(state: RolloutState) -> float:
    return float(state.response_ids.size)


def test_without_partial_rollouts_only_whole_responses_are_stored() -> None:
    sink = Slow()
    lengths = {"math-1-0": 50, "math-1-1": 2000}
    engine = SimulatedEngine(lengths=lambda request: lengths[str(request.session_id)], tokens_per_second=50)
    virtual_time.run(run_checkpointed(engine, sink, Interval(100, 1.0), groups_of(1), keep_tokens=False, reward=lambda_reward))
    assert len(sink.written) == 1
    one, two = (sink.durable[name] for name in lengths)
    assert (one.status, one.response_ids.size) == (Status.COMPLETED, 50)
    assert (two.status, two.response_ids.size, two.turns) == (Status.RUNNING, 0, [])


def test_nothing_new_is_not_written_and_without_an_interval_nothing_is() -> None:
    for interval in (Interval(None, None), Interval(1000, 1000.0)):
        sink = Slow()
        virtual_time.run(run_checkpointed(SimulatedEngine(lengths=100, tokens_per_second=50), sink, interval, groups_of(2)))
        assert sink.written == []

    async def slow_reward(state: RolloutState) -> float:
        await asyncio.sleep(50)
        return 1.0

    sink = Slow()
    engine = SimulatedEngine(lengths=110, tokens_per_second=50)
    virtual_time.run(run_checkpointed(engine, sink, Interval(None, 2.0), groups_of(1), reward=slow_reward))
    assert [at for at, _ in sink.written] == pytest.approx([1, 2, 3], abs=0.1), "two of tokens, one that it is whole, none after"


# -- in a strategy, over a real buffer --------------------------------------------------------------------------


class Refusing(ReplayBuffer):
    """Counts checkpoints, and answers some with an error."""

    refuse: Callable[[RolloutGroup], Exception | None] = staticmethod(lambda group: None)
    refuse_put: Callable[[RolloutGroup], Exception | None] = staticmethod(lambda group: None)

    async def checkpoint(self, group: RolloutGroup) -> None:
        self.checkpoints = [*getattr(self, "checkpoints", []), group]
        if (error := self.refuse(group)) is not None:
            raise error
        await super().checkpoint(group)

    async def put(self, group: RolloutGroup) -> None:
        if (error := self.refuse_put(group)) is not None:
            raise error
        await super().put(group)


@pytest.fixture
async def refusing(url: str) -> AsyncIterator[Refusing]:
    async with Refusing(url) as opened:
        yield opened
        report = await opened.audit()
        assert report.ok, report.problems


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


def produce(strategy: ProduceStrategy, engine: SimulatedEngine, n: int = 2, **options: Any) -> Any:
    loop = SingleTurnAgentLoop(
        engine, sampling=SamplingParams(max_tokens=400, seed=1), **{"reward": lambda state: 1.0, "back_off": 0.0, **options}
    )
    rows = [{"prompt_ids": [10 + index]} for index in range(40)]
    sampler = ReplayPromptSampler(rows, strategy.buffer, group_size=2, shuffle=False)
    return strategy.produce_batch(loop, sampler, n, TASK)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_batch_is_the_same_with_and_without_checkpoints(refusing: Refusing, strategy: Callable[..., ProduceStrategy]) -> None:
    async with SimulatedEngine(lengths=300, max_length=1000) as engine:
        batch = await produce(strategy(refusing, checkpoint_tokens=20), engine)
    assert refusing.checkpoints
    for group in batch.groups:
        for state in group.rollouts:
            sizes = {state.response_ids.size, state.logprobs.size, state.loss_mask.size, state.versions.size}
            assert (sizes, state.attempts, state.interruptions, len(state.turns)) == ({300}, 0, 0, 1)
            assert state.response_ids.tolist() == [63] * 299 + [0]
    assert (await refusing.counts(TASK))[Status.RUNNING] == 0


async def test_checkpoints_are_beginnings_of_what_is_stored_in_the_end(refusing: Refusing) -> None:
    async with SimulatedEngine(seed=5, eos_token_id=63) as engine:
        batch = await produce(SyncProduceStrategy(refusing, checkpoint_tokens=8), engine, 3)
    final = {state.rollout_id: state for group in batch.groups for state in group.rollouts}
    for group in refusing.checkpoints:
        for state in group.rollouts:
            for name in ("response_ids", "logprobs", "loss_mask", "versions"):
                np.testing.assert_array_equal(getattr(state, name), getattr(final[state.rollout_id], name)[: state.response_ids.size])


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_no_checkpoint_of_a_group_is_asked_for_after_its_put(refusing: Refusing, strategy: Callable[..., ProduceStrategy]) -> None:
    put, late = set[int](), set[int]()

    def checkpointed(group: RolloutGroup) -> None:
        late.update(put & {group.group_id})

    refusing.refuse = checkpointed
    refusing.refuse_put = lambda group: put.add(group.group_id)  # type: ignore[func-returns-value]
    async with SimulatedEngine(lengths=lognormal_lengths(60, 0.8, longest=300), max_length=1000) as engine:
        await produce(strategy(refusing, checkpoint_tokens=2), engine, 8)
    assert len(put) >= 8
    assert refusing.checkpoints
    assert not late


async def test_off_with_none_and_none(refusing: Refusing) -> None:
    async with SimulatedEngine(lengths=200) as engine:
        await produce(SyncProduceStrategy(refusing, checkpoint_tokens=None, checkpoint_seconds=None), engine)
    assert not hasattr(refusing, "checkpoints")


async def test_a_database_that_fails_a_checkpoint_stops_the_batch_with_the_cause_and_keeps_what_ran(refusing: Refusing) -> None:
    error = DatabaseError("the disk is full")
    refusing.refuse = lambda group: error
    async with SimulatedEngine(lengths=4000, max_length=10_000) as engine:
        with pytest.raises(DatabaseError, match="the disk is full"):
            await produce(SyncProduceStrategy(refusing, checkpoint_tokens=20), engine)
    counts = await refusing.counts(TASK)
    assert (counts[Status.RUNNING], counts[Status.INTERRUPTED]) == (0, 2)
    assert all(state.response_ids.size >= 10 for group in await refusing.query(task_name=TASK) for state in group.rollouts)


async def test_a_group_that_is_anothers_by_now_is_stopped_and_not_stored_and_replaced(refusing: Refusing) -> None:
    puts: list[int] = []

    def refuse_put(group: RolloutGroup) -> Exception | None:
        puts.append(group.group_id)
        return None

    refusing.refuse = lambda group: LeaseLostError("the lease of group 1 ran out") if group.group_id == 1 else None
    refusing.refuse_put = refuse_put
    async with SimulatedEngine(lengths=300) as engine:
        batch = await produce(SyncProduceStrategy(refusing, checkpoint_tokens=20), engine)
    assert [group.group_id for group in batch.groups] == [2, 3]
    assert batch.metrics["produce/interrupted"] == 1
    assert puts == [2, 3]
    await refusing.release([1])  # it is ours in truth


async def test_a_put_that_finds_the_lease_lost_ends_its_group_and_is_counted_with_the_reason(refusing: Refusing) -> None:
    refusing.refuse_put = lambda group: LeaseLostError("'other' runs it now")
    async with SimulatedEngine(lengths=30) as engine:
        with pytest.raises(FailureBudgetError, match=r"were interrupted.*it was lost: 'other' runs it now"):
            await produce(SyncProduceStrategy(refusing, max_interrupted=2), engine)
    assert (await refusing.counts(TASK))[Status.COMPLETED] == 0
    await refusing.release([group.group_id for group in await refusing.query(status=Status.RUNNING)])


@pytest.mark.parametrize("tokens", [20, None], ids=["at a checkpoint", "at its put"])
async def test_a_group_that_was_released_meanwhile_is_left_to_whoever_takes_it(refusing: Refusing, tokens: int | None) -> None:
    class Released(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            if (state.group_id, state.index) == (1, 0):
                await refusing.release([1])  # as another producer does with the groups of one that it thinks dead
            return await super().generate(state)

    rows = [{"prompt_ids": [10 + index]} for index in range(40)]
    sampler = ReplayPromptSampler(rows, refusing, group_size=2, shuffle=False)
    async with SimulatedEngine(lengths=300) as engine:
        loop = Released(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=400))
        strategy = SyncProduceStrategy(refusing, checkpoint_tokens=tokens, checkpoint_seconds=None)
        batch = await strategy.produce_batch(loop, sampler, 2, TASK)
    assert [group.group_id for group in batch.groups] == [2, 3]
    assert (batch.metrics["produce/interrupted"], batch.metrics["produce/failed"]) == (1, 0)
    (released,) = await refusing.query(status=Status.INTERRUPTED)
    assert released.group_id == 1
    assert [state.attempts for state in released.rollouts] == [0, 0]


async def test_content_that_cannot_be_encoded_is_left_to_the_groups_put(refusing: Refusing, caplog: pytest.LogCaptureFixture) -> None:
    refusing.refuse = lambda group: ValueError("metrics of group 1 cannot be stored") if group.group_id == 1 else None
    async with SimulatedEngine(lengths=300) as engine:
        with caplog.at_level(logging.WARNING, logger="producer.checkpoints"):
            batch = await produce(SyncProduceStrategy(refusing, checkpoint_tokens=20), engine)
    assert [group.group_id for group in batch.groups] == [1, 2]
    assert "group 1 could not be checkpointed, it goes on without: ValueError: metrics" in caplog.text


@pytest.mark.parametrize("turns", [0, 1, 5, 20, 50, 100, 200, 400])
async def test_cancelled_anywhere_beside_checkpoints_nothing_is_left_running(refusing: Refusing, turns: int) -> None:
    async with SimulatedEngine(lengths=4000, max_length=10_000) as engine:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(produce(SyncProduceStrategy(refusing, checkpoint_tokens=2), engine))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
        counts = await refusing.counts(TASK)
    assert (counts[Status.RUNNING], counts[Status.COMPLETED]) == (0, 0)


async def test_an_error_of_a_checkpoint_leaves_its_block_as_the_error_of_a_task_group(refusing: Refusing) -> None:
    rows = [{"prompt_ids": [10]}]
    (group,) = await ReplayPromptSampler(rows, refusing, group_size=1).sample_many(TASK, 1, buffer=refusing)
    refusing.refuse = lambda group: DatabaseError("gone")
    async with SimulatedEngine(lengths=10**4, max_length=10**5) as engine:
        loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=10**4))

        async def block() -> None:
            async with Checkpointer(refusing, loop, Interval(4, None), keep_tokens=True, lost=lambda *_: None) as checkpoints:
                checkpoints.watch(group)
                await loop.generate_group(group)

        with pytest.raises(BaseExceptionGroup) as caught:
            await block()
    assert isinstance(first_error(caught.value), DatabaseError)
    assert not loop._watchers
    await refusing.release([group.group_id])
