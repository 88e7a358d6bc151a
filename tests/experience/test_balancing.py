"""Shows that balancing splits nothing, leaves no rank empty, keeps the budget, gives all ranks as many steps, and is near the best."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.experience.balancing import Cost, Plan, balance, karmarkar_karp, longest_first

all_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)
all_costs = st.builds(Cost, st.floats(0.5, 9), st.floats(0, 2))


def totals(plan: Plan, costs: np.ndarray) -> list[float]:
    return [float(sum(costs[number] for part in of_rank for number in part)) for of_rank in plan]


@given(lengths=all_lengths, ranks=st.integers(1, 6), extra=st.none() | st.integers(0, 80), cost=all_costs, padded=st.booleans())
def test_every_sequence_has_one_place_within_the_budget(
    lengths: list[int], ranks: int, extra: int | None, cost: Cost, padded: bool
) -> None:
    lengths += [5] * max(0, ranks - len(lengths))
    budget = None if extra is None else max(lengths) + extra
    plan = balance(lengths, ranks, token_budget=budget, cost=cost, padded=padded)
    assert sorted(number for of_rank in plan for part in of_rank for number in part) == list(range(len(lengths)))
    assert len(plan) == ranks
    assert len({len(of_rank) for of_rank in plan}) == 1
    parts = [part for of_rank in plan for part in of_rank]
    # An empty one only where there are not enough sequences, and never a rank's first.
    assert sum(not part for part in parts) == max(0, len(parts) - len(lengths))
    assert all(of_rank[0] for of_rank in plan)
    if budget is not None:
        sizes = [[lengths[number] for number in part] for part in parts if part]
        assert all((max(size) * len(size) if padded else sum(size)) <= budget for size in sizes)
        # No rank takes one step more than the budget asks for (first fit decreasing: 11/9 of the fewest, plus 6/9).
        if not padded:
            fewest = -(-sum(lengths) // budget)
            assert len(plan[0]) <= -(-(2 * fewest) // ranks)


@pytest.mark.parametrize("parts", [2, 3])
@given(lengths=st.lists(st.integers(1, 30), min_size=3, max_size=7), cost=all_costs)
def test_the_costliest_rank_is_near_the_best_possible(parts: int, lengths: list[int], cost: Cost) -> None:
    costs = cost.of(lengths)
    best = min(
        max(sum(value for value, at in zip(costs, places, strict=True) if at == part) for part in range(parts))
        for places in product(range(parts), repeat=len(lengths))
    )
    ours = max(totals(balance(lengths, parts, cost=cost), costs))
    assert best <= ours * (1 + 1e-9)
    assert ours <= best * (4 / 3 - 1 / (3 * parts)) * (1 + 1e-9)


def test_differences_beat_the_longest_first_where_numbers_are_many() -> None:
    """On lengths as rollouts have them, both kinds of total are within a per cent of even, and those of differences within a thousandth."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1, 512), 8192).astype(int) + 1
    for cost, bound in ((Cost(), 1e-3), (Cost.transformer(1024), 1e-3)):
        costs = cost.of(lengths)
        even = costs.sum() / 8
        of_differences = max(costs[part].sum() for part in karmarkar_karp(costs, 8))
        of_longest = max(costs[part].sum() for part in longest_first(costs, 8) or [])
        assert of_differences <= of_longest
        assert of_differences / even < 1 + bound
        plan = balance(lengths.tolist(), 8, token_budget=16_384, cost=cost)
        assert max(totals(plan, costs)) / even < 1.01


def test_micro_batches_that_run_at_once_cost_alike() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 256).tolist()
    plan = balance(lengths, 4, token_budget=4000)
    for together in zip(*plan, strict=True):
        sizes = [sum(lengths[number] for number in part) for part in together]
        assert max(sizes) - min(sizes) <= 0.02 * max(sizes)


def test_attention_makes_one_long_sequence_as_dear_as_many_short_ones() -> None:
    lengths = [1000] + [100] * 20
    plan = balance(lengths, 2, cost=Cost(0.0, 1.0))
    assert sorted(map(len, (part for of_rank in plan for part in of_rank))) == [1, 20]
    assert Cost.transformer(64).of([1, 10]).tolist() == [769.0, 7780.0]


def test_as_many_micro_batches_as_asked_for() -> None:
    plan = balance([1] * 12, 2, micro_batches=3)
    assert [len(of_rank) for of_rank in plan] == [3, 3]
    assert balance([4, 4], 2, micro_batches=2) == (((0,), ()), ((1,), ()))
    with pytest.raises(ValueError, match="micro_batches=1 on 2 ranks do not hold 24 tokens within token_budget=8; 2 do"):
        balance([4] * 6, 2, token_budget=8, micro_batches=1)


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="3 sequences for 4 ranks: none is split"):
        balance([1, 1, 1], 4)
    with pytest.raises(ValueError, match="0 sequences for 1 ranks"):
        balance([])
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, over the budget of 8"):
        balance([1, 9], token_budget=8)
    with pytest.raises(ValueError, match="a sequence of length 0"):
        balance([1, 0])
    for name in ("ranks", "micro_batches"):
        with pytest.raises(ValueError, match=f"{name}=0 must be 1 or more"):
            balance([1, 2], **{name: 0})
    with pytest.raises(ValueError, match="not both 0"):
        Cost(0.0, 0.0)
