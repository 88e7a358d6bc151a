"""Every statement, one function each. Nothing outside `buffer/` composes SQL.

Functions take a connection inside a transaction. Writing ones also take `Deltas`, which collects how the counts
by task and status change; the writer stores them once per transaction, so that they are exact at every commit.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from sqlalchemy import ColumnElement, Connection, Row, Table, bindparam, delete, func, insert, literal, select, tuple_, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError

from buffer import schema as t
from buffer.codec import EncodedGroup, decode_group
from buffer.errors import CorruptPayloadError, CursorConflictError, DuplicateGroupError, IllegalTransitionError, UnknownGroupError
from buffer.policies import Fifo, FreshestFirst, StalestFirst, TakePolicy
from buffer.rollout import RolloutGroup
from buffer.status import Status, check_transition

Deltas = Counter[tuple[str, Status]]

_CHUNK = 500
"""Ids per IN list: below every driver's limit on bound parameters."""


# -- counts and keys ------------------------------------------------------------------------------------------


def _upsert(table: Table, keys: Sequence[str], change: Callable[[Any], dict[str, Any]]) -> sqlite.Insert:
    """INSERT that changes the row of the same keys where there is one; `change` is given what would be inserted.

    Statements are built once, here or below: to build one costs several times what SQLite needs for it.
    """
    statement = sqlite.insert(table)
    return statement.on_conflict_do_update(index_elements=keys, set_=change(statement.excluded))


_ADD_COUNTS = _upsert(t.counts, ["task_name", "status"], lambda new: {"n": t.counts.c.n + new.n})


def apply_deltas(conn: Connection, deltas: Deltas) -> None:
    """Add the deltas to the stored counts. Sorted, so that two writers lock rows in one order."""
    rows = [{"task_name": task, "status": status.value, "n": n} for (task, status), n in sorted(deltas.items()) if n]
    if rows:
        conn.execute(_ADD_COUNTS, rows)


def counts(conn: Connection, task_name: str) -> dict[Status, int]:
    """Groups of the task by status, every status present."""
    rows = conn.execute(select(t.counts.c.status, t.counts.c.n).where(t.counts.c.task_name == task_name))
    return dict.fromkeys(Status, 0) | {Status(status): n for status, n in rows}


def count(conn: Connection, task_name: str, status: Status) -> int:
    """Groups of the task with this status; one row is read, whatever the size of the buffer."""
    found = conn.scalar(select(t.counts.c.n).where(t.counts.c.task_name == task_name, t.counts.c.status == status.value))
    return found or 0


def task_names(conn: Connection) -> list[str]:
    """The tasks that ever drew or stored a group."""
    return list(conn.scalars(select(t.tasks.c.task_name).order_by(t.tasks.c.task_name)))


_RESERVE = _upsert(t.sequences, ["name"], lambda new: {"last": t.sequences.c.last + new.last}).returning(t.sequences.c.last)
_RESERVE_BEYOND = _upsert(t.sequences, ["name"], lambda new: {"last": func.max(new.last, t.sequences.c.last)})


def reserve(conn: Connection, name: str, n: int) -> int:
    """Take the next `n` numbers of a sequence and return the first; sequences start at 1 and never repeat."""
    last: int | None = conn.scalar(_RESERVE, {"name": name, "last": n})
    assert last is not None
    return last - n + 1


def reserve_beyond(conn: Connection, name: str, number: int) -> None:
    """See to it that the sequence never gives `number` or anything below it."""
    conn.execute(_RESERVE_BEYOND, {"name": name, "last": number})


def meta_value(conn: Connection, key: str) -> str | None:
    """One entry of the table of run-wide values."""
    return conn.scalar(select(t.meta.c.value).where(t.meta.c.key == key))


_SET_META = _upsert(t.meta, ["key"], lambda new: {"value": new.value})


def set_meta_value(conn: Connection, key: str, value: str) -> None:
    """Store one run-wide value."""
    conn.execute(_SET_META, {"key": key, "value": value})


