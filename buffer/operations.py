"""What the writer does in a transaction: each operation takes all requests of its kind that wait, in order.

An operation either does all of them or raises; the writer then repeats them one by one, so that one bad request
fails alone. Operations hold no state, so repeating after a rollback is safe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection

from buffer import queries as q
from buffer.codec import EncodedGroup, encode_group
from buffer.errors import IllegalTransitionError, StepError
from buffer.policies import TakePolicy
from buffer.queries import Deltas
from buffer.rollout import Position, RolloutGroup, RolloutState
from buffer.staleness import Level, oldest_fresh, too_stale
from buffer.status import Status, check_transition

Operation = Callable[[Connection, Sequence[Any], Deltas], Sequence[Any]]

_STORABLE_NEW = frozenset({Status.PENDING, Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED, Status.FILTERED, Status.FAILED})

_ONLY_BY = {Status.RUNNING: "claim() or start()", Status.CONSUMED: "take()", Status.ARCHIVED: "commit()"}
"""Statuses that a `put` may not give: each comes with a record of its own."""


def opened(conn: Connection, requests: Sequence[None], deltas: Deltas) -> list[tuple[bool, int]]:
    """Release every running group: on SQLite there is one writing process, so theirs is gone.

    Gives whether anything is consumed and not committed, and how many groups were released.
    """
    # Written at every opening: a file or disk that takes nothing is found out now, not at the first result.
    q.set_meta_value(conn, "opened_at", datetime.now(UTC).isoformat())
    ids = [group_id for task in q.task_names(conn) for group_id in _running(conn, task)]
    release(conn, [ids] if ids else [], deltas)
    return [(q.any_consumed(conn), len(ids))] * len(requests)


def _running(conn: Connection, task_name: str) -> list[int]:
    limit = q.count(conn, task_name, Status.RUNNING)
    return [row.group_id for row in q.claimable(conn, task_name, Status.RUNNING, limit)]


def put(conn: Connection, encoded: Sequence[EncodedGroup], deltas: Deltas) -> list[None]:
    """Store what came of groups; groups that the database never saw are added and count as drawn."""
    if len({e.group_id for e in encoded}) < len(encoded):
        raise IllegalTransitionError("a group is stored twice at once")  # one by one, the second meets the first's result
    stored = q.known(conn, [e.group_id for e in encoded])
    known = [e for e in encoded if e.group_id in stored]
    new = [e for e in encoded if e.group_id not in stored]
    if known:
        _check_results(known, stored)
        q.store_results(conn, known, stored, deltas)
    if new:
        _add(conn, new, deltas)
    return [None] * len(encoded)


def _check_results(known: Sequence[EncodedGroup], stored: Mapping[int, Any]) -> None:
    for e in known:
        row, what = stored[e.group_id], f"group {e.group_id} of task {e.task_name!r}"
        if (row.task_name, row.members) != (e.task_name, len(e.rollouts)):
            raise IllegalTransitionError(
                f"{what} with {len(e.rollouts)} rollouts is stored as one of task {row.task_name!r} with {row.members}; "
                "give another group an id of its own"
            )
        if row.status == Status.CONSUMED:
            raise IllegalTransitionError(f"{what} is consumed: resume() gives it back, commit() makes it final, put() does neither")
        if e.status in _ONLY_BY:
            raise IllegalTransitionError(f"{what} cannot be stored as {e.status}: that is done by {_ONLY_BY[e.status]}")
        check_transition(Status(row.status), e.status, what)


def _add(conn: Connection, new: Sequence[EncodedGroup], deltas: Deltas) -> None:
    for e in new:
        if e.status not in _STORABLE_NEW:
            raise IllegalTransitionError(
                f"group {e.group_id} of task {e.task_name!r} is new and cannot be stored as {e.status}; "
                f"a new group may be {sorted(_STORABLE_NEW)}"
            )
    q.reserve_beyond(conn, "group", max(e.group_id for e in new))
    for task_name in {e.task_name for e in new}:
        q.add_drawn(conn, task_name, sum(e.task_name == task_name for e in new))
    q.insert_groups(conn, new, deltas)


@dataclass(frozen=True, slots=True)
class DrawnRow:
    """One prompt as the dataset gave it; `error` says why it cannot be run."""

    row: Any
    position: Position
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Prompts taken from a dataset whose cursor had moved `moves` times and now stands at `cursor` (JSON)."""

    task_name: str
    rows: Sequence[DrawnRow]
    group_size: int
    moves: int
    cursor: str


