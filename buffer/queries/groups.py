"""Adding groups, and storing what came of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from buffer import schema as t
from buffer.amounts import NOTHING, Amount
from buffer.codec import EncodedGroup, EncodedPrefix
from buffer.errors import DuplicateGroupError
from buffer.queries.dialects import Insert, Many, Upsert, reserve
from buffer.queries.moving import note_moves
from buffer.queries.standing import Standing, amount_in, require_rowcount
from buffer.queries.transaction import INTERRUPTED, LEFT_OUT, RESTARTED, Transaction
from buffer.status import Status

# -- adding -----------------------------------------------------------------------------------------------------

_AMOUNT = ("tokens", "finished", "finished_tokens")
_RESULT = ("min_version", "max_version", "oldest_version", "freshest_version", *_AMOUNT, "payload_bytes", "filter_reason")
_NEW = ("group_id", "task_name", "status", "owner", "ready_seq", "consumed_seq", "created_at", "updated_at", "epoch", "position", "members")
_INSERT_GROUP, _INSERT_MEMBER = Insert(t.groups, (*_NEW, *_RESULT)), Insert(t.rollouts, t.rollouts.c.keys())
_INSERT_PROMPT = Many(insert(t.prompts))

_TWICE = ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_ROWID", "23505")
"""How the drivers say that a key is there already."""


def insert_groups(tx: Transaction, encoded: Sequence[EncodedGroup], *, start: bool = False) -> None:
    """Add groups that the database does not have; its unique keys refuse a group id or a prompt that it has.

    With `start` those that are pending run at once, and are ours.
    """
    started = {e.group_id for e in encoded if start and e.status is Status.PENDING}
    rows = [
        {
            "group_id": e.group_id,
            "task_name": e.task_name,
            "status": Status.RUNNING.value if e.group_id in started else e.status.value,
            "owner": tx.owner if e.group_id in started else None,
            "ready_seq": seq,
            "consumed_seq": t.NEVER_CONSUMED,
            "created_at": tx.now,
            "updated_at": tx.now,
            **e.group,
        }
        for e, seq in zip(encoded, reserve(tx.conn, "ready", len(encoded)), strict=True)
    ]
    try:
        _INSERT_GROUP.execute(tx.conn, rows)
    except IntegrityError as error:
        if _code(error) not in _TWICE:
            raise
        raise DuplicateGroupError(
            f"{_named(encoded)} cannot be added: the database has a group of this id or position already; "
            "draw prompts through the buffer, or give every group an id and position of its own"
        ) from error
    _INSERT_PROMPT.execute(tx.conn, [{"group_id": e.group_id, "data": e.prompt} for e in encoded])
    _INSERT_MEMBER.execute(tx.conn, [member for e in encoded for member in e.rollouts])
    # What is only drawn has none. No prefixes are there that it could replace.
    if has_payload := [e for e in encoded if e.arrays or e.status is not Status.PENDING]:
        _WRITE_PAYLOAD.execute_many(tx.conn, [_payload(e) for e in has_payload])
    for e in encoded:
        tx.changed(e.group_id, e.task_name, None, e.status, (NOTHING, amount_of(e)), version=e.group["max_version"], reason=_reason(e))
        _note_lost(tx, e)
    note_moves(tx, [_as_drawn(e) for e in encoded if e.group_id in started], Status.RUNNING)


def _as_drawn(e: EncodedGroup) -> Standing:
    return Standing(e.group_id, e.task_name, e.status.value, e.group["members"], t.NEVER_CONSUMED, None, None, 0, None, 0, 0, 0)


def amount_of(e: EncodedGroup) -> Amount:
    """How much was sampled of an encoded group."""
    return Amount(e.group["tokens"], e.group["finished"], e.group["finished_tokens"])


def _note_lost(tx: Transaction, e: EncodedGroup) -> None:
    """Note what its producer dropped of a group: without partial rollouts what is interrupted, else what a loop began anew."""
    if not e.snapshot.lost_any:
        return
    tx.gave_up(e.task_name, INTERRUPTED if e.status is Status.INTERRUPTED else RESTARTED, e.snapshot.dropped)
    tx.gave_up(e.task_name, LEFT_OUT, e.snapshot.left_out)
    if e.status in _WHOLE:  # an interrupted group comes again, with the same responses
        tx.gave_up(e.task_name, LEFT_OUT, e.snapshot.left_out_whole)


_WHOLE = (Status.COMPLETED, Status.FILTERED)


def _code(error: IntegrityError) -> str | None:
    return getattr(error.orig, "sqlite_errorname", None) or getattr(error.orig, "sqlstate", None)


def _named(encoded: Sequence[EncodedGroup]) -> str:
    first = encoded[0]
    others = f" (or one of {len(encoded) - 1} beside it)" if len(encoded) > 1 else ""
    return f"group {first.group_id} of task {first.task_name!r} at (epoch {first.group['epoch']}, {first.group['position']}){others}"


# -- storing ----------------------------------------------------------------------------------------------------

_STORE_RESULT = Many(
    update(t.groups)
    .where(
        t.groups.c.group_id == bindparam("id"),
        t.groups.c.status == bindparam("expected"),
        t.groups.c.task_name == bindparam("task"),
        t.groups.c.members == bindparam("size"),
        or_(t.groups.c.status != Status.RUNNING.value, t.groups.c.owner == bindparam("me")),
    )
    .values(
        {name: bindparam(name) for name in ("status", "ready_seq", *_RESULT)}
        | {"updated_at": bindparam("now"), "owner": None, "crashes": 0}
    )
)
_STORE_MEMBER = Many(
    update(t.rollouts)
    .where(t.rollouts.c.group_id == bindparam("id"), t.rollouts.c.member == bindparam("at"))
    .values({c.name: bindparam(c.name) for c in t.rollouts.c if c.name not in ("group_id", "member")})
)


def store_results(tx: Transaction, encoded: Sequence[EncodedGroup], stored: Mapping[int, Standing]) -> None:
    """Write what came of groups that stand in the database as `stored`.

    The rows themselves hold the guard: the expected status, task, size and owner stand in the WHERE.
    """
    rows = [
        {"id": e.group_id, "expected": stored[e.group_id].status, "task": e.task_name, "size": len(e.rollouts), "now": tx.now}
        | {"me": tx.owner, "status": e.status.value, "ready_seq": seq}
        | {name: e.group[name] for name in _RESULT}
        for e, seq in zip(encoded, reserve(tx.conn, "ready", len(encoded)), strict=True)
    ]
    require_rowcount(_STORE_RESULT.execute(tx.conn, rows), len(rows))
    _store_members(tx.conn, encoded)
    _write_payloads(tx.conn, encoded)
    for e in encoded:
        row = stored[e.group_id]
        amounts = (amount_in(row), amount_of(e))
        tx.changed(e.group_id, e.task_name, Status(row.status), e.status, amounts, version=e.group["max_version"], reason=_reason(e))
        _note_lost(tx, e)


def _reason(e: EncodedGroup) -> str | None:
    """Why a group was filtered or failed."""
    return e.group["filter_reason"] or next((member["error"] for member in e.rollouts if member["error"]), None)


def _store_members(conn: Connection, encoded: Sequence[EncodedGroup | EncodedPrefix]) -> None:
    members = [{"id": m["group_id"], "at": m["member"], **m} for e in encoded for m in e.rollouts]
    require_rowcount(_STORE_MEMBER.execute(conn, members), len(members))


_WRITE_PAYLOAD = Upsert(t.payloads, ["group_id"], lambda new: {"extras": new.extras, "arrays": new.arrays})
_DROP_PREFIXES = Many(delete(t.prefixes).where(t.prefixes.c.group_id == bindparam("id")))


def _payload(e: EncodedGroup) -> dict[str, Any]:
    return {"group_id": e.group_id, "extras": e.extras, "arrays": e.arrays}


def _write_payloads(conn: Connection, encoded: Sequence[EncodedGroup]) -> None:
    if encoded:
        _WRITE_PAYLOAD.execute_many(conn, [_payload(e) for e in encoded])
        _DROP_PREFIXES.execute(conn, [{"id": e.group_id} for e in encoded])


_STORE_EXPIRED = Many(
    update(t.groups)
    .where(t.groups.c.group_id == bindparam("id"), t.groups.c.status == bindparam("expected"))
    .values({name: bindparam(name) for name in ("status", *_RESULT)} | {"updated_at": bindparam("now")})
)


def store_expired(tx: Transaction, encoded: Sequence[EncodedGroup], stored: Sequence[Status], reason: str, why: str) -> None:
    """Write groups some of whose members were reset, and that stood in the database as `stored`.

    `why` is what their tokens are given up for, in a word. They keep their place in the queue (`ready_seq`): those that
    waited longest run again first.
    """
    rows = [
        {"id": e.group_id, "expected": was.value, "status": e.status.value, "now": tx.now} | {name: e.group[name] for name in _RESULT}
        for e, was in zip(encoded, stored, strict=True)
    ]
    require_rowcount(_STORE_EXPIRED.execute(tx.conn, rows), len(rows))
    _store_members(tx.conn, encoded)
    _write_payloads(tx.conn, encoded)
    for e, was in zip(encoded, stored, strict=True):
        dropped = e.snapshot.dropped
        amounts = (amount_of(e) + dropped, amount_of(e))
        tx.gave_up(e.task_name, why, dropped)
        if was in _WHOLE:  # told when it was stored so, and told again when it is whole again
            tx.gave_up(e.task_name, LEFT_OUT, NOTHING - e.snapshot.left_out_whole)
        if was is e.status:  # more of its members expired
            tx.moved(e.task_name, was, e.status, amounts)
        else:
            tx.changed(e.group_id, e.task_name, was, e.status, amounts, version=e.group["max_version"], reason=reason)


# -- prefixes ---------------------------------------------------------------------------------------------------

_PROGRESS = ("min_version", "max_version", "oldest_version", "freshest_version", *_AMOUNT)
_TOUCH_RUNNING = Many(
    update(t.groups)
    .where(t.groups.c.group_id == bindparam("id"), t.groups.c.status == Status.RUNNING.value, t.groups.c.owner == bindparam("me"))
    .values({name: bindparam(name) for name in _PROGRESS} | {"updated_at": bindparam("now"), "crashes": 0})
)
_NEXT_PREFIX = select(func.coalesce(func.max(t.prefixes.c.number), 0) + 1).where(t.prefixes.c.group_id == bindparam("id"))
_ADD_PREFIX = Many(
    insert(t.prefixes).values(
        group_id=bindparam("id"), number=_NEXT_PREFIX.scalar_subquery(), extras=bindparam("extras"), arrays=bindparam("arrays")
    )
)


def add_prefixes(tx: Transaction, encoded: Sequence[EncodedPrefix]) -> bool:
    """Store what running groups of ours decoded; False, and perhaps half of it, where one of them is not ours any more."""
    touched = _TOUCH_RUNNING.execute(tx.conn, [{"id": e.group_id, "me": tx.owner, "now": tx.now, **e.group} for e in encoded])
    if touched != len(encoded):
        return False
    _store_members(tx.conn, encoded)
    _ADD_PREFIX.execute(tx.conn, [{"id": e.group_id, "extras": e.extras, "arrays": e.arrays} for e in encoded])
    return True
