"""Handing out completed groups, making that final, and taking it back."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any, assert_never

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    bindparam,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)

from buffer import schema as t
from buffer.errors import CorruptPayloadError
from buffer.policies import Fifo, FreshestFirst, StalestFirst, TakePolicy
from buffer.queries.dialects import Many, Prepared, Upsert, chunks, ids_of, is_among, literally, numbered, reserve
from buffer.queries.moving import move, note_moves
from buffer.queries.standing import ROWS, Standing, Standings, require_rowcount
from buffer.queries.transaction import Transaction
from buffer.staleness import Level, Timeline
from buffer.status import Status

_g = t.groups.c


# -- taking -----------------------------------------------------------------------------------------------------


def first_completed(conn: Connection, task_name: str, limit: int, policy: TakePolicy, oldest_version: int | None) -> list[Standing]:
    """The completed groups to hand out next: the rewound first, as they were consumed, then by policy; none that is older."""
    bound = {} if oldest_version is None else {"oldest_version": oldest_version}
    return _ready(policy, bool(bound)).all(conn, {"task": task_name, "limit": limit, **bound})


@cache
def _ready(policy: TakePolicy, bounded: bool) -> Standings:
    ready = ROWS.where(_g.task_name == bindparam("task"), _g.status == literally(Status.COMPLETED)).order_by(
        _g.consumed_seq, *_order(policy)
    )
    if bounded:
        # As an expression, of which there is no index: else statistics may choose the one by age, and sort all that it finds.
        ready = ready.where(_g.oldest_version + 0 >= bindparam("oldest_version"))
    return Standings(ready.limit(bindparam("limit")).with_for_update(skip_locked=True))


def _order(policy: TakePolicy) -> list[ColumnElement[Any]]:
    match policy:
        case Fifo():
            return [_g.ready_seq.asc()]
        case StalestFirst():
            return [_g.oldest_version.asc(), _g.ready_seq.asc()]
        case FreshestFirst():
            return [_g.oldest_version.desc(), _g.ready_seq.asc()]
        case _:
            assert_never(policy)


_TURN = numbered("turns")
_CONSUME = Prepared(
    update(t.groups)
    # Of this expression there is no index: else SQLite reads all that wait, and looks for the few that are named among them.
    .where(_g.group_id == _TURN.c.id, func.coalesce(_g.status, "") == Status.COMPLETED.value)
    .values(
        status=literally(Status.CONSUMED),
        consumed_step=bindparam("step"),
        consumed_seq=_TURN.c.number,
        take=bindparam("number"),
        owner=bindparam("me"),
        updated_at=bindparam("now"),
    )
)


_REMEMBER_VERSION = Upsert(t.steps, ["step"], lambda new: {"version": func.coalesce(new.version, t.steps.c.version)})


def consume(tx: Transaction, rows: Sequence[Standing], step: int, version: int | None) -> int | None:
    """Mark completed groups as consumed at `step`, in this order, and remember the policy's version then.

    Gives the number of this take, which no other has.
    """
    if not rows:
        return None
    note_moves(tx, rows, Status.CONSUMED, step=step)
    (number,) = reserve(tx.conn, "take", 1)
    fresh = reserve(tx.conn, "consumed", len(rows))
    # A rewound group keeps its place: however often a run is rewound, its batches come again in one order.
    seqs = [seq if row.consumed_seq == t.NEVER_CONSUMED else row.consumed_seq for row, seq in zip(rows, fresh, strict=True)]
    turns = json.dumps([(row.group_id, seq) for row, seq in zip(rows, seqs, strict=True)])
    changed = _CONSUME.execute(tx.conn, {"turns": turns, "step": step, "number": number, "me": tx.owner, "now": tx.now})
    require_rowcount(changed, len(rows))
    _REMEMBER_VERSION.execute(tx.conn, {"step": step, "version": version})
    return number


# -- committing and rewinding -----------------------------------------------------------------------------------


_CONSUMED = ROWS.where(_g.status == literally(Status.CONSUMED)).order_by(_g.consumed_seq)
_CONSUMED_AFTER = Standings(_CONSUMED.where(_g.consumed_step > bindparam("step")))
_CONSUMED_UP_TO = Standings(_CONSUMED.where(_g.consumed_step <= bindparam("step")))


def consumed_after(conn: Connection, step: int) -> list[Standing]:
    """Consumed and not committed, at a step later than `step`."""
    return _CONSUMED_AFTER.all(conn, {"step": step})


def consumed_up_to(conn: Connection, step: int) -> list[Standing]:
    """Consumed and not committed, at `step` or before."""
    return _CONSUMED_UP_TO.all(conn, {"step": step})


_FORGET_STEP = Prepared(update(t.groups).where(is_among(_g.group_id, "ids")).values(consumed_step=None, take=None))


def unconsume(tx: Transaction, rows: Sequence[Standing], reason: str) -> None:
    """Give consumed groups back: completed again, to be handed out first and in the order they had."""
    move(tx, rows, Status.COMPLETED, reason=reason)
    for chunk in chunks([row.group_id for row in rows]):
        _FORGET_STEP.execute(tx.conn, {"ids": ids_of(tx.conn, chunk)})


def drop_steps_after(conn: Connection, step: int) -> None:
    """Forget the versions at steps later than `step`."""
    conn.execute(delete(t.steps).where(t.steps.c.step > step))


def step_version(conn: Connection, step: int) -> int | None:
    """The policy's version recorded when the batch of `step` was handed out."""
    return conn.scalar(select(t.steps.c.version).where(t.steps.c.step == step))


