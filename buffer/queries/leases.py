"""Who runs what: the producers that are alive, and the running groups of those that are not."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, literal, select, update

from buffer import schema as t
from buffer.queries.groups import ROWS, chunks
from buffer.queries.transaction import Transaction
from buffer.status import Status

_ALIVE = select(t.producers.c.owner)


def forget_producers(tx: Transaction, *, expired_only: bool) -> None:
    """Forget producers whose leases ran out, or all, where it is known that none of them lives."""
    statement = delete(t.producers)
    tx.conn.execute(statement.where(t.producers.c.expires_at < tx.now) if expired_only else statement)


def register_producer(tx: Transaction, host: str, pid: int, lease: float) -> None:
    """Add this process to those that are alive."""
    row = {"owner": tx.owner, "host": host, "pid": pid, "started_at": tx.now, "expires_at": tx.now + lease, "transactions": 0}
    tx.conn.execute(insert(t.producers), row)


def running_without_owner(conn: Connection) -> list[Row[Any]]:
    """Running groups whose producer is not alive."""
    # Literally, not as a parameter: only then does the planner see that the partial index holds what it needs.
    running = t.groups.c.status == literal(Status.RUNNING.value, literal_execute=True)
    orphaned = ROWS.where(running, t.groups.c.owner.not_in(_ALIVE) | t.groups.c.owner.is_(None))
    return list(conn.execute(orphaned.order_by(t.groups.c.group_id).with_for_update(skip_locked=True)))


def consumed_without_owner(conn: Connection) -> bool:
    """Whether any group is consumed, not committed, and was taken by a process that is not alive."""
    consumed = (t.groups.c.status == Status.CONSUMED.value, t.groups.c.consumed_step.is_not(None))
    found = select(t.groups.c.group_id).where(*consumed, t.groups.c.owner.not_in(_ALIVE) | t.groups.c.owner.is_(None)).limit(1)
    return conn.scalar(found) is not None


_COUNT_CRASH = update(t.groups).where(t.groups.c.group_id == bindparam("id")).values(crashes=t.groups.c.crashes + 1)


def count_crash(conn: Connection, group_ids: Sequence[int]) -> None:
    """One more producer died running these."""
    if group_ids:
        conn.execute(_COUNT_CRASH, [{"id": group_id} for group_id in group_ids])


def count_interruption(conn: Connection, group_ids: Sequence[int]) -> None:
    """One more interruption for the unfinished members of groups that were released."""
    for chunk in chunks(group_ids):
        statement = update(t.rollouts).where(_unfinished(chunk)).values(interruptions=t.rollouts.c.interruptions + 1)
        conn.execute(statement)


def fail_unfinished(conn: Connection, group_ids: Sequence[int], error: str) -> None:
    """The unfinished members of these groups failed."""
    for chunk in chunks(group_ids):
        conn.execute(update(t.rollouts).where(_unfinished(chunk)).values(status=Status.FAILED.value, error=error))


def _unfinished(group_ids: Sequence[int]) -> Any:
    return t.rollouts.c.group_id.in_(group_ids) & (t.rollouts.c.status != Status.COMPLETED.value)
