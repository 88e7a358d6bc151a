"""Shows that pass@k and the advantages for it are the exact expectations over all subsets of k members."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.experience.advantages import grpo
from producer.experience.pass_at_k import pass_at_k, pass_rate_at_k

rewards_of_a_group = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=6)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.3), (5, 0.9166667), (8, 1.0)])
def test_o17_the_metric(k: int, expected: float) -> None:
    assert pass_rate_at_k(10, 3, k) == pytest.approx(expected)


@given(rewards=rewards_of_a_group, data=st.data())
def test_advantages_are_those_of_all_subsets(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards) - 1))
    subsets = list(combinations(range(len(rewards)), k))
    best = np.array([max(rewards[at] for at in subset) for subset in subsets])
    with_member = [[value for value, subset in zip(best, subsets, strict=True) if at in subset] for at in range(len(rewards))]
    expected = [(np.mean(values) - best.mean()) / best.std() if best.std() > 0 else 0.0 for values in with_member]
    np.testing.assert_allclose(pass_at_k(rewards, [0] * len(rewards), k), expected, atol=1e-9)


@given(wrong=st.integers(2, 9), right=st.integers(1, 9), k=st.integers(1, 5))
def test_of_right_and_wrong_it_is_the_closed_form(wrong: int, right: int, k: int) -> None:
    n = wrong + right
    found = pass_at_k([1.0] * right + [0.0] * wrong, [0] * n, k)
    rate = pass_rate_at_k(n, right, k) if k < n else 1.0
    if rate == 1:
        assert not found.any()
        return
    std = (rate * (1 - rate)) ** 0.5
    expected = [(1 - rate) / std] * right + [(1 - rate - comb(wrong - 1, k - 1) / comb(n - 1, k - 1)) / std] * wrong
    np.testing.assert_allclose(found, expected, atol=1e-9)


@given(rewards=rewards_of_a_group)
def test_of_one_it_is_grpo(rewards: list[float]) -> None:
    np.testing.assert_allclose(pass_at_k(rewards, [0] * len(rewards), 1), grpo(rewards, [0] * len(rewards), ddof=0, eps=0.0), atol=1e-9)


def test_groups_of_k_or_fewer_get_zero_and_missing_members_take_no_part() -> None:
    assert pass_at_k([0.0, 1, 2], [0, 0, 0], 3).tolist() == [0.0] * 3
    assert pass_at_k([1.0, 1, 1, 0], [0] * 4, 2).tolist() == [0.0] * 4  # any two hold a best one
    with_holes = pass_at_k([None, 0.0, 1, None, 0, 5], [0, 0, 0, 0, 0, 1], 2)
    assert with_holes[[1, 2, 4]].tolist() == pass_at_k([0.0, 1, 0], [0, 0, 0], 2).tolist()
    assert with_holes[[0, 3, 5]].tolist() == [0.0] * 3


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="k=0"):
        pass_at_k([1.0], [0], 0)
    with pytest.raises(ValueError, match="n=3, correct=4, k=1"):
        pass_rate_at_k(3, 4, 1)
