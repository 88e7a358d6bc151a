"""An agent loop keeps every token once, tries again what may succeed, and fails a rollout with its reason where nothing helps."""

import asyncio
import functools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from agent_loop import AgentLoop, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.base import Completion
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError
from buffer import RolloutGroup, RolloutState, Status

EOS = 0


def group_of(size: int = 1, *, group_id: int = 7, **fields: Any) -> RolloutGroup:
    given = {"prompt_ids": [10, 11], **fields}
    return RolloutGroup(group_id, [RolloutState(group_id, index, status=Status.RUNNING, **given) for index in range(size)])


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


class Seen(SimulatedEngine):
    """Writes down what it is asked for; the first `cut` requests are ended early by an interruption after `after` tokens."""

    def __init__(self, *, cut: int = 0, after: int = 1, **options: Any) -> None:
        super().__init__(**{"vocab_size": 512, **options})
        self.requests: list[tuple[list[int], SamplingParams]] = []
        self._cut, self._after = cut, after

    async def generate(self, prompt_ids: Any, params: SamplingParams, *, request_id: str, session_id: str, **others: Any) -> Completion:
        self.requests.append((np.asarray(prompt_ids).tolist(), params))
        tokens, cutting = 0, len(self.requests) <= self._cut

        def watch(piece: Completion) -> None:
            nonlocal tokens
            tokens += len(piece.token_ids)
            if cutting and tokens == self._after:
                self._end([self._requests[request_id]], "abort")

        return await super().generate(prompt_ids, params, request_id=request_id, session_id=session_id, on_tokens=watch)


# -- continuing -------------------------------------------------------------------------------------------------


async def test_a_continuation_sees_the_kept_tokens_and_gets_what_is_left_of_the_limit() -> None:
    group = group_of()
    group.rollouts[0].append([101, 102], logprobs=[-0.1, -0.2], version=1)
    async with Seen(script=lambda prompt: [101, 102, 103, 104, 105, 106, 107, EOS]) as engine:
        await engine.update_weights({"seed": 1}, 3)
        await SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=5)).generate_group(group)
    ((ids, params),) = engine.requests
    assert ids == [10, 11, 101, 102]
    assert params.max_tokens == 3
    (state,) = group.rollouts
    assert state.response_ids.tolist() == [101, 102, 103, 104, 105]
    assert state.versions.tolist() == [1, 1, 3, 3, 3]
    assert (state.finish_reason, state.status) == ("length", Status.COMPLETED)


async def test_a_loop_given_an_adapter_samples_with_its_newest_version_and_fails_where_there_is_none() -> None:
    group, sampling = group_of(), SamplingParams(max_tokens=20, ignore_eos=True, seed=1)
    async with SimulatedEngine() as engine:
        loop = SingleTurnAgentLoop(engine, sampling=sampling, adapter="math", max_attempts=1)
        (failed,) = (await loop.generate_group(group_of())).rollouts
        assert failed.status is Status.FAILED
        assert "unknown adapter 'math'" in str(failed.error)
        first = await engine.add_adapter("math", {"seed": 1})
        state = group.rollouts[0]
        response = await engine.generate([10, 11], sampling.replace(max_tokens=6), request_id="before", adapter=first)
        state.append(response.token_ids, logprobs=response.logprobs, version=response.versions)
        second = await engine.add_adapter("math", {"seed": 2})
        await loop.generate_group(group)
        assert state.versions.tolist() == [0] * 6 + [1] * 14
        context = [10, 11, *state.response_ids[:6].tolist()]
        expected = engine.reference_logprobs(context, state.response_ids[6:].tolist(), 0, adapter=second)
        np.testing.assert_allclose(state.logprobs[6:], expected, atol=1e-6)
    with pytest.raises(ValueError, match="adapter='math' needs an engine"):
        SingleTurnAgentLoop(None, adapter="math")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adapter='' names none"):
        SingleTurnAgentLoop(engine, adapter="")