# -- drawing --------------------------------------------------------------------------------------------------


def cursor(conn: Connection, task_name: str) -> tuple[int, str | None]:
    """How often the task's dataset cursor moved, and where it stands (JSON; None before the first draw)."""
    row = conn.execute(select(t.tasks.c.moves, t.tasks.c.cursor).where(t.tasks.c.task_name == task_name)).one_or_none()
    return (0, None) if row is None else (row.moves, row.cursor)


def move_cursor(conn: Connection, task_name: str, moves: int, new_cursor: str, drawn: int) -> None:
    """Advance the cursor that had moved `moves` times; anything else means that somebody else draws for the task."""
    _ensure_task(conn, task_name)
    moved = conn.execute(
        update(t.tasks)
        .where(t.tasks.c.task_name == task_name, t.tasks.c.moves == moves)
        .values(moves=moves + 1, cursor=new_cursor, drawn=t.tasks.c.drawn + drawn)
    )
    if moved.rowcount != 1:
        raise CursorConflictError(
            f"the dataset cursor of task {task_name!r} was moved by another sampler; "
            "use one sampler for a task, and one task_name for a dataset"
        )


_ADD_DRAWN = update(t.tasks).where(t.tasks.c.task_name == bindparam("task")).values(drawn=t.tasks.c.drawn + bindparam("n"))


def add_drawn(conn: Connection, task_name: str, drawn: int) -> None:
    """Account for groups that came in without a draw of ours."""
    _ensure_task(conn, task_name)
    conn.execute(_ADD_DRAWN, {"task": task_name, "n": drawn})


_ENSURE_TASK = sqlite.insert(t.tasks).on_conflict_do_nothing()


def _ensure_task(conn: Connection, task_name: str) -> None:
    conn.execute(_ENSURE_TASK, {"task_name": task_name, "drawn": 0, "moves": 0})


# -- writing groups -------------------------------------------------------------------------------------------


_INSERT_GROUP, _INSERT_PROMPT, _INSERT_MEMBER = insert(t.groups), insert(t.prompts), insert(t.rollouts)


_TWICE = ("SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY", "SQLITE_CONSTRAINT_ROWID")
"""How the driver says that a key is there already."""


def insert_groups(conn: Connection, encoded: Sequence[EncodedGroup], deltas: Deltas) -> None:
    """Add groups that the database does not have; its unique keys refuse a group id or a prompt that it has."""
    now, seq = time.time(), reserve(conn, "ready", len(encoded))
    rows = [
        {
            "group_id": e.group_id,
            "task_name": e.task_name,
            "status": e.status.value,
            "ready_seq": seq + n,
            "consumed_seq": t.NEVER_CONSUMED,
            "created_at": now,
            "updated_at": now,
            **e.group,
        }
        for n, e in enumerate(encoded)
    ]
    try:
        conn.execute(_INSERT_GROUP, rows)
    except IntegrityError as error:
        if getattr(error.orig, "sqlite_errorname", "") not in _TWICE:
            raise
        raise DuplicateGroupError(
            f"{_named(encoded)} cannot be added: the database has a group of this id or position already; "
            "draw prompts through the buffer, or give every group an id and position of its own"
        ) from error
    conn.execute(_INSERT_PROMPT, [{"group_id": e.group_id, "data": e.prompt} for e in encoded])
    conn.execute(_INSERT_MEMBER, [member for e in encoded for member in e.rollouts])
    _write_payloads(conn, [e for e in encoded if e.arrays])
    deltas.update((e.task_name, e.status) for e in encoded)


def _named(encoded: Sequence[EncodedGroup]) -> str:
    first = encoded[0]
    others = f" (or one of {len(encoded) - 1} beside it)" if len(encoded) > 1 else ""
    return f"group {first.group_id} of task {first.task_name!r} at (epoch {first.group['epoch']}, {first.group['position']}){others}"


