"""Storing what came of groups, and what running ones decoded so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from buffer import queries as q
from buffer.ahead import Preparable
from buffer.codec import EncodedGroup, GroupSnapshot, encode, encode_prefix
from buffer.errors import IllegalTransitionError, LeaseLostError, UnknownGroupError
from buffer.queries import Transaction
from buffer.staleness import Timeline
from buffer.status import TRANSITIONS, Status, check_transition

_STORABLE_NEW = frozenset({Status.PENDING, Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED, Status.FILTERED, Status.FAILED})

_ONLY_BY = {Status.RUNNING: "claim() or start()", Status.CONSUMED: "take()", Status.ARCHIVED: "commit()"}
"""Statuses that a `put` may not give: each comes with a record of its own."""


class Put(Preparable):
    """A group to be stored, and its rows once they are made: by `prepare`, on any thread and ahead of the operation, or by it."""

    __slots__ = ("_encoded", "snapshot")

    def __init__(self, snapshot: GroupSnapshot) -> None:
        self.snapshot = snapshot
        self.size = sum(_BYTES_A_TOKEN * rollout.response_ids.size for rollout in snapshot.rollouts)
        self.taken = False
        self._encoded: EncodedGroup | None = None

    def prepare(self) -> bool:
        """Make the rows, unless the operation has begun; what cannot be stored is refused there."""
        if self.taken:
            return False
        try:
            encoded = encode(self.snapshot)
        except ValueError:
            return False
        # From here on the operation may change the snapshot: what was made before it began is whole.
        if not self.taken:
            self._encoded = encoded
        return not self.taken

    def encoded(self, tx: Transaction, timeline: int) -> EncodedGroup:
        """The rows of a group that the database knows, its staleness counted as it is now, also where a rewind came meanwhile."""
        e = self._take() or encode(self.snapshot)
        return e if e.timeline == timeline else encode(self.snapshot, q.timeline(tx.conn))

    def encoded_new(self, timeline: Timeline) -> EncodedGroup:
        """The rows of a group that the database never saw: its tokens are of the weights that there are now."""
        prepared = self._take()
        numbers = {rollout.timeline.number for rollout in self.snapshot.rollouts}
        if prepared is not None and numbers == {timeline.number}:
            return prepared
        for rollout in self.snapshot.rollouts:
            if rollout.timeline.number < timeline.number:
                rollout.timeline, rollout.timelines = timeline, np.full(rollout.versions.size, timeline.number, np.int32)
        return encode(self.snapshot, timeline)

    def _take(self) -> EncodedGroup | None:
        """What was prepared before the operation began; done again after a rollback, it finds nothing, as the snapshot may be changed."""
        again, self.taken = self.taken, True
        prepared, self._encoded = self._encoded, None
        return None if again else prepared


_BYTES_A_TOKEN = 9
"""Its id, its log-probability and its mask."""


def put(tx: Transaction, puts: Sequence[Put]) -> list[None]:
    """Store what came of groups; groups that the database never saw are added and count as drawn."""
    ids = [p.snapshot.group_id for p in puts]
    if len(set(ids)) < len(puts):
        raise IllegalTransitionError("a group is stored twice at once")  # one by one, the second meets the first's result
    stored = q.known(tx.conn, ids)
    known = [p.encoded(tx, stored[p.snapshot.group_id].timeline) for p in puts if p.snapshot.group_id in stored]
    new = [p for p in puts if p.snapshot.group_id not in stored]
    if known:
        for e in known:
            _check_result(tx, e, stored[e.group_id])
        q.store_results(tx, known, stored)
    if new:
        timeline = q.timeline(tx.conn)
        _add(tx, [p.encoded_new(timeline) for p in new])
    return [None] * len(puts)


def _check_result(tx: Transaction, e: EncodedGroup, row: Any) -> None:
    what = f"group {e.group_id} of task {e.task_name!r}"
    if (row.task_name, row.members) != (e.task_name, len(e.rollouts)):
        raise IllegalTransitionError(
            f"{what} with {len(e.rollouts)} rollouts is stored as one of task {row.task_name!r} with {row.members}; "
            "give another group an id of its own"
        )
    if row.status == Status.RUNNING and row.owner != tx.owner:
        raise lease_lost(what, row)
    if row.status == Status.CONSUMED:
        raise IllegalTransitionError(f"{what} is consumed: resume() gives it back, commit() makes it final, put() does neither")
    if e.status in _ONLY_BY:
        raise IllegalTransitionError(f"{what} cannot be stored as {e.status}: that is done by {_ONLY_BY[e.status]}")
    if e.status not in TRANSITIONS[Status(row.status)] and q.ran_and_lost(tx, e.group_id):
        raise lease_lost(what, row)
    check_transition(Status(row.status), e.status, what)


def lease_lost(what: str, row: Any) -> LeaseLostError:
    """The error for a group that this process ran and that is not its own any more; `row` is how it stands."""
    now = f"{row.owner!r} runs it" if row.status == Status.RUNNING else f"it is {row.status}"
    return LeaseLostError(f"the lease of {what} ran out, and now {now}; drop what you have of it, or give the buffer a longer lease")


def _add(tx: Transaction, new: Sequence[EncodedGroup]) -> None:
    for e in new:
        if e.status not in _STORABLE_NEW:
            raise IllegalTransitionError(
                f"group {e.group_id} of task {e.task_name!r} is new and cannot be stored as {e.status}; "
                f"a new group may be {sorted(_STORABLE_NEW)}"
            )
    q.reserve_beyond(tx.conn, "group", max(e.group_id for e in new))
    for task_name in {e.task_name for e in new}:
        q.add_drawn(tx.conn, task_name, sum(e.task_name == task_name for e in new))
    q.insert_groups(tx, new)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A running group as it is now, and from which tokens on each changed member is new."""

    snapshot: GroupSnapshot
    starts: Mapping[int, int]


def checkpoint(tx: Transaction, requests: Sequence[Checkpoint]) -> list[None]:
    """Add to running groups of ours what they decoded since they were stored last."""
    if len({request.snapshot.group_id for request in requests}) < len(requests):
        raise IllegalTransitionError("a group is stored twice at once")  # one by one, they come in order
    timeline = q.timeline(tx.conn)
    if not q.add_prefixes(tx, [encode_prefix(request.snapshot, request.starts, timeline) for request in requests]):
        _refuse_foreign(tx, [request.snapshot for request in requests])
    return [None] * len(requests)


def _refuse_foreign(tx: Transaction, snapshots: Sequence[GroupSnapshot]) -> None:
    found = q.known(tx.conn, [s.group_id for s in snapshots])
    for s in snapshots:
        row, what = found.get(s.group_id), f"group {s.group_id} of task {s.task_name!r}"
        if row is None:
            raise UnknownGroupError(f"{what} is not in the database; only groups that were handed out can be checkpointed")
        if row.status != Status.RUNNING or row.owner != tx.owner:
            raise lease_lost(what, row)
