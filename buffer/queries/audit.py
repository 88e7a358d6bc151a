"""What an audit counts one by one, and compares with what the counters say."""

from sqlalchemy import Connection, func, select

from buffer import schema as t
from buffer.status import Status


def drawn_by_task(conn: Connection) -> dict[str, int]:
    """Prompts ever drawn, by task."""
    return {row.task_name: row.drawn for row in conn.execute(select(t.tasks.c.task_name, t.tasks.c.drawn))}


def counted_rows(conn: Connection) -> dict[tuple[str, Status], int]:
    """Rows by task and status, counted one by one: what `counts` must say."""
    rows = conn.execute(select(t.groups.c.task_name, t.groups.c.status, func.count()).group_by(t.groups.c.task_name, t.groups.c.status))
    return {(task, Status(status)): n for task, status, n in rows}


def stored_counts(conn: Connection) -> dict[tuple[str, Status], int]:
    """The counter table, zeros left out."""
    rows = conn.execute(select(t.counts.c.task_name, t.counts.c.status, t.counts.c.n).where(t.counts.c.n != 0))
    return {(task, Status(status)): n for task, status, n in rows}


def orphans(conn: Connection) -> dict[str, int]:
    """Rows of the other tables that belong to no group, and groups that lack what they need."""
    no_group = {
        table.name: select(func.count())
        .select_from(table.outerjoin(t.groups, t.groups.c.group_id == table.c.group_id))
        .where(t.groups.c.group_id.is_(None))
        for table in (t.rollouts, t.prompts, t.payloads)
    }
    found = {f"rows of {name} without a group": conn.scalar(statement) or 0 for name, statement in no_group.items()}
    for table in (t.rollouts, t.prompts):
        lacks = ~select(table.c.group_id).where(table.c.group_id == t.groups.c.group_id).exists()
        found[f"groups without {table.name}"] = conn.scalar(select(func.count()).select_from(t.groups).where(lacks)) or 0
    consumed = t.groups.c.status.in_([Status.CONSUMED.value, Status.ARCHIVED.value])
    without_step = consumed != t.groups.c.consumed_step.is_not(None)
    found["groups whose status and step of consumption disagree"] = (
        conn.scalar(select(func.count()).select_from(t.groups).where(without_step)) or 0
    )
    return {what: n for what, n in found.items() if n}
