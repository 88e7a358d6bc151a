"""Handing out batches, taking it back from a taker who was cancelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from buffer import queries as q
from buffer.errors import StepError
from buffer.operations.running import HandedOut
from buffer.policies import TakePolicy
from buffer.queries import Transaction
from buffer.status import Status


@dataclass(frozen=True, slots=True)
class Take:
    """A wish for up to `limit` completed groups, consumed at `step`; with `whole` for all of them or none, and none that is older.

    `among` names the only groups that are wanted, in the order in which they are; `policy` has no say then.
    """

    task_name: str
    limit: int
    step: int
    version: int | None
    policy: TakePolicy
    oldest_version: int | None = None
    whole: bool = False
    among: Sequence[int] | None = None


class Taken(list[int]):
    """Ids of groups in the order of handing out, and the number of the take that consumed them."""

    number: int | None = None


def take(tx: Transaction, requests: Sequence[Take]) -> list[Taken]:
    """Move completed groups to consumed."""
    return [_take_one(tx, request) for request in requests]


def next_step(conn: Connection, task_name: str) -> int:
    """The first step that lies behind the task's last one and behind what is final."""
    return max(q.last_step(conn, task_name), committed_step(conn) or 0) + 1


def check_step(conn: Connection, step: int) -> None:
    """Raise `StepError` if what is consumed at `step` is final already."""
    committed = committed_step(conn)
    if committed is not None and step <= committed:
        raise StepError(f"step={step} lies at or before the committed step {committed}; take at step {committed + 1} or later")


def _take_one(tx: Transaction, request: Take) -> Taken:
    check_step(tx.conn, request.step)
    rows = _ready(tx, request)
    if request.whole and len(rows) < request.limit:
        return Taken()
    taken = Taken(row.group_id for row in rows)
    taken.number = q.consume(tx, rows, request.step, request.version)
    return taken


def _ready(tx: Transaction, request: Take) -> list[Any]:
    if request.among is not None:
        return q.claimable_among(tx.conn, request.task_name, Status.COMPLETED, request.among)[: request.limit]
    return q.first_completed(tx.conn, request.task_name, request.limit, request.policy, request.oldest_version)


def give_back(tx: Transaction, requests: Sequence[HandedOut]) -> list[None]:
    """Undo a take whose taker was cancelled before it had the groups, or that met a damaged one."""
    for request in requests:
        taken: Taken = request.outcome or Taken()
        found = q.known(tx.conn, taken)
        # Only this take: a rewind may have come between, and the groups may be another taker's by now.
        still = [found[group_id] for group_id in taken if found[group_id].take == taken.number]
        q.unconsume(tx, [row for row in still if row.status == Status.CONSUMED], "its taker was cancelled, or could not have it")
    return [None] * len(requests)


def committed_step(conn: Connection) -> int | None:
    """The last committed step; None before the first commit."""
    stored = q.meta_value(conn, "committed_step")
    return None if stored is None else int(stored)