async def test_three_rounds_never_exceed_the_limit() -> None:
    group = group_of()
    async with Seen(cut=2, after=2, script=lambda prompt: [101, 102, 103, 104, 105, 106, 107, EOS]) as engine:
        loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=5))
        for expected in (Status.INTERRUPTED, Status.INTERRUPTED, Status.COMPLETED):
            await loop.generate_group(group)
            assert group.status is expected
    assert [params.max_tokens for _, params in engine.requests] == [5, 3, 1]
    (state,) = group.rollouts
    assert state.response_ids.tolist() == [101, 102, 103, 104, 105]
    assert (state.interruptions, len(state.turns)) == (2, 1)


@pytest.mark.parametrize(
    ("kept", "sampling", "reason"),
    [
        ([101, EOS], {"max_tokens": 5}, "stop"),
        ([101, 33], {"max_tokens": 5, "stop_token_ids": (33,)}, "stop"),
        ([101, 102], {"max_tokens": 2}, "length"),
        ([101, 102, 103], {"max_tokens": 2}, "length"),
    ],
)
async def test_a_kept_response_that_is_whole_costs_no_request(kept: list[int], sampling: dict[str, Any], reason: str) -> None:
    group = group_of()
    group.rollouts[0].append(kept, logprobs=[-0.1] * len(kept), version=0)
    async with Seen(lengths=3) as engine:
        await SingleTurnAgentLoop(engine, reward=lambda state: 2, sampling=SamplingParams(**sampling)).generate_group(group)
    assert engine.requests == []
    (state,) = group.rollouts
    assert (state.finish_reason, state.score, state.status) == (reason, 2.0, Status.COMPLETED)
    assert state.response_ids.tolist() == kept


async def test_with_ignore_eos_and_after_a_tools_eos_sampling_goes_on() -> None:
    ignoring, tool = group_of(), group_of()
    ignoring.rollouts[0].append([101, EOS], logprobs=[-0.1, -0.1], version=0)
    tool.rollouts[0].append([101], logprobs=[-0.1], version=0)
    tool.rollouts[0].append([EOS], trainable=False)
    async with Seen(lengths=1) as engine:
        await SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=9, ignore_eos=True)).generate_group(ignoring)
        await SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=9)).generate_group(tool)
    assert len(engine.requests) == 2


async def test_the_rows_own_sampling_overrides_the_loops() -> None:
    async with Seen(lengths=20) as engine:
        await SingleTurnAgentLoop(engine).generate_group(group := group_of(sampling={"max_tokens": 3, "temperature": 0.5}))
    assert (engine.requests[0][1].max_tokens, engine.requests[0][1].temperature) == (3, 0.5)
    assert group.rollouts[0].response_ids.size == 3


@pytest.mark.parametrize("sampling", [{"max_token": 3}, {"temperature": -1}, {"max_tokens": "many"}])
async def test_a_rows_bad_sampling_fails_at_once_with_the_reason(sampling: dict[str, Any]) -> None:
    async with Seen(lengths=2) as engine:
        await SingleTurnAgentLoop(engine).generate_group(group := group_of(sampling=sampling))
    assert group.status is Status.FAILED
    assert "`sampling` of this prompt's row" in str(group.rollouts[0].error)
    assert group.rollouts[0].attempts == 1


async def test_seeds_differ_between_members_and_continuations_and_repeat_in_another_run() -> None:
    def fresh() -> RolloutGroup:
        return group_of(3)

    async def seeds() -> list[int | None]:
        async with Seen(cut=3, after=2, lengths=9) as engine:
            loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=20, seed=5))
            group = fresh()
            await loop.generate_group(group)
            await loop.generate_group(group)
        assert group.status is Status.COMPLETED
        return [params.seed for _, params in engine.requests]

    first = await seeds()
    assert len(set(first)) == 6
    assert await seeds() == first


# -- interruption -----------------------------------------------------------------------------------------------


