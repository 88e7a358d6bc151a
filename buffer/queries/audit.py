"""What an audit counts one by one, and compares with what the counters say."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, select

from buffer import schema as t
from buffer.amounts import Amount
from buffer.status import Status


class Task(NamedTuple):
    """Prompts ever drawn of a task, and how many of their groups were given up since."""

    drawn: int
    pruned: int


def drawn_by_task(conn: Connection) -> dict[str, Task]:
    """What was drawn, by task."""
    rows = conn.execute(select(t.tasks.c.task_name, t.tasks.c.drawn, t.tasks.c.pruned))
    return {row.task_name: Task(row.drawn, row.pruned) for row in rows}


def counted_rows(conn: Connection) -> dict[tuple[str, str], int]:
    """Rows by task and status (any text, of a database that was edited), counted one by one: what `counts` must say."""
    rows = conn.execute(select(t.groups.c.task_name, t.groups.c.status, func.count()).group_by(t.groups.c.task_name, t.groups.c.status))
    return {(task, status): n for task, status, n in rows}


def stored_counts(conn: Connection) -> dict[tuple[str, str], int]:
    """The counter table, zeros left out."""
    rows = conn.execute(select(t.counts.c.task_name, t.counts.c.status, t.counts.c.n).where(t.counts.c.n != 0))
    return {(task, status): n for task, status, n in rows}


_SUMS = ("tokens", "finished", "finished_tokens")


def counted_amounts(conn: Connection) -> dict[tuple[str, str], Amount]:
    """What was sampled by task and status, summed up one by one: what `counts` must say of all but running groups."""
    sums = [func.sum(t.groups.c[name]) for name in _SUMS]
    kept = select(t.groups.c.task_name, t.groups.c.status, *sums).where(t.groups.c.status != Status.RUNNING.value)
    return _amounts(conn, kept.group_by(t.groups.c.task_name, t.groups.c.status))


def stored_amounts(conn: Connection) -> dict[tuple[str, str], Amount]:
    """The sums of the counter table, zeros left out."""
    return _amounts(conn, select(t.counts.c.task_name, t.counts.c.status, *(t.counts.c[name] for name in _SUMS)))


def _amounts(conn: Connection, statement: Select[Any]) -> dict[tuple[str, str], Amount]:
    found = {(task, status): Amount(*map(int, amount)) for task, status, *amount in conn.execute(statement)}
    return {key: amount for key, amount in found.items() if amount}


_EXAMPLES = 5
_MAY_HAVE_PREFIXES = [status.value for status in (Status.RUNNING, Status.INTERRUPTED, Status.FAILED)]
"""A group that failed since its producers died goes on from its checkpoint too, when it is run on request."""

_g = t.groups.c


class Fault(NamedTuple):
    """Something that is wrong with `n` groups, of which `examples` are the first."""

    what: str
    n: int
    examples: list[int]


def faults(conn: Connection) -> list[Fault]:
    """Rows of other tables that belong to no group, groups that lack what they need, and columns that contradict each other."""
    found = []
    for what, ids in _questions():
        n = conn.scalar(select(func.count()).select_from(ids.subquery())) or 0
        if n:
            found.append(Fault(what, n, list(conn.scalars(ids.order_by(*ids.selected_columns).limit(_EXAMPLES)))))
    return found


def _questions() -> Iterator[tuple[str, Select[Any]]]:
    for table in (t.rollouts, t.prompts, t.payloads, t.prefixes, t.transitions):
        joined = table.outerjoin(t.groups, _g.group_id == table.c.group_id)
        yield f"rows of {table.name} without a group", select(table.c.group_id).select_from(joined).where(_g.group_id.is_(None))
    for table in (t.rollouts, t.prompts):
        yield f"groups without {table.name}", select(_g.group_id).where(~_rows_of(table).exists())
    for what, condition in _contradictions().items():
        yield what, select(_g.group_id).where(condition)


def _rows_of(table: Any) -> Select[Any]:
    return select(table.c.group_id).where(table.c.group_id == _g.group_id)


def _contradictions() -> dict[str, ColumnElement[bool]]:
    consumed = _g.status.in_([Status.CONSUMED.value, Status.ARCHIVED.value])
    n_members = select(func.count()).where(t.rollouts.c.group_id == _g.group_id).scalar_subquery()
    n_tokens = select(func.sum(t.rollouts.c.tokens)).where(t.rollouts.c.group_id == _g.group_id).scalar_subquery()
    has_prefix = _rows_of(t.prefixes).exists()
    return {
        "groups of an unknown status": _g.status.not_in([status.value for status in Status]),
        "groups whose status and step of consumption disagree": consumed != _g.consumed_step.is_not(None),
        "groups with another number of rollouts than they say": n_members != _g.members,
        # A running group's tokens are counted when it is stored; until then its prefixes have more.
        "groups with other tokens than their rollouts": (n_tokens != _g.tokens) & ~has_prefix,
        "groups with tokens and without a payload": (_g.tokens > 0) & _g.pruned_at.is_(None) & ~_rows_of(t.payloads).exists() & ~has_prefix,
        "groups with a payload that was given up": _g.pruned_at.is_not(None) & _rows_of(t.payloads).exists(),
        "groups that run and belong to nobody": (_g.status == Status.RUNNING.value) & _g.owner.is_(None),
        "groups with prefixes that neither run nor may run on": has_prefix & _g.status.not_in(_MAY_HAVE_PREFIXES),
    }