def draw(conn: Connection, draws: Sequence[Draw], deltas: Deltas) -> list[list[int]]:
    """Record drawn prompts and the cursor behind them together; gives the new groups' ids."""
    return [_draw_one(conn, request, deltas) for request in draws]


def _draw_one(conn: Connection, request: Draw, deltas: Deltas) -> list[int]:
    q.move_cursor(conn, request.task_name, request.moves, request.cursor, len(request.rows))
    if not request.rows:
        return []
    first = q.reserve(conn, "group", len(request.rows))
    encoded = [_encode_drawn(first + n, drawn, request) for n, drawn in enumerate(request.rows)]
    q.insert_groups(conn, encoded, deltas)
    return [e.group_id for e in encoded]


def _encode_drawn(group_id: int, drawn: DrawnRow, request: Draw) -> EncodedGroup:
    if drawn.error is None:
        group = RolloutGroup.from_row(
            group_id, drawn.row, group_size=request.group_size, task_name=request.task_name, position=drawn.position
        )
        return encode_group(group)
    row = drawn.row if isinstance(drawn.row, Mapping) else {"value": repr(drawn.row)}
    rollouts = [
        RolloutState(group_id, index, request.task_name, Status.FAILED, error=drawn.error, row=row) for index in range(request.group_size)
    ]
    return encode_group(RolloutGroup(group_id, rollouts, request.task_name, drawn.position))


def cursor(conn: Connection, task_names: Sequence[str], deltas: Deltas) -> list[tuple[int, str | None]]:
    """Where each task's dataset goes on, as of the operations before this one."""
    return [q.cursor(conn, task_name) for task_name in task_names]


@dataclass(frozen=True, slots=True)
class Claim:
    """A wish for up to `limit` waiting groups of a task, from the first of `statuses` that has any, and so on."""

    task_name: str
    statuses: Sequence[Status]
    limit: int
    exclude: frozenset[int]


def claim(conn: Connection, claims: Sequence[Claim], deltas: Deltas) -> list[list[int]]:
    """Move waiting groups to running; gives their ids, each to one claimant."""
    return [_claim_one(conn, request, deltas) for request in claims]


def _claim_one(conn: Connection, request: Claim, deltas: Deltas) -> list[int]:
    rows: list[Any] = []
    for status in dict.fromkeys(request.statuses):
        if len(rows) < request.limit:
            wanted = request.limit - len(rows)
            waiting = q.claimable(conn, request.task_name, status, wanted + len(request.exclude))
            rows += [row for row in waiting if row.group_id not in request.exclude][:wanted]
    q.move(conn, rows, Status.RUNNING, deltas)
    return [row.group_id for row in rows]


def start(conn: Connection, requests: Sequence[Sequence[int]], deltas: Deltas) -> list[Sequence[int]]:
    """Move given groups to running; gives their ids."""
    for group_ids in requests:
        q.move(conn, q.rows_of(conn, group_ids), Status.RUNNING, deltas)
    return list(requests)


def release(conn: Connection, requests: Sequence[Sequence[int]], deltas: Deltas) -> list[None]:
    """Running groups that nobody runs become interrupted, with what was stored of them."""
    for group_ids in requests:
        rows = q.rows_of(conn, group_ids)
        q.move(conn, rows, Status.INTERRUPTED, deltas)
        q.count_interruption(conn, group_ids)
    return [None] * len(requests)