_STORE_RESULT = (
    update(t.groups)
    .where(
        t.groups.c.group_id == bindparam("id"),
        t.groups.c.status == bindparam("expected"),
        t.groups.c.task_name == bindparam("task"),
        t.groups.c.members == bindparam("size"),
    )
    .values(
        status=bindparam("status"),
        ready_seq=bindparam("ready_seq"),
        min_version=bindparam("min_version"),
        max_version=bindparam("max_version"),
        tokens=bindparam("tokens"),
        filter_reason=bindparam("filter_reason"),
        updated_at=bindparam("now"),
    )
)
_STORE_MEMBER = (
    update(t.rollouts)
    .where(t.rollouts.c.group_id == bindparam("id"), t.rollouts.c.member == bindparam("at"))
    .values({c.name: bindparam(c.name) for c in t.rollouts.c if c.name not in ("group_id", "member")})
)


def store_results(conn: Connection, encoded: Sequence[EncodedGroup], stored: Mapping[int, Row[Any]], deltas: Deltas) -> None:
    """Write what came of groups that stand in the database as `stored`.

    The rows themselves hold the guard: the expected status, task and size stand in the WHERE.
    """
    now, seq = time.time(), reserve(conn, "ready", len(encoded))
    rows = [
        {"id": e.group_id, "expected": stored[e.group_id].status, "task": e.task_name, "size": len(e.rollouts), "now": now}
        | {"status": e.status.value, "ready_seq": seq + n}
        | {name: e.group[name] for name in ("min_version", "max_version", "tokens", "filter_reason")}
        for n, e in enumerate(encoded)
    ]
    _require_rowcount(conn.execute(_STORE_RESULT, rows).rowcount, len(rows))
    _store_members(conn, encoded)
    _write_payloads(conn, encoded)
    for e in encoded:
        deltas[e.task_name, Status(stored[e.group_id].status)] -= 1
        deltas[e.task_name, e.status] += 1


def _store_members(conn: Connection, encoded: Sequence[EncodedGroup]) -> None:
    members = [{"id": m["group_id"], "at": m["member"], **m} for e in encoded for m in e.rollouts]
    _require_rowcount(conn.execute(_STORE_MEMBER, members).rowcount, len(members))


_WRITE_PAYLOAD = _upsert(t.payloads, ["group_id"], lambda new: {"extras": new.extras, "arrays": new.arrays})


def _write_payloads(conn: Connection, encoded: Sequence[EncodedGroup]) -> None:
    if encoded:
        conn.execute(_WRITE_PAYLOAD, [{"group_id": e.group_id, "extras": e.extras, "arrays": e.arrays} for e in encoded])


def _require_rowcount(found: int, expected: int) -> None:
    if found != expected:
        raise IllegalTransitionError(f"{expected} rows were to change, {found} did: a group is not what it was, or has other members")


_ROWS = select(t.groups.c.group_id, t.groups.c.task_name, t.groups.c.status, t.groups.c.members, t.groups.c.consumed_seq, t.groups.c.take)
_KNOWN = _ROWS.where(t.groups.c.group_id.in_(bindparam("ids", expanding=True)))


def known(conn: Connection, group_ids: Sequence[int]) -> dict[int, Row[Any]]:
    """What `_ROWS` selects, of those of the groups that exist."""
    found: dict[int, Row[Any]] = {}
    for chunk in _chunks(group_ids):
        found |= {row.group_id: row for row in conn.execute(_KNOWN, {"ids": chunk})}
    return found


_MOVE = (
    update(t.groups)
    .where(t.groups.c.group_id == bindparam("id"), t.groups.c.status == bindparam("expected"))
    .values(status=bindparam("status"), updated_at=bindparam("now"))
)


