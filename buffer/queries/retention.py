"""Giving up what committed groups hold: payloads first, rows later."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, delete, false, func, or_, select, text, update

from buffer import schema as t
from buffer.queries.consumption import last_step_of
from buffer.queries.standing import amount_in
from buffer.queries.transaction import Transaction
from buffer.queries.values import meta_value, set_meta_value, task_names
from buffer.status import Status

_g = t.groups.c
_ARCHIVED = Status.ARCHIVED
_PRUNABLE = text(t.PRUNABLE)
_ORDER = (_g.consumed_step, _g.consumed_seq)


class Bounds(NamedTuple):
    """Up to which (step, order of consumption) payloads are given up, each bound included; None where it sets none."""

    step: int | None
    consumed_seq: int | None


def seq_before_last(conn: Connection, keep: int) -> int | None:
    """The order of consumption of the newest archived group with a payload that is not among the last `keep`."""
    newest = select(_g.consumed_seq).where(_PRUNABLE).order_by(_g.consumed_seq.desc()).offset(keep).limit(1)
    found: int | None = conn.scalar(newest)
    return found


def seq_within_bytes(conn: Connection, max_bytes: int) -> int | None:
    """The order of consumption up to which payloads have to go so that the others take `max_bytes` or less."""
    newer = func.sum(_g.payload_bytes).over(order_by=(_g.consumed_seq.desc()))
    sums = select(_g.consumed_seq, newer.label("bytes")).where(_PRUNABLE).subquery()
    found: int | None = conn.scalar(select(func.max(sums.c.consumed_seq)).where(sums.c.bytes > max_bytes))
    return found


def prunable(conn: Connection, bounds: Bounds, limit: int) -> list[Row[Any]]:
    """The archived groups whose payloads go first: rows of group_id and payload_bytes."""
    found = select(_g.group_id, _g.payload_bytes).where(_PRUNABLE, _beyond(bounds)).order_by(*_ORDER)
    return list(conn.execute(found.limit(limit)))


def _beyond(bounds: Bounds) -> ColumnElement[bool]:
    at_most = [(_g.consumed_step, bounds.step), (_g.consumed_seq, bounds.consumed_seq)]
    return or_(false(), *(column <= bound for column, bound in at_most if bound is not None))


_DROP_PAYLOAD = delete(t.payloads).where(t.payloads.c.group_id == bindparam("id"))
_MARK_PRUNED = update(t.groups).where(_g.group_id == bindparam("id")).values(pruned_at=bindparam("now"), payload_bytes=0)


def drop_payloads(tx: Transaction, group_ids: Sequence[int]) -> None:
    """Delete these groups' payloads, and note when."""
    if group_ids:
        tx.conn.execute(_DROP_PAYLOAD, [{"id": group_id} for group_id in group_ids])
        tx.conn.execute(_MARK_PRUNED, [{"id": group_id, "now": tx.now} for group_id in group_ids])


def pruned(conn: Connection, limit: int) -> list[Row[Any]]:
    """Archived groups without a payload, the oldest first; those of each task's last step stay, to tell which it was."""
    before_last = [
        and_(_g.task_name == task_name, _g.consumed_step < last_step_of(conn, _ARCHIVED, task_name)) for task_name in task_names(conn)
    ]
    found = select(_g.group_id, _g.task_name, _g.consumed_step, _g.tokens, _g.finished, _g.finished_tokens).where(
        _g.status == _ARCHIVED.value, _g.pruned_at.is_not(None), or_(false(), *before_last)
    )
    return list(conn.execute(found.order_by(_g.consumed_step).limit(limit)))


_DROP_GROUP = delete(t.groups).where(_g.group_id == bindparam("id"))
_ADD_PRUNED = update(t.tasks).where(t.tasks.c.task_name == bindparam("task")).values(pruned=t.tasks.c.pruned + 1)


def drop_groups(tx: Transaction, rows: Sequence[Row[Any]]) -> None:
    """Delete everything of these archived groups, and account for it."""
    if rows:
        tx.conn.execute(_DROP_GROUP, [{"id": row.group_id} for row in rows])  # the other tables' rows go with it
        tx.conn.execute(_ADD_PRUNED, [{"task": row.task_name} for row in rows])
        for row in rows:
            tx.pruned(row.task_name, 1, amount_in(row))
        last = max(row.consumed_step for row in rows)
        if last > rows_pruned_to(tx.conn):
            set_meta_value(tx.conn, "rows_pruned_to", str(last))


def rows_pruned_to(conn: Connection) -> int:
    """The last step of which a group's row was given up; 0 where there is none."""
    return int(meta_value(conn, "rows_pruned_to") or 0)
