"""The buffer as a few dictionaries: what the public methods of `ReplayBuffer` do and answer, without a database.

Methods have the names and arguments of those that they stand for. Of the package only its vocabulary is used: rollouts,
statuses and their table. An error is one of the same class, raised before anything is changed.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from buffer import Fifo, FreshestFirst, ResumeReport, RolloutGroup, RolloutState, StalestFirst, Status
from buffer.amounts import NOTHING, Amount
from buffer.codec import encode_prompt
from buffer.errors import (
    CursorConflictError,
    DuplicateGroupError,
    IllegalTransitionError,
    LeaseLostError,
    ResumeRequiredError,
    StepError,
    UnknownGroupError,
)
from buffer.operations import DrawnRow
from buffer.policies import TakePolicy
from buffer.replay_buffer import DatasetCursor
from buffer.rollout import Position
from buffer.sharing import Share
from buffer.staleness import Timeline
from buffer.status import GROUP_WIDE, TRANSITIONS, member_status
from tests.buffer.model.described import contents

S = Status


def left_out_whole(members: Sequence[RolloutState]) -> Amount:
    """Whole responses of members that are left out."""
    failed = [m for m in members if m.error is not None and m.status in (S.COMPLETED, *GROUP_WIDE)]
    lengths = [m.response_ids.size for m in failed if m.finish_reason in ("stop", "length")]
    return Amount(0, len(lengths), sum(lengths))


LAST = 2**62
PROSE = "some words"
"""Stands in a history for a reason of which only its presence is compared."""

Change = tuple[Status | None, Status, int | None, int | None, str | None]


@dataclass
class Known:
    """A group as it is stored; its members have their own last outcomes."""

    group_id: int
    task: str
    status: Status
    members: list[RolloutState]
    position: Position | None
    filter_reason: str | None = None
    ready: int = 0
    changed: int = 0
    versions: tuple[int, int] | None = None  # the oldest and the newest trainable one, when it was stored last
    step: int | None = None
    place: int | None = None  # in the order of first consumption
    crashes: int = 0
    prompt: str = ""  # written once, when it was added
    pruned: bool = False
    lengths_before: tuple[int, ...] = ()  # of its responses, when it was pruned
    amount: Amount = NOTHING  # when it was stored last
    history: list[Change] = field(default_factory=list)

    def store(self, members: Iterable[RolloutState]) -> None:
        """Prompts are written once; all else is replaced."""
        for index, new in enumerate(members):
            kept, old = new.detached(), self.members[index]
            kept.row, kept.prompt, kept.sampling, kept.dropped = old.row, old.prompt, old.sampling, Amount()
            self.members[index] = kept
        self.count()

    def count(self) -> None:
        ended = [m for m in self.members if m.status in (S.COMPLETED, *GROUP_WIDE)]
        whole = [m for m in self.members if (m in ended or m.finish_reason in ("stop", "length")) and not (m in ended and m.error)]
        sizes = [m.response_ids.size for m in whole]
        self.amount = Amount(sum(m.response_ids.size for m in self.members), len(sizes), sum(sizes))
        found = [v for m in self.members for v, mask in zip(m.versions.tolist(), m.loss_mask.tolist(), strict=True) if mask]
        self.versions = (min(found), max(found)) if found else None

    @property
    def newest(self) -> int | None:
        return None if self.versions is None else self.versions[1]


@dataclass
class Task:
    """A task's dataset and its books."""

    moves: int = 0
    cursor: Any = None
    drawn: int = 0
    pruned: int = 0


