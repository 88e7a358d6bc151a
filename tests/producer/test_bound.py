"""With the limit on what is on its way, and the rule when a batch is handed out, no group is too stale and none is dropped."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.bound import due, is_ready
from producer.issue import Load, bounded_issue, bounded_limit


@dataclass
class Run:
    """A run by the rules alone: groups by the version they began at, and a schedule that decides all else."""

    batch_size: int
    threshold: float
    max_staleness: int
    chance: random.Random
    version: int = 0
    waits_for_update: bool = False
    names: int = 0
    in_flight: dict[int, int] = field(default_factory=dict)
    left_behind: dict[int, int] = field(default_factory=dict)
    completed: dict[int, int] = field(default_factory=dict)
    handed_out: set[int] = field(default_factory=set)
    sizes: tuple[int, ...] = ()

    @property
    def coming(self) -> list[int]:
        """Sizes of the batches to come, at first those given, over and over; else all are alike."""
        first = self.version + int(self.waits_for_update)
        return [self.sizes[at % len(self.sizes)] if self.sizes else self.batch_size for at in range(first, first + 8)]

    def issue(self) -> None:
        """What was left behind goes on, with the version of its tokens; then fresh groups start."""
        load = Load(self.batch_size, len(self.completed), len(self.in_flight))
        updates = int(self.waits_for_update)
        coming = self.coming if self.sizes else None
        left = len(self.left_behind)
        wanted = bounded_issue(load, self.threshold, self.max_staleness, left_behind=left, updates_before=updates, coming=coming)
        for _ in range(wanted):
            if self.left_behind:
                group, oldest = self.left_behind.popitem()
            else:
                group, oldest, self.names = self.names, self.version, self.names + 1
            self.in_flight[group] = oldest
        unconsumed = len(self.completed) + len(self.in_flight)
        assert self.sizes or unconsumed <= bounded_limit(self.batch_size, self.threshold, self.max_staleness)

    def complete(self) -> None:
        group = self.chance.choice(list(self.in_flight))
        self.completed[group] = self.in_flight.pop(group)

    def interrupt(self) -> None:
        group = self.chance.choice(list(self.in_flight))
        self.left_behind[group] = self.in_flight.pop(group)

    def fail(self) -> None:
        """It failed or was filtered: it is not dropped for its age, and another takes its place."""
        group = self.chance.choice(list(self.in_flight))
        self.handed_out.add(group)
        del self.in_flight[group]

    def update(self) -> None:
        self.version, self.waits_for_update = self.version + 1, False

    @property
    def ready(self) -> bool:
        unfinished = [*self.in_flight.values(), *self.left_behind.values()]
        size, *later = self.coming
        versions = (self.version, self.max_staleness)
        if self.waits_for_update or size == 0:
            return not self.waits_for_update  # a batch of none is never waited for
        return is_ready(size, self.completed.values(), unfinished, *versions, later if self.sizes else None)

    def hand_out(self) -> None:
        batch = sorted(self.completed, key=lambda group: (self.completed[group], group))[: self.coming[0]]
        assert len(batch) == self.coming[0]
        for group in batch:
            staleness = self.version - self.completed.pop(group)
            assert 0 <= staleness <= self.max_staleness
            self.handed_out.add(group)
        rest = [*self.completed.values(), *self.in_flight.values(), *self.left_behind.values()]
        assert all(self.version - oldest < self.max_staleness for oldest in rest), "what is due was left out"
        self.waits_for_update = True

    def events(self) -> list[Callable[[], None]]:
        """What may happen beside starting groups, each as often as it is likely."""
        ends = [*[self.complete] * 6, self.interrupt, self.fail]
        return ends * bool(self.in_flight) + [self.hand_out] * 3 * self.ready + [self.update] * 3 * self.waits_for_update

    def step(self) -> None:
        """Something that may happen now; if nothing may, groups start. That something can happen then means no deadlock."""
        if self.chance.random() < 0.7 or not self.events():
            self.issue()
        events = self.events()
        assert events, "nothing runs, nothing may start, and no batch is ready"
        self.chance.choice(events)()

    def finish_one_batch(self) -> None:
        """Everything completes in an adverse order, the newest first; the batch has to come."""
        if self.waits_for_update:
            self.update()
        while not self.ready:
            self.issue()
            assert self.in_flight, "nothing runs, nothing may start, and no batch is ready"
            group = max(self.in_flight, key=lambda name: (self.in_flight[name], name))
            self.completed[group] = self.in_flight.pop(group)
        self.hand_out()


runs = st.builds(Run, st.integers(1, 6), st.floats(0, 6), st.integers(0, 5), st.randoms(use_true_random=False))


@settings(max_examples=300, deadline=None)
@given(runs, st.integers(0, 400))
def test_no_group_exceeds_the_bound_nothing_is_dropped_and_there_is_no_deadlock(run: Run, steps: int) -> None:
    for _ in range(steps):
        run.step()
    for _ in range(run.max_staleness + 2):
        run.finish_one_batch()
    on_the_way = {*run.in_flight, *run.left_behind, *run.completed}
    assert run.handed_out | on_the_way == set(range(run.names))
    assert not run.handed_out & on_the_way


@settings(max_examples=200, deadline=None)
@given(runs, st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(0, 400))
def test_nor_does_any_where_batches_differ_in_size_and_it_is_known_how(run: Run, sizes: list[int], steps: int) -> None:
    run.sizes, run.batch_size = tuple(sizes), max(sizes)
    test_no_group_exceeds_the_bound_nothing_is_dropped_and_there_is_no_deadlock.hypothesis.inner_test(run, steps)  # type: ignore[attr-defined]


@settings(max_examples=200, deadline=None)
@given(runs, st.integers(0, 400))
def test_up_to_twice_the_batch_only_what_is_due_is_waited_for(run: Run, steps: int) -> None:
    """Which is the whole rule there: a batch of completed groups, and nothing in flight that is due."""
    run.threshold = min(run.threshold, 1.0)
    for _ in range(steps):
        run.step()
        if not run.waits_for_update and len(run.completed) >= run.batch_size:
            unfinished = run.in_flight | run.left_behind
            assert run.ready == (not due(unfinished, run.version, run.max_staleness))


@given(st.integers(1, 5), st.lists(st.integers(0, 20), max_size=40), st.integers(20, 25), st.integers(0, 6))
def test_whatever_the_buffer_holds_a_batch_is_handed_out_when_nothing_is_in_flight(
    batch_size: int, completed: list[int], version: int, max_staleness: int
) -> None:
    """Also what no rule of ours let in: a smaller bound than before, a rewind. What is too stale then expires."""
    assert is_ready(batch_size, completed, [], version, max_staleness) == (len(completed) >= batch_size)


def test_counts_stand_for_versions() -> None:
    assert is_ready(2, Counter({3: 2}), Counter({3: 1}), 4, 2)
    assert not is_ready(2, Counter({4: 2}), Counter({2: 1}), 4, 2)


def test_groups_that_are_due_later_may_need_room_now() -> None:
    """Four groups of version 0 have to be handed out until version 2, two a batch: two of newer ones may not go before them."""
    assert not is_ready(2, completed=[1, 1], in_flight=[0, 0, 0, 0], version=1, max_staleness=2)
    assert not is_ready(2, completed=[0, 1, 1], in_flight=[0, 0, 0], version=1, max_staleness=2)
    assert is_ready(2, completed=[0, 0, 1, 1], in_flight=[0, 0], version=1, max_staleness=2)
    assert is_ready(2, completed=[1, 1], in_flight=[0, 0], version=1, max_staleness=2)


@pytest.mark.parametrize(("max_staleness", "named"), [(0, [7, 5, 6, 8]), (1, [7, 5, 6]), (2, [7]), (3, [])])
def test_what_is_due_comes_stalest_first(max_staleness: int, named: list[int]) -> None:
    assert due({5: 2, 6: 2, 7: 1, 8: 3}, version=3, max_staleness=max_staleness) == named
