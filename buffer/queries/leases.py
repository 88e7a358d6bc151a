"""Who runs what: the producers that are alive, and the running groups of those that are not."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, Row, bindparam, delete, literal_column, select, update

from buffer import schema as t
from buffer.queries.dialects import Prepared, Upsert, chunks, clock, ids_of, is_among, literally
from buffer.queries.standing import ROWS, Standing, Standings
from buffer.queries.transaction import Transaction
from buffer.status import Status

# -- producers --------------------------------------------------------------------------------------------------

_REMEMBERED = 86_400.0
"""Seconds for which a producer whose lease ran out is kept: coming back, it asks whether its last transaction counts."""

_REGISTER = Upsert(t.producers, ["owner"], lambda new: {"expires_at": new.expires_at})


def register_producer(conn: Connection, owner: str, lease: float, host: str, pid: int, transactions: int) -> None:
    """Add a process to those that are alive."""
    now = clock(conn)
    row = {"owner": owner, "host": host, "pid": pid, "started_at": now, "expires_at": now + lease, "transactions": transactions}
    _REGISTER.execute(conn, row)


def forget_producers(tx: Transaction, *, alone: bool) -> None:
    """Forget producers that are long dead; all others, where it is known that none of them lives."""
    gone = t.producers.c.owner != tx.owner if alone else t.producers.c.expires_at < tx.now - _REMEMBERED
    tx.conn.execute(delete(t.producers).where(gone))


def other_producers(tx: Transaction) -> list[Row[Any]]:
    """Owners, and their process ids, whose leases have not run out yet."""
    columns = select(t.producers.c.owner, t.producers.c.pid)
    return list(tx.conn.execute(columns.where(t.producers.c.owner != tx.owner, t.producers.c.expires_at >= tx.now)))


def end_leases(tx: Transaction, owners: Sequence[str]) -> None:
    """Let the leases of producers run out now."""
    if owners:
        tx.conn.execute(update(t.producers).where(t.producers.c.owner.in_(owners)).values(expires_at=0.0))


def forget_producer(tx: Transaction) -> None:
    """This process ends: what it ran is nobody's any more."""
    tx.conn.execute(delete(t.producers).where(t.producers.c.owner == tx.owner))


def prolong(tx: Transaction, lease: float) -> None:
    """Renew this process's leases, where nobody could take them away: for those who look at the run."""
    tx.conn.execute(update(t.producers).where(t.producers.c.owner == tx.owner).values(expires_at=tx.now + lease))


_CLOCK: ColumnElement[float] = literal_column("extract(epoch FROM clock_timestamp())::float8", Float)
_RENEW = (
    update(t.producers)
    .where(t.producers.c.owner == bindparam("me"))
    .values(transactions=t.producers.c.transactions + 1, expires_at=_CLOCK + bindparam("lease", type_=Float))
    .returning(t.producers.c.transactions, t.producers.c.expires_at)
)


def renew(conn: Connection, owner: str, lease: float) -> tuple[int, float] | None:
    """Renew a producer's leases and count a transaction of its; gives its number and the time. None: it is not registered.

    For PostgreSQL only, where the server's clock is everybody's.
    """
    row = conn.execute(_RENEW, {"me": owner, "lease": lease}).one_or_none()
    return None if row is None else (row.transactions, row.expires_at - lease)


_TRANSACTIONS = select(t.producers.c.transactions).where(t.producers.c.owner == bindparam("me")).with_for_update()


def transactions_of(conn: Connection, owner: str) -> int | None:
    """The number of the producer's last transaction, once one that is still under way has ended."""
    return conn.scalar(_TRANSACTIONS, {"me": owner})


# -- groups -----------------------------------------------------------------------------------------------------

_ALIVE = select(t.producers.c.owner).where(t.producers.c.expires_at >= bindparam("now", type_=Float))
_NOT_ALIVE = t.groups.c.owner.not_in(_ALIVE) | t.groups.c.owner.is_(None)
_RUNNING = t.groups.c.status == literally(Status.RUNNING)
_ORPHANED = Standings(ROWS.where(_RUNNING, _NOT_ALIVE).order_by(t.groups.c.group_id).with_for_update(skip_locked=True))
_RUN_BY_ME = Standings(ROWS.where(_RUNNING, t.groups.c.owner == bindparam("me")).order_by(t.groups.c.group_id).with_for_update())


def running_without_owner(tx: Transaction) -> list[Standing]:
    """Running groups whose producer is not alive, and that nobody else releases at this moment."""
    return _ORPHANED.all(tx.conn, {"now": tx.now})


def running_here(tx: Transaction) -> list[Standing]:
    """Groups that this process runs."""
    return _RUN_BY_ME.all(tx.conn, {"me": tx.owner})


def consumed_without_owner(tx: Transaction) -> bool:
    """Whether any group is consumed, not committed, and was taken by a process that is not alive."""
    consumed = (t.groups.c.status == Status.CONSUMED.value, t.groups.c.consumed_step.is_not(None))
    return tx.conn.scalar(select(t.groups.c.group_id).where(*consumed, _NOT_ALIVE).limit(1), {"now": tx.now}) is not None


_LAST_TRANSITIONS = (
    select(t.transitions.c.source, t.transitions.c.target, t.transitions.c.owner)
    .where(t.transitions.c.group_id == bindparam("id"))
    .order_by(t.transitions.c.transition_id.desc())
)


def ran_and_lost(tx: Transaction, group_id: int) -> bool:
    """Whether this process once ran the group, and another ended that."""
    ended_by: str | None = None
    for row in tx.conn.execute(_LAST_TRANSITIONS, {"id": group_id}):
        if row.target == Status.RUNNING and row.owner == tx.owner:
            return ended_by is not None and ended_by != tx.owner
        ended_by = row.owner
    return False


_COUNT_CRASH = Prepared(update(t.groups).where(is_among(t.groups.c.group_id, "ids")).values(crashes=t.groups.c.crashes + 1))


def count_crash(conn: Connection, group_ids: Sequence[int]) -> None:
    """One more producer died running these."""
    for chunk in chunks(group_ids):
        _COUNT_CRASH.execute(conn, {"ids": ids_of(conn, chunk)})


_UNFINISHED = is_among(t.rollouts.c.group_id, "ids") & (t.rollouts.c.status != Status.COMPLETED.value)
_COUNT_INTERRUPTION = Prepared(update(t.rollouts).where(_UNFINISHED).values(interruptions=t.rollouts.c.interruptions + 1))
_FAIL = Prepared(update(t.rollouts).where(_UNFINISHED).values(status=Status.FAILED.value, error=bindparam("why")))


def count_interruption(conn: Connection, group_ids: Sequence[int]) -> None:
    """One more interruption for the unfinished members of groups that were released."""
    for chunk in chunks(group_ids):
        _COUNT_INTERRUPTION.execute(conn, {"ids": ids_of(conn, chunk)})


def fail_unfinished(conn: Connection, group_ids: Sequence[int], error: str) -> None:
    """The unfinished members of these groups failed."""
    for chunk in chunks(group_ids):
        _FAIL.execute(conn, {"ids": ids_of(conn, chunk), "why": error})
