"""Group filters: judged by raw scores, they say why a finished group is of no use, or None to keep it.

A reason has a fixed part, then a colon and what is particular to the group: "pass rate too low: 0.125 < 0.25". Counted are
fixed parts (`reason_kind`). What is rejected is stored with its reason and replaced by another prompt; a strategy's
`max_filtered` bounds how many a batch may spend on it, over all filters together.
"""

from collections.abc import Callable

from agent_loop.sampling import number
from buffer import RolloutGroup

GroupFilter = Callable[[RolloutGroup], str | None]


def zero_variance(group: RolloutGroup) -> str | None:
    """Reject a group whose scores are all equal: every group-relative advantage would be 0 (DAPO's dynamic sampling)."""
    scores = _scores(group)
    if not scores:
        return _NO_SCORE
    return None if len(set(scores)) > 1 else f"all scores are equal: {sorted(set(scores))}"


def pass_rate(low: float = 0.0, high: float = 1.0, *, threshold: float = 0.5) -> GroupFilter:
    """A filter that keeps prompts of fitting difficulty: those that between `low` and `high` of the members pass.

    Args:
        low: the smallest fraction of members that is kept; what lies below is too hard.
        high: the largest; what lies above is too easy.
        threshold: the score from which on a member passes. Members without a score, those that failed, are not counted.

    Raises:
        ValueError: the bounds are no fractions, or nothing lies between them.
    """
    if not 0 <= number("low", low) <= number("high", high) <= 1:
        raise ValueError(f"low={low}, high={high} are no bounds of a pass rate; it must be that 0 <= low <= high <= 1")
    if (low, high) == (0, 1):
        raise ValueError("low=0, high=1 keeps every group; give one of them, such as low=0.1, or leave the filter out")
    bar = number("threshold", threshold)

    def rejects(group: RolloutGroup) -> str | None:
        scores = _scores(group)
        if not scores:
            return _NO_SCORE
        rate = sum(score >= bar for score in scores) / len(scores)
        if rate < low:
            return f"pass rate too low: {rate:.3g} < {low:g}"
        return f"pass rate too high: {rate:.3g} > {high:g}" if rate > high else None

    rejects.__name__ = rejects.__qualname__ = f"pass_rate({low:g}, {high:g}, threshold={bar:g})"
    return rejects


def all_of(*filters: GroupFilter) -> GroupFilter:
    """A filter that keeps what all `filters` keep; asked in order, the first that rejects gives the reason.

    Raises:
        ValueError: there is no filter among them.
    """
    if not filters:
        raise ValueError("all_of() needs filters to ask; to keep everything, give the strategy group_filter=None")

    def rejects(group: RolloutGroup) -> str | None:
        return next((reason for each in filters if (reason := checked_reason(each, group)) is not None), None)

    rejects.__name__ = rejects.__qualname__ = f"all_of({', '.join(map(_name, filters))})"
    return rejects


def checked_reason(group_filter: GroupFilter, group: RolloutGroup) -> str | None:
    """What the filter says, which must be a text or None: a bool could mean either."""
    reason: object = group_filter(group)
    if reason is None or isinstance(reason, str):
        return reason
    name = _name(group_filter)
    raise TypeError(f"group filter {name} returned {reason!r:.100}; it must return None to keep the group, or a text that says why not")


def reason_kind(reason: str) -> str:
    """What a reason has in common with others like it, to be counted by: the part before its first colon, 60 characters at most."""
    return reason.partition(":")[0].strip()[:60] or "no reason given"


_NO_SCORE = "no member has a score: give the agent loop a reward"


def _scores(group: RolloutGroup) -> list[float]:
    return [state.score for state in group.rollouts if state.score is not None]


def _name(group_filter: GroupFilter) -> str:
    return getattr(group_filter, "__name__", type(group_filter).__name__)