async def test_interrupting_keeps_the_tokens_of_every_member_and_leaves_no_mark() -> None:
    begun = asyncio.Event()

    class Begun(Seen):
        async def generate(self, *arguments: Any, **named: Any) -> Completion:
            if len(self.requests) == 2:
                begun.set()
            return await super().generate(*arguments, **named)

    async with Begun(script=lambda prompt: [101] * 500 + [EOS]) as engine:
        loop, group = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=1000)), group_of(3)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(loop.generate_group(group))
            await begun.wait()
            for _ in range(10):
                await asyncio.sleep(0)
            await loop.interrupt([7])
        assert group.statuses == [Status.INTERRUPTED] * 3
        assert all(0 < state.response_ids.size < 500 for state in group.rollouts)
        await loop.interrupt([7])  # it does not run: this must not stop its next run
        await loop.generate_group(group)
    assert group.statuses == [Status.COMPLETED] * 3
    assert all(state.response_ids.tolist() == [101] * 500 + [EOS] for state in group.rollouts)


async def test_an_interrupt_reaches_members_that_have_not_begun_and_those_between_attempts() -> None:
    async with Seen(lengths=5, fail=lambda request_id, attempt: EngineError("503")) as engine:
        loop, group = SingleTurnAgentLoop(engine, back_off=0.01), group_of(2)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(loop.generate_group(group))
            await asyncio.sleep(0)
            await loop.interrupt([7])
        assert group.statuses == [Status.INTERRUPTED] * 2
        assert engine.requests == []


class TwoSteps(AgentLoop):
    """Samples a thought, adds a tool's answer, samples the conclusion; goes on wherever it was left."""

    async def generate(self, state: RolloutState) -> RolloutState:
        while len(state.turns) < 3:
            last = state.turns[-1].role if state.turns else None
            whole = last == "assistant" and self.engine is not None and int(state.response_ids[-1]) in self.engine.eos_token_ids
            if last == "assistant" and whole:
                state.append([200, EOS], trainable=False)
                continue
            state.finish_reason = await self.extend(state)
            if state.finish_reason == "abort":
                return state
        state.finish_reason = await self.extend(state)
        return state


async def test_a_loop_of_several_steps_goes_on_between_them_with_every_token_once() -> None:
    def script(prompt: Sequence[int]) -> list[int]:
        return [101, 102, EOS] if 200 not in prompt else [103, 104, 105, EOS]

    for cut, after in ((0, 1), (1, 2), (2, 1), (3, 1), (4, 1)):
        group = group_of()
        async with Seen(cut=cut, after=after, script=script) as engine:
            loop = TwoSteps(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=50))
            for _ in range(8):
                if group.status is not Status.COMPLETED:
                    await loop.generate_group(group)
        (state,) = group.rollouts
        assert state.status is Status.COMPLETED
        assert state.response_ids.tolist() == [101, 102, EOS, 200, EOS, 103, 104, 105, EOS]
        assert state.loss_mask.tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1]
        assert [turn.role for turn in state.turns] == ["assistant", "environment", "assistant"]


