"""What becomes of a group's members when they end: decisions over their states alone, without event loop, engine or reward."""

from dataclasses import replace

from agent_loop.errors import RewardError
from buffer.rollout import RolloutGroup, RolloutState
from buffer.status import Status

_BEFORE = "; before that: "

_LONGEST_HISTORY = 1000
"""Characters of earlier attempts' reasons that are kept beside the last one's."""


def interrupt(state: RolloutState) -> None:
    """It was stopped; what it has is kept."""
    state.status = Status.INTERRUPTED
    state.interruptions += 1


def record_failure(state: RolloutState, error: Exception) -> None:
    """One more attempt failed: `state.error` says why, and why those before it did, where that was something else."""
    said = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
    said = said.encode(errors="backslashreplace").decode()  # a message may hold what no database stores
    before = state.error or ""
    if before.split(_BEFORE, 1)[0] != said:
        state.error = f"{said}{_BEFORE}{before:.{_LONGEST_HISTORY}}" if before else said
    state.attempts += 1


def leave_out_failed(group: RolloutGroup, min_group_size: int) -> None:
    """Keep the group without the members that failed for good, while enough others are left; else it has failed with them."""
    failed = [state for state in group.rollouts if state.status is Status.FAILED or state.left_out]
    enough = len(group.rollouts) - len(failed) >= min_group_size
    for state in failed:
        state.status = Status.COMPLETED if enough else Status.FAILED


def waits_for_judgement(group: RolloutGroup) -> bool:
    """Whether every member that counts is whole (those that run are, once their tasks have ended), and not all are judged."""
    standing = {state.status for state in group.rollouts if not state.left_out}
    return Status.RUNNING in standing and standing <= {Status.RUNNING, Status.COMPLETED}


def without_left_out(group: RolloutGroup) -> RolloutGroup:
    """The group as its judge sees it."""
    seen = replace(group)
    seen.rollouts = [state for state in group.rollouts if not state.left_out]  # their places in it are not their indices
    return seen


def fail_unjudged(group: RolloutGroup) -> None:
    """The judgement failed for good: members that waited for it have failed, and so have those that were left out of it."""
    for state in group.rollouts:
        if state.status is Status.RUNNING or state.left_out:
            state.status = Status.FAILED
