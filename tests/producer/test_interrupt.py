"""What becomes of an unfinished group: its running members are interrupted, finished work is never touched."""

import pytest

from buffer import RolloutGroup, RolloutState, Status
from producer.interrupt import settle_unfinished


def group(*members: tuple[Status, str | None]) -> RolloutGroup:
    """A group of members with these statuses and finish reasons, two tokens each."""
    states = []
    for index, (status, finish_reason) in enumerate(members):
        state = RolloutState(1, index, status=status, prompt_ids=[5], finish_reason=finish_reason)
        state.append([7, 8], logprobs=[-0.1, -0.2], version=3)
        states.append(state)
    return RolloutGroup(1, states)


@pytest.mark.parametrize("keep", [True, False])
def test_running_members_become_interrupted_and_completed_ones_stay(keep: bool) -> None:
    settled = group((Status.RUNNING, None), (Status.COMPLETED, "stop"))
    settle_unfinished(settled, keep_tokens=keep)
    assert settled.statuses == [Status.INTERRUPTED, Status.COMPLETED]
    assert settled.status is Status.INTERRUPTED
    assert [state.interruptions for state in settled.rollouts] == [1, 0]
    assert settled.rollouts[1].response_ids.tolist() == [7, 8]


@pytest.mark.parametrize(("keep", "tokens"), [(True, [7, 8]), (False, [])])
def test_tokens_of_the_unfinished_are_kept_or_dropped_as_told(keep: bool, tokens: list[int]) -> None:
    settled = group((Status.INTERRUPTED, "abort"))
    settle_unfinished(settled, keep_tokens=keep)
    assert settled.rollouts[0].response_ids.tolist() == tokens
    assert settled.rollouts[0].interruptions == 0, "its agent loop has counted it"
    assert settled.rollouts[0].prompt_ids is not None


@pytest.mark.parametrize("keep", [True, False])
def test_a_whole_response_that_waits_for_its_judgement_is_kept_either_way(keep: bool) -> None:
    settled = group((Status.RUNNING, "stop"))
    settle_unfinished(settled, keep_tokens=keep)
    assert settled.rollouts[0].status is Status.INTERRUPTED
    assert settled.rollouts[0].response_ids.tolist() == [7, 8]
    assert settled.rollouts[0].finished


def test_failed_members_and_their_siblings_tokens_stay() -> None:
    settled = group((Status.FAILED, None), (Status.COMPLETED, "stop"))
    settle_unfinished(settled, keep_tokens=False)
    assert settled.statuses == [Status.FAILED, Status.COMPLETED]
    assert all(state.response_ids.size == 2 for state in settled.rollouts)
