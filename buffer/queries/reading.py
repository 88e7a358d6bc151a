"""Whole groups, and those that a question finds."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, bindparam, func, select

from buffer import schema as t
from buffer.codec import GROUP_COLUMNS, MEMBER_COLUMNS, decode_group, storable_text
from buffer.errors import CorruptPayloadError
from buffer.queries.consumption import timeline as current_timeline
from buffer.queries.dialects import Prepared, chunks, contains_text, ids_of, is_among
from buffer.queries.standing import all_of, known
from buffer.rollout import RolloutGroup
from buffer.status import Status


def load_groups(conn: Connection, group_ids: Sequence[int]) -> list[RolloutGroup]:
    """Whole groups, payloads included, in the order asked for; an unknown id is an error, and so is one that does not decode."""
    loaded: dict[int, RolloutGroup] = {}
    for chunk in chunks(group_ids):
        loaded |= _load_chunk(conn, chunk, _refuse)
    return [loaded[group_id] for group_id in all_of(group_ids, loaded)]


def load_sound(conn: Connection, group_ids: Sequence[int]) -> tuple[list[RolloutGroup], dict[int, str]]:
    """The same, of those that decode; and what is wrong with each that does not."""
    damaged: dict[int, str] = {}

    def note(group_id: int, error: CorruptPayloadError) -> None:
        damaged[group_id] = storable_text(str(error))

    loaded: dict[int, RolloutGroup] = {}
    for chunk in chunks(group_ids):
        loaded |= _load_chunk(conn, chunk, note)
    return [loaded[group_id] for group_id in all_of(group_ids, loaded | damaged) if group_id in loaded], damaged


def _refuse(group_id: int, error: CorruptPayloadError) -> None:
    raise error


_r = t.rollouts.c
_MEMBERS = Prepared(select(*(_r[name] for name in MEMBER_COLUMNS)).where(is_among(_r.group_id, "ids")).order_by(_r.group_id, _r.member))
_GROUPS = Prepared(
    select(*(t.groups.c[name] for name in GROUP_COLUMNS), t.prompts.c.data, t.payloads.c.extras, t.payloads.c.arrays)
    .select_from(t.groups.join(t.prompts).outerjoin(t.payloads, t.payloads.c.group_id == t.groups.c.group_id))
    .where(is_among(t.groups.c.group_id, "ids"))
)
_PREFIXES = Prepared(
    select(t.prefixes.c.group_id, t.prefixes.c.extras, t.prefixes.c.arrays)
    .where(is_among(t.prefixes.c.group_id, "ids"))
    .order_by(t.prefixes.c.group_id, t.prefixes.c.number)
)


def _load_chunk(
    conn: Connection, group_ids: Sequence[int], on_damage: Callable[[int, CorruptPayloadError], None]
) -> dict[int, RolloutGroup]:
    ids = {"ids": ids_of(conn, group_ids)}
    members = {group_id: list(rows) for group_id, rows in groupby(_MEMBERS.all(conn, ids), itemgetter(0))}
    prefixes = {group_id: [row[1:] for row in rows] for group_id, rows in groupby(_PREFIXES.all(conn, ids), itemgetter(0))}
    timeline = current_timeline(conn)
    loaded: dict[int, RolloutGroup] = {}
    # Each group is decoded as it is read: then its bytes are still in the processor's cache.
    for *group, prompt, extras, arrays in _GROUPS.rows(conn, ids):
        group_id, payload = group[0], None if arrays is None else (extras, arrays)
        try:
            loaded[group_id] = decode_group(group, members.get(group_id, []), prompt, payload, prefixes.get(group_id, ()), timeline)
        except CorruptPayloadError as error:
            on_damage(group_id, error)
    return loaded


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
