"""How batches of several tasks were shared out among them, by step."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select

from buffer import schema as t

_s = t.shares.c

_FORGET = delete(t.shares).where(_s.step == bindparam("at"))
_FORGET_AFTER = delete(t.shares).where(_s.step > bindparam("at"))
_LAST = select(func.max(_s.step)).where(_s.step < bindparam("before")).scalar_subquery()
_SHARES = select(_s.task_name, _s.weight, _s.groups, _s.carried).where(_s.step == _LAST).order_by(_s.task_name)
_TASKS = select(_s.task_name).distinct().order_by(_s.task_name)


def record_shares(conn: Connection, step: int, shares: Sequence[dict[str, Any]]) -> None:
    """Write down how the batch of `step` was shared out, in place of what is there."""
    conn.execute(_FORGET, {"at": step})
    conn.execute(insert(t.shares), [{"step": step, **share} for share in shares])


def shares_before(conn: Connection, step: int) -> list[Row[Any]]:
    """How the last batch of several tasks before `step` was shared out: rows of task_name, weight, groups and carried."""
    return list(conn.execute(_SHARES, {"before": step}))


def shared_tasks(conn: Connection) -> list[str]:
    """The tasks that had a share of any batch."""
    return list(conn.scalars(_TASKS))


def drop_shares_after(conn: Connection, step: int) -> None:
    """Forget how batches later than `step` were shared out."""
    conn.execute(_FORGET_AFTER, {"at": step})
