"""Shows that whitening covers the trained tokens of the whole batch once, and that clipping tells what it changed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from producer.experience.returns import discounted_returns
from producer.experience.whitening import clip, whiten

numbers = arrays.arrays(np.float64, st.integers(2, 30), elements=st.integers(-100, 100).map(float))


def test_o20_whitening_by_the_masked_tokens_with_zeros_outside() -> None:
    found = whiten([[1, 2, 3], [4, 5, 6]], [[1, 1, 0], [1, 0, 0]], eps=0.0)
    np.testing.assert_allclose(found, [[-1.069045, -0.2672612, 0], [1.3363062, 0, 0]], atol=1e-6)


def test_o21_reinforce_plus_plus() -> None:
    returns = discounted_returns([-0.01, -0.02, 1, -0.03, 0.5], [3, 2])
    np.testing.assert_allclose(returns, [0.97, 0.98, 1, 0.47, 0.5])
    expected = [0.6804018, 0.7169825, 0.790144, -1.1486352, -1.038893]
    np.testing.assert_allclose(whiten(returns, ddof=1), expected, atol=1e-6)


@given(values=numbers, shift=st.integers(-1000, 1000), factor=st.floats(0.1, 10))
def test_shift_and_scale_change_nothing(values: np.ndarray, shift: int, factor: float) -> None:
    expected = whiten(values, eps=0.0)
    np.testing.assert_allclose(whiten(values * factor + shift, eps=0.0), expected, atol=1e-9)
    if np.ptp(values) > 0:
        assert expected.mean() == pytest.approx(0, abs=1e-12)
        assert expected.std() == pytest.approx(1)


@given(values=numbers)
def test_scaling_keeps_zeros_and_signs(values: np.ndarray) -> None:
    scaled = whiten(values, centre=False, eps=0.0)
    np.testing.assert_array_equal(np.sign(scaled), np.sign(values))
    if values.any():
        assert (scaled**2).mean() == pytest.approx(1)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_equal_values_one_value_and_none_at_all(ddof: int, eps: float) -> None:
    assert whiten(np.full(7, 0.99, np.float32), ddof=ddof, eps=eps).tolist() == [0.0] * 7
    assert whiten([3.0, math.nan], [1, 0], ddof=ddof, eps=eps).tolist() == [0.0, 0.0]
    assert whiten([3.0, math.nan], [0, 0], ddof=ddof, eps=eps).tolist() == [0.0, 0.0]


def test_the_input_is_left_as_it_was() -> None:
    values = np.array([1.0, 2.0])
    whiten(values)
    assert values.tolist() == [1.0, 2.0]


def test_clipping_counts_before_it_clamps_and_leaves_out_what_is_missing() -> None:
    clipped, fraction = clip([-3, -1, 0, 1, 5, math.nan], (-1, 1))
    np.testing.assert_array_equal(clipped, [-1, -1, 0, 1, 1, math.nan])
    assert fraction == 2 / 5
    assert clip([], (0, 1))[1] == 0.0


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match=r"bounds=\(1, 1\); give"):
        clip([1.0], (1, 1))
    with pytest.raises(ValueError, match="differ in shape"):
        whiten([1.0], [1, 1])
    with pytest.raises(ValueError, match="eps=-1"):
        whiten([1.0], eps=-1)