class Reference:
    """A run, as a producer and trainer in one process see it."""

    def __init__(self, max_crashes: int) -> None:
        self.max_crashes = max_crashes
        self.groups: dict[int, Known] = {}
        self.tasks: dict[str, Task] = {}
        self.steps: dict[int, int | None] = {}
        self.shared: dict[int, list[Share]] = {}
        self.forks: tuple[int, ...] = ()
        self.last_id = self.ready = self.place = self.clock = self.rows_pruned_to = self.released = 0
        self.committed: int | None = None
        self.told: tuple[int, int] | None = None  # a version, and at which committed step
        self.needs_resume = False
        self.given_up: dict[tuple[str, str], Amount] = {}
        self.base: dict[int, list[RolloutState]] = {}  # what a running group's producer knows to be stored

    # -- helpers ----------------------------------------------------------------------------------------------------

    def copied(self) -> "Reference":
        """Another, that goes its own way. Members and what they hold are replaced, never changed."""
        other = copy.copy(self)
        other.groups = {group_id: copy.copy(known) for group_id, known in self.groups.items()}
        for known in other.groups.values():
            known.members, known.history = list(known.members), list(known.history)
        other.tasks = {name: copy.copy(task) for name, task in self.tasks.items()}
        other.shared = dict(self.shared)
        other.steps, other.base, other.given_up = dict(self.steps), dict(self.base), dict(self.given_up)
        return other

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.forks)

    def of(self, group_id: int) -> Known:
        if group_id not in self.groups:
            raise UnknownGroupError(group_id)
        return self.groups[group_id]

    def load(self, group_id: int) -> RolloutGroup:
        known = self.of(group_id)
        members = [member.detached() for member in known.members]
        for member in members:
            member.status, member.timeline = member_status(known.status, member.status), self.timeline
        return RolloutGroup(group_id, members, known.task, known.position, known.step, known.filter_reason)

    def effective(self, member: RolloutState) -> list[int]:
        """Of each trainable token the version that its staleness is counted from: as far behind a fork as it lay before it."""
        tokens = zip(member.versions.tolist(), member.timelines.tolist(), member.loss_mask.tolist(), strict=True)
        return [min(v, 2 * min(self.forks[timeline:], default=v) - v) for v, timeline, mask in tokens if mask]

    def oldest(self, known: Known) -> int:
        return min((version for member in known.members for version in self.effective(member)), default=LAST)

    def note(self, known: Known, target: Status, *, reason: str | None = None, step: int | None = None, new: bool = False) -> None:
        known.history.append((None if new else known.status, target, step, known.newest, reason))
        known.status, known.changed = target, self.clock

    def move(self, group_ids: Sequence[int], target: Status, reason: str | None = None) -> None:
        for group_id in group_ids:
            if target not in TRANSITIONS[self.of(group_id).status]:
                raise IllegalTransitionError(group_id)
        for group_id in group_ids:
            self.note(self.groups[group_id], target, reason=reason)

    def give_up(self, task: str, status: Status, members: Sequence[RolloutState]) -> None:
        """What a producer's members were reset from."""
        why = "interrupted" if status is S.INTERRUPTED else "restarted"
        failed = [m for m in members if m.error is not None and m.status in (S.COMPLETED, *GROUP_WIDE)]
        self.add_given_up(task, why, Amount.total(m.dropped for m in members if m not in failed))
        self.add_given_up(task, "left_out", Amount.total(m.dropped for m in failed))
        if status in (S.COMPLETED, S.FILTERED):
            self.add_given_up(task, "left_out", left_out_whole(members))

    def add_given_up(self, task: str, why: str, amount: Amount) -> None:
        self.given_up[task, why] = self.given_up.get((task, why), NOTHING) + amount

    def next_ready(self) -> int:
        self.ready += 1
        return self.ready

    def add(self, group: RolloutGroup) -> Known:
        known = Known(group.group_id, group.task_name, group.status, [r.detached() for r in group.rollouts], group.position)
        known.prompt = encode_prompt(known.members)
        known.ready, known.filter_reason = self.next_ready(), group.filter_reason
        known.count()
        self.give_up(known.task, group.status, known.members)
        for index, member in enumerate(known.members):
            known.members[index] = member.detached()
            known.members[index].dropped = Amount()
        self.groups[group.group_id] = known
        self.last_id = max(self.last_id, group.group_id)
        self.tasks.setdefault(group.task_name, Task()).drawn += 1
        error = next((r.error for r in group.rollouts if r.error), None)
        self.note(known, group.status, reason=group.filter_reason or error, new=True)
        return known

    def refuse_positions(self, groups: Iterable[RolloutGroup]) -> None:
        taken = Counter((known.task, known.position) for known in self.groups.values() if known.position is not None)
        taken.update((group.task_name, group.position) for group in groups if group.position is not None)
        if any(n > 1 for n in taken.values()):
            raise DuplicateGroupError

    def interrupt(self, group_ids: Iterable[int], reason: str | None = PROSE) -> None:
        for group_id in group_ids:
            self.note(self.groups[group_id], S.INTERRUPTED, reason=reason)
            self.change_unfinished(self.groups[group_id], lambda member: setattr(member, "interruptions", member.interruptions + 1))

    def change_unfinished(self, known: Known, change: Any) -> None:
        for index, member in enumerate(known.members):
            if member.status is not S.COMPLETED:
                known.members[index] = member.detached()
                change(known.members[index])

    def running(self) -> list[int]:
        return sorted(group_id for group_id, known in self.groups.items() if known.status is S.RUNNING)

    def of_task(self, task_name: str, *statuses: Status) -> list[Known]:
        return [known for known in self.groups.values() if known.task == task_name and (not statuses or known.status in statuses)]

    # -- opening ----------------------------------------------------------------------------------------------------

    def closed(self) -> None:
        """Where others may run them, groups are given back at once."""
        self.interrupt(self.running())

    def reopened(self) -> None:
        """The process died or closed the buffer, and another opened it."""
        running = self.running()
        self.released, self.base = len(running), {}
        poison = [group_id for group_id in running if self.groups[group_id].crashes + 1 >= self.max_crashes]
        self.interrupt(group_id for group_id in running if group_id not in poison)
        for group_id in running:
            self.groups[group_id].crashes += 1
        words = f"{self.max_crashes} producers in a row died while they ran it (max_crashes={self.max_crashes})"
        for group_id in poison:
            self.change_unfinished(self.groups[group_id], lambda member: _fail(member, words))
            self.note(self.groups[group_id], S.FAILED, reason=words)
        self.needs_resume = any(known.status is S.CONSUMED for known in self.groups.values())

    # -- storing and handing out ------------------------------------------------------------------------------------

    def put(self, group: RolloutGroup) -> None:
        status, known = group.status, self.groups.get(group.group_id)
        self.base.pop(group.group_id, None)
        if known is None:
            self.put_new(group, status)
            return
        if (known.task, len(known.members)) != (group.task_name, len(group.rollouts)):
            raise IllegalTransitionError
        if known.status is S.CONSUMED or status in (S.RUNNING, S.CONSUMED, S.ARCHIVED) or status not in TRANSITIONS[known.status]:
            raise IllegalTransitionError
        known.store(group.rollouts)
        self.give_up(known.task, status, group.rollouts)
        known.filter_reason, known.ready, known.crashes = group.filter_reason, self.next_ready(), 0
        error = next((r.error for r in group.rollouts if r.error), None)
        self.note(known, status, reason=group.filter_reason or error)

    def put_new(self, group: RolloutGroup, status: Status) -> None:
        if status in (S.RUNNING, S.CONSUMED, S.ARCHIVED, S.DISCARDED):
            raise IllegalTransitionError
        self.refuse_positions([group])
        for index, member in enumerate(self.add(group).members):
            if member.timeline.number < len(self.forks):
                # Its producer knows nothing of the rewinds: its tokens are of the weights that there are now.
                kept = member.detached()
                kept.timelines = kept.timelines * 0 + len(self.forks)
                self.groups[group.group_id].members[index] = kept

    def checkpoint(self, group: RolloutGroup) -> None:
        if group.status is not S.RUNNING:
            raise IllegalTransitionError(group.group_id)
        base = self.base.get(group.group_id)
        changed = [r for i, r in enumerate(group.rollouts) if base is None or contents(r) != contents(base[i])]
        if not changed:
            return
        self.base.pop(group.group_id, None)
        known = self.of(group.group_id)
        if known.status is not S.RUNNING:
            raise LeaseLostError
        self.base[group.group_id] = [r.detached() for r in group.rollouts]
        known.store(_without_unfinished_text(r) if r in changed else known.members[r.index] for r in group.rollouts)
        known.crashes, known.changed = 0, self.clock

    def take(
        self,
        task_name: str,
        n: int,
        *,
        step: int,
        version: int | None = None,
        policy: TakePolicy | None = None,
        oldest_version: int | None = None,
        whole: bool = False,
    ) -> list[RolloutGroup]:
        if self.needs_resume:
            raise ResumeRequiredError
        if n == 0:
            return []
        self.refuse_final(step)
        found = self.first(task_name, n, policy, oldest_version)
        return [] if whole and len(found) < n else self.consume(found, step, version)

    def first(self, task_name: str, n: int, policy: TakePolicy | None, oldest_version: int | None = None) -> list[Known]:
        def place(known: Known) -> tuple[int, ...]:
            by = {Fifo: 0, StalestFirst: self.oldest(known), FreshestFirst: -self.oldest(known)}[type(policy or Fifo())]
            return (LAST if known.place is None else known.place, by, known.ready)

        fresh = (known for known in self.of_task(task_name, S.COMPLETED) if oldest_version is None or self.oldest(known) >= oldest_version)
        return sorted(fresh, key=place)[:n]

    def consume(self, taken: Sequence[Known], step: int, version: int | None) -> list[RolloutGroup]:
        for known in taken:
            self.note(known, S.CONSUMED, step=step)
            self.place += 1
            known.step, known.place = step, self.place if known.place is None else known.place
        if taken:
            self.steps[step] = self.steps.get(step) if version is None else version
        return [self.load(known.group_id) for known in taken]

    def take_together(
        self, shares: Sequence[Share], *, step: int, version: int | None = None, oldest_versions: Mapping[str, int] | None = None
    ) -> dict[str, list[RolloutGroup]]:
        if self.needs_resume:
            raise ResumeRequiredError
        self.refuse_final(step)
        parts = [self.first(share.task_name, share.groups, None, (oldest_versions or {}).get(share.task_name)) for share in shares]
        if any(len(part) < share.groups for part, share in zip(parts, shares, strict=True)):
            return {}
        self.shared[step] = sorted(shares, key=lambda share: share.task_name)
        return {share.task_name: self.consume(part, step, version) for part, share in zip(parts, shares, strict=True)}

    def shares(self, *, before: int) -> list[Share]:
        return self.shared.get(max((step for step in self.shared if step < before), default=-1), [])

    def shared_tasks(self) -> list[str]:
        return sorted({share.task_name for shares in self.shared.values() for share in shares})

    def refuse_final(self, step: int) -> None:
        if self.committed is not None and step <= self.committed:
            raise StepError

    def check_take(self, task_name: str, step: int) -> None:
        if self.needs_resume:
            raise ResumeRequiredError
        self.refuse_final(step)

    def give_back(self, groups: Iterable[RolloutGroup]) -> None:
        """What a cancelled `take` leads to."""
        for group in groups:
            self.note(self.groups[group.group_id], S.COMPLETED, reason=PROSE)
            self.groups[group.group_id].step = None

    def commit(self, step: int, *, version: int | None = None) -> int:
        final = self.consumed(lambda at: at <= step)
        for known in final:
            self.note(known, S.ARCHIVED)
        before = self.committed or 0
        self.committed = step if step > before else self.committed
        if version is not None and step >= before:
            self.told = (version, step)
        return len(final)

    def consumed(self, when: Any) -> list[Known]:
        found = [known for known in self.groups.values() if known.status is S.CONSUMED and when(known.step)]
        return sorted(found, key=lambda known: known.place or 0)

    def resume(self, step: int, *, future: str = "keep") -> ResumeReport:
        if self.committed is not None and step < self.committed:
            raise StepError
        version = self.version_at(step)
        back = self.consumed(lambda at: at > step)
        for known in back:
            self.note(known, S.COMPLETED, reason=PROSE)
            known.step = None
        self.steps = {at: seen for at, seen in self.steps.items() if at <= step + 1}
        self.shared = {at: shares for at, shares in self.shared.items() if at <= step}
        expired = 0
        if self.steps or any(known.versions for known in self.groups.values()):
            self.forks += (version,)
            expired = self.expire_those(lambda member: _newest(member) > version) if future == "expire" else 0
        self.needs_resume = False
        counts = {name: self.counts(name) for name in self.task_names()}
        return ResumeReport(step, version, len(back), self.released, len(self.forks), expired, counts)

    def version_at(self, step: int) -> int:
        if self.told is not None and self.told[1] == step:
            return self.told[0]
        after, at = self.steps.get(step + 1), self.steps.get(step)
        return after if after is not None else step if at is None else at + 1

    def expire(self, task_name: str, *, version: int, max_staleness: int, level: str = "sequence") -> int:
        def stale(member: RolloutState) -> bool:
            found = [version - effective > max_staleness for effective in self.effective(member)]
            return any(found) if level == "sequence" else bool(found) and all(found)

        return self.expire_those(stale, task_name)

    def expire_those(self, gone: Any, task_name: str | None = None) -> int:
        """Reset the members of waiting groups that are `gone`."""
        expired = 0
        for known in self.groups.values():
            # A rewind looks at what has expired too.
            waiting = (S.COMPLETED, S.INTERRUPTED) if task_name else (S.COMPLETED, S.INTERRUPTED, S.EXPIRED)
            waits = known.status in waiting and task_name in (None, known.task)
            if not waits or not any(map(gone, known.members)):
                continue
            members = self.load(known.group_id).rollouts
            for member in filter(gone, members):
                member.reset()
                member.status = S.EXPIRED
            before, why = known.amount, "stale" if task_name else "undone"
            known.store(members)
            self.add_given_up(known.task, why, before - known.amount)
            if known.status is S.COMPLETED:
                self.add_given_up(known.task, "left_out", NOTHING - left_out_whole(members))
            if known.status is S.EXPIRED:  # more of its members did: no change of the group's status
                known.changed = self.clock
                continue
            expired += 1
            self.note(known, S.EXPIRED, reason=PROSE)
        return expired

    # -- producing --------------------------------------------------------------------------------------------------

    def cursor(self, task_name: str) -> DatasetCursor:
        task = self.tasks.get(task_name, Task())
        return DatasetCursor(task.moves, task.cursor)

    def draw(self, task_name: str, rows: Sequence[DrawnRow], *, group_size: int, moves: int, cursor: Mapping[str, Any]) -> list[int]:
        if self.tasks.get(task_name, Task()).moves != moves:
            raise CursorConflictError
        groups = [_drawn(self.last_id + n, row, group_size, task_name) for n, row in enumerate(rows, 1)]
        self.refuse_positions(groups)
        for group in groups:
            self.add(group)
        task = self.tasks.setdefault(task_name, Task())
        task.moves, task.cursor = moves + 1, cursor
        return [group.group_id for group in groups]

    def draw_and_start(self, task_name: str, rows: Sequence[DrawnRow], **options: Any) -> list[RolloutGroup]:
        ids = self.draw(task_name, rows, **options)
        return self.start([group_id for group_id in ids if self.of(group_id).status is S.PENDING])

    def claim(
        self,
        task_name: str,
        n: int,
        *,
        statuses: Sequence[Status],
        exclude: Collection[int] = (),
        order: str = "oldest",
        among: Sequence[int] | None = None,
    ) -> list[RolloutGroup]:
        def turn(known: Known) -> tuple[int, ...]:
            if among is not None:
                return (list(among).index(known.group_id) if known.group_id in among else LAST,)
            most = max(member.interruptions for member in known.members) if order == "most_interrupted" else 0
            return -most, LAST if known.place is None else known.place, known.ready

        waiting = [known for status in dict.fromkeys(statuses) for known in sorted(self.of_task(task_name, status), key=turn)]
        waiting = [known for known in waiting if among is None or known.group_id in among]
        return self.start([known.group_id for known in waiting if known.group_id not in exclude][:n])

    def start(self, group_ids: Sequence[int]) -> list[RolloutGroup]:
        self.move(group_ids, S.RUNNING)
        groups = [self.load(group_id) for group_id in group_ids]
        self.base |= {group.group_id: [r.detached() for r in group.rollouts] for group in groups}
        return groups

    def release(self, group_ids: Sequence[int]) -> None:
        for group_id in group_ids:
            self.base.pop(group_id, None)
        if any(self.of(group_id).status is not S.RUNNING for group_id in group_ids):
            raise IllegalTransitionError
        self.interrupt(group_ids)

    # -- asking -----------------------------------------------------------------------------------------------------

    def count(self, task_name: str, status: Status) -> int:
        return len(self.of_task(task_name, status))

    def tail_candidates(self, task_name: str, min_interruptions: int) -> int:
        interrupted = self.of_task(task_name, S.INTERRUPTED)
        often = [known for known in interrupted if any(member.interruptions >= min_interruptions for member in known.members)]
        return self.count(task_name, S.EXPIRED) + len(often)

    def oldest_versions(self, task_name: str) -> dict[Status, dict[int, int]]:
        return {s: dict(Counter(self.oldest(known) for known in self.of_task(task_name, s))) for s in (S.COMPLETED, S.INTERRUPTED)}

    def positions(self, task_name: str, status: Status, *, limit: int) -> dict[int, Position | None]:
        found = sorted(self.of_task(task_name, status), key=lambda known: (LAST if known.place is None else known.place, known.ready))
        return {known.group_id: known.position for known in found[:limit]}

    def response_lengths(self, task_name: str, positions: Collection[Position]) -> dict[Position, float]:
        finished = self.of_task(task_name, S.COMPLETED, S.CONSUMED, S.ARCHIVED, S.FILTERED)
        lengths = {k.position: sum(member.response_ids.size for member in k.members) / len(k.members) for k in finished if k.position}
        return {position: length for position, length in lengths.items() if position in positions}

    def lengths_by_prompt(self, task_name: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for _, known in sorted(self.groups.items()):
            sizes = known.lengths_before or [member.response_ids.size for member in known.members]
            lengths = [size for member, size in zip(known.members, sizes, strict=True) if member.finish_reason and size]
            if known.task == task_name and lengths:
                key = hashlib.blake2b(known.prompt.encode(), digest_size=16).hexdigest()
                found.setdefault(key, []).extend(lengths)
        return found

    def wait_for(self, task_name: str, status: Status, n: int = 1, *, timeout: float | None = None) -> int:
        """Nobody else changes anything meanwhile."""
        if (found := self.count(task_name, status)) < n:
            raise TimeoutError
        return found

    def counts(self, task_name: str) -> dict[Status, int]:
        return {status: self.count(task_name, status) for status in Status}

    def task_names(self) -> list[str]:
        return sorted(self.tasks)

    def last_step(self, task_name: str | None = None) -> int:
        return max((known.step or 0 for known in self.groups.values() if task_name in (None, known.task)), default=0)

    def next_step(self, task_name: str) -> int:
        return max(self.last_step(task_name), self.committed or 0) + 1

    def get(self, group_id: int) -> RolloutGroup:
        return self.load(group_id)

    def history(self, group_id: int) -> list[Change]:
        return self.of(group_id).history


def _without_unfinished_text(rollout: RolloutState) -> RolloutState:
    """Text is decoded anew until a member is completed: a checkpoint does not store it."""
    kept = rollout.detached()
    kept.text = kept.text if kept.status is S.COMPLETED else None
    return kept


def _newest(member: RolloutState) -> int:
    return max((v for v, mask in zip(member.versions.tolist(), member.loss_mask.tolist(), strict=True) if mask), default=-1)


def _fail(member: RolloutState, error: str) -> None:
    member.status, member.error = S.FAILED, error


def _drawn(group_id: int, drawn: DrawnRow, size: int, task_name: str) -> RolloutGroup:
    if drawn.error is None:
        return RolloutGroup.from_row(group_id, drawn.row, group_size=size, task_name=task_name, position=drawn.position)
    failed = [RolloutState(group_id, index, task_name, S.FAILED, error=drawn.error, row=drawn.row) for index in range(size)]
    return RolloutGroup(group_id, failed, task_name, drawn.position)