class HandedOut(Protocol):
    """A request that named groups, as the writer's thread knows it; `outcome` is None where nothing came of it."""

    outcome: Any


def release_claimed(conn: Connection, requests: Sequence[HandedOut], deltas: Deltas) -> list[None]:
    """Undo a claim whose claimant was cancelled before it had the groups."""
    for request in requests:
        found = q.known(conn, list(request.outcome or ()))
        still = [group_id for group_id, row in found.items() if row.status == Status.RUNNING]
        release(conn, [still], deltas)
    return [None] * len(requests)


@dataclass(frozen=True, slots=True)
class Take:
    """A wish for up to `limit` completed groups, consumed at `step`."""

    task_name: str
    limit: int
    step: int
    version: int | None
    policy: TakePolicy


class Taken(list[int]):
    """Ids of groups in the order of handing out, and the number of the take that consumed them."""

    number: int | None = None


def take(conn: Connection, requests: Sequence[Take], deltas: Deltas) -> list[Taken]:
    """Move completed groups to consumed."""
    return [_take_one(conn, request, deltas) for request in requests]


def next_step(conn: Connection, task_name: str) -> int:
    """The first step that lies behind the task's last one and behind what is final."""
    return max(q.last_step(conn, task_name), committed_step(conn) or 0) + 1


def check_step(conn: Connection, step: int) -> None:
    """Raise `StepError` if what is consumed at `step` is final already."""
    committed = committed_step(conn)
    if committed is not None and step <= committed:
        raise StepError(f"step={step} lies at or before the committed step {committed}; take at step {committed + 1} or later")


def _take_one(conn: Connection, request: Take, deltas: Deltas) -> Taken:
    check_step(conn, request.step)
    rows = q.first_completed(conn, request.task_name, request.limit, request.policy)
    taken = Taken(row.group_id for row in rows)
    taken.number = q.consume(conn, rows, request.step, request.version, deltas)
    return taken


def give_back(conn: Connection, requests: Sequence[HandedOut], deltas: Deltas) -> list[None]:
    """Undo a take whose taker was cancelled before it had the groups."""
    for request in requests:
        taken: Taken = request.outcome or Taken()
        found = q.known(conn, taken)
        # Only this take: a rewind may have come between, and the groups may be another taker's by now.
        still = [found[group_id] for group_id in taken if found[group_id].take == taken.number]
        q.unconsume(conn, [row for row in still if row.status == Status.CONSUMED], deltas)
    return [None] * len(requests)


_SLICE_GROUPS, _SLICE_TOKENS = 64, 2**18
"""Most groups, and about the most tokens, that one expiry rewrites: others wait for the writer meanwhile."""

_BEFORE_ALL = (-(2**62), 0)


@dataclass(frozen=True, slots=True)
class Expire:
    """A wish to expire the next slice of a task's stale groups, behind the place `after` (min_version, group_id)."""

    task_name: str
    version: int
    max_staleness: int
    level: Level
    after: tuple[int, int] = _BEFORE_ALL


class Expired(NamedTuple):
    """How many groups of a slice expired, and behind which place the next one begins; None at the end."""

    n: int
    after: tuple[int, int] | None


def expire(conn: Connection, requests: Sequence[Expire], deltas: Deltas) -> list[Expired]:
    """Move stale groups to expired, their stale members reset."""
    return [_expire_slice(conn, request, deltas) for request in requests]


def _expire_slice(conn: Connection, request: Expire, deltas: Deltas) -> Expired:
    below = oldest_fresh(request.version, request.max_staleness)
    found = q.stale(conn, request.task_name, below, request.after, _SLICE_GROUPS)
    before = accumulate((row.tokens for row in found), initial=0)
    rows = [row for row, tokens in zip(found, before, strict=False) if tokens < _SLICE_TOKENS]
    n = _expire_groups(conn, q.load_groups(conn, [row.group_id for row in rows]), request, deltas)
    at_the_end = len(rows) == len(found) < _SLICE_GROUPS
    return Expired(n, None if at_the_end else (rows[-1].min_version, rows[-1].group_id))