def last_step(conn: Connection, task_name: str | None = None) -> int:
    """The last step at which anything of the task (of any task) was consumed and not given back; 0 before the first."""
    return max(last_step_of(conn, status, task_name) for status in (Status.CONSUMED, Status.ARCHIVED))


def last_step_of(conn: Connection, status: Status, task_name: str | None) -> int:
    """The last step of the groups of the task (of any task) that are consumed, or of those that are archived."""
    reached = _g.consumed_step
    # Walks the index from its end; the first entry is nearly always the task's own.
    last = select(reached).where(_g.status == status.value, reached.is_not(None)).order_by(reached.desc()).limit(1)
    found = conn.scalar(last if task_name is None else last.where(_g.task_name == task_name))
    if found is not None and not isinstance(found, int):
        raise CorruptPayloadError(f"a step of consumption is {found!r}; the database was edited: restore it from a copy")
    return found or 0


# -- timelines and staleness ------------------------------------------------------------------------------------

_FORKS = Prepared(select(t.timelines.c.fork).order_by(t.timelines.c.timeline))


def timeline(conn: Connection) -> Timeline:
    """The run's timeline: the versions to which its rewinds went back."""
    return Timeline(tuple([fork for (fork,) in _FORKS.all(conn)]))


_SAMPLED = select(_g.group_id).where(_g.max_version.is_not(None)).order_by(_g.group_id.desc()).limit(1)


def anything_sampled(conn: Connection) -> bool:
    """Whether any group has a token, or any step a version."""
    # Steps first, then the newest groups: what was drawn and never sampled may be nearly all there is.
    return conn.scalar(select(t.steps.c.step).limit(1)) is not None or conn.scalar(_SAMPLED) is not None


def begin_timeline(tx: Transaction, ended: int, fork: int, step: int) -> None:
    """Record that a rewind to the checkpoint of `step`, at version `fork`, ended a timeline."""
    tx.conn.execute(insert(t.timelines), {"timeline": ended, "fork": fork, "step": step, "at": tx.now})


_MAY_EXPIRE = [literally(status) for status in (Status.COMPLETED, Status.INTERRUPTED)]
"""In the order of the schema's index `groups_oldest`."""


def stale(conn: Connection, task_name: str, below: int, level: Level, after: tuple[int, int], limit: int) -> list[Row[Any]]:
    """Completed and interrupted groups with a member that is stale at this level below version `below`, the stalest first.

    `after` is the (oldest_version, group_id) behind which to go on. Rows of group_id, oldest_version and tokens.
    """
    place = (_g.oldest_version, _g.group_id)
    statement = select(*place, _g.tokens).where(
        _g.task_name == task_name, _g.status.in_(_MAY_EXPIRE), _g.oldest_version < below, tuple_(*place) > tuple_(*after)
    )
    if level is Level.TOKEN:
        statement = statement.where(_g.freshest_version < below)
    return list(conn.execute(statement.order_by(*place).limit(limit).with_for_update(skip_locked=True)))


STALENESS_KEPT = frozenset(Status) - {Status.FILTERED, Status.ARCHIVED, Status.DISCARDED}
"""Statuses in which a group waits, or from which it may come to wait: a rewind counts their staleness anew. The others are final."""


def newer_than(conn: Connection, version: int) -> list[int]:
    """Groups that may be handed out some time and have a trainable token newer than `version`, by id."""
    # With the tasks named, an index on task and status finds them; final groups are never looked at.
    statuses = sorted(status.value for status in STALENESS_KEPT)
    newer = select(_g.group_id).where(_g.task_name.in_(select(t.tasks.c.task_name)), _g.status.in_(statuses), _g.max_version > version)
    return list(conn.scalars(newer.order_by(_g.group_id)))


_REQUALIFY = Many(
    update(t.groups)
    .where(_g.group_id == bindparam("id"))
    .values(oldest_version=bindparam("oldest_version"), freshest_version=bindparam("freshest_version"))
)


def requalify(conn: Connection, versions: Sequence[dict[str, int]]) -> None:
    """Store from which versions the staleness of groups (`id`) is counted now."""
    if versions:
        _REQUALIFY.execute(conn, versions)
