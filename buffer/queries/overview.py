"""What an overview asks: each statement reads an index or a bounded number of rows, whatever the size of the buffer."""

from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, literal, select, text

from buffer import schema as t
from buffer.staleness import NO_VERSION
from buffer.status import Status

_g = t.groups.c

_TASKS = select(t.tasks.c.task_name, t.tasks.c.drawn, t.tasks.c.pruned).order_by(t.tasks.c.task_name)


def task_rows(conn: Connection) -> list[Row[Any]]:
    """Rows of task_name, drawn and pruned, by name."""
    return list(conn.execute(_TASKS))


_KNOWN_VERSIONS = (
    select(t.steps.c.version).where(t.steps.c.version.is_not(None)).order_by(t.steps.c.step.desc()).limit(1),
    select(t.timelines.c.fork).order_by(t.timelines.c.timeline.desc()).limit(1),
)


def recorded_versions(conn: Connection) -> list[int]:
    """The policy's versions that are written down and exist on this timeline: when a batch was handed out last, and of the last rewind."""
    return [version for statement in _KNOWN_VERSIONS if (version := conn.scalar(statement)) is not None]


_WAITING = (
    select(_g.task_name, _g.oldest_version, func.count().label("n"), func.max(_g.freshest_version).label("freshest"))
    # In exactly these words, and by the index's columns: it is read alone, and only what waits is in it.
    .where(text(t.MAY_EXPIRE), _g.oldest_version < literal(NO_VERSION, literal_execute=True))
    .group_by(_g.task_name, _g.oldest_version)
    .order_by(_g.task_name, _g.oldest_version)
)


def waiting_versions(conn: Connection) -> list[Row[Any]]:
    """How many completed and interrupted groups wait with this oldest version: rows of task_name, oldest_version, n and freshest."""
    return list(conn.execute(_WAITING))


_t = t.transitions.c
_columns = (_t.transition_id, _t.group_id, _t.source, _t.target, _t.at, _t.reason)
_newest = select(*_columns).order_by(_t.transition_id.desc()).limit(bindparam("most")).subquery()
_at_work = _newest.c.target.in_([Status.COMPLETED.value, Status.CONSUMED.value]) & (
    func.coalesce(_newest.c.source, "") != Status.CONSUMED.value  # that would be a rewind
)

_REACH = select(func.count().label("n"), func.min(_newest.c.at).label("oldest"), func.max(_newest.c.at).label("newest"))

_CHANGES = (
    select(_g.task_name, _newest.c.target, func.count().label("n"))
    .select_from(_newest.join(t.groups, _g.group_id == _newest.c.group_id))
    .where(_newest.c.at >= bindparam("since"), _at_work)
    .group_by(_g.task_name, _newest.c.target)
)


def newest_changes(conn: Connection, most: int) -> Row[Any]:
    """How many of the `most` newest transitions there are (`n`), and when the `oldest` and the `newest` of them were."""
    return conn.execute(_REACH, {"most": most}).one()


def changes_since(conn: Connection, since: float, most: int) -> list[Row[Any]]:
    """How many groups were generated to the end and consumed, among the `most` newest transitions: rows of task_name, target and n."""
    return list(conn.execute(_CHANGES, {"since": since, "most": most}))


_useless = _newest.c.target.in_([Status.FAILED.value, Status.FILTERED.value])
_FAILURES = (
    select(_newest.c.at, _g.task_name, _newest.c.group_id, _newest.c.target, _newest.c.reason)
    .select_from(_newest.join(t.groups, _g.group_id == _newest.c.group_id))
    .where(_useless)
    .order_by(_newest.c.transition_id.desc())
    .limit(bindparam("shown"))
)


def newest_failures(conn: Connection, shown: int, most: int) -> list[Row[Any]]:
    """Groups that failed or were filtered among the `most` newest transitions, the last first: rows of at, task_name, group_id,
    target and reason."""
    return list(conn.execute(_FAILURES, {"shown": shown, "most": most}))


_TIMELINES = select(t.timelines.c.at, t.timelines.c.step, t.timelines.c.fork).order_by(t.timelines.c.timeline)


def rewinds(conn: Connection) -> list[Row[Any]]:
    """Rows of at, step and fork (the version), the first rewind first."""
    return list(conn.execute(_TIMELINES))


_is_running = _g.status == literal(Status.RUNNING.value, literal_execute=True)
_RUNNING = select(_g.owner, func.count().label("n")).where(_is_running).group_by(_g.owner).order_by(_g.owner)
_PRODUCERS = select(t.producers).order_by(t.producers.c.started_at, t.producers.c.owner)


def running_by_owner(conn: Connection) -> dict[str | None, int]:
    """Running groups by who runs them; None where nobody does."""
    return {row.owner: row.n for row in conn.execute(_RUNNING)}


def producers(conn: Connection) -> list[Row[Any]]:
    """The processes that write, the first begun first."""
    return list(conn.execute(_PRODUCERS))


_PRUNABLE = select(func.count().label("n"), func.coalesce(func.sum(_g.payload_bytes), 0).label("bytes")).where(text(t.PRUNABLE))
_PREFIXES = select(
    func.count(t.prefixes.c.group_id.distinct()).label("n"),
    func.coalesce(func.sum(func.length(t.prefixes.c.arrays) + func.length(t.prefixes.c.extras)), 0).label("bytes"),
)


def committed_payloads(conn: Connection) -> Row[Any]:
    """Of committed groups whose tokens are there: how many (`n`), and the `bytes` of their payloads."""
    return conn.execute(_PRUNABLE).one()


def stored_prefixes(conn: Connection) -> Row[Any]:
    """Of groups with tokens that are not in their payloads yet: how many (`n`), and the `bytes` of these."""
    return conn.execute(_PREFIXES).one()


_SIZE_SQLITE = text(
    "SELECT page_count * page_size AS bytes, freelist_count * page_size AS free"
    " FROM pragma_page_count, pragma_page_size, pragma_freelist_count"
)
_SIZE_POSTGRESQL = text(
    "SELECT sum(pg_total_relation_size(oid))::bigint AS bytes, NULL AS free FROM pg_class"
    " WHERE relkind = 'r' AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'groups'::regclass)"
)


def database_size(conn: Connection) -> Row[Any]:
    """The `bytes` of the file, or of the tables; and those that are `free` to be used again, None where that is not known."""
    return conn.execute(_SIZE_SQLITE if conn.dialect.name == "sqlite" else _SIZE_POSTGRESQL).one()
