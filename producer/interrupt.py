"""What becomes of the unfinished? A pure decision over one group."""

from buffer import RolloutGroup, Status


def settle_unfinished(group: RolloutGroup, *, keep_tokens: bool) -> None:
    """Make a group that was stopped storable: members still running are interrupted; completed ones stay as they are.

    With `keep_tokens` what was decoded stays, to be continued; else unfinished responses begin anew. A member
    whose response is whole and only waits for its judgement keeps it either way.
    """
    for state in group.rollouts:
        if state.status is Status.RUNNING:
            state.status = Status.INTERRUPTED
            state.interruptions += 1
        if state.status is Status.INTERRUPTED and not keep_tokens and not state.finished:
            state.reset()
