"""Batches are shared out by weight to the group: nobody starves, nobody is ahead, whatever becomes of the weights."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.shares import allot

NAMES = "abcdef"
weight = st.one_of(st.integers(0, 9), st.floats(0.001, 100))
some_weights = st.dictionaries(st.sampled_from(NAMES), weight, min_size=1).filter(lambda weights: any(weights.values()))
sizes = st.lists(st.integers(1, 12), min_size=1, max_size=40)


def test_weights_1_2_and_0_share_7_groups_out_as_2_5_and_0() -> None:  # case 31
    assert allot(7, {"a": 1, "b": 2, "c": 0}, {}).groups == {"a": 2, "b": 5, "c": 0}


def test_what_is_left_over_is_carried() -> None:
    weights, carried, seen = {"a": 1, "b": 2, "c": 0}, {}, []
    for _ in range(3):
        groups, carried = allot(7, weights, carried)
        seen.append((groups["a"], groups["b"]))
    assert [sum(column) for column in zip(*seen, strict=True)] == [7, 14]
    assert carried == {"a": pytest.approx(0, abs=1e-9), "b": pytest.approx(0, abs=1e-9)}


@given(some_weights, sizes)
def test_while_weights_stay_every_task_is_within_1_of_its_share_after_every_batch(weights: dict[str, float], batches: list[int]) -> None:
    total, served, carried = math.fsum(weights.values()), Counter[str](), {}
    for n, size in enumerate(batches, 1):
        groups, carried = allot(size, weights, carried)
        assert groups.keys() == weights.keys()
        assert sum(groups.values()) == size
        served.update(groups)
        assert all(abs(served[name] - sum(batches[:n]) * weights[name] / total) < 1 + 1e-6 for name in weights)
        assert all(weights[name] > 0 or served[name] == 0 for name in weights)


@given(some_weights, sizes)
def test_it_is_a_function_of_its_arguments_and_not_of_their_order_or_scale(weights: dict[str, float], batches: list[int]) -> None:
    carried, turned = {}, {}
    for size in batches:
        one, carried = allot(size, weights, carried)
        other, turned = allot(size, {name: weights[name] * 4 for name in reversed(list(weights))}, turned)
        assert (one, carried) == (other, turned)


def test_giving_to_whoever_is_owed_most_would_not_keep_all_within_1() -> None:
    weights = {f"task {n}": 10.0 if n < 3 else 1.0 for n in range(33)}

    def furthest(next_one: Callable[[dict[str, float]], str]) -> float:
        owed, most = dict.fromkeys(weights, 0.0), 0.0
        for _ in range(300):
            name = next_one(owed)
            owed = {other: owed[other] + weights[other] / 60 - (other == name) for other in weights}
            most = max(most, *map(abs, owed.values()))
        return most

    def owed_most(owed: dict[str, float]) -> str:
        return max(weights, key=lambda name: owed[name] + weights[name] / 60)

    assert furthest(owed_most) > 1.16
    assert furthest(lambda owed: next(name for name, n in allot(1, weights, owed).groups.items() if n)) < 1


changing = st.lists(st.tuples(some_weights, st.integers(1, 12)), min_size=1, max_size=60)


@settings(max_examples=300)
@given(changing)
def test_weights_that_change_at_any_time_lose_no_group_and_no_debt_grows(batches: list[tuple[dict[str, float], int]]) -> None:
    carried: dict[str, float] = {}
    for weights, size in batches:
        groups, carried = allot(size, weights, carried)
        assert sum(groups.values()) == size
        assert min(groups.values()) >= 0
        assert all(groups[name] == 0 for name in weights if weights[name] == 0)
        assert carried.keys() == {name for name in weights if weights[name] > 0}
        assert math.fsum(carried.values()) == pytest.approx(0, abs=1e-6)
        assert max(map(abs, carried.values())) <= len(NAMES)


@given(
    st.lists(st.tuples(st.fixed_dictionaries({name: st.floats(0.1, 10) for name in "abcd"}), st.integers(1, 12)), min_size=30, max_size=60)
)
def test_no_task_starves_however_weights_change(batches: list[tuple[dict[str, float], int]]) -> None:
    carried: dict[str, float] = {}
    served, share = Counter[str](), Counter[str]()
    for weights, size in batches:
        groups, carried = allot(size, weights, carried)
        served.update(groups)
        for name in weights:
            share[name] += size * weights[name] / math.fsum(weights.values())  # type: ignore[assignment]
    assert all(served[name] >= share[name] - 4 for name in "abcd")


def test_a_task_of_small_weight_is_served_in_its_turn_and_one_added_later_starts_with_no_debt() -> None:
    carried: dict[str, float] = {}
    rare = []
    for _ in range(300):
        groups, carried = allot(1, {"a": 99, "b": 1}, carried)
        rare.append(groups["b"])
    assert sum(rare) == 3
    assert max(sum(rare[start : start + 100]) for start in range(200)) <= 2
    groups, carried = allot(4, {"a": 99, "b": 1, "new": 100}, carried)
    assert groups["new"] == 2


@pytest.mark.parametrize("weights", [{"a": -1.0}, {"a": math.nan}, {"a": math.inf}, {"a": True}, {"a": "1"}, {"a": 0, "b": 0.0}, {}])
def test_weights_that_are_none_are_refused_with_their_value(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        allot(3, weights, {})
