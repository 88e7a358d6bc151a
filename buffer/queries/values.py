"""Run-wide values: counts, tasks and their cursors, the timeline, entries of the table of values."""

from sqlalchemy import Connection, bindparam, delete, select, update

from buffer import schema as t
from buffer.errors import CursorConflictError
from buffer.queries.dialects import Prepared, Upsert
from buffer.status import Status


def counts(conn: Connection, task_name: str) -> dict[Status, int]:
    """Groups of the task by status, every status present. What an edited database has beside them is told by an audit."""
    rows = conn.execute(select(t.counts.c.status, t.counts.c.n).where(t.counts.c.task_name == task_name))
    found: dict[str, int] = {row.status: row.n for row in rows}
    return {status: found.get(status.value, 0) for status in Status}


def count(conn: Connection, task_name: str, status: Status) -> int:
    """Groups of the task with this status; one row is read, whatever the size of the buffer."""
    found = conn.scalar(select(t.counts.c.n).where(t.counts.c.task_name == task_name, t.counts.c.status == status.value))
    return found or 0


def task_names(conn: Connection) -> list[str]:
    """The tasks that ever drew or stored a group."""
    return list(conn.scalars(select(t.tasks.c.task_name).order_by(t.tasks.c.task_name)))


_META = Prepared(select(t.meta.c.value).where(t.meta.c.key == bindparam("key")))


def meta_value(conn: Connection, key: str) -> str | None:
    """One entry of the table of run-wide values."""
    found: str | None = _META.value(conn, {"key": key})
    return found


_SET_META = Upsert(t.meta, ["key"], lambda new: {"value": new.value})


def set_meta_value(conn: Connection, key: str, value: str) -> None:
    """Store one run-wide value."""
    _SET_META.execute(conn, {"key": key, "value": value})


def forget_meta_value(conn: Connection, key: str) -> None:
    """Delete one run-wide value."""
    conn.execute(delete(t.meta).where(t.meta.c.key == key))


def cursor(conn: Connection, task_name: str) -> tuple[int, str | None]:
    """How often the task's dataset cursor moved, and where it stands (JSON; None before the first draw)."""
    row = conn.execute(select(t.tasks.c.moves, t.tasks.c.cursor).where(t.tasks.c.task_name == task_name)).one_or_none()
    return (0, None) if row is None else (row.moves, row.cursor)


_MOVE_CURSOR = Prepared(
    update(t.tasks)
    .where(t.tasks.c.task_name == bindparam("task"), t.tasks.c.moves == bindparam("before"))
    .values(moves=bindparam("after"), cursor=bindparam("at"), drawn=t.tasks.c.drawn + bindparam("n"))
)


def move_cursor(conn: Connection, task_name: str, moves: int, new_cursor: str, drawn: int) -> None:
    """Advance the cursor that had moved `moves` times; anything else means that somebody else draws for the task."""
    _ensure_task(conn, task_name)
    if _MOVE_CURSOR.execute(conn, {"task": task_name, "before": moves, "after": moves + 1, "at": new_cursor, "n": drawn}) != 1:
        raise CursorConflictError(
            f"the dataset cursor of task {task_name!r} was moved by another sampler; "
            "use one sampler for a task, and one task_name for a dataset"
        )


_ADD_DRAWN = Prepared(update(t.tasks).where(t.tasks.c.task_name == bindparam("task")).values(drawn=t.tasks.c.drawn + bindparam("n")))


def add_drawn(conn: Connection, task_name: str, drawn: int) -> None:
    """Account for groups that came in without a draw of ours."""
    if not _ADD_DRAWN.execute(conn, {"task": task_name, "n": drawn}):
        _ensure_task(conn, task_name)
        _ADD_DRAWN.execute(conn, {"task": task_name, "n": drawn})


_ENSURE_TASK = Upsert(t.tasks, ["task_name"])


def _ensure_task(conn: Connection, task_name: str) -> None:
    _ENSURE_TASK.execute(conn, {"task_name": task_name, "drawn": 0, "moves": 0})
