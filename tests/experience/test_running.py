"""Shows that running moments do not depend on how values came in, stay finite from the first one on, and survive as JSON."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.experience import RunningMoments

values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20)


@given(batches=st.lists(values, min_size=1, max_size=5))
def test_in_which_parts_values_come_makes_no_difference(batches: list[list[float]]) -> None:
    by_parts = RunningMoments()
    for batch in batches:
        by_parts = by_parts.updated(batch)
    together = [value for batch in batches for value in batch]
    assert by_parts.count == len(together)
    assert (by_parts.mean, by_parts.std) == pytest.approx((np.mean(together), np.std(together)), abs=1e-9)
    assert RunningMoments.from_json(by_parts.to_json()) == by_parts


def test_a_first_value_and_equal_values_give_zero() -> None:
    assert RunningMoments().updated([5.0]).normalised([5.0]).tolist() == [0.0]
    moments = RunningMoments().updated(np.full(8, 0.99, np.float32)).updated(np.full(3, 0.99, np.float32))
    assert moments.std == 0.0
    assert moments.normalised(np.full(2, 0.99, np.float32)).tolist() == [0.0, 0.0]


def test_missing_values_are_left_out_and_stay_missing() -> None:
    moments = RunningMoments().updated([1.0, math.nan, 3.0])
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, 1.0)
    np.testing.assert_array_equal(moments.normalised([math.nan, 4.0]), [math.nan, 2.0])
    assert moments.updated([math.nan]) is moments


def test_bad_state_is_refused() -> None:
    for text in ('{"count": 1}', "[1, 2]", "nothing"):
        with pytest.raises(ValueError):
            RunningMoments.from_json(text)
    with pytest.raises(ValueError, match="squares"):
        RunningMoments(1, 0.0, -1.0)
