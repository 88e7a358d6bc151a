"""Shows that advantages meet the published numbers, are exactly 0 where nothing can be learned, and depend on nothing but the group."""

import math
import random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from producer.experience.advantages import AdvantageFn, dr_grpo, gdpo, grpo, opo, rloo, zero_variance
from producer.experience.groups import Rewards
from producer.experience.pass_at_k import pass_at_k

TWO_GROUPS = [0.0, 1, 0, 1, 1, 0, 0, 0]
IDS = [0, 0, 0, 0, 1, 1, 1, 1]


def best_of_two(rewards: Rewards, group_ids: ArrayLike) -> NDArray[np.float64]:
    return pass_at_k(rewards, group_ids, 2)


def gdpo_of_one_part(rewards: Rewards, group_ids: ArrayLike) -> NDArray[np.float64]:
    return gdpo(np.array(rewards, np.float64)[:, None], group_ids)


def opo_of_equal_lengths(rewards: Rewards, group_ids: ArrayLike) -> NDArray[np.float64]:
    return opo(rewards, group_ids, [7] * len(rewards))


ESTIMATORS: list[AdvantageFn] = [grpo, dr_grpo, rloo, best_of_two, gdpo_of_one_part, opo_of_equal_lengths]
BY_GROUP: list[AdvantageFn] = [grpo, dr_grpo, rloo, best_of_two, opo_of_equal_lengths]

group_rewards = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=7)
batches = st.lists(group_rewards, min_size=1, max_size=5)


def flat(batch: list[list[float]]) -> tuple[list[float], list[int]]:
    return [reward for group in batch for reward in group], [number for number, group in enumerate(batch) for _ in group]


def test_o9_and_o10_rloo() -> None:
    np.testing.assert_allclose(rloo([0, 0, 0, 1], [0] * 4), [-1 / 3, -1 / 3, -1 / 3, 1])
    np.testing.assert_allclose(rloo([1, 3, 5, 7, 2, 2], [0, 0, 1, 1, 2, 2]), [-2, 2, -2, 2, 0, 0])


@pytest.mark.parametrize(
    ("eps", "first", "high", "low"),
    [
        (1e-4, 0.8658754, 1.4997001, -0.4999),
        (1e-6, 0.8660239, 1.499997, -0.499999),
        (1e-8, 0.8660254, 1.5, -0.5),
        (1e-9, 0.8660254, 1.5, -0.5),
    ],
)
def test_o11_grpo_by_the_sample_standard_deviation(eps: float, first: float, high: float, low: float) -> None:
    expected = [-first, first, -first, first, high, low, low, low]
    np.testing.assert_allclose(grpo(TWO_GROUPS, IDS, eps=eps), expected, atol=1e-7)


def test_o12_grpo_by_the_standard_deviation_of_the_population() -> None:
    expected = [-1, 1, -1, 1, 1.7320508, *[-0.5773503] * 3]
    np.testing.assert_allclose(grpo(TWO_GROUPS, IDS, ddof=0, eps=1e-8), expected, atol=5e-8)


def test_o13_dr_grpo_only_centres() -> None:
    np.testing.assert_array_equal(dr_grpo(TWO_GROUPS, IDS), [-0.5, 0.5, -0.5, 0.5, 0.75, -0.25, -0.25, -0.25])


def test_o14_grpo_by_the_standard_deviation_of_the_batch() -> None:
    expected = [-0.9659052, 0.9659052, -0.9659052, 0.9659052, 1.4488577, *[-0.4829526] * 3]
    np.testing.assert_allclose(grpo(TWO_GROUPS, IDS, scale="batch"), expected, atol=5e-8)