def _expire_groups(conn: Connection, groups: Sequence[RolloutGroup], request: Expire, deltas: Deltas) -> int:
    stored = {group.group_id: group.status for group in groups}
    expired = [group for group in groups if _reset_stale(group, request)]
    if expired:
        q.store_expired(conn, [encode_group(group) for group in expired], [stored[group.group_id] for group in expired], deltas)
    return len(expired)


def _reset_stale(group: RolloutGroup, request: Expire) -> bool:
    """Reset the members that are too stale, and say whether there are any; the others stay as they are."""
    stale = [r for r in group.rollouts if too_stale(r.versions, r.loss_mask, request.version, request.max_staleness, request.level)]
    for rollout in stale:
        check_transition(rollout.status, Status.EXPIRED, f"rollout {rollout.rollout_id}")
        rollout.reset()
        rollout.status = Status.EXPIRED
    return bool(stale)


def committed_step(conn: Connection) -> int | None:
    """The last committed step; None before the first commit."""
    stored = q.meta_value(conn, "committed_step")
    return None if stored is None else int(stored)


@dataclass(frozen=True, slots=True)
class Commit:
    """A wish to make what was consumed up to `step` final, with the policy's version there, if it was told."""

    step: int
    version: int | None


def commit(conn: Connection, requests: Sequence[Commit], deltas: Deltas) -> list[int]:
    """Archive what was consumed up to each step; gives how many groups that made final."""
    return [_commit_one(conn, request, deltas) for request in requests]


def _commit_one(conn: Connection, request: Commit, deltas: Deltas) -> int:
    rows = q.consumed_up_to(conn, request.step)
    q.move(conn, rows, Status.ARCHIVED, deltas)
    committed = committed_step(conn) or 0
    if request.step > committed:
        q.set_meta_value(conn, "committed_step", str(request.step))
    if request.version is not None and request.step >= committed:
        q.set_meta_value(conn, "committed_version", f"{request.version} at step {request.step}")
    return len(rows)


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """What `resume` found and did.

    Attributes:
        step: the step that the trainer resumes from.
        version: of the policy at that checkpoint; give it to `engine.update_weights`.
        rewound: groups consumed after that step that will be handed out again.
        released: groups that were running when their process died, now interrupted.
        counts: groups by task and status, after resuming.
    """

    step: int
    version: int
    rewound: int
    released: int
    counts: Mapping[str, Mapping[Status, int]]


def resume(conn: Connection, steps: Sequence[int], deltas: Deltas) -> list[tuple[int, int]]:
    """Rewind to each step; gives the version at its checkpoint and how many groups were given back."""
    return [_resume_one(conn, step, deltas) for step in steps]


def _resume_one(conn: Connection, step: int, deltas: Deltas) -> tuple[int, int]:
    committed = committed_step(conn)
    if committed is not None and step < committed:
        raise StepError(
            f"step={step} lies before the committed step {committed}, whose batches are final; resume from a checkpoint of step "
            f"{committed} or later, and commit only when you will not go back further"
        )
    version = _version_at(conn, step)
    rows = q.consumed_after(conn, step)
    q.unconsume(conn, rows, deltas)
    # What the next step saw stays: resuming from here once more must give the same version.
    q.drop_steps_after(conn, step + 1)
    return version, len(rows)


def _version_at(conn: Connection, step: int) -> int:
    """The policy's version at the checkpoint of `step`: as told to `commit`, else what the next batch saw, else one more
    than this step's batch saw: true where every step makes one update of the weights."""
    told, _, at_step = (q.meta_value(conn, "committed_version") or "").partition(" at step ")
    if at_step == str(step):
        return int(told)
    after = q.step_version(conn, step + 1)
    if after is not None:
        return after
    at = q.step_version(conn, step)
    return step if at is None else at + 1
