"""A group's reward is asked once, when all its rollouts are whole, and a rollout that fails need not fail its siblings."""

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop import AgentLoop, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import EngineDeadError, EngineError
from buffer import RolloutGroup, RolloutState, Status
from producer.simulate import virtual_time


def group_of(size: int = 3, group_id: int = 7) -> RolloutGroup:
    return RolloutGroup(group_id, [RolloutState(group_id, index, status=Status.RUNNING, prompt_ids=[10, 11]) for index in range(size)])


class Whole(AgentLoop):
    """Responses of two tokens, without an engine; counts how often each was generated. Members in `broken` fail."""

    def __init__(self, *, broken: Sequence[int] = (), **options: Any) -> None:
        super().__init__(**{"back_off": 0.0, "max_attempts": 2, **options})
        self.generated: Counter[int] = Counter()
        self.broken = broken

    async def generate(self, state: RolloutState) -> RolloutState:
        self.generated[state.index] += 1
        await asyncio.sleep(0)
        if state.index in self.broken:
            raise LookupError("no tool named 'calc'")
        state.append([5, 6], logprobs=[-0.1, -0.2], version=0)
        state.finish_reason = "stop"
        return state


def lengths(group: RolloutGroup) -> list[float]:
    """The rank of each."""
    return [float(10 * state.index + state.response_ids.size) for state in group.rollouts]


class Ranking:
    """As an object, async."""

    async def __call__(self, group: RolloutGroup) -> list[float]:
        await asyncio.sleep(0)
        return lengths(group)


@pytest.mark.parametrize(
    "reward",
    [
        lengths,
        Ranking(),
        lambda group: np.array(lengths(group), np.float32),
        lambda group: tuple(lengths(group)),
        lambda group: Ranking()(group),
    ],
)
async def test_a_group_reward_gives_each_rollout_its_score(reward: Any) -> None:
    loop, group = Whole(group_reward=reward), group_of()
    await loop.generate_group(group)
    assert group.status is Status.COMPLETED
    assert [(state.score, state.reward) for state in group.rollouts] == [(2.0, 2.0), (12.0, 12.0), (22.0, 22.0)]
    assert all(type(state.score) is float for state in group.rollouts)


async def test_it_is_asked_once_when_all_are_whole_and_none_is_completed_before() -> None:
    asked: list[list[tuple[bool, Status]]] = []

    async def reward(group: RolloutGroup) -> list[float]:
        asked.append([(state.finished, state.status) for state in group.rollouts])
        assert [state.status for state in loop.snapshot(group).rollouts] == [Status.RUNNING] * 3
        assert all(state.score is None for state in loop.snapshot(group).rollouts)
        return [1.0, 2.0, 3.0]

    async with SimulatedEngine(lengths=lambda request: int(request.session_id[-1]) * 7 + 1) as engine:
        loop = SingleTurnAgentLoop(engine, group_reward=reward, sampling=SamplingParams(max_tokens=64))
        group = await loop.generate_group(group_of())
    assert asked == [[(True, Status.RUNNING)] * 3]
    assert group.statuses == [Status.COMPLETED] * 3


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (lambda group: [1.0, 2.0], "gave 2 scores; it must give 3 finite numbers"),
        (lambda group: [1.0, math.nan, 2.0], "gave nan; it must give a finite number"),
        (lambda group: [1.0, None, 2.0], "gave None"),
        (lambda group: 1.0, "gave 1.0; it must give 3 finite numbers, one for each"),
        (lambda group: None, "gave None; it must give 3"),
        (lambda group: "123", "gave '123'; it must give 3"),
        (lambda group: {0: 1.0, 1: 2.0, 2: 3.0}, "it must give 3 finite numbers"),
        (lambda group: {1.0, 2.0, 3.0}, "it must give 3 finite numbers"),
        (lambda group: np.ones((3, 2)), "it must give a finite number"),
        (lambda group: group.rollouts[5], "raised IndexError"),
    ],
)
async def test_one_that_gives_anything_else_fails_the_group_and_is_never_0(reward: Any, reason: str) -> None:
    loop, group = Whole(group_reward=reward), group_of()
    await loop.generate_group(group)
    assert group.statuses == [Status.FAILED] * 3
    for state in group.rollouts:
        assert (state.score, state.reward, state.attempts) == (None, None, 2)
        assert reason in str(state.error)
        assert state.response_ids.size == 2, "the responses stay: judging may be asked for again"
    assert set(loop.generated.values()) == {1}


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_one_that_takes_too_long_fails(kind: str) -> None:
    hung = threading.Event()

    def stuck(group: RolloutGroup) -> list[float]:
        hung.wait()
        return lengths(group)

    async def never(group: RolloutGroup) -> list[float]:
        await asyncio.Event().wait()
        raise AssertionError

    group = await Whole(group_reward=stuck if kind == "sync" else never, reward_timeout=0.05, max_attempts=1).generate_group(group_of())
    hung.set()
    assert group.statuses == [Status.FAILED] * 3
    assert "took longer than 0.05 s" in str(group.rollouts[0].error)


