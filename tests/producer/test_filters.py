"""Filters keep exactly what their rule keeps, say why they reject the rest, and their reasons can be counted."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import RolloutGroup, RolloutState
from producer import all_of, pass_rate, zero_variance
from producer.filters import checked_reason, reason_kind

scores = st.lists(st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8)
rates = st.floats(0, 1)


def scored(*given: float | None) -> RolloutGroup:
    return RolloutGroup(1, [RolloutState(1, index, score=score) for index, score in enumerate(given)])


@given(scores, rates, rates, st.sampled_from([0.1, 0.5, 1.0]))
def test_a_group_is_kept_if_its_pass_rate_lies_within_the_bounds(found: list[float | None], a: float, b: float, threshold: float) -> None:
    low, high = sorted((a, b))
    if (low, high) == (0, 1):
        return
    reason = pass_rate(low, high, threshold=threshold)(scored(*found))
    known = [score for score in found if score is not None]
    if not known:
        assert reason == "no member has a score: give the agent loop a reward"
        return
    rate = sum(score >= threshold for score in known) / len(known)
    assert (reason is None) == (low <= rate <= high)
    if reason is not None:
        assert reason_kind(reason) == ("pass rate too low" if rate < low else "pass rate too high")


@given(scores)
def test_equal_scores_are_rejected_and_counted_as_one_kind(found: list[float | None]) -> None:
    reason = zero_variance(scored(*found))
    assert (reason is None) == (len({score for score in found if score is not None}) > 1)
    assert reason is None or reason_kind(reason) in ("all scores are equal", "no member has a score")


@given(scores)
def test_all_of_keeps_what_all_keep_and_gives_the_first_reason(found: list[float | None]) -> None:
    group, hard = scored(*found), pass_rate(low=0.25)
    reasons = [zero_variance(group), hard(group)]
    assert all_of(zero_variance, hard)(group) == next((reason for reason in reasons if reason), None)


def test_filters_behind_one_that_rejects_are_not_asked() -> None:
    asked = list[str]()

    def records(group: RolloutGroup) -> None:
        asked.append("asked")

    assert all_of(zero_variance, records)(scored(1, 1)) == "all scores are equal: [1]"
    assert asked == []
    assert all_of(zero_variance, records)(scored(0, 1)) is None
    assert asked == ["asked"]


def test_a_filter_that_says_no_text_is_named_also_within_others() -> None:
    def too_short(group: RolloutGroup) -> Any:
        return True

    with pytest.raises(TypeError, match=r"group filter too_short returned True"):
        all_of(zero_variance, too_short)(scored(0, 1))
    assert checked_reason(all_of(zero_variance, pass_rate(high=0.9)), scored(1, 0)) is None
    composed: Any = all_of(zero_variance, pass_rate(high=0.9))
    assert composed.__name__ == "all_of(zero_variance, pass_rate(0, 0.9, threshold=0.5))"


@pytest.mark.parametrize("bounds", [(0.5, 0.25), (-0.1, 1.0), (0.0, 1.1), (0.0, 1.0), (float("nan"), 1.0)])
def test_bounds_that_keep_nothing_or_everything_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low="):
        pass_rate(*bounds)
    with pytest.raises(ValueError, match="needs filters"):
        all_of()


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("too long: 512 > 256", "too long"), ("plain", "plain"), ("", "no reason given"), (": odd", "no reason given"), ("x" * 99, "x" * 60)],
)
def test_the_fixed_part_of_a_reason_is_its_kind(reason: str, kind: str) -> None:
    assert reason_kind(reason) == kind
