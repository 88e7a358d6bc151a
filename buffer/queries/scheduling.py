"""What a producer asks to decide which groups to run next."""

import hashlib
from collections.abc import Collection, Sequence
from typing import Literal

from sqlalchemy import Connection, Float, bindparam, cast, func, select, text

from buffer import schema as t
from buffer.queries.dialects import chunks, ids_of, is_among
from buffer.queries.standing import ROWS, Standing, Standings
from buffer.queries.values import count
from buffer.rollout import Position
from buffer.status import Status

_g, _r = t.groups.c, t.rollouts.c

ClaimOrder = Literal["oldest", "most_interrupted"]

_INTERRUPTIONS = select(func.coalesce(func.max(_r.interruptions), 0)).where(_r.group_id == _g.group_id).scalar_subquery()
_WAITING = (
    ROWS.where(_g.task_name == bindparam("task"), _g.status == bindparam("status")).limit(bindparam("n")).with_for_update(skip_locked=True)
)
_ORDERED = {
    "oldest": _WAITING.order_by(_g.consumed_seq, _g.ready_seq),
    "most_interrupted": _WAITING.order_by(_INTERRUPTIONS.desc(), _g.consumed_seq, _g.ready_seq),
}
_OFTEN = select(_r.group_id).where(_r.group_id == _g.group_id, _r.interruptions >= bindparam("at_least")).correlate(t.groups).exists()
_CLAIMABLE = {order: Standings(statement) for order, statement in _ORDERED.items()}
_CLAIMABLE_UNLESS_OFTEN = {order: Standings(statement.where(~_OFTEN)) for order, statement in _ORDERED.items()}


def claimable(
    conn: Connection, task_name: str, status: Status, limit: int, order: ClaimOrder = "oldest", interrupted_below: int | None = None
) -> list[Standing]:
    """The first groups of the task that wait in `status` and that nobody else claims at this moment.

    "most_interrupted" looks at all of them, ties by age. With `interrupted_below`, none with a member that was interrupted so often.
    """
    values = {"task": task_name, "status": status.value, "n": limit}
    if interrupted_below is None:
        return _CLAIMABLE[order].all(conn, values)
    return _CLAIMABLE_UNLESS_OFTEN[order].all(conn, {**values, "at_least": interrupted_below})


# Of these expressions there is no index: else SQLite reads all that wait, not the few that are named.
_STILL = (func.coalesce(_g.task_name, "") == bindparam("task"), func.coalesce(_g.status, "") == bindparam("status"))
_NAMED = Standings(ROWS.where(is_among(_g.group_id, "ids"), *_STILL).with_for_update(skip_locked=True))


def claimable_among(conn: Connection, task_name: str, status: Status, group_ids: Sequence[int]) -> list[Standing]:
    """Those of the given groups that wait in `status` and that nobody else claims at this moment, in the order given."""
    found: dict[int, Standing] = {}
    for chunk in chunks(group_ids):
        rows = _NAMED.all(conn, {"task": task_name, "status": status.value, "ids": ids_of(conn, chunk)})
        found |= {row.group_id: row for row in rows}
    return [found[group_id] for group_id in group_ids if group_id in found]


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


_POSITIONS = (
    select(_g.group_id, _g.epoch, _g.position)
    .where(_g.task_name == bindparam("task"), _g.status == bindparam("status"))
    .order_by(_g.consumed_seq, _g.ready_seq)
    .limit(bindparam("n"))
)


def positions(conn: Connection, task_name: str, status: Status, limit: int) -> dict[int, Position | None]:
    """The groups of the task in `status`, the oldest first, and where their prompts stand."""
    rows = conn.execute(_POSITIONS, {"task": task_name, "status": status.value, "n": limit})
    return {row.group_id: None if row.epoch is None else Position(row.epoch, row.position) for row in rows}


_FINISHED = [status.value for status in (Status.COMPLETED, Status.CONSUMED, Status.ARCHIVED, Status.FILTERED)]
_LENGTHS = select(_g.position, cast(_g.tokens, Float) / _g.members).where(
    _g.task_name == bindparam("task"), _g.epoch == bindparam("epoch"), is_among(_g.position, "ids"), _g.status.in_(_FINISHED)
)


def response_lengths(conn: Connection, task_name: str, at: Collection[Position]) -> dict[Position, float]:
    """The mean length of the responses to the prompts at these positions, of the groups that finished."""
    found: dict[Position, float] = {}
    for epoch in sorted({position.epoch for position in at}):
        for chunk in chunks([position.offset for position in at if position.epoch == epoch]):
            rows = conn.execute(_LENGTHS, {"task": task_name, "epoch": epoch, "ids": ids_of(conn, chunk)})
            found |= {Position(epoch, offset): mean for offset, mean in rows}
    return found


_PROMPTS = select(t.prompts.c.group_id, t.prompts.c.data).join(t.groups).where(_g.task_name == bindparam("task"))
_RESPONSES = (
    select(_r.group_id, _r.tokens)
    .join(t.groups)
    .where(_g.task_name == bindparam("task"), _r.finish_reason.is_not(None), _r.tokens > 0)
    .order_by(_r.group_id, _r.member)
)


def lengths_by_prompt(conn: Connection, task_name: str) -> dict[str, list[int]]:
    """The tokens of all whole responses, by what stands for the prompt's content: the same prompt in two epochs is one."""
    rows = conn.execute(_PROMPTS, {"task": task_name})
    key_of = {group_id: hashlib.blake2b(data.encode(), digest_size=16).hexdigest() for group_id, data in rows}
    found: dict[str, list[int]] = {}
    for group_id, tokens in conn.execute(_RESPONSES, {"task": task_name}):
        found.setdefault(key_of[group_id], []).append(tokens)
    return found
