"""Whole groups, and those that a question finds."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, func, select

from buffer import schema as t
from buffer.codec import decode_group
from buffer.queries.consumption import timeline as current_timeline
from buffer.queries.dialects import contains_text, ids_of, is_among
from buffer.queries.groups import all_of, chunks, known
from buffer.rollout import RolloutGroup
from buffer.status import Status


def load_groups(conn: Connection, group_ids: Sequence[int]) -> list[RolloutGroup]:
    """Whole groups, payloads included, in the order asked for; an unknown id is an error."""
    loaded: dict[int, RolloutGroup] = {}
    for chunk in chunks(group_ids):
        loaded |= _load_chunk(conn, chunk)
    return [loaded[group_id] for group_id in all_of(group_ids, loaded)]


_r = t.rollouts.c
_OF_MEMBERS = ("group_id", "member", "status", "attempts", "interruptions", "error", "finish_reason", "score", "reward")
_MEMBERS = select(*(_r[name] for name in _OF_MEMBERS)).where(is_among(_r.group_id, "ids")).order_by(_r.group_id, _r.member)
_OF_GROUPS = ("group_id", "task_name", "status", "epoch", "position", "consumed_step", "filter_reason")
_GROUPS = (
    select(*(t.groups.c[name] for name in _OF_GROUPS), t.prompts.c.data, t.payloads.c.extras, t.payloads.c.arrays)
    .select_from(t.groups.join(t.prompts).outerjoin(t.payloads, t.payloads.c.group_id == t.groups.c.group_id))
    .where(is_among(t.groups.c.group_id, "ids"))
)
_PREFIXES = (
    select(t.prefixes.c.group_id, t.prefixes.c.extras, t.prefixes.c.arrays)
    .where(is_among(t.prefixes.c.group_id, "ids"))
    .order_by(t.prefixes.c.group_id, t.prefixes.c.number)
)
_WHOLE = {Status.COMPLETED.value, Status.CONSUMED.value, Status.ARCHIVED.value, Status.FILTERED.value, Status.EXPIRED.value}
"""Statuses in which the payload holds all there is: it took the place of the prefixes."""


def _load_chunk(conn: Connection, group_ids: Sequence[int]) -> dict[int, RolloutGroup]:
    ids = {"ids": ids_of(conn, group_ids)}
    # Fetched at once and made into plain dicts: there are hundreds of them, and to look a name up in a row of SQLAlchemy is slow.
    members: dict[int, list[Mapping[str, Any]]] = {}
    for row in conn.execute(_MEMBERS, ids).all():
        members.setdefault(row[0], []).append(dict(zip(_OF_MEMBERS, row, strict=True)))
    rows = conn.execute(_GROUPS, ids).all()
    prefixes = _prefixes(conn, [row.group_id for row in rows if row.status not in _WHOLE])
    timeline = current_timeline(conn)
    return {
        row.group_id: decode_group(
            dict(zip(_OF_GROUPS, row, strict=False)),
            members.get(row.group_id, []),
            row.data,
            None if row.arrays is None else (row.extras, row.arrays),
            prefixes.get(row.group_id, ()),
            timeline,
        )
        for row in rows
    }


def _prefixes(conn: Connection, group_ids: Sequence[int]) -> dict[int, list[tuple[str, bytes]]]:
    found: dict[int, list[tuple[str, bytes]]] = {}
    if group_ids:
        for group_id, extras, arrays in conn.execute(_PREFIXES, {"ids": ids_of(conn, group_ids)}).all():
            found.setdefault(group_id, []).append((extras, arrays))
    return found


@dataclass(frozen=True, slots=True)
class Filters:
    """What is asked of groups, all of it at once; None (of `status`, nothing) asks nothing. See `ReplayBuffer.query`."""

    task_name: str | None = None
    status: Collection[Status] = ()
    step: int | None = None
    min_version: int | None = None
    max_version: int | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    error: str | None = None
    min_attempts: int | None = None
    drawn_before: float | None = None
    drawn_after: float | None = None
    order: str = "oldest"


def find(conn: Connection, filters: Filters, limit: int, offset: int) -> list[int]:
    """Ids of the groups that are as asked, in the order asked for."""
    statement = select(t.groups.c.group_id).where(*_of_groups(filters), *_of_members(filters))
    ordered = statement.order_by(*ORDERS[filters.order], t.groups.c.group_id)
    return list(conn.scalars(ordered.limit(limit).offset(offset)))


_MEAN_REWARD = select(func.avg(t.rollouts.c.reward)).where(t.rollouts.c.group_id == t.groups.c.group_id).scalar_subquery()

ORDERS: dict[str, Sequence[ColumnElement[Any]]] = {
    "oldest": (),
    "newest": (t.groups.c.group_id.desc(),),
    "changed": (t.groups.c.updated_at.desc(),),
    "stalest": (t.groups.c.oldest_version,),
    "best": (func.coalesce(_MEAN_REWARD, -math.inf).desc(),),
    "worst": (func.coalesce(_MEAN_REWARD, math.inf),),
}
"""Orders of what `query` finds, ties by age."""


def _of_groups(filters: Filters) -> Iterable[ColumnElement[bool]]:
    if filters.task_name is not None:
        yield t.groups.c.task_name == filters.task_name
    if filters.status:
        yield t.groups.c.status.in_([s.value for s in filters.status])
    if filters.step is not None:
        # The statuses are those that a step goes with; naming them lets the index on it be used.
        yield t.groups.c.status.in_([Status.CONSUMED.value, Status.ARCHIVED.value])
        yield t.groups.c.consumed_step == filters.step
    if filters.min_version is not None:
        yield t.groups.c.min_version >= filters.min_version
    if filters.max_version is not None:
        yield t.groups.c.max_version <= filters.max_version
    if filters.drawn_before is not None:
        yield t.groups.c.created_at <= filters.drawn_before
    if filters.drawn_after is not None:
        yield t.groups.c.created_at >= filters.drawn_after


def _of_members(filters: Filters) -> Iterable[ColumnElement[bool]]:
    members = select(t.rollouts.c.member).where(t.rollouts.c.group_id == t.groups.c.group_id)
    if filters.min_reward is not None:
        yield filters.min_reward <= _MEAN_REWARD
    if filters.max_reward is not None:
        yield filters.max_reward >= _MEAN_REWARD
    if filters.error is not None:
        yield members.where(contains_text(t.rollouts.c.error, filters.error)).exists()
    if filters.min_attempts is not None:
        yield members.where(t.rollouts.c.attempts >= filters.min_attempts).exists()


_IDS_AFTER = select(t.groups.c.group_id).where(t.groups.c.group_id > bindparam("after")).order_by(t.groups.c.group_id)


def ids_after(conn: Connection, after: int, limit: int) -> list[int]:
    """The next ids behind `after`."""
    return list(conn.scalars(_IDS_AFTER.limit(limit), {"after": after}))


def hot_columns(conn: Connection, group_id: int) -> Row[Any]:
    """The group's row, and whether something of it is `checkpointed` only."""
    prefixes = select(t.prefixes.c.number).where(t.prefixes.c.group_id == t.groups.c.group_id).exists()
    return conn.execute(select(t.groups, prefixes.label("checkpointed")).where(t.groups.c.group_id == group_id)).one()


# -- history --------------------------------------------------------------------------------------------------

_HISTORY = select(t.transitions).where(t.transitions.c.group_id == bindparam("id")).order_by(t.transitions.c.transition_id)


def history(conn: Connection, group_id: int) -> list[Row[Any]]:
    """The transitions of a group, in order; an unknown id is an error."""
    all_of([group_id], known(conn, [group_id]))
    return list(conn.execute(_HISTORY, {"id": group_id}))