async def test_a_first_turn_that_ended_does_not_make_a_cancelled_loop_finished() -> None:
    first_turn = asyncio.Event()

    class Waits(AgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            if not state.turns:
                state.finish_reason = await self.extend(state)
                first_turn.set()
                await asyncio.Event().wait()
            state.append([9], trainable=False)
            state.finish_reason = "stop"
            return state

    group = group_of()
    async with Seen(lengths=3) as engine:
        loop = Waits(engine)
        task = asyncio.create_task(loop.generate_group(group))
        await first_turn.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (group.status, group.rollouts[0].finished, group.rollouts[0].response_ids.size) == (Status.INTERRUPTED, False, 3)
        await loop.generate_group(group)
    assert group.rollouts[0].response_ids.size == 4


async def test_cancelled_as_it_begins_every_member_is_interrupted_once() -> None:
    async with Seen(lengths=5) as engine:
        group = group_of(3)
        task = asyncio.create_task(SingleTurnAgentLoop(engine).generate_group(group))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert group.statuses == [Status.INTERRUPTED] * 3
    assert [state.interruptions for state in group.rollouts] == [1, 1, 1]


# -- failing ----------------------------------------------------------------------------------------------------


async def test_a_failing_request_is_tried_again_keeping_siblings_and_tokens() -> None:
    failures = iter([None, ConnectionResetError("reset by peer"), EngineError("429"), None, None])
    async with Seen(lengths=4, fail=lambda request_id, attempt: next(failures)) as engine:
        group = group_of(2)
        group.rollouts[1].append([101], logprobs=[-0.1], version=0)
        await SingleTurnAgentLoop(engine, back_off=0.001).generate_group(group)
    assert group.statuses == [Status.COMPLETED] * 2
    assert [state.attempts for state in group.rollouts] == [0, 2]
    assert len(engine.requests) == 4
    assert group.rollouts[1].response_ids[0] == 101
    assert group.rollouts[1].error is None, "it succeeded in the end"


async def test_what_fails_on_every_attempt_fails_with_its_reason_and_siblings_are_kept() -> None:
    calls: list[int] = []

    class Broken(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            calls.append(state.index)
            if state.index == 1:
                raise LookupError("no tool named 'calc' \udc80")
            return await super().generate(state)

    async with Seen(lengths=4) as engine:
        group = await Broken(engine, max_attempts=2, back_off=0.0).generate_group(group_of(3))
    assert group.statuses == [Status.COMPLETED, Status.FAILED, Status.COMPLETED]
    assert group.status is Status.FAILED
    assert group.rollouts[1].error == "LookupError: no tool named 'calc' \\udc80"
    assert sorted(calls) == [0, 1, 1, 2]


async def test_a_refused_request_fails_at_once() -> None:
    async with Seen(lengths=4, max_length=100) as engine:
        group = await SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=99)).generate_group(group_of())
    assert group.status is Status.FAILED
    assert group.rollouts[0].attempts == 1
    assert "exceed the model's length of 100" in str(group.rollouts[0].error)


@pytest.mark.parametrize("error", [EngineDeadError("gone"), None])
async def test_a_dead_or_closed_engine_is_raised_with_its_cause_and_interrupts(error: EngineDeadError | None) -> None:
    if error is not None:
        error.__cause__ = MemoryError("device")
    engine, group = Seen(lengths=4, fail=lambda request_id, attempt: error), group_of(2)
    if error is not None:
        await engine.open()
    with pytest.raises(EngineClosedError if error is None else EngineDeadError) as caught:
        await SingleTurnAgentLoop(engine).generate_group(group)
    assert error is None or isinstance(caught.value.__cause__, MemoryError)
    assert group.statuses == [Status.INTERRUPTED] * 2
    assert [state.attempts for state in group.rollouts] == [0, 0]


def returning(what: Callable[[RolloutState], Any]) -> type[AgentLoop]:
    class Returning(AgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            returned: RolloutState = what(state)
            return returned

    return Returning


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda state: None, "TypeError: generate returned None .* it must return the state it was given"),
        (lambda state: RolloutState(8, 0), "TypeError: generate returned .*must return the state"),
        (lambda state: state, "ValueError: generate left finish_reason=None; it must set one of"),
    ],
)
async def test_a_generate_that_returns_the_wrong_thing_is_told_so(returned: Any, reason: str) -> None:
    group = await returning(returned)(back_off=0.0).generate_group(group_of())
    assert group.status is Status.FAILED
    (state,) = group.rollouts
    assert state.error is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(state.error)


async def test_an_earlier_abort_does_not_stand_for_a_finish_reason_that_was_forgotten() -> None:
    group = await returning(lambda state: state)(back_off=0.0).generate_group(group_of(finish_reason="abort"))
    assert group.status is Status.FAILED


