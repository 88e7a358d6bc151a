"""Storing what came of groups, and what running ones decoded so far."""

from collections.abc import Sequence
from typing import Any

from buffer import queries as q
from buffer.codec import EncodedGroup
from buffer.errors import IllegalTransitionError, LeaseLostError
from buffer.queries import Transaction
from buffer.status import Status, check_transition

_STORABLE_NEW = frozenset({Status.PENDING, Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED, Status.FILTERED, Status.FAILED})

_ONLY_BY = {Status.RUNNING: "claim() or start()", Status.CONSUMED: "take()", Status.ARCHIVED: "commit()"}
"""Statuses that a `put` may not give: each comes with a record of its own."""


def put(tx: Transaction, encoded: Sequence[EncodedGroup]) -> list[None]:
    """Store what came of groups; groups that the database never saw are added and count as drawn."""
    if len({e.group_id for e in encoded}) < len(encoded):
        raise IllegalTransitionError("a group is stored twice at once")  # one by one, the second meets the first's result
    stored = q.known(tx.conn, [e.group_id for e in encoded])
    known = [e for e in encoded if e.group_id in stored]
    new = [e for e in encoded if e.group_id not in stored]
    if known:
        for e in known:
            _check_result(tx, e, stored[e.group_id])
        q.store_results(tx, known, stored)
    if new:
        _add(tx, new)
    return [None] * len(encoded)


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


def checkpoint(tx: Transaction, prefixes: Sequence[Any]) -> list[None]:
    """Add to running groups of ours what they decoded since they were stored last."""
    if len({e.group_id for e in prefixes}) < len(prefixes):
        raise IllegalTransitionError("a group is stored twice at once")  # one by one, they come in order
    if not q.add_prefixes(tx, prefixes):
        found = q.known(tx.conn, [e.group_id for e in prefixes])
        for e in prefixes:
            row = found.get(e.group_id)
            if row is None or row.status != Status.RUNNING or row.owner != tx.owner:
                what = f"group {e.group_id} of task {e.task_name!r}"
                raise IllegalTransitionError(f"{what} is not in the database") if row is None else lease_lost(what, row)
    return [None] * len(prefixes)
