"""Shows that any sequence of calls leaves the buffer as a few dictionaries say it should be, through closing and reopening."""

import asyncio
import math
import tempfile
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from buffer import Fifo, FreshestFirst, ReplayBuffer, StalestFirst, Status, TakePolicy
from buffer.errors import CursorConflictError, IllegalTransitionError, ResumeRequiredError, StepError
from buffer.staleness import Timeline
from buffer.status import CLAIMABLE
from tests.buffer.groups import a_group, fill, ids, rows, url

S = Status
T = TypeVar("T")
TASKS = st.sampled_from(["math", "code"])
OUTCOMES = st.sampled_from([S.COMPLETED, S.COMPLETED, S.INTERRUPTED, S.FILTERED, S.FAILED])
POLICIES = st.sampled_from([Fifo(), StalestFirst(), FreshestFirst()])


@dataclass
class Modelled:
    """A group as the model knows it."""

    task: str
    status: Status
    ready: int
    version: int | None = None
    timeline: int = 0
    step: int | None = None
    consumed: int | None = None


class BufferModel(RuleBasedStateMachine):
    """The buffer beside a model of it; `groups` and a few numbers are all the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.groups: dict[int, Modelled] = {}
        self.moves: Counter[str] = Counter()
        self.offsets: Counter[str] = Counter()
        self.next_id, self.clock, self.consumptions = 1, 0, 0
        self.committed: int | None = None
        self.forks: list[int] = []
        self.needs_resume = False

    @initialize()
    def open(self) -> None:
        self.buffer = ReplayBuffer.open(url(Path(self.folder.name)))
        self.run(self.buffer.__aenter__())

    def teardown(self) -> None:
        try:
            if hasattr(self, "buffer"):
                self.run(self.buffer.close())
        finally:
            self.loop.close()
            self.folder.cleanup()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(call)

    # -- the model --------------------------------------------------------------------------------------------------

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def those(self, task: str, *statuses: Status) -> list[int]:
        """Ids by status in the order given, the rewound first as they were consumed, then by age."""
        chosen = [
            (statuses.index(g.status), math.inf if g.consumed is None else g.consumed, g.ready, group_id)
            for group_id, g in self.groups.items()
            if g.task == task and g.status in statuses
        ]
        return [group_id for *_, group_id in sorted(chosen)]

    def effective(self, known: Modelled) -> int:
        """The version from which the group's staleness is counted: as far behind the fork as it lay before it."""
        assert known.version is not None
        fork = min(self.forks[known.timeline :], default=known.version)
        return min(known.version, 2 * fork - known.version)

    def sampled(self, known: Modelled, version: int) -> None:
        known.ready, known.version, known.timeline = self.tick(), version, len(self.forks)

    def to_hand_out(self, task: str, policy: TakePolicy) -> list[int]:
        def key(group_id: int) -> tuple[float, ...]:
            g = self.groups[group_id]
            by = {Fifo: 0, StalestFirst: self.effective(g), FreshestFirst: -self.effective(g)}[type(policy)]
            return (0, g.consumed) if g.consumed is not None else (1, by, g.ready)

        return sorted(self.those(task, S.COMPLETED), key=key)

    # -- producing --------------------------------------------------------------------------------------------------

    @rule(task=TASKS, n=st.integers(0, 3))
    def draw(self, task: str, n: int) -> None:
        at = self.offsets[task]
        call = self.buffer.draw(task, rows(*range(at, at + n)), group_size=2, moves=self.moves[task], cursor={"offset": at + n})
        drawn = self.run(call)
        assert drawn == list(range(self.next_id, self.next_id + n))
        self.groups |= {group_id: Modelled(task, S.PENDING, self.tick()) for group_id in drawn}
        self.next_id += n
        self.offsets[task] += n
        self.moves[task] += 1

    @rule(task=TASKS)
    def draw_as_a_stranger(self, task: str) -> None:
        with pytest.raises(CursorConflictError):
            self.run(self.buffer.draw(task, rows(999), group_size=2, moves=self.moves[task] + 1, cursor={}))

    @rule(task=TASKS, n=st.integers(0, 4), statuses=st.lists(st.sampled_from(sorted(CLAIMABLE)), unique=True, max_size=4), data=st.data())
    def claim(self, task: str, n: int, statuses: list[Status], data: st.DataObject) -> None:
        exclude = data.draw(st.sets(st.sampled_from(sorted(self.groups)))) if self.groups else set()
        expected = [group_id for group_id in self.those(task, *statuses) if group_id not in exclude][:n]
        assert ids(self.run(self.buffer.claim(task, n, statuses=statuses, exclude=exclude))) == expected
        for group_id in expected:
            self.groups[group_id].status = S.RUNNING

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.groups)), unique=True, max_size=3))
        if all(self.groups[group_id].status in CLAIMABLE for group_id in wanted):
            assert ids(self.run(self.buffer.start(wanted))) == wanted
            for group_id in wanted:
                self.groups[group_id].status = S.RUNNING
        else:
            with pytest.raises(IllegalTransitionError):
                self.run(self.buffer.start(wanted))

    @rule(task=TASKS)
    def release(self, task: str) -> None:
        running = self.those(task, S.RUNNING)
        self.run(self.buffer.release(running))
        for group_id in running:
            self.groups[group_id].status = S.INTERRUPTED

    @rule(task=TASKS, outcome=OUTCOMES, version=st.integers(0, 4), data=st.data())
    def put_what_came_of_it(self, task: str, outcome: Status, version: int, data: st.DataObject) -> None:
        running = self.those(task, S.RUNNING)
        if not running:
            return
        group_id = data.draw(st.sampled_from(running))
        group = self.run(self.buffer.get(group_id))
        for rollout in group.rollouts:
            rollout.reset()
            fill(rollout, version=version)
            rollout.status = S.COMPLETED if outcome is S.FILTERED else outcome
        if outcome is S.FILTERED:
            group.mark(outcome)
        self.run(self.buffer.put(group))
        self.groups[group_id].status = outcome
        self.sampled(self.groups[group_id], version)

    @rule(
        task=TASKS, status=st.sampled_from([S.PENDING, S.COMPLETED, S.INTERRUPTED, S.EXPIRED, S.FAILED, S.FILTERED]), jump=st.integers(0, 3)
    )
    def put_a_new_one(self, task: str, status: Status, jump: int) -> None:
        group_id = self.next_id + jump
        self.run(self.buffer.put(a_group(group_id, status, task_name=task, version=jump, timeline=Timeline(tuple(self.forks)))))
        self.groups[group_id] = Modelled(task, status, 0)
        self.sampled(self.groups[group_id], jump)
        self.next_id = group_id + 1

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), status=st.sampled_from(sorted(S)))
    def put_over(self, data: st.DataObject, status: Status) -> None:
        group_id = data.draw(st.sampled_from(sorted(self.groups)))
        known = self.groups[group_id]
        allowed = {
            S.RUNNING: {S.COMPLETED, S.INTERRUPTED, S.FILTERED, S.FAILED},
            S.COMPLETED: {S.EXPIRED},
            S.INTERRUPTED: {S.EXPIRED},
            S.EXPIRED: {S.DISCARDED},
        }
        group = a_group(group_id, status, task_name=known.task, version=2, timeline=Timeline(tuple(self.forks)))
        if status in allowed.get(known.status, set()):
            self.run(self.buffer.put(group))
            known.status = status
            self.sampled(known, 2)
        else:
            with pytest.raises(IllegalTransitionError):
                self.run(self.buffer.put(group))

    # -- training ---------------------------------------------------------------------------------------------------

    @rule(task=TASKS, n=st.integers(0, 4), step=st.integers(1, 9), policy=POLICIES)
    def take(self, task: str, n: int, step: int, policy: TakePolicy) -> None:
        call = self.buffer.take(task, n, step=step, version=step, policy=policy)
        if self.needs_resume:
            with pytest.raises(ResumeRequiredError):
                self.run(call)
        elif n and self.committed is not None and step <= self.committed:
            with pytest.raises(StepError):
                self.run(call)
        else:
            self.check_taken(self.run(call), self.to_hand_out(task, policy)[:n], step)

    def check_taken(self, taken: list[Any], expected: list[int], step: int) -> None:
        assert ids(taken) == expected
        for group in taken:
            known = self.groups[group.group_id]
            assert (group.consumed_step, group.min_version, group.status) == (step, known.version, S.CONSUMED)
            known.status, known.step = S.CONSUMED, step
            self.consumptions += 1
            known.consumed = self.consumptions if known.consumed is None else known.consumed

    @rule(task=TASKS, version=st.integers(0, 6), max_staleness=st.integers(0, 3), level=st.sampled_from(["sequence", "token"]))
    def expire(self, task: str, version: int, max_staleness: int, level: str) -> None:
        stale = [
            g
            for g in self.groups.values()
            if g.task == task
            and g.status in (S.COMPLETED, S.INTERRUPTED)
            and g.version is not None
            and version - self.effective(g) > max_staleness
        ]
        assert self.run(self.buffer.expire(task, version=version, max_staleness=max_staleness, level=level)) == len(stale)
        for known in stale:
            known.status, known.version = S.EXPIRED, None
        assert self.run(self.buffer.expire(task, version=version, max_staleness=max_staleness, level=level)) == 0

    @rule(step=st.integers(0, 6))
    def commit(self, step: int) -> None:
        final = [g for g in self.groups.values() if g.status is S.CONSUMED and g.step is not None and g.step <= step]
        assert self.run(self.buffer.commit(step)) == len(final)
        for known in final:
            known.status = S.ARCHIVED
        if step > (self.committed or 0):
            self.committed = step

    @rule(step=st.integers(0, 6))
    def resume(self, step: int) -> None:
        if self.committed is not None and step < self.committed:
            with pytest.raises(StepError):
                self.run(self.buffer.resume(step))
            return
        report = self.run(self.buffer.resume(step))
        if any(known.version is not None for known in self.groups.values()):
            assert report.timeline == len(self.forks) + 1
        if report.timeline > len(self.forks):
            self.forks.append(report.version)
        rewound = [g for g in self.groups.values() if g.status is S.CONSUMED and g.step is not None and g.step > step]
        for known in rewound:
            known.status, known.step = S.COMPLETED, None
        self.needs_resume = False
        assert report.rewound == len(rewound)

    @rule()
    def close_and_reopen(self) -> None:
        self.run(self.buffer.close())
        self.open()
        for known in self.groups.values():
            if known.status is S.RUNNING:
                known.status = S.INTERRUPTED
        self.needs_resume = any(known.status is S.CONSUMED for known in self.groups.values())

    # -- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def the_buffer_is_as_the_model(self) -> None:
        if not hasattr(self, "buffer"):
            return
        report = self.run(self.buffer.audit())
        assert report.ok, report.problems
        for task in ("math", "code"):
            expected = Counter(known.status for known in self.groups.values() if known.task == task)
            assert self.run(self.buffer.counts(task)) == {status: expected[status] for status in Status}
        stored = self.run(self.buffer.query(limit=1000))
        assert [(g.group_id, g.task_name, g.status, g.consumed_step, g.min_version) for g in stored] == [
            (group_id, known.task, known.status, known.step, known.version) for group_id, known in sorted(self.groups.items())
        ]
        last = max((known.step or 0 for known in self.groups.values()), default=0)
        assert self.run(self.buffer.last_step()) == last


@pytest.mark.parametrize(("backend", "examples"), [("sqlite", 25), ("postgresql", 4)], indirect=["backend"])
def test_the_buffer_is_as_the_model(backend: str, examples: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        BufferModel,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
