"""A simulation runs the strategies of production: it agrees with a plain model of their rules, keeps them, and is the same each time."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop.engines.simulated_costs import CostModel
from benchmarks import scheduling_model as model
from buffer import ReplayBuffer
from producer import AsyncProduceStrategy, ProduceStrategy, SyncProduceStrategy
from producer.simulate.choices import Choice, options_of, parse_option
from producer.simulate.lengths import LognormalLengths, RecordedLengths
from producer.simulate.run import MakeStrategy, simulate
from producer.simulate.scenario import Scenario
from producer.simulate.sweep import compared, swept

SMALL = Scenario(LognormalLengths(24, median=20, longest=400), CostModel(slots=16, tokens_per_second=1.0), 4, 4, 6)


def waiting(bound: int, max_in_flight: int) -> MakeStrategy:
    def make(buffer: ReplayBuffer) -> ProduceStrategy:
        return AsyncProduceStrategy(
            buffer,
            staleness_threshold=bound,
            max_staleness=bound,
            in_flight="keep",
            max_in_flight=max_in_flight,
            checkpoint_tokens=None,
            checkpoint_seconds=None,
        )

    return make


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The plain model at the size of `SMALL`; gives its lengths."""
    monkeypatch.setattr(model, "SLOTS", SMALL.costs.slots)
    monkeypatch.setattr(model, "BATCH", SMALL.batch_size)
    return SMALL.lengths.drawn(20 * SMALL.batch_size, SMALL.group_size)


def test_synchronous_batches_take_as_long_as_in_the_plain_model(small_model: np.ndarray) -> None:
    outcome = simulate(SMALL, SyncProduceStrategy)
    assert outcome.seconds == pytest.approx(model.sync(small_model, steps=SMALL.steps).seconds, rel=1e-6)
    assert outcome.rollouts == SMALL.steps * SMALL.batch_size * SMALL.group_size
    assert outcome.staleness == {0: SMALL.steps * SMALL.batch_size}


@pytest.mark.parametrize("bound", [1, 4])
def test_bounded_production_takes_as_long_as_in_the_plain_model(bound: int) -> None:
    """Nearly: a group that waits for its slots while the weights are updated is a version older here."""
    lengths = LognormalLengths(320, median=50, longest=1600)
    scenario = Scenario(lengths, CostModel(slots=model.SLOTS, tokens_per_second=1.0), model.BATCH, model.MEMBERS, 4)
    outcome = simulate(scenario, waiting(bound, model.SLOTS + model.MEMBERS))
    expected = model.bounded(lengths.drawn(15 * model.BATCH, model.MEMBERS), bound, steps=4)
    assert outcome.seconds == pytest.approx(expected.seconds, rel=0.1)
    assert outcome.largest_staleness <= bound
    assert outcome.wasted == 0.0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3), st.sampled_from([4, 8, 20, 100]), st.floats(0, 5))
def test_a_hard_bound_holds_and_nothing_is_wasted_whatever_the_lengths(seed: int, bound: int, cap: int, update: float) -> None:
    lengths = LognormalLengths(7, median=10, tail=20, longest=300, seed=seed)
    scenario = Scenario(lengths, CostModel(slots=8, tokens_per_second=1.0, update_seconds=update), 3, 2, 8)
    outcome = simulate(scenario, waiting(bound, cap))
    assert outcome.rollouts == 8 * 3 * 2
    assert outcome.largest_staleness <= bound
    assert outcome.wasted == 0.0
    assert outcome.share_of_bound <= 1.0 + 1e-9


def test_two_simulations_are_the_same_and_leave_a_whole_database(tmp_path: Path) -> None:
    first = simulate(SMALL, waiting(2, 20), folder=tmp_path)
    assert replace(first, computed=0.0) == replace(simulate(SMALL, waiting(2, 20)), computed=0.0)
    with sqlite3.connect(tmp_path / "run.db") as conn:
        assert conn.execute("SELECT count(*) FROM groups WHERE status = 'archived'").fetchone() == (24,)
        assert conn.execute("SELECT count(*) FROM groups WHERE status = 'running'").fetchone() == (0,)


def test_an_update_makes_synchronous_batches_longer_by_what_it_takes() -> None:
    share = 0.1
    plain, *_ = compared(SMALL, [], update_share=share)
    without = simulate(SMALL, SyncProduceStrategy)
    update = share * without.seconds / SMALL.steps
    slower = replace(SMALL, costs=replace(SMALL.costs, update_seconds=update))
    measured = simulate(slower, SyncProduceStrategy)
    for name in ("seconds", "utilisation", "share_of_bound"):
        assert getattr(plain.outcome, name) == pytest.approx(getattr(measured, name), rel=1e-6)


def test_choices_by_name_are_the_strategies_of_production() -> None:
    choices = swept("async", {"in_flight": "keep", "order": "windows", "order_size": 8}, {"max_staleness": [1, 2]})
    rows = list(compared(SMALL, choices))
    assert [str(row.choice) for row in rows][1:] == [
        f"async in_flight=keep order=windows order_size=8 max_staleness={bound}" for bound in (1, 2)
    ]
    assert [row.outcome.largest_staleness <= bound for row, bound in zip(rows[1:], (1, 2), strict=True)] == [True, True]
    assert rows[0].speed_up == 1.0
    assert {"staleness_threshold", "max_staleness", "tail_batch_trigger_size", "order"} <= set(options_of("async"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Choice("fast"), "'fast' is unknown"),
        (lambda: Choice("sync", {"staleness_threshold": 1}), "takes no option 'staleness_threshold'"),
        (lambda: Choice("async", {"order": "random"}), "order='random' is unknown"),
        (lambda: Choice("async", {"order_size": 3}), "give order too"),
        (lambda: parse_option("max_staleness"), "NAME=VALUE"),
        (lambda: Scenario(SMALL.lengths, SMALL.costs, 0, 1, 1), "batch_size=0"),
        (lambda: Scenario(SMALL.lengths, CostModel(), 1, 1, 1), "tokens_per_second"),
    ],
)
def test_what_cannot_be_simulated_is_refused(make: type, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_values_are_read_as_they_are_meant() -> None:
    assert parse_option("max-staleness=1,0.5,none,TRUE,keep") == ("max_staleness", [1, 0.5, None, True, "keep"])


def test_recorded_lengths_are_simulated() -> None:
    lengths = RecordedLengths({"a": [3, 5], "b": [100, 90], "c": [1, 1]})
    outcome = simulate(Scenario(lengths, CostModel(slots=2, tokens_per_second=10.0), 3, 2, 2), SyncProduceStrategy)
    assert outcome.rollouts == 12
    assert outcome.seconds >= 2 * 10.0
