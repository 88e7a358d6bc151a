"""The plain model of scheduling keeps its own rules, and reaches the figures that the documentation quotes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scheduling_model import BATCH, SLOTS, STEPS, Figures, bench_lengths, bounded, recorded, sync, tail_batches, windows

LENGTHS = bench_lengths(0, longest=32)
PLAIN = sync(LENGTHS)


@pytest.mark.parametrize(("bound", "speed_up", "share"), [(1, 1.9, 0.53), (2, 2.6, 0.74), (4, 3.25, 0.92)])
def test_waiting_costs_little_and_bounds_staleness(bound: int, speed_up: float, share: float) -> None:
    figures = Figures.of(bounded(LENGTHS, bound), PLAIN, LENGTHS)
    assert figures.speed_up >= speed_up
    assert figures.share_of_bound >= share
    assert figures.staleness == bound
    assert abs(figures.length_bias) < 0.02


@pytest.mark.parametrize("bound", [1, 2])
def test_sorted_windows_are_faster_than_the_order_of_the_dataset(bound: int) -> None:
    known = recorded(LENGTHS, 640)
    assert bounded(LENGTHS, bound, windows(known, 10)).seconds < 0.9 * bounded(LENGTHS, bound).seconds


def test_on_policy_tail_batches_reach_half_as_much_again_for_wasted_tokens() -> None:
    known = recorded(LENGTHS, 640)
    tails = Figures.of(tail_batches(LENGTHS, 0.125, known, 5), PLAIN, LENGTHS)
    assert tails.speed_up >= 1.5
    assert 0 < tails.wasted < 0.3
    assert Figures.of(sync(LENGTHS, windows(known, 5)), PLAIN, LENGTHS).wasted == 0


def test_sync_uses_little_of_the_engine() -> None:
    assert 0.24 < LENGTHS[PLAIN.trained].sum() / SLOTS / PLAIN.seconds < 0.30


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 4), st.none() | st.floats(0, 3))
def test_no_group_is_trained_twice_or_too_stale_or_dropped(seed: int, bound: int, over_issue: float | None) -> None:
    steps = 5
    lengths = bench_lengths(seed, steps=steps)
    outcome = bounded(lengths, bound, steps=steps, over_issue=over_issue)
    assert len(set(outcome.trained)) == len(outcome.trained) == steps * BATCH
    assert max(outcome.staleness) <= bound
    assert outcome.seconds >= lengths[outcome.trained].sum() / SLOTS


@given(st.integers(0, 1000), st.integers(1, 10))
def test_windows_hold_every_group_once_and_nobody_waits_longer_than_two_of_them(seed: int, batches: int) -> None:
    predicted = np.random.default_rng(seed).normal(size=STEPS * BATCH)
    order = windows(predicted, batches)
    assert sorted(order) == list(range(len(predicted)))
    assert max(abs(place - group) for place, group in enumerate(order)) < batches * BATCH