async def test_a_judge_that_fails_is_asked_again_and_the_responses_are_kept() -> None:
    answers: list[Any] = [KeyError("judge"), [1, 2, 3]]

    async def reward(group: RolloutGroup) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    loop, group = Whole(group_reward=reward), group_of()
    await loop.generate_group(group)
    assert [state.score for state in group.rollouts] == [1.0, 2.0, 3.0]
    assert [(state.attempts, state.error) for state in group.rollouts] == [(1, None)] * 3
    assert set(loop.generated.values()) == {1}


@pytest.mark.parametrize("how", ["interrupted", "cancelled"])
async def test_stopped_during_a_slow_judge_only_the_judging_is_repeated(how: str) -> None:  # case 34
    asked, patient = asyncio.Event(), asyncio.Event()

    async def reward(group: RolloutGroup) -> list[float]:
        asked.set()
        await patient.wait()
        return lengths(group)

    loop, group = Whole(group_reward=reward), group_of()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(loop.generate_group(group))
        await asked.wait()
        if how == "interrupted":
            await loop.interrupt([7])
            await running
        else:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
    assert group.statuses == [Status.INTERRUPTED] * 3
    assert [(state.finished, state.score, state.interruptions, state.response_ids.size) for state in group.rollouts] == [
        (True, None, 1, 2)
    ] * 3
    patient.set()
    await loop.generate_group(group)
    assert group.status is Status.COMPLETED
    assert set(loop.generated.values()) == {1}


async def test_members_completed_before_are_judged_again_with_their_siblings() -> None:
    """Of a group that expired in part: what a member's score is depends on the siblings that are new."""
    group = group_of(2)
    first = group.rollouts[0]
    first.append([9], logprobs=[-0.1], version=0)
    first.status, first.finish_reason, first.score, first.reward = Status.COMPLETED, "stop", 99.0, 99.0
    loop = Whole(group_reward=lengths)
    await loop.generate_group(group)
    assert [state.score for state in group.rollouts] == [1.0, 12.0]
    assert loop.generated == {1: 1}
    assert first.response_ids.tolist() == [9]


async def test_a_group_with_a_failed_or_an_unfinished_member_is_not_judged_and_siblings_are_kept() -> None:
    group = await Whole(broken=[1], group_reward=lambda group: pytest.fail("not to be judged")).generate_group(group_of())
    assert group.statuses == [Status.INTERRUPTED, Status.FAILED, Status.INTERRUPTED]
    assert (group.status, group.rollouts[0].finished, group.rollouts[0].response_ids.size) == (Status.FAILED, True, 2)