@pytest.mark.parametrize("size", [5, 6, 7, 8, 16])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("reward", [0.99, 0.1, -1 / 3, 1e-30, 60_000.1])
def test_o32_equal_rewards_give_exactly_zero(size: int, dtype: type[np.floating], reward: float) -> None:
    rewards, ids = np.full(size, reward, dtype), [3] * size
    for values in (
        grpo(rewards, ids),
        grpo(rewards, ids, eps=0.0),
        grpo(rewards, ids, scale="batch", eps=0.0),
        dr_grpo(rewards, ids),
        rloo(rewards, ids),
        opo(rewards, ids, np.arange(size)),
        pass_at_k(rewards, ids, 2),
        gdpo(np.stack([rewards, rewards], axis=1), ids, eps=0.0),
    ):
        assert values.tolist() == [0.0] * size


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_members_without_a_reward_get_zero_and_take_no_part(advantage: AdvantageFn) -> None:
    given_all = advantage([1.0, 0.0, 0.0], [7, 7, 7])
    with_holes = advantage([None, 1.0, math.nan, 0.0, 0.0], [7] * 5)
    assert with_holes.tolist() == [0.0, given_all[0], 0.0, given_all[1], given_all[2]]
    assert advantage([None, 5.0, None], [1, 1, 1]).tolist() == [0.0] * 3  # one that is scored has nothing to be compared with
    assert advantage([None, None], [1, 1]).tolist() == [0.0] * 2
    assert advantage([], []).tolist() == []


