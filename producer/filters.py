"""Group filters: judged by raw scores, they say why a finished group is of no use, or None to keep it."""

from collections.abc import Callable

from buffer import RolloutGroup

GroupFilter = Callable[[RolloutGroup], str | None]


def zero_variance(group: RolloutGroup) -> str | None:
    """Reject a group whose scores are all equal: every group-relative advantage would be 0 (DAPO's dynamic sampling)."""
    scores = {state.score for state in group.rollouts if state.score is not None}
    return None if len(scores) > 1 else f"all scores are equal: {sorted(scores)}"
