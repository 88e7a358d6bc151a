"""What a producer asks to decide which groups to run next."""

from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, func, select, text

from buffer import schema as t
from buffer.queries.groups import ROWS
from buffer.queries.values import count
from buffer.status import Status

_g, _r = t.groups.c, t.rollouts.c

ClaimOrder = Literal["oldest", "most_interrupted"]

_INTERRUPTIONS = select(func.coalesce(func.max(_r.interruptions), 0)).where(_r.group_id == _g.group_id).scalar_subquery()
_WAITING = (
    ROWS.where(_g.task_name == bindparam("task"), _g.status == bindparam("status")).limit(bindparam("n")).with_for_update(skip_locked=True)
)
_CLAIMABLE = {
    "oldest": _WAITING.order_by(_g.consumed_seq, _g.ready_seq),
    "most_interrupted": _WAITING.order_by(_INTERRUPTIONS.desc(), _g.consumed_seq, _g.ready_seq),
}


def claimable(conn: Connection, task_name: str, status: Status, limit: int, order: ClaimOrder = "oldest") -> list[Row[Any]]:
    """The first groups of the task that wait in `status` and that nobody else claims at this moment.

    "most_interrupted" looks at all of them, ties by age.
    """
    return list(conn.execute(_CLAIMABLE[order], {"task": task_name, "status": status.value, "n": limit}))


_OFTEN = select(_r.group_id).where(_r.group_id == _g.group_id, _r.interruptions >= bindparam("at_least")).correlate(t.groups).exists()
_INTERRUPTED_OFTEN = (
    select(func.count()).select_from(t.groups).where(_g.task_name == bindparam("task"), _g.status == Status.INTERRUPTED.value, _OFTEN)
)


def tail_candidates(conn: Connection, task_name: str, min_interruptions: int) -> int:
    """Expired groups of the task, and those that wait interrupted with a member that was interrupted so often."""
    interrupted: int = conn.scalars(_INTERRUPTED_OFTEN, {"task": task_name, "at_least": min_interruptions}).one()
    return count(conn, task_name, Status.EXPIRED) + interrupted


_OLDEST_VERSIONS = (
    select(_g.status, _g.oldest_version, func.count())
    .where(_g.task_name == bindparam("task"), text(t.MAY_EXPIRE))
    .group_by(_g.status, _g.oldest_version)
)


def oldest_versions(conn: Connection, task_name: str) -> dict[Status, dict[int, int]]:
    """How many completed and how many interrupted groups of the task have which oldest version, see `buffer.staleness`."""
    found: dict[Status, dict[int, int]] = {Status.COMPLETED: {}, Status.INTERRUPTED: {}}
    for status, version, n in conn.execute(_OLDEST_VERSIONS, {"task": task_name}):
        found[Status(status)][version] = n
    return found
