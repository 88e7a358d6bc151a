"""The decisions how many groups to start: exact, over-issued, and never more than the bound."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import AsyncProduceStrategy
from producer.issue import Load, exact, issue_limit, over_issue

sizes = st.integers(1, 5000)
counts = st.integers(0, 10_000)
thresholds = st.floats(0, 20, allow_nan=False)


@given(sizes, counts, counts)
def test_exact_issues_what_is_missing_and_no_more(batch_size: int, completed: int, in_flight: int) -> None:
    more = exact(Load(batch_size, completed, in_flight))
    assert more >= 0
    assert more == 0 or completed + in_flight + more == batch_size


@given(sizes, counts, counts, thresholds)
def test_over_issue_stays_within_the_limit(batch_size: int, completed: int, in_flight: int, threshold: float) -> None:
    more = over_issue(Load(batch_size, completed, in_flight), threshold)
    limit = issue_limit(batch_size, threshold)
    assert more >= 0
    assert more == 0 or completed + in_flight + more == limit
    if completed >= batch_size:
        assert more == 0


@given(sizes, st.integers(0, 2000))
def test_the_limit_is_the_exact_ceiling_for_thresholds_written_in_decimals(batch_size: int, hundredths: int) -> None:
    assert issue_limit(batch_size, hundredths / 100) == math.ceil((1 + Fraction(hundredths, 100)) * batch_size)


@given(sizes, thresholds)
def test_the_limit_lies_between_the_batch_and_the_ceiling(batch_size: int, threshold: float) -> None:
    assert batch_size <= issue_limit(batch_size, threshold) <= math.ceil((1 + threshold) * batch_size)


@given(sizes, st.integers(0, 5000), thresholds)
def test_an_unfinished_batch_with_nothing_in_flight_always_starts_something(batch_size: int, completed: int, threshold: float) -> None:
    if completed < batch_size:
        load = Load(batch_size, completed, 0)
        assert exact(load) >= 1
        assert over_issue(load, threshold) >= 1


def test_nine_of_ten_completed_and_threshold_0_4_start_at_most_five() -> None:
    assert over_issue(Load(batch_size=10, completed=9, in_flight=0), 0.4) == 5
    assert over_issue(Load(batch_size=10, completed=9, in_flight=5), 0.4) == 0


@pytest.mark.parametrize(
    ("batch_size", "threshold", "limit"), [(10, 0.1, 11), (100, 0.1, 110), (10, 0.1 + 0.2, 13), (7, 0.0, 7), (3, 0.5, 5)]
)
def test_floats_do_not_add_a_group(batch_size: int, threshold: float, limit: int) -> None:
    assert issue_limit(batch_size, threshold) == limit


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_a_threshold_that_bounds_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="staleness_threshold"):
        AsyncProduceStrategy(None, staleness_threshold=threshold)  # type: ignore[arg-type]