async def test_no_engine_no_prompt_no_tokenizer_each_say_what_to_pass() -> None:
    class Extends(AgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            state.finish_reason = await self.extend(state)
            return state

    without_engine = await Extends(back_off=0.0).generate_group(group_of())
    assert "pass engine=" in str(without_engine.rollouts[0].error)
    async with Seen(lengths=2) as engine:
        without_ids = await Extends(engine).generate_group(group_of(prompt_ids=None, prompt="hello"))
        without_tokenizer = await SingleTurnAgentLoop(engine).generate_group(group_of(prompt_ids=None, prompt="hello"))
    assert "encode its prompt first" in str(without_ids.rollouts[0].error)
    assert "this loop no tokenizer" in str(without_tokenizer.rollouts[0].error)


async def test_a_subclass_without_super_init_is_named() -> None:
    class Forgetful(AgentLoop):
        def __init__(self) -> None:
            pass

        async def generate(self, state: RolloutState) -> RolloutState:
            return state

    with pytest.raises(TypeError, match=r"Forgetful.__init__ does not call super"):
        await Forgetful().generate_group(group_of())


@pytest.mark.parametrize("options", [{"max_attempts": 0}, {"reward_timeout": 0}, {"back_off": -1}], ids=lambda given: next(iter(given)))
async def test_bad_arguments_are_refused_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        TwoSteps(**options)


# -- rewards ----------------------------------------------------------------------------------------------------


def finished_group(size: int = 1) -> RolloutGroup:
    group = group_of(size, finish_reason="stop")
    for state in group.rollouts:
        state.append([101, EOS], logprobs=[-0.1, -0.2], version=0)
    return group


async def judged(reward: Any, **options: Any) -> RolloutState:
    loop = returning(lambda state: pytest.fail("a whole response is not generated again"))(
        reward=reward, **{"back_off": 0.0, "max_attempts": 1, **options}
    )
    return (await loop.generate_group(finished_group())).rollouts[0]


class Scorer:
    """A reward as an object."""

    def __call__(self, state: RolloutState) -> float:
        return 0.25


class AsyncScorer:
    """Likewise, async."""

    async def __call__(self, state: RolloutState) -> float:
        await asyncio.sleep(0)
        return 0.25

    async def method(self, state: RolloutState, factor: float = 1.0) -> float:
        return 0.25 * factor


def sync_returning_coroutine(state: RolloutState) -> Any:
    return AsyncScorer()(state)


@pytest.mark.parametrize(
    "reward",
    [
        Scorer(),
        AsyncScorer(),
        AsyncScorer().method,
        functools.partial(AsyncScorer().method, factor=1.0),
        sync_returning_coroutine,
        lambda state: np.float32(0.25),
        lambda state: np.array(0.25),
    ],
)
async def test_rewards_are_functions_methods_and_objects_sync_or_async(reward: Any) -> None:
    state = await judged(reward)
    assert (state.score, state.reward, state.status) == (0.25, 0.25, Status.COMPLETED)
    assert type(state.score) is float


def raises(error: BaseException) -> Any:
    def reward(state: RolloutState) -> float:
        raise error

    return reward


async def raises_async(state: RolloutState) -> float:
    raise TimeoutError("judge's own")


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (raises(KeyError("answer")), "reward reward raised KeyError: 'answer'"),
        (raises(StopIteration()), "reward reward raised RuntimeError: StopIteration()"),
        (raises(SystemExit(3)), "reward reward raised RuntimeError: SystemExit(3)"),
        (raises_async, "reward raises_async raised TimeoutError: judge's own"),
        (lambda state: math.nan, "gave nan; it must give a finite number"),
        (lambda state: math.inf, "gave inf"),
        (lambda state: None, "gave None"),
        (lambda state: "1.0", "gave '1.0'"),
        (lambda state: [1.0, 2.0], "gave [1.0, 2.0]"),
        (lambda state: np.array([1.0, 2.0]), "gave array([1., 2.])"),
        (lambda state: 10**400, "it must give a finite number"),
        (lambda state, extra: 1.0, "raised TypeError"),
    ],
)
async def test_a_reward_that_gives_no_finite_number_fails_the_rollout_and_is_never_0(reward: Any, reason: str) -> None:
    state = await judged(reward)
    assert state.status is Status.FAILED
    assert (state.score, state.reward) == (None, None)
    assert reason in str(state.error)
    assert state.response_ids.size == 2, "the response stays: judging may be asked for again"


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_reward_that_takes_too_long_fails_and_holds_up_nobody(kind: str) -> None:
    hung = threading.Event()

    async def never(state: RolloutState) -> float:
        await asyncio.Event().wait()
        raise AssertionError

    def stuck(state: RolloutState) -> float:
        hung.wait()
        return 1.0

    slow = stuck if kind == "sync" else never
    loop = returning(lambda state: state)(reward=slow, reward_timeout=0.05, max_attempts=1)
    group = await loop.generate_group(finished_group(40))
    hung.set()
    assert group.statuses == [Status.FAILED] * 40
    assert all("took longer than 0.05 s" in str(state.error) for state in group.rollouts)


