"""The decisions how many groups to start: exact, over-issued, never more than the bound on staleness allows, and tail batches."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer import AsyncProduceStrategy
from producer.issue import Load, bounded_issue, check_tail_options, exact, issue_limit, over_issue, tail_batch

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


# -- bounded ----------------------------------------------------------------------------------------------------


@given(sizes, counts, counts, counts, thresholds, st.integers(0, 8), st.integers(0, 1))
def test_bounded_issue_fills_up_to_both_limits_and_takes_up_what_was_left_behind(
    batch_size: int, completed: int, in_flight: int, left_behind: int, threshold: float, max_staleness: int, updates_before: int
) -> None:
    load = Load(batch_size, completed, in_flight)
    more = bounded_issue(load, threshold, max_staleness, left_behind=left_behind, updates_before=updates_before)
    limit = min(issue_limit(batch_size, threshold), (max_staleness + 1 - updates_before) * batch_size)
    fresh = more - left_behind
    assert fresh == 0 or completed + in_flight + left_behind + fresh == limit
    assert fresh > 0 or completed + in_flight + left_behind >= limit


def test_on_policy_starts_a_batch_and_nothing_for_the_next_one_before_the_update() -> None:
    assert bounded_issue(Load(8, 0, 0), 3.0, 0) == 8
    assert bounded_issue(Load(8, 0, 0), 3.0, 0, updates_before=1) == 0
    assert bounded_issue(Load(8, 0, 0), 3.0, 1, updates_before=1) == 8


# -- tail batches -----------------------------------------------------------------------------------------------


@given(counts)
def test_a_tail_batch_comes_never_at_once_or_when_so_many_wait(candidates: int) -> None:
    assert not tail_batch(-1, candidates)
    assert tail_batch(0, candidates) == (candidates > 0)
    assert tail_batch(5, candidates) == (candidates >= 5)


def test_trigger_1_with_two_expired_is_a_tail_batch_of_exactly_two() -> None:  # case 22
    assert tail_batch(1, 2)
    assert exact(Load(batch_size=2, completed=0, in_flight=0)) == 2


@pytest.mark.parametrize(
    ("trigger_size", "candidate_step", "named"),
    [
        (-2, 1, "tail_batch_trigger_size=-2"),
        (0.5, 1, "tail_batch_trigger_size=0.5"),
        (None, 1, "tail_batch_trigger_size=None"),
        (0, 0, "tail_batch_candidate_step=0"),
        (0, True, "tail_batch_candidate_step=True"),
    ],
)
def test_options_of_tail_batches_are_checked(trigger_size: Any, candidate_step: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_tail_options(trigger_size, candidate_step)


@pytest.mark.parametrize("options", [(-1, 1), (0, 3), (64, 2)])
def test_options_of_tail_batches_come_back(options: tuple[int, int]) -> None:
    assert check_tail_options(*options) == options