def move(conn: Connection, rows: Sequence[Row[Any]], target: Status, deltas: Deltas) -> None:
    """Take groups (rows with group_id, task_name, status) to `target`; refused where the table does not allow it."""
    if not rows:
        return
    for row in rows:
        check_transition(Status(row.status), target, f"group {row.group_id} of task {row.task_name!r}")
        deltas[row.task_name, Status(row.status)] -= 1
        deltas[row.task_name, target] += 1
    now = time.time()
    moved = conn.execute(_MOVE, [{"id": row.group_id, "expected": row.status, "status": target.value, "now": now} for row in rows])
    _require_rowcount(moved.rowcount, len(rows))


def rows_of(conn: Connection, group_ids: Sequence[int]) -> list[Row[Any]]:
    """What `known` gives of each, in the order asked for; an unknown id is an error."""
    found = known(conn, group_ids)
    return [found[group_id] for group_id in _all_of(group_ids, found)]


def _all_of(group_ids: Sequence[int], found: Mapping[int, Any]) -> Sequence[int]:
    if missing := [group_id for group_id in group_ids if group_id not in found]:
        raise UnknownGroupError(f"no group {missing[0]} is in the database; query() lists those that are")
    return group_ids


def claimable(conn: Connection, task_name: str, status: Status, limit: int) -> list[Row[Any]]:
    """The oldest groups of the task that wait in `status`."""
    statement = _ROWS.where(t.groups.c.task_name == task_name, t.groups.c.status == status.value)
    return list(conn.execute(statement.order_by(t.groups.c.consumed_seq, t.groups.c.ready_seq).limit(limit)))


_MAY_EXPIRE = [literal(status.value, literal_execute=True) for status in (Status.COMPLETED, Status.INTERRUPTED)]
"""Literally and in the order of the schema's index `groups_versions`: only then does the planner see that it fits."""


def stale(conn: Connection, task_name: str, below: int, after: tuple[int, int], limit: int) -> list[Row[Any]]:
    """Completed and interrupted groups with a trainable token older than version `below`, the stalest first.

    `after` is the (min_version, group_id) behind which to go on. Rows of group_id, min_version and tokens.
    """
    place = (t.groups.c.min_version, t.groups.c.group_id)
    statement = select(*place, t.groups.c.tokens).where(
        t.groups.c.task_name == task_name,
        t.groups.c.status.in_(_MAY_EXPIRE),
        t.groups.c.min_version < below,
        tuple_(*place) > tuple_(*after),
    )
    return list(conn.execute(statement.order_by(*place).limit(limit)))


_STORE_EXPIRED = (
    update(t.groups)
    .where(t.groups.c.group_id == bindparam("id"), t.groups.c.status == bindparam("expected"))
    .values({name: bindparam(name) for name in ("status", "min_version", "max_version", "tokens")} | {"updated_at": bindparam("now")})
)


def store_expired(conn: Connection, encoded: Sequence[EncodedGroup], stored: Sequence[Status], deltas: Deltas) -> None:
    """Write groups some of whose members were reset, and that stood in the database as `stored`.

    They keep their place in the queue (`ready_seq`): those that waited longest run again first.
    """
    now = time.time()
    rows = [
        {"id": e.group_id, "expected": was.value, "status": e.status.value, "now": now}
        | {name: e.group[name] for name in ("min_version", "max_version", "tokens")}
        for e, was in zip(encoded, stored, strict=True)
    ]
    _require_rowcount(conn.execute(_STORE_EXPIRED, rows).rowcount, len(rows))
    _store_members(conn, encoded)
    _write_payloads(conn, encoded)
    for e, was in zip(encoded, stored, strict=True):
        deltas[e.task_name, was] -= 1
        deltas[e.task_name, e.status] += 1


def count_interruption(conn: Connection, group_ids: Sequence[int]) -> None:
    """One more interruption for the unfinished members of groups whose producer died."""
    for chunk in _chunks(group_ids):
        unfinished = t.rollouts.c.status != Status.COMPLETED.value
        conn.execute(
            update(t.rollouts).where(t.rollouts.c.group_id.in_(chunk), unfinished).values(interruptions=t.rollouts.c.interruptions + 1)
        )