async def test_a_dead_engine_leaves_whole_siblings_to_be_judged() -> None:
    async with SimulatedEngine(lengths=3, fail=lambda request_id, attempt: EngineDeadError("gone")) as engine:
        loop, group = SingleTurnAgentLoop(engine, group_reward=lengths), group_of(2)
        group.rollouts[0].append([5], logprobs=[-0.1], version=0)
        group.rollouts[0].finish_reason = "stop"
        with pytest.raises(EngineDeadError):
            await loop.generate_group(group)
    assert group.statuses == [Status.INTERRUPTED] * 2
    assert group.rollouts[0].finished


def test_bad_arguments_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="pass one"):
        Whole(reward=lambda state: 1.0, group_reward=lengths)
    with pytest.raises(TypeError, match=r"group_reward=5 is no function"):
        Whole(group_reward=5)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="min_group_size"):
            Whole(min_group_size=bad)


# -- groups that are kept without members that failed -----------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "status", "left_out"),
    [([], Status.COMPLETED, 0), ([1], Status.COMPLETED, 1), ([0, 2], Status.FAILED, 0), ([0, 1, 2], Status.FAILED, 0)],
)
async def test_members_that_fail_are_left_out_while_enough_finish(broken: list[int], status: Status, left_out: int) -> None:
    group = await Whole(broken=broken, min_group_size=2, reward=lambda state: 5).generate_group(group_of())
    assert group.status is status
    assert sum(state.left_out for state in group.rollouts) == left_out
    for state in group.rollouts:
        failed = state.index in broken
        assert (state.score, state.error) == ((None, "LookupError: no tool named 'calc'") if failed else (5.0, None))


async def test_the_judge_of_a_group_sees_it_without_those_that_are_left_out() -> None:
    group = await Whole(broken=[1], min_group_size=2, group_reward=lengths).generate_group(group_of())
    assert group.status is Status.COMPLETED
    assert [state.score for state in group.rollouts] == [2.0, None, 22.0]
    assert [state.left_out for state in group.rollouts] == [False, True, False]
    assert len(group.rollouts) == 3


async def test_a_member_left_out_of_an_interrupted_group_is_not_run_again_and_fails_with_it() -> None:
    loop, group = Whole(broken=[1], min_group_size=2), group_of()
    hold = asyncio.Event()
    generate = loop.generate

    async def held(state: RolloutState) -> RolloutState:
        if state.index == 0 and not hold.is_set():
            hold.set()
            await asyncio.sleep(0)
            state.finish_reason = "abort"
            return state
        return await generate(state)

    loop.generate = held  # type: ignore[method-assign]
    await loop.generate_group(group)
    assert (group.status, group.rollouts[1].left_out) == (Status.INTERRUPTED, True)
    loop.broken = [0, 1]
    await loop.generate_group(group)
    assert (group.status, group.statuses) == (Status.FAILED, [Status.FAILED, Status.FAILED, Status.COMPLETED])
    assert loop.generated == {0: 2, 1: 2, 2: 1}


# -- failures that pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ConnectionResetError("by peer"), EngineError("429 Too Many Requests"), EngineError("503 Service Unavailable")]
)
def test_a_failure_that_passes_is_tried_again_with_back_off_and_the_tokens_are_kept(error: Exception) -> None:  # case 29
    async def main() -> tuple[RolloutState, list[float]]:
        times: list[float] = []

        class Failing(SimulatedEngine):
            async def generate(self, prompt_ids: Any, params: SamplingParams, *, on_tokens: Any, **others: Any) -> Any:
                times.append(asyncio.get_running_loop().time())
                completion = await super().generate(prompt_ids, params.replace(max_tokens=2), on_tokens=on_tokens, **others)
                if len(times) < 4:
                    raise error
                return completion

        async with Failing(lengths=100, vocab_size=512) as engine:
            loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=8), max_attempts=5, back_off=1.0)
            return (await loop.generate_group(group_of(1))).rollouts[0], times

    state, times = virtual_time.run(main())
    assert state.status is Status.COMPLETED
    assert (state.attempts, state.response_ids.size) == (3, 8), "two tokens of each attempt"
    assert np.diff(times).tolist() == [1.0, 2.0, 4.0]


