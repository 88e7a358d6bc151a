"""Claiming groups to run, and releasing those that nobody runs any more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from buffer import queries as q
from buffer.processes import is_dead
from buffer.queries import ClaimOrder, Transaction
from buffer.status import Status, parse_status


@dataclass(frozen=True, slots=True)
class Opening:
    """A process that begins to write, and is registered already.

    `alone`: no other process writes to this database, so that whoever did is dead. `max_crashes`: producers that may die
    running a group, None for any number.
    """

    alone: bool
    max_crashes: int | None


class Opened(NamedTuple):
    """Whether batches of dead processes are consumed and not committed, and how many groups were released."""

    needs_resume: bool
    released: int


def opened(tx: Transaction, requests: Sequence[Opening]) -> list[Opened]:
    """Release what dead processes ran."""
    return [_open_one(tx, request) for request in requests]


def _open_one(tx: Transaction, request: Opening) -> Opened:
    # Written at every opening: a file or disk that takes nothing is found out now, not at the first result.
    q.set_meta_value(tx.conn, "opened_at", datetime.now(UTC).isoformat())
    q.forget_producers(tx, alone=request.alone)
    released = release_dead(tx, request.max_crashes)
    return Opened(q.consumed_without_owner(tx), released)


def closing(tx: Transaction) -> None:
    """Give back what this process runs, and forget it: nobody has to wait until its leases run out."""
    _release(tx, q.running_here(tx), "its producer closed the buffer")
    q.forget_producer(tx)


def release_dead(tx: Transaction, max_crashes: int | None) -> int:
    """Interrupt the running groups of producers that are not alive; fail those that took too many with them."""
    q.end_leases(tx, [row.owner for row in q.other_producers(tx) if is_dead(row.owner, row.pid)])
    rows = q.running_without_owner(tx)
    poison = [row for row in rows if max_crashes is not None and row.crashes + 1 >= max_crashes]
    others = [row for row in rows if row not in poison]
    _release(tx, others, "its producer died, or its lease ran out")
    q.count_crash(tx.conn, [row.group_id for row in rows])
    if poison:
        reason = f"{max_crashes} producers in a row died while they ran it (max_crashes={max_crashes})"
        q.fail_unfinished(tx.conn, [row.group_id for row in poison], reason)
        q.move(tx, poison, Status.FAILED, reason=reason)
    return len(rows)


def counted(tx: Transaction, requests: Sequence[None]) -> list[dict[tuple[str, Status], int]]:
    """The stored counts by task and status."""
    return [{(task, parse_status(status)): n for (task, status), n in q.stored_counts(tx.conn).items()}] * len(requests)


@dataclass(frozen=True, slots=True)
class Claim:
    """A wish for up to `limit` waiting groups of a task, from the first of `statuses` that has any, and so on; of each in `order`.

    `among` names the only groups that are wanted, in the order in which they are.
    """

    task_name: str
    statuses: Sequence[Status]
    limit: int
    exclude: frozenset[int]
    order: ClaimOrder = "oldest"
    among: Sequence[int] | None = None
    interrupted_below: int | None = None


def claim(tx: Transaction, claims: Sequence[Claim]) -> list[list[int]]:
    """Move waiting groups to running; gives their ids, each to one claimant."""
    return [_claim_one(tx, request) for request in claims]


def _claim_one(tx: Transaction, request: Claim) -> list[int]:
    rows: list[Any] = []
    for status in dict.fromkeys(request.statuses):
        if len(rows) < request.limit:
            wanted = request.limit - len(rows)
            waiting = _waiting(tx, request, status, wanted + len(request.exclude))
            rows += [row for row in waiting if row.group_id not in request.exclude][:wanted]
    q.move(tx, rows, Status.RUNNING)
    return [row.group_id for row in rows]


def _waiting(tx: Transaction, request: Claim, status: Status, limit: int) -> list[Any]:
    if request.among is not None:
        return q.claimable_among(tx.conn, request.task_name, status, request.among)
    return q.claimable(tx.conn, request.task_name, status, limit, request.order, request.interrupted_below)


def start(tx: Transaction, requests: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Move given groups to running; gives their ids."""
    for group_ids in requests:
        q.move(tx, q.rows_of(tx.conn, group_ids), Status.RUNNING)
    return list(requests)


def release(tx: Transaction, requests: Sequence[Sequence[int]]) -> list[None]:
    """Running groups that will not be run after all become interrupted, with what was stored of them.

    Those whose lease was lost are left to whoever has them now.
    """
    for group_ids in requests:
        rows = q.rows_of(tx.conn, group_ids)
        _release(tx, [row for row in rows if row.status != Status.RUNNING or row.owner == tx.owner], "released by its producer")
    return [None] * len(requests)


def _release(tx: Transaction, rows: Sequence[Any], reason: str) -> None:
    q.move(tx, rows, Status.INTERRUPTED, reason=reason)
    q.count_interruption(tx.conn, [row.group_id for row in rows])


def fail(tx: Transaction, requests: Sequence[Mapping[int, str]]) -> list[None]:
    """Groups that this process runs fail, each for its reason."""
    for reasons in requests:
        for row in q.known(tx.conn, list(reasons)).values():
            if row.status == Status.RUNNING and row.owner == tx.owner:
                q.fail_unfinished(tx.conn, [row.group_id], reasons[row.group_id])
                q.move(tx, [row], Status.FAILED, reason=reasons[row.group_id])
    return [None] * len(requests)


class HandedOut(Protocol):
    """A request that named groups, as the writer's thread knows it; `outcome` is None where nothing came of it."""

    outcome: Any


def release_claimed(tx: Transaction, requests: Sequence[HandedOut]) -> list[None]:
    """Undo a claim whose claimant was cancelled before it had the groups."""
    for request in requests:
        found = q.known(tx.conn, list(request.outcome or ()))
        still = [row for row in found.values() if row.status == Status.RUNNING and row.owner == tx.owner]
        _release(tx, still, "its claimant was cancelled")
    return [None] * len(requests)
