"""Group filters: judged by raw scores, they say why a finished group is of no use, or None to keep it."""

from collections.abc import Callable

from buffer import RolloutGroup

GroupFilter = Callable[[RolloutGroup], str | None]


def zero_variance(group: RolloutGroup) -> str | None:
    """Reject a group whose scores are all equal: every group-relative advantage would be 0 (DAPO's dynamic sampling)."""
    scores = {state.score for state in group.rollouts if state.score is not None}
    if not scores:
        return "no member has a score; give the agent loop a reward"
    return None if len(scores) > 1 else f"all scores are equal: {sorted(scores)}"


def checked_reason(group_filter: GroupFilter, group: RolloutGroup) -> str | None:
    """What the filter says, which must be a text or None: a bool could mean either."""
    reason: object = group_filter(group)
    if reason is None or isinstance(reason, str):
        return reason
    name = getattr(group_filter, "__name__", type(group_filter).__name__)
    raise TypeError(f"group filter {name} returned {reason!r:.100}; it must return None to keep the group, or a text that says why not")