@pytest.mark.parametrize("advantage", ESTIMATORS)
@given(batch=batches, order=st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(advantage: AdvantageFn, batch: list[list[float]], order: random.Random) -> None:
    rewards, ids = flat(batch)
    places = list(range(len(rewards)))
    order.shuffle(places)
    shuffled = advantage([rewards[at] for at in places], [100 - 7 * ids[at] for at in places])
    np.testing.assert_allclose(shuffled, advantage(rewards, ids)[places], atol=1e-12)


@pytest.mark.parametrize("advantage", ESTIMATORS)
@given(batch=batches, shifts=st.lists(st.integers(-1000, 1000), min_size=5, max_size=5))
def test_a_constant_added_to_a_group_changes_nothing(advantage: AdvantageFn, batch: list[list[float]], shifts: list[int]) -> None:
    rewards, ids = flat(batch)
    moved = [reward + shifts[number] for reward, number in zip(rewards, ids, strict=True)]
    # Exactly: these sums have no rounding, and a reward of the group is taken off before anything else.
    np.testing.assert_array_equal(advantage(moved, ids), advantage(rewards, ids))


@given(batch=batches, factor=st.floats(0.01, 100))
def test_grpo_is_free_of_the_scale_of_rewards(batch: list[list[float]], factor: float) -> None:
    rewards, ids = flat(batch)
    scaled = [reward * factor for reward in rewards]
    np.testing.assert_allclose(grpo(scaled, ids, eps=0.0), grpo(rewards, ids, eps=0.0), atol=1e-9)


@pytest.mark.parametrize("advantage", ESTIMATORS)
@given(batch=batches)
def test_each_group_has_mean_zero(advantage: AdvantageFn, batch: list[list[float]]) -> None:
    rewards, ids = flat(batch)
    values = advantage(rewards, ids)
    for number in set(ids):
        assert abs(values[np.array(ids) == number].mean()) < 1e-12


@pytest.mark.parametrize("advantage", BY_GROUP)
@given(batch=batches)
def test_a_shard_of_whole_groups_has_the_answers_of_the_batch(advantage: AdvantageFn, batch: list[list[float]]) -> None:
    rewards, ids = flat(batch)
    values = advantage(rewards, ids)
    for number, group in enumerate(batch):
        members = values[np.array(ids) == number]
        np.testing.assert_allclose(members, advantage(group, [0] * len(group)), atol=1e-12)


@given(rewards=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_rloo_compares_each_with_the_mean_of_the_others(rewards: list[float]) -> None:
    assume(max(rewards) > min(rewards))
    expected = [reward - np.mean(rewards[:at] + rewards[at + 1 :]) for at, reward in enumerate(rewards)]
    np.testing.assert_allclose(rloo(rewards, [0] * len(rewards)), expected, rtol=1e-9, atol=1e-6)


def test_o15_opo_weighs_the_baseline_by_length() -> None:
    np.testing.assert_allclose(opo([1, 0, 1], [0] * 3, [2, 3, 5]), [0.3, -0.7, 0.3])
    # A group without a trained token has no weights; what is then given reaches no token.
    assert opo([1, 0], [0, 0], [0, 0]).tolist() == [0.5, -0.5]


def test_gdpo_adds_normalised_parts_and_scales_their_sum_over_the_batch() -> None:
    first, second, ids = [0.0, 1, 0, 1], [10.0, 10, 30, 50], [0, 0, 1, 1]
    total = grpo(first, ids) + 0.5 * grpo(second, ids)
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(gdpo(np.stack([first, second], axis=1), ids, [1, 0.5]), expected, atol=1e-12)


def test_a_missing_part_adds_nothing_and_a_rollout_without_any_takes_no_part() -> None:
    parts = np.array([[1.0, math.nan], [0, 2], [math.nan, math.nan], [0, 4]])
    found = gdpo(parts, [0] * 4)
    total = np.nan_to_num(grpo([1, 0, None, 0], [0] * 4)) + grpo([None, 2, None, 4], [0] * 4)
    np.testing.assert_allclose(found, total / (total[[0, 1, 3]].std(ddof=1) + 1e-4))
    assert found[2] == 0.0


def test_gdpo_keeps_apart_what_a_sum_of_rewards_makes_equal() -> None:
    parts, ids = np.array([[0.0, 1], [1, 0], [1, 1], [0, 0], [0, 0], [0, 0]]), [0, 0, 0, 0, 1, 1]
    heavier = gdpo(parts, ids, [2.0, 1.0])
    assert heavier[1] > heavier[0]
    assert heavier[4:].tolist() == [0.0, 0.0]


def test_zero_variance_is_a_fraction_of_the_groups_with_a_reward() -> None:
    assert zero_variance([1, 1, 0, 1, None, None, 3], [0, 0, 1, 1, 2, 2, 3]) == pytest.approx(2 / 3)
    assert zero_variance([None], [0]) == 0.0


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="2 rewards came with 1 group ids"):
        grpo([1, 2], [0])
    with pytest.raises(ValueError, match="reward 1 is inf"):
        rloo([0.0, math.inf], [0, 0])
    with pytest.raises(ValueError, match="'groups'; known are"):
        grpo([1.0], [0], scale="groups")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ddof=2"):
        grpo([1.0], [0], ddof=2)
    with pytest.raises(ValueError, match=r"lengths .* for 2 rewards"):
        opo([1.0, 2.0], [0, 0], [1])
    with pytest.raises(ValueError, match=r"parts of shape \(2,\)"):
        gdpo([1.0, 2.0], [0, 0])
    with pytest.raises(ValueError, match="for 2 parts"):
        gdpo([[1.0, 2.0]], [0], [1.0])


@pytest.mark.parametrize("advantage", ESTIMATORS)
@given(
    batch=st.integers(2, 9).flatmap(
        lambda size: st.lists(st.lists(st.integers(-40, 40).map(float), min_size=size, max_size=size), min_size=2)
    )
)
def test_groups_of_one_size_in_order_have_the_answers_of_any_others(advantage: AdvantageFn, batch: list[list[float]]) -> None:
    rewards, ids = flat(batch)
    expected = advantage(rewards, ids)
    backwards = advantage(rewards, [-number for number in ids])
    uneven = advantage([*rewards, 3.0], [*ids, ids[-1] + 1])[:-1]
    np.testing.assert_allclose(backwards, expected, atol=1e-12)
    if advantage is not gdpo_of_one_part:  # of which the scale is the batch's
        np.testing.assert_allclose(uneven, expected, atol=1e-12)


@pytest.mark.parametrize(
    "ids", [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1], [0, 1, 0, 1], [2, 2, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [5, 4, 5, 4]]
)
def test_ids_that_only_look_like_groups_of_one_size_are_not_taken_for_them(ids: list[int]) -> None:
    rewards = np.arange(len(ids), dtype=np.float64) ** 2
    expected = [
        reward - np.mean([other for other, number in zip(rewards, ids, strict=True) if number == own])
        for reward, own in zip(rewards, ids, strict=True)
    ]
    np.testing.assert_allclose(dr_grpo(rewards, ids), expected, atol=1e-12)


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_group_ids_may_be_any_numbers_in_any_order(advantage: AdvantageFn) -> None:
    rewards = [1.0, 0.0, 2.0, 5.0, 5.0, 1.0]
    expected = advantage(rewards, [0, 0, 0, 1, 1, 1])
    for ids in ([7, 7, 7, 2**40, 2**40, 2**40], np.array([1, 1, 1, 2, 2, 2], np.uint8)):
        np.testing.assert_array_equal(advantage(rewards, ids), expected)
    np.testing.assert_allclose(advantage(rewards, [9, 9, 9, -3, -3, -3]), expected, atol=1e-12)
    order = [3, 0, 4, 1, 5, 2]
    np.testing.assert_allclose(advantage([rewards[at] for at in order], [at // 3 for at in order]), expected[order], atol=1e-12)
