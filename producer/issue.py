"""How many more groups to start? Pure decisions: no tasks, no storage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from agent_loop.sampling import whole


@dataclass(frozen=True, slots=True)
class Load:
    """Where a batch stands.

    Attributes:
        batch_size: groups wanted.
        completed: those found in the buffer included.
        in_flight: started, and not ended.
        ahead: whether what runs when the batch is whole goes on running, for later ones.
    """

    batch_size: int
    completed: int
    in_flight: int
    ahead: bool = False


def exact(load: Load) -> int:
    """As many as are missing if everything in flight completes."""
    return max(0, load.batch_size - load.completed - load.in_flight)


def over_issue(load: Load, staleness_threshold: float) -> int:
    """Up to `ceil((1 + staleness_threshold) * batch_size)` groups completed or in flight; none that a whole batch would stop."""
    if load.completed >= load.batch_size and not load.ahead:
        return 0
    return max(0, issue_limit(load.batch_size, staleness_threshold) - load.completed - load.in_flight)


def issue_limit(batch_size: int, staleness_threshold: float) -> int:
    """`ceil((1 + staleness_threshold) * batch_size)`, safe against 1.1 * 10 = 11.000000000000002."""
    return math.ceil((1 + staleness_threshold) * batch_size * (1 - 1e-12))


def groups_that_fit(max_in_flight: int, in_flight: int, group_size: int) -> int:
    """Groups that may start while at most `max_in_flight` rollouts are to be in flight, and `in_flight` are."""
    return max(0, max_in_flight - in_flight) // group_size


# -- bounded staleness, without dropping ------------------------------------------------------------------------


def bounded_issue(
    load: Load,
    staleness_threshold: float,
    max_staleness: int,
    *,
    left_behind: int = 0,
    updates_before: int = 0,
    coming: Sequence[int] | None = None,
) -> int:
    """As many as may start so that all can be handed out within `max_staleness`; what was left behind first.

    A whole batch does not end it: what starts now is for the next one. With `producer.bound.is_ready` at each hand-out,
    no group ever exceeds the bound.

    Args:
        load: where the batch stands.
        staleness_threshold: bounds it too, see `over_issue`.
        max_staleness: of what is handed out, in updates of the weights; one update a batch.
        left_behind: groups with tokens that wait to be continued. They are not handed out yet, so they count whether
            they run or wait, and starting one adds nothing.
        updates_before: that come before the next batch is handed out. 0 while this version's batch is still to come, 1
            once it is handed out and the trainer works on it.
        coming: sizes of the batches to come, the next first, where they differ; None: all are of the load's size.
    """
    unconsumed = load.completed + load.in_flight + left_behind
    limit = bounded_limit(load.batch_size, staleness_threshold, max_staleness, updates_before=updates_before, coming=coming)
    return left_behind + max(0, limit - unconsumed)


def bounded_limit(
    batch_size: int, staleness_threshold: float, max_staleness: int, *, updates_before: int = 0, coming: Sequence[int] | None = None
) -> int:
    """The most groups that may be completed, in flight or left behind: what over-issuing allows, and the bound can use up.

    A group that starts at version V is handed out at V + `max_staleness` at the latest: with those before it in as many
    batches as come until then.
    """
    batches = max(0, max_staleness + 1 - updates_before)
    room = batches * batch_size if coming is None else sum(coming[:batches])
    return min(issue_limit(batch_size, staleness_threshold), room)


# -- tail batches -----------------------------------------------------------------------------------------------


def tail_batch(trigger_size: int, candidates: int) -> bool:
    """Whether this batch is one for those left behind: they run first, and nothing is over-issued (`exact`).

    Args:
        trigger_size: -1 never, 0 at once (when any waits), N when N wait.
        candidates: that wait: expired groups, and those interrupted often enough (`ReplayBuffer.tail_candidates`).
    """
    return trigger_size >= 0 and candidates >= max(1, trigger_size)


def check_tail_options(trigger_size: int, candidate_step: int) -> tuple[int, int]:
    """`tail_batch_trigger_size` and `tail_batch_candidate_step`, or `ValueError`."""
    if whole("tail_batch_trigger_size", trigger_size) < -1:
        raise ValueError(
            f"tail_batch_trigger_size={trigger_size} is below -1; it must be -1 (no tail batches), 0 (one as soon as any "
            "group was left behind) or the number of groups that have to wait"
        )
    if whole("tail_batch_candidate_step", candidate_step) < 1:
        raise ValueError(
            f"tail_batch_candidate_step={candidate_step} must be 1 or more: the interruptions after which a group counts as left behind"
        )
    return whole("tail_batch_trigger_size", trigger_size), whole("tail_batch_candidate_step", candidate_step)
