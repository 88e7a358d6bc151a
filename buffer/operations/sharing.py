"""Taking a batch of several tasks at once: all of it, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from buffer import queries as q
from buffer.operations.consuming import Take, Taken, check_step
from buffer.queries import Transaction


@dataclass(frozen=True, slots=True)
class TakeTogether:
    """A wish for completed groups of several tasks, all consumed at one step; `shares` are written down with it."""

    step: int
    version: int | None
    takes: Sequence[Take]
    shares: Sequence[dict[str, Any]]


def take_together(tx: Transaction, requests: Sequence[TakeTogether]) -> list[Taken]:
    """Move completed groups to consumed: as many as each part asks for, or none of any."""
    return [_take_one(tx, request) for request in requests]


def _take_one(tx: Transaction, request: TakeTogether) -> Taken:
    check_step(tx.conn, request.step)
    rows = []
    for part in request.takes:
        found = q.first_completed(tx.conn, part.task_name, part.limit, part.policy, part.oldest_version)
        if len(found) < part.limit:
            return Taken()
        rows += found
    taken = Taken(row.group_id for row in rows)
    taken.number = q.consume(tx, rows, request.step, request.version)
    q.record_shares(tx.conn, request.step, request.shares)
    return taken