def test_the_pause_between_attempts_is_bounded_and_an_interruption_ends_it() -> None:
    async def main() -> tuple[RolloutState, float]:
        async with SimulatedEngine(lengths=3, fail=lambda request_id, attempt: EngineError("503")) as engine:
            loop, group = SingleTurnAgentLoop(engine, max_attempts=10_000, back_off=0.1), group_of(1)
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(loop.generate_group(group))
                await asyncio.sleep(30.0 * 2000 + 15.0)
                began = asyncio.get_running_loop().time()
                await loop.interrupt([7])
                await running
                return group.rollouts[0], asyncio.get_running_loop().time() - began

    state, seconds = virtual_time.run(main())
    assert 2000 <= state.attempts <= 2020
    assert (state.status, state.interruptions, seconds) == (Status.INTERRUPTED, 1, 0.0)


# -- any schedule -----------------------------------------------------------------------------------------------


class Chance(AgentLoop):
    """Takes its time, fails and is interrupted as `seed` has it; never generates what is whole."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(group_reward=self.judged, max_attempts=2, back_off=0.5, **options)
        self.chance = np.random.default_rng(seed)
        self.wrong: list[str] = []
        self.judgements = 0

    async def generate(self, state: RolloutState) -> RolloutState:
        if state.left_out or state.finish_reason is not None:
            self.wrong.append(f"{state.index} is generated again")
        while state.response_ids.size < 4:
            await asyncio.sleep(float(self.chance.random()))
            if self.chance.random() < 0.1:
                raise EngineError(f"{self.chance.integers(3)}")
            if self.interrupted(state):
                state.finish_reason = "abort"
                return state
            state.append([state.response_ids.size], logprobs=[-0.1], version=0)
        state.finish_reason = "stop"
        return state

    async def judged(self, group: RolloutGroup) -> list[float]:
        self.judgements += 1
        if not all(state.finished and state.status in (Status.RUNNING, Status.COMPLETED) for state in group.rollouts):
            self.wrong.append("judged before all are whole")
        await asyncio.sleep(float(self.chance.exponential(2.0)))
        if self.chance.random() < 0.2:
            raise RuntimeError("judge")
        return [float(state.index) for state in group.rollouts]


@given(st.integers(0, 2**32), st.integers(1, 4), st.none() | st.integers(1, 4))
@settings(deadline=None)
def test_in_any_schedule_a_group_ends_judged_as_a_whole_or_failed_with_a_reason(seed: int, size: int, least: int | None) -> None:
    async def main() -> None:
        loop, group = Chance(seed, min_group_size=least), group_of(size)
        for _ in range(100):
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(loop.generate_group(group))
                await asyncio.wait([running], timeout=float(loop.chance.exponential(4.0)))
                await loop.interrupt([7])
                if loop.chance.random() < 0.3:
                    running.cancel()
                await asyncio.wait([running])
            assert loop.wrong == []
            if group.status is not Status.INTERRUPTED:
                break
            for state in group.rollouts:
                assert state.status in (Status.INTERRUPTED, Status.COMPLETED)
                assert state.score is None
                assert state.left_out or state.status is Status.INTERRUPTED, "judged alone"
        for state in group.rollouts:
            whole = state.response_ids.tolist() == [0, 1, 2, 3]
            assert whole or state.left_out or group.status is Status.FAILED
        if group.status is Status.COMPLETED:
            counting = [state for state in group.rollouts if not state.left_out]
            assert [state.score for state in counting] == [float(state.index) for state in counting]
            assert loop.judgements >= 1
            assert len(counting) >= (size if least is None else min(least, size))
        else:
            assert group.status is Status.FAILED
            assert all(state.score is None for state in group.rollouts)
            assert any(state.error for state in group.rollouts)

    virtual_time.run(main())
