"""What is decoded of a running request is kept, each token once, whatever ends the request, and is seen while it runs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from agent_loop import AgentLoop, Completion, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import EngineDeadError, EngineError
from buffer import RolloutGroup, RolloutState, Status

EOS = 0
RESPONSE = [*range(101, 141), EOS]
ARRAYS = ("response_ids", "logprobs", "loss_mask", "versions")


def group_of(size: int = 1) -> RolloutGroup:
    return RolloutGroup(7, [RolloutState(7, index, status=Status.RUNNING, prompt_ids=[10, 11]) for index in range(size)])


def scripted(response: Sequence[int] = RESPONSE, kind: type[SimulatedEngine] = SimulatedEngine, **options: Any) -> SimulatedEngine:
    return kind(script=lambda prompt: list(response), vocab_size=512, **options)


def loop_of(engine: SimulatedEngine, **options: Any) -> SingleTurnAgentLoop:
    return SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=200), **{"back_off": 0.0, **options})


class Told:
    """Writes down what a watcher is told, and calls back when a member has decoded `at` tokens."""

    def __init__(self, at: int = 0, then: Callable[[], None] = lambda: None, piece_tokens: int = 1) -> None:
        self.tokens: dict[int, int] = {}
        self.over: list[int] = []
        self.piece_tokens, self._at, self._then = piece_tokens, at, then

    def decoded(self, member: int, tokens: int) -> None:
        self.tokens[member] = self.tokens.get(member, 0) + tokens
        if self.tokens[member] == self._at:
            self._then()

    def ended(self, member: int) -> None:
        self.over.append(member)


@pytest.fixture(autouse=True)
async def nothing_is_left_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


def remembers_nothing(loop: AgentLoop) -> bool:
    return not (loop._decoding or loop._generating or loop._requests or loop._running)


# -- seen while it runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_tokens", [1, 4, 100])
async def test_a_snapshot_holds_what_was_decoded_so_far_and_changes_nothing(piece_tokens: int) -> None:
    group, seen = group_of(3), list[RolloutGroup]()
    async with scripted() as engine:
        loop = loop_of(engine, reward=lambda state: 1.0)
        watcher = Told(at=20, then=lambda: seen.append(loop.snapshot(group)), piece_tokens=piece_tokens)
        loop.watch(group, watcher)
        await loop.generate_group(group)
        assert remembers_nothing(loop)
    assert watcher.tokens == dict.fromkeys(range(3), len(RESPONSE))
    assert watcher.over == [0, 1, 2]
    assert [len(group.rollouts) for group in seen] == ([3] * 3 if piece_tokens in (1, 4) else [])
    for snapshot in seen:
        assert (snapshot.status, snapshot.group_id) == (Status.RUNNING, 7)
        for state, final in zip(snapshot.rollouts, group.rollouts, strict=True):
            assert 16 <= state.response_ids.size <= 24
            assert (state.finish_reason, state.score, len(state.turns)) == (None, None, 1)
            for name in ARRAYS:
                np.testing.assert_array_equal(getattr(state, name), getattr(final, name)[: state.response_ids.size])
    assert all(state.response_ids.tolist() == RESPONSE for state in group.rollouts)
    assert all([(turn.start, turn.end) for turn in state.turns] == [(0, len(RESPONSE))] for state in group.rollouts)


async def test_without_a_watcher_a_snapshot_lags_no_more_than_a_piece_behind() -> None:
    group = group_of()
    async with scripted([101] * 400 + [EOS]) as engine:
        loop = SingleTurnAgentLoop(engine, sampling=SamplingParams(max_tokens=1000))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(loop.generate_group(group))
            for turn in range(200):
                await asyncio.sleep(0)
                decoded = engine.statistics().tokens
                (state,) = loop.snapshot(group).rollouts
                assert decoded - 16 < state.response_ids.size <= decoded or decoded == 0, turn
            await loop.interrupt([7])
    assert group.rollouts[0].response_ids.size > 100


class TwoTurns(AgentLoop):
    """A turn of the model, a hint, another turn; sets `finish_reason` after each, as loops may."""

    async def generate(self, state: RolloutState) -> RolloutState:
        if not state.turns:
            state.finish_reason = await self.extend(state, SamplingParams(max_tokens=10, ignore_eos=True))
            state.append([40, 41], trainable=False)
        state.finish_reason = await self.extend(state, SamplingParams(max_tokens=30, ignore_eos=True))
        return state


async def test_between_turns_a_snapshot_is_not_finished_though_the_first_turn_said_so() -> None:
    group, seen = group_of(), list[RolloutState]()
    async with SimulatedEngine(seed=1) as engine:
        loop = TwoTurns(engine)
        loop.watch(group, Told(at=15, then=lambda: seen.append(loop.snapshot(group).rollouts[0])))
        await loop.generate_group(group)
    (state,) = seen
    assert (state.finished, state.response_ids.size) == (False, 17)
    assert [(turn.role, turn.start, turn.end) for turn in state.turns] == [
        ("assistant", 0, 10),
        ("environment", 10, 12),
        ("assistant", 12, 17),
    ]
    assert state.loss_mask.tolist() == [1] * 10 + [0] * 2 + [1] * 5


async def test_a_whole_response_that_waits_for_its_judge_is_finished_and_a_judged_one_has_its_score() -> None:
    group, seen = group_of(2), list[RolloutGroup]()
    judging = asyncio.Event()

    async def reward(state: RolloutState) -> float:
        if state.index == 1:
            judging.set()
            await release.wait()
        return 2.0

    release, first_judged = asyncio.Event(), asyncio.Event()

    class Ended(Told):
        def ended(self, member: int) -> None:
            first_judged.set()

    async with scripted() as engine:
        loop = loop_of(engine, reward=reward)
        loop.watch(group, Ended())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(loop.generate_group(group))
            await judging.wait()
            await first_judged.wait()
            seen.append(loop.snapshot(group))
            release.set()
    (snapshot,) = seen
    assert [(s.status, s.finished, s.score) for s in snapshot.rollouts] == [(Status.COMPLETED, True, 2.0), (Status.RUNNING, True, None)]


async def test_a_loop_that_never_asks_an_engine_has_its_states_in_the_snapshot() -> None:
    group, seen = group_of(), list[RolloutState]()

    class ByHand(AgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            state.append([5, 6], logprobs=[-0.5, -0.6], version=3)
            seen.append(self.snapshot(group).rollouts[0])
            state.append([7], logprobs=[-0.7], version=3)
            state.finish_reason = "stop"
            return state

    await ByHand().generate_group(group)
    assert [state.response_ids.tolist() for state in seen] == [[5, 6]]
    assert seen[0].messages is None
    assert group.rollouts[0].response_ids.tolist() == [5, 6, 7]


# -- whatever ends it -------------------------------------------------------------------------------------------


class Breaking(SimulatedEngine):
    """Its first requests end with `error` after 12 tokens were shown."""

    error: Exception = EngineError("connection reset")
    breaks = 1

    async def generate(self, *arguments: Any, on_tokens: Any, **named: Any) -> Completion:
        shown = 0

        def watch(piece: Completion) -> None:
            nonlocal shown
            on_tokens(piece)
            shown += len(piece.token_ids)
            if self.breaks and shown == 12:
                self.breaks -= 1
                raise self.error

        watch.piece_tokens = 3  # type: ignore[attr-defined]
        return await super().generate(*arguments, on_tokens=watch, **named)


async def test_a_request_that_fails_midway_goes_on_from_the_tokens_already_paid_for() -> None:  # case 29
    group = group_of()
    async with scripted(kind=Breaking) as engine:
        loop = loop_of(engine)
        loop.watch(group, told := Told())
        await loop.generate_group(group)
        assert remembers_nothing(loop)
    (state,) = group.rollouts
    assert (state.status, state.attempts, state.response_ids.tolist()) == (Status.COMPLETED, 1, RESPONSE)
    assert told.tokens == {0: len(RESPONSE)}, "no token was decoded twice"
    assert [(turn.start, turn.end) for turn in state.turns] == [(0, len(RESPONSE))]


async def test_an_engine_that_dies_midway_leaves_the_tokens_in_the_group() -> None:
    group = group_of()
    async with scripted(kind=Breaking) as engine:
        assert isinstance(engine, Breaking)
        engine.error = EngineDeadError("gone")
        with pytest.raises(EngineDeadError):
            await loop_of(engine).generate_group(group)
    (state,) = group.rollouts
    assert (state.status, state.response_ids.tolist()) == (Status.INTERRUPTED, RESPONSE[:12])


@pytest.mark.parametrize("turns", [*range(1, 8), 20, 33, 60])
async def test_cancelled_anywhere_every_token_is_kept_once(turns: int) -> None:
    group = group_of(2)
    async with scripted() as engine:
        loop, told = loop_of(engine), Told()
        loop.watch(group, told)
        task = asyncio.create_task(loop.generate_group(group))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            kept = [state.response_ids.tolist() for state in group.rollouts]
            assert [len(ids) for ids in kept] == [told.tokens.get(index, 0) for index in range(2)]
            assert kept == [RESPONSE[: len(ids)] for ids in kept]
            assert remembers_nothing(loop)
            await loop.generate_group(group)
    assert all(state.response_ids.tolist() == RESPONSE for state in group.rollouts)


async def test_a_time_limit_of_the_users_keeps_the_tokens_for_the_next_attempt() -> None:
    class Hurried(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            async with asyncio.timeout(0.05 if state.attempts == 0 else None):
                return await super().generate(state)

    group = group_of()
    async with scripted([101] * 3 + [EOS], tokens_per_second=40) as engine:
        await Hurried(engine, sampling=SamplingParams(max_tokens=50), back_off=0.0).generate_group(group)
    (state,) = group.rollouts
    assert (state.status, state.attempts, state.response_ids.tolist()) == (Status.COMPLETED, 1, [101] * 3 + [EOS])


# -- the completion is the record -------------------------------------------------------------------------------


class Guessing(SimulatedEngine):
    """Its pieces carry versions, and where asked tokens, that the completion then corrects."""

    wrong_token = False

    async def generate(self, *arguments: Any, on_tokens: Any, **named: Any) -> Completion:
        def guess(piece: Completion) -> None:
            ids = piece.token_ids + 1 if self.wrong_token else piece.token_ids
            on_tokens(Completion.of(ids.tolist(), piece.logprobs.tolist(), 9, piece.finish_reason))

        return await super().generate(*arguments, on_tokens=guess, **named)


async def test_the_versions_of_the_completion_are_the_record_not_those_of_the_pieces() -> None:
    group = group_of()
    async with scripted(kind=Guessing) as engine:
        await loop_of(engine).generate_group(group)
    assert group.rollouts[0].versions.tolist() == [0] * len(RESPONSE)


async def test_pieces_that_contradict_the_completion_fail_the_attempt() -> None:
    group = group_of()
    async with scripted(kind=Guessing) as engine:
        assert isinstance(engine, Guessing)
        engine.wrong_token = True
        await loop_of(engine, max_attempts=1).generate_group(group)
    (state,) = group.rollouts
    assert (state.status, state.response_ids.size) == (Status.FAILED, 0)
    assert "41 tokens) are not the beginning of its completion" in str(state.error)
