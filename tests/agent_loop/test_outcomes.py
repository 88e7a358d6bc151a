"""What becomes of members that end: who is left out, who waits for a judgement, and which reasons are kept."""

from hypothesis import given
from hypothesis import strategies as st

from agent_loop.errors import EngineError, RewardError
from agent_loop.outcomes import fail_unjudged, leave_out_failed, record_failure, waits_for_judgement, without_left_out
from buffer import RolloutGroup, RolloutState, Status

ENDED = (Status.RUNNING, Status.COMPLETED, Status.INTERRUPTED, Status.FAILED)


def group_of(*statuses: Status, left_out: int = 0) -> RolloutGroup:
    states = [
        RolloutState(1, index, status=status, error="it failed" if status is Status.FAILED else None)
        for index, status in enumerate(statuses)
    ]
    states += [RolloutState(1, len(states) + n, status=Status.COMPLETED, error="it failed") for n in range(left_out)]
    return RolloutGroup(1, states)


GROUPS = st.builds(
    lambda statuses, left_out: group_of(*statuses, left_out=left_out),
    st.lists(st.sampled_from(ENDED), min_size=1, max_size=6),
    st.integers(0, 2),
)


@given(GROUPS, st.integers(1, 8))
def test_a_group_is_kept_without_those_that_failed_while_enough_are_left(group: RolloutGroup, least: int) -> None:
    failed = [state.status is Status.FAILED or state.left_out for state in group.rollouts]
    before = group.statuses
    leave_out_failed(group, least)
    kept = failed.count(False) >= least
    for was_failed, status, state in zip(failed, before, group.rollouts, strict=True):
        assert state.status is (status if not was_failed else Status.COMPLETED if kept else Status.FAILED)
        assert state.left_out == (was_failed and kept)
    assert (group.status is Status.FAILED) == (any(failed) and not kept and Status.RUNNING not in before)
    again = group.statuses
    leave_out_failed(group, least)
    assert group.statuses == again


@given(GROUPS)
def test_a_group_is_judged_when_all_that_count_are_whole_and_not_all_are_judged(group: RolloutGroup) -> None:
    counting = [state.status for state in group.rollouts if not state.left_out]
    expected = Status.RUNNING in counting and not {Status.INTERRUPTED, Status.FAILED} & set(counting)
    assert waits_for_judgement(group) == expected
    assert without_left_out(group).rollouts == [state for state in group.rollouts if not state.left_out]
    if expected:
        fail_unjudged(group)
        assert group.status is Status.FAILED
        assert not any(state.left_out for state in group.rollouts)


def test_the_reasons_of_all_attempts_are_kept_and_none_twice_in_a_row() -> None:
    state = RolloutState(1, 0)
    for error in (EngineError("503"), EngineError("503"), ConnectionResetError("by peer"), RewardError("reward r gave nan")):
        record_failure(state, error)
    assert state.error == "reward r gave nan; before that: ConnectionResetError: by peer; before that: EngineError: 503"
    assert state.attempts == 4


def test_what_is_kept_of_reasons_is_bounded() -> None:
    state = RolloutState(1, 0)
    for number in range(100):
        record_failure(state, EngineError(f"{number} " + "x" * 300))
    assert state.error is not None
    assert state.error.startswith("EngineError: 99 x")
    assert len(state.error) < 1500
