"""Only missing members run; redundant ones are dropped without a gap in the books, and only where the bias was accepted."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop import SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer.experience import make_experience
from producer.members import SURPLUS, RedundantMembers, missing_members
from producer.metrics import batch_statistics
from tests.buffer.groups import plain

unfinished = [Status.PENDING, Status.INTERRUPTED, Status.EXPIRED]


def group_of(*statuses: Status, tokens: int = 3, group_id: int = 1) -> RolloutGroup:
    """Members of these statuses; the completed and the interrupted have tokens."""
    group = RolloutGroup(group_id, [RolloutState(group_id, n, prompt_ids=[5, 6], status=status) for n, status in enumerate(statuses)])
    for state in group.rollouts:
        if state.status in (Status.COMPLETED, Status.INTERRUPTED):
            state.append([7] * tokens, logprobs=[-0.5] * tokens)
        if state.status is Status.COMPLETED:
            state.finish_reason, state.text, state.score, state.reward = "stop", "seven", 1.0, 1.0
    return group


# -- member-level refill ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
async def test_a_group_that_goes_on_runs_its_missing_members_and_no_other(seed: int) -> None:
    statuses = random.Random(seed).choices([Status.COMPLETED, *unfinished], k=5)
    group, scored, asked = group_of(*statuses), list[int](), list[str]()
    missing, before = missing_members(group), plain(group)

    def reward(state: RolloutState) -> float:
        scored.append(state.index)
        return 0.5

    def fail(request_id: str, attempt: int) -> None:
        asked.append(request_id)

    async with SimulatedEngine(lengths=5, fail=fail) as engine:
        await SingleTurnAgentLoop(engine, reward=reward).generate_group(group)
    assert missing == [index for index, status in enumerate(statuses) if status is not Status.COMPLETED]
    assert sorted(scored) == missing
    assert len(asked) == len(missing)
    after = plain(group)
    assert all(after["rollouts"][n] == before["rollouts"][n] for n in range(5) if n not in missing), "the others keep every byte"
    assert missing_members(group) == []


# -- redundant members ------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 6), st.randoms(use_true_random=False), st.integers(0, 10))
def test_the_first_that_complete_are_kept_and_the_others_dropped(extra: int, needed: int, chance: Any, done: int) -> None:
    order = list(range(needed + extra))
    chance.shuffle(order)
    completed = order[:done]
    surplus = RedundantMembers(extra, bias="accept").surplus(completed, needed + extra)
    if len(completed) < needed:
        assert surplus == []
    else:
        assert sorted([*surplus, *completed[:needed]]) == list(range(needed + extra))
        assert len(surplus) == extra


async def test_a_group_without_its_surplus_is_stored_and_trained_on_as_any_other(buffer: ReplayBuffer) -> None:
    redundant = RedundantMembers(2, bias="accept")
    group = group_of(Status.COMPLETED, Status.INTERRUPTED, Status.COMPLETED, Status.COMPLETED, Status.PENDING)
    assert redundant.leave_out(group, [3, 0]) == 0, "not whole yet"
    assert group.status is Status.INTERRUPTED
    late = group.rollouts[2]  # completed before it could be stopped
    assert redundant.leave_out(group, [3, 0, 2]) == 3
    assert (group.status, late.left_out) == (Status.COMPLETED, False)
    await buffer.put(group)
    (taken,) = await buffer.take("default", 1, step=1)
    assert [state.index for state in taken.rollouts if state.left_out] == [1, 4]
    assert {state.error for state in taken.rollouts} == {None, SURPLUS}
    assert [found.group_id for found in await buffer.query(error="surplus")] == [1]
    experience = make_experience([taken], advantage="grpo", pad_id=0)
    assert experience.rollout_ids == ("default-1-0", "default-1-2", "default-1-3")
    assert experience.metrics["left_out/surplus"] == experience.metrics["left_out/total"] == 2
    assert "left_out/failed" not in experience.metrics
    counted = batch_statistics([taken], version=0)
    assert (counted["batch/rollouts"], counted["batch/left_out"], counted["batch/response_tokens_mean"]) == (5, 2, 3.0)


async def test_a_surplus_member_that_had_failed_before_is_surplus_and_keeps_what_went_wrong() -> None:
    group = group_of(Status.COMPLETED, Status.INTERRUPTED)
    group.rollouts[1].error, group.rollouts[1].attempts = "TimeoutError: no answer", 1
    RedundantMembers(1, bias="accept").leave_out(group, [0])
    assert group.rollouts[1].error == f"{SURPLUS}; before that: TimeoutError: no answer"
    assert make_experience([group]).metrics["left_out/surplus"] == 1


async def test_what_completed_too_late_is_dropped_too(buffer: ReplayBuffer) -> None:
    group = group_of(*[Status.COMPLETED] * 4)
    assert RedundantMembers(1, bias="accept").leave_out(group, [2, 0, 3, 1]) == 3
    assert [state.response_ids.size for state in group.rollouts] == [3, 0, 3, 3]
    assert missing_members(group) == []
    await buffer.put(group)


def test_failures_use_up_the_redundancy_first() -> None:
    redundant = RedundantMembers(2, bias="accept")
    group = group_of(Status.FAILED, Status.PENDING, Status.FAILED, Status.PENDING, Status.PENDING)
    group.rollouts[0].error = "reward broke"
    assert redundant.can_complete(group)
    group.rollouts[1].status = Status.FAILED
    assert not redundant.can_complete(group)
    whole = group_of(Status.FAILED, Status.COMPLETED, Status.COMPLETED, Status.INTERRUPTED)
    whole.rollouts[0].error = "reward broke"
    redundant.leave_out(whole, [2, 1])
    assert [state.error for state in whole.rollouts] == ["reward broke", None, None, SURPLUS]
    assert whole.status is Status.COMPLETED


@pytest.mark.parametrize("bias", [None, "refuse", "yes", True])
def test_the_bias_has_to_be_accepted_in_so_many_words(bias: Any) -> None:
    with pytest.raises(ValueError, match=r"the slowest are the longest.*pass bias='accept'"):
        RedundantMembers(2, bias=bias)


def test_a_redundancy_of_nothing_or_of_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="extra=0 adds no member"):
        RedundantMembers(0, bias="accept")
    with pytest.raises(ValueError, match="a group of 4 with extra=4 would train on none"):
        RedundantMembers(4, bias="accept").surplus([], 4)
