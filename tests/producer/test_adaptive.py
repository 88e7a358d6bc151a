"""The cap on rollouts in flight finds what an engine can decode at once, stays near it, and never leaves its bounds."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop.engines.base import EngineLoad
from producer.adaptive import AdaptiveLimit

loads = st.none() | st.builds(EngineLoad, st.integers(0, 500), st.integers(0, 500), st.integers(0, 20))


class Queue:
    """An engine of some slots that keeps a share of what runs preempted beyond its room in the cache."""

    def __init__(self, slots: int, room: int) -> None:
        self.slots, self.room, self.in_flight, self.preemptions = slots, room, 0, 0

    def look(self, limit: int) -> tuple[EngineLoad, int]:
        """One round: a sixteenth of what runs completes, and rollouts start up to the limit."""
        self.in_flight -= min(self.slots, self.in_flight + 15) // 16
        self.in_flight = max(self.in_flight, limit)
        running = min(self.slots, self.in_flight)
        if running > self.room:
            self.preemptions += running - self.room
            running = self.room
        return EngineLoad(running, self.in_flight - running, self.preemptions), self.in_flight


@pytest.mark.parametrize("start", [8, 64, 2000])
@pytest.mark.parametrize(("slots", "room"), [(16, 1000), (64, 1000), (256, 1000), (256, 100)])
def test_it_comes_near_what_the_engine_can_run_and_stays_there(slots: int, room: int, start: int) -> None:
    engine, state, seen = Queue(slots, room), AdaptiveLimit(start=start), list[int]()
    for turn in range(4000):
        load, in_flight = engine.look(state.limit)
        state = state.after(load, in_flight)
        if turn >= 3500:
            seen.append(load.running + load.waiting)
    best = min(slots, room)
    assert 0.7 * best <= min(seen)
    assert max(seen) <= 1.1 * best + 2 * state.increase
    assert sum(min(n, best) for n in seen) / len(seen) >= 0.85 * best, "the engine is kept busy"


@given(st.lists(st.tuples(loads, st.integers(0, 1000)), max_size=60), st.integers(1, 20), st.integers(0, 400))
def test_it_never_leaves_its_bounds_and_moves_the_right_way(seen: list[tuple[EngineLoad | None, int]], smallest: int, more: int) -> None:
    state = AdaptiveLimit(smallest=smallest, largest=smallest + more)
    for load, in_flight in seen:
        before, state = state, state.after(load, in_flight)
        assert smallest <= state.limit <= smallest + more
        if load is None or (load.running == 0 and load.waiting > 0):
            assert state == before
        elif load.waiting > max(1, 0.05 * load.running):
            assert state.limit <= before.limit
        if state.limit > before.limit:
            assert in_flight >= before.limit, "what does not hold back is not raised"


def test_a_fall_is_not_repeated_before_it_shows() -> None:
    state = AdaptiveLimit(start=100).after(EngineLoad(80, 20), in_flight=100)
    assert state.limit == 80
    assert state.after(EngineLoad(80, 15), in_flight=95).limit == 80
    assert state.after(EngineLoad(70, 10), in_flight=80).limit == 64


def test_a_preemption_is_a_signal_once() -> None:
    first = AdaptiveLimit(start=100).after(EngineLoad(50, 0, preemptions=7), in_flight=50)
    assert first.limit == 100, "what was preempted before is no news"
    second = first.after(EngineLoad(50, 0, preemptions=8), in_flight=50)
    assert second.limit == 80
    assert second.after(EngineLoad(80, 0, preemptions=8), in_flight=80).limit == 84


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"smallest": 0}, "smallest=0"),
        ({"smallest": 9, "largest": 8}, "largest=8"),
        ({"start": 5000}, "start=5000"),
        ({"increase": 0}, "increase=0"),
        ({"decrease": 1}, "decrease=1"),
        ({"queue": -1}, "queue=-1"),
        ({"largest": 2.5}, "largest=2.5"),
    ],
)
def test_bad_bounds_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        AdaptiveLimit(**options)