async def test_a_reward_that_waits_for_its_turn_is_not_late() -> None:
    """More judgements than threads, together far longer than the timeout, each far shorter."""
    turn = threading.Semaphore(4)

    def reward(state: RolloutState) -> float:
        with turn:
            time.sleep(0.02)
        return 1.0

    group = await returning(lambda state: state)(reward=reward, reward_timeout=1.0).generate_group(finished_group(400))
    assert group.status is Status.COMPLETED


async def test_a_sync_reward_runs_off_the_event_loop_and_an_async_one_on_it() -> None:
    here, threads = threading.get_ident(), []

    def sync(state: RolloutState) -> float:
        threads.append(threading.get_ident())
        return 1.0

    async def on_loop(state: RolloutState) -> float:
        return sync(state)

    await judged(sync)
    await judged(on_loop)
    assert threads[0] != here
    assert threads[1] == here


async def test_completed_members_are_neither_generated_nor_judged_again() -> None:
    scored: list[int] = []

    def reward(state: RolloutState) -> float:
        scored.append(state.index)
        return 5.0

    group = group_of(3)
    group.rollouts[1] = RolloutState(7, 1, status=Status.COMPLETED, prompt_ids=[10, 11], finish_reason="stop", score=1.0, reward=1.0)
    group.rollouts[1].append([42], logprobs=[-0.5], version=0)
    async with Seen(lengths=3) as engine:
        await SingleTurnAgentLoop(engine, reward=reward).generate_group(group)
    assert sorted(scored) == [0, 2]
    assert len(engine.requests) == 2
    assert (group.rollouts[1].response_ids.tolist(), group.rollouts[1].score) == ([42], 1.0)


async def test_a_response_whose_judgement_was_cut_short_is_only_judged_when_it_runs_again() -> None:
    asked, patient = asyncio.Event(), asyncio.Event()

    async def reward(state: RolloutState) -> float:
        asked.set()
        await patient.wait()
        return 3.0

    async with Seen(lengths=3) as engine:
        loop, group = SingleTurnAgentLoop(engine, reward=reward), group_of()
        task = asyncio.create_task(loop.generate_group(group))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert group.status is Status.INTERRUPTED
        assert group.rollouts[0].finished
        assert group.rollouts[0].score is None
        patient.set()
        await loop.generate_group(group)
    assert len(engine.requests) == 1
    assert (group.rollouts[0].score, group.status) == (3.0, Status.COMPLETED)