# -- taking, committing, rewinding ------------------------------------------------------------------------------


def first_completed(conn: Connection, task_name: str, limit: int, policy: TakePolicy) -> list[Row[Any]]:
    """The completed groups to hand out next: the rewound first, as they were consumed, then by policy."""
    # Literally, not as a parameter: only then does the planner see that the partial indexes hold what it needs.
    completed = literal(Status.COMPLETED.value, literal_execute=True)
    ready = _ROWS.where(t.groups.c.task_name == task_name, t.groups.c.status == completed)
    return list(conn.execute(ready.order_by(t.groups.c.consumed_seq, *_order(policy)).limit(limit)))


def _order(policy: TakePolicy) -> list[ColumnElement[Any]]:
    match policy:
        case Fifo():
            return [t.groups.c.ready_seq.asc()]
        case StalestFirst():
            return [t.groups.c.min_version.asc(), t.groups.c.ready_seq.asc()]
        case FreshestFirst():
            return [t.groups.c.min_version.desc(), t.groups.c.ready_seq.asc()]
        case _:
            assert_never(policy)


_CONSUME = (
    update(t.groups)
    .where(t.groups.c.group_id == bindparam("id"))
    .values(consumed_step=bindparam("step"), consumed_seq=bindparam("seq"), take=bindparam("number"))
)


_REMEMBER_VERSION = _upsert(t.steps, ["step"], lambda new: {"version": func.coalesce(new.version, t.steps.c.version)})


def consume(conn: Connection, rows: Sequence[Row[Any]], step: int, version: int | None, deltas: Deltas) -> int | None:
    """Mark completed groups as consumed at `step`, in this order, and remember the policy's version then.

    Gives the number of this take, which no other has.
    """
    if not rows:
        return None
    move(conn, rows, Status.CONSUMED, deltas)
    number, first = reserve(conn, "take", 1), reserve(conn, "consumed", len(rows))
    # A rewound group keeps its place: however often a run is rewound, its batches come again in one order.
    seqs = [first + n if row.consumed_seq == t.NEVER_CONSUMED else row.consumed_seq for n, row in enumerate(rows)]
    conn.execute(_CONSUME, [{"id": row.group_id, "step": step, "seq": seq, "number": number} for row, seq in zip(rows, seqs, strict=True)])
    conn.execute(_REMEMBER_VERSION, {"step": step, "version": version})
    return number


def consumed_after(conn: Connection, step: int) -> list[Row[Any]]:
    """Consumed and not committed, at a step later than `step`."""
    return _consumed(conn, t.groups.c.consumed_step > step)


def consumed_up_to(conn: Connection, step: int) -> list[Row[Any]]:
    """Consumed and not committed, at `step` or before."""
    return _consumed(conn, t.groups.c.consumed_step <= step)


def _consumed(conn: Connection, when: ColumnElement[bool]) -> list[Row[Any]]:
    return list(conn.execute(_ROWS.where(when, t.groups.c.status == Status.CONSUMED.value).order_by(t.groups.c.consumed_seq)))


def any_consumed(conn: Connection) -> bool:
    """Whether any group is consumed and not committed."""
    consumed = (t.groups.c.status == Status.CONSUMED.value, t.groups.c.consumed_step.is_not(None))
    return conn.scalar(select(t.groups.c.group_id).where(*consumed).limit(1)) is not None


def unconsume(conn: Connection, rows: Sequence[Row[Any]], deltas: Deltas) -> None:
    """Give consumed groups back: completed again, to be handed out first and in the order they had."""
    move(conn, rows, Status.COMPLETED, deltas)
    for chunk in _chunks([row.group_id for row in rows]):
        conn.execute(update(t.groups).where(t.groups.c.group_id.in_(chunk)).values(consumed_step=None, take=None))


