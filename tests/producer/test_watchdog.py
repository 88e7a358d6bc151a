"""A stall is told exactly when nothing ended for too long while something runs, and by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.watchdog import RunningRollout, Watchdog

times = st.floats(0, 1e6)
rollouts = st.lists(st.builds(RunningRollout, st.text("abc", min_size=1, max_size=3), times, st.integers(0, 1000)), max_size=12)


@given(rollouts, st.lists(st.floats(0.001, 1e4), max_size=20), st.none() | times, times)
def test_it_barks_from_the_due_time_on_and_not_before(
    running: list[RunningRollout], took: list[float], last_end: float | None, now: float
) -> None:
    watchdog = Watchdog()
    due = watchdog.due(running, took, last_end)
    stall = watchdog.look(running, took, last_end, now)
    assert (due is None) == (not running)
    assert (stall is None) == (due is None or now < due)
    if stall is not None:
        assert stall.quiet >= stall.allowed * (1 - 1e-9)
        assert sorted(stall.running, key=lambda r: r.since)[0].since == stall.running[0].since
        assert len(stall.running) == len(running)


def test_the_median_of_recent_groups_sets_the_time() -> None:
    running, watchdog = [RunningRollout("math-1-0", 0.0, 5)], Watchdog(factor=10, least_seconds=60)
    assert watchdog.due(running, [20.0, 30.0, 4000.0], last_end=100.0) == 100 + 300
    assert watchdog.due(running, [1.0, 2.0, 3.0], last_end=100.0) == 100 + 60, "short groups do not make it nervous"
    assert watchdog.due(running, [], last_end=None) == 900, "before the first end there is no median"


def test_an_idle_time_is_no_stall() -> None:
    running = [RunningRollout("math-9-0", 5000.0, 0)]
    assert Watchdog().look(running, [10.0], last_end=100.0, now=5050.0) is None
    assert Watchdog().look([], [10.0], last_end=100.0, now=1e9) is None


def test_the_report_names_rollouts_their_tokens_and_since_when() -> None:
    running = [RunningRollout(f"math-{n}-0", 100.0 - n, 512 + n) for n in range(10)]
    stall = Watchdog().look(running, [1.0], last_end=90.0, now=171.0)
    assert stall is not None
    assert str(stall).startswith("no group ended for 80 s, 60 s are allowed; 10 rollouts run: math-9-0 (521 tokens, for 80 s), math-8-0")
    assert "and 2 more" in str(stall)


@pytest.mark.parametrize("options", [{"factor": 0.5}, {"least_seconds": 0}, {"first_seconds": -1}, {"factor": float("nan")}])
def test_bad_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Watchdog(**options)