@pytest.mark.parametrize("slow", [True, False])
async def test_an_interruption_as_the_response_ends_waits_for_no_slow_judge(slow: bool) -> None:
    patient, group, loops = asyncio.Event(), group_of(), list[SingleTurnAgentLoop]()

    class Late(Seen):
        """Its response is whole when the interruption comes."""

        async def generate(self, *args: Any, **options: Any) -> Completion:
            completion = await super().generate(*args, **options)
            await loops[0].interrupt([group.group_id])
            return completion

    async def reward(state: RolloutState) -> float:
        if slow:
            await patient.wait()
        return 3.0

    async with Late(lengths=3) as engine:
        loops.append(SingleTurnAgentLoop(engine, reward=reward))
        await loops[0].generate_group(group)
        assert group.status is (Status.INTERRUPTED if slow else Status.COMPLETED)
        assert (group.rollouts[0].finished, group.rollouts[0].attempts) == (True, 0)
        patient.set()
        await loops[0].generate_group(group)
    assert len(engine.requests) == 1
    assert (group.rollouts[0].score, group.status) == (3.0, Status.COMPLETED)


async def test_without_a_reward_a_rollout_completes_unscored() -> None:
    assert (await judged(None)).score is None


# -- text -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tests.tiny_model import make_tiny_tokenizer

    return make_tiny_tokenizer()


async def test_messages_go_through_the_chat_template_and_text_through_the_tokenizer(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "What is 1 + 2?"}]
    async with Seen(lengths=1) as engine:
        loop = SingleTurnAgentLoop(engine, tokenizer)
        await loop.generate_group(group_of(prompt_ids=None, messages=messages))
        await loop.generate_group(group_of(prompt_ids=None, prompt="What is 1 + 2?"))
    assert tokenizer.decode(engine.requests[0][0]) == "user: What is 1 + 2?\nassistant: "
    assert tokenizer.decode(engine.requests[1][0]) == "What is 1 + 2?"


async def test_a_character_split_over_two_continuations_is_whole_in_the_text(tokenizer: Any) -> None:
    answer = "= 3 \N{ROCKET}!"
    ids = [int(token) for token in tokenizer.encode(answer)]
    end = tokenizer.eos_token_id
    assert len(ids) > len(answer), "the rocket takes several tokens"
    for cut_at in range(1, len(ids)):
        async with Seen(cut=1, after=cut_at, script=lambda prompt: [*ids, end], eos_token_id=end) as engine:
            loop, group = SingleTurnAgentLoop(engine, tokenizer), group_of(prompt_ids=None, prompt="1 + 2 ")
            await loop.generate_group(group)
            assert group.rollouts[0].response_ids.size == cut_at
            await loop.generate_group(group)
        assert group.rollouts[0].text == answer
        assert group.rollouts[0].response_ids.tolist() == [*ids, end]


async def test_refused_errors_are_what_they_say() -> None:
    with pytest.raises(RequestRefusedError, match=r"pass|encode"):
        async with Seen(lengths=1) as engine:
            await SingleTurnAgentLoop(engine).extend(RolloutState(1, 0))


# -- bad arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", "8"),
        ("max_tokens", 0),
        ("top_k", 1.5),
        ("seed", "a"),
        ("temperature", math.inf),
        ("temperature", -0.1),
        ("top_p", 0),
        ("stop", "x"),
        ("stop", None),
        ("stop", [1]),
        ("stop", [""]),
        ("stop_token_ids", [1.7]),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_sampling_parameters_out_of_bounds_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


async def test_parts_that_could_only_fail_once_per_prompt_are_refused_at_construction() -> None:
    async with SimulatedEngine() as engine:
        for arguments, named in (((SimulatedEngine,), {}), ((engine,), {"reward": 5}), ((engine,), {"sampling": {"max_tokens": 3}})):
            with pytest.raises(TypeError, match="is no"):
                SingleTurnAgentLoop(*arguments, **named)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="third argument"):
            SingleTurnAgentLoop(engine, lambda state: 1.0)  # type: ignore[arg-type]
        for bad in ([5.5], "abc", None):
            with pytest.raises(RequestRefusedError):
                await engine.generate(bad, SamplingParams(max_tokens=1), request_id="bad")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"version=1.5"):
            await engine.update_weights({"seed": 1}, version=1.5)  # type: ignore[arg-type]