def drop_steps_after(conn: Connection, step: int) -> None:
    """Forget the versions at steps later than `step`."""
    conn.execute(delete(t.steps).where(t.steps.c.step > step))


def step_version(conn: Connection, step: int) -> int | None:
    """The policy's version recorded when the batch of `step` was handed out."""
    return conn.scalar(select(t.steps.c.version).where(t.steps.c.step == step))


def last_step(conn: Connection, task_name: str | None = None) -> int:
    """The last step at which anything of the task (of any task) was consumed and not given back; 0 before the first."""
    return max(_last_step_of(conn, status, task_name) for status in (Status.CONSUMED, Status.ARCHIVED))


def _last_step_of(conn: Connection, status: Status, task_name: str | None) -> int:
    reached = t.groups.c.consumed_step
    # Walks the index from its end; the first entry is nearly always the task's own.
    last = select(reached).where(t.groups.c.status == status.value, reached.is_not(None)).order_by(reached.desc()).limit(1)
    found = conn.scalar(last if task_name is None else last.where(t.groups.c.task_name == task_name))
    if found is not None and not isinstance(found, int):
        raise CorruptPayloadError(f"a step of consumption is {found!r}; the database was edited: restore it from a copy")
    return found or 0


# -- reading groups -------------------------------------------------------------------------------------------


def load_groups(conn: Connection, group_ids: Sequence[int]) -> list[RolloutGroup]:
    """Whole groups, payloads included, in the order asked for; an unknown id is an error."""
    loaded: dict[int, RolloutGroup] = {}
    for chunk in _chunks(group_ids):
        loaded |= _load_chunk(conn, chunk)
    return [loaded[group_id] for group_id in _all_of(group_ids, loaded)]


def _load_chunk(conn: Connection, group_ids: Sequence[int]) -> dict[int, RolloutGroup]:
    members: dict[int, list[Mapping[str, Any]]] = {}
    order = (t.rollouts.c.group_id, t.rollouts.c.member)
    for row in conn.execute(select(t.rollouts).where(t.rollouts.c.group_id.in_(group_ids)).order_by(*order)).mappings():
        members.setdefault(row["group_id"], []).append(dict(row))
    joined = t.groups.join(t.prompts).outerjoin(t.payloads, t.payloads.c.group_id == t.groups.c.group_id)
    statement = select(t.groups, t.prompts.c.data, t.payloads.c.extras, t.payloads.c.arrays).select_from(joined)
    rows = conn.execute(statement.where(t.groups.c.group_id.in_(group_ids))).mappings()
    return {
        row["group_id"]: decode_group(
            dict(row), members.get(row["group_id"], []), row["data"], None if row["arrays"] is None else (row["extras"], row["arrays"])
        )
        for row in rows
    }


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


def find(conn: Connection, filters: Filters, limit: int, offset: int) -> list[int]:
    """Ids of the groups that are as asked, oldest first."""
    statement = select(t.groups.c.group_id).where(*_of_groups(filters), *_of_members(filters))
    return list(conn.scalars(statement.order_by(t.groups.c.group_id).limit(limit).offset(offset)))


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


def _of_members(filters: Filters) -> Iterable[ColumnElement[bool]]:
    members = select(t.rollouts.c.member).where(t.rollouts.c.group_id == t.groups.c.group_id)
    mean = select(func.avg(t.rollouts.c.reward)).where(t.rollouts.c.group_id == t.groups.c.group_id).scalar_subquery()
    if filters.min_reward is not None:
        yield mean >= filters.min_reward
    if filters.max_reward is not None:
        yield mean <= filters.max_reward
    if filters.error is not None:
        yield members.where(t.rollouts.c.error.contains(filters.error, autoescape=True)).exists()
    if filters.min_attempts is not None:
        yield members.where(t.rollouts.c.attempts >= filters.min_attempts).exists()


# -- audit ----------------------------------------------------------------------------------------------------


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


def _chunks(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))
