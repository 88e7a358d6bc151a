"""How a run stands, in one state of its database: counts, steps, versions, staleness, rates, waste, biases, leases and sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from sqlalchemy import Connection

from buffer import queries
from buffer.accounts import WINDOW, Account, account
from buffer.errors import CorruptPayloadError
from buffer.operations.consuming import committed_step
from buffer.status import Status

_MOST_TRANSITIONS = 10_000
"""Rates are of at most so many of the newest changes of a status: asking costs the same in a run of any length."""

_FAILURES_SHOWN = 8

_LEAST_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Staleness:
    """How many versions the groups that wait (completed, interrupted) lie behind the policy; those without trained tokens left out."""

    groups: int
    least: int
    median: int
    most: int


@dataclass(frozen=True, slots=True)
class TaskOverview:
    """How one task stands.

    Attributes:
        drawn: prompts ever drawn.
        pruned: groups whose rows were given up since; the counts and they add up to `drawn`.
        last_step: the last step at which anything of it was consumed; 0 before the first.
        counts: groups by status, every status present.
        staleness: of what waits; None where nothing waits.
        by_staleness: of what waits, how many groups lie so many versions behind the policy, the freshest first.
        account: what was sampled over the whole run, what was wasted, and the biases of what is trained on.
        completed_per_minute: groups completed lately; what a rewind gave back does not count.
        consumed_per_minute: groups handed out lately.
    """

    drawn: int
    pruned: int
    last_step: int
    counts: Mapping[Status, int]
    staleness: Staleness | None
    by_staleness: Mapping[int, int]
    account: Account
    completed_per_minute: float
    consumed_per_minute: float


@dataclass(frozen=True, slots=True)
class RewindRecord:
    """A rewind: when (seconds since 1970), to the checkpoint of which step, and the policy's version there."""

    at: float
    step: int
    version: int


@dataclass(frozen=True, slots=True)
class FailureRecord:
    """A group that failed or was filtered: when (seconds since 1970), which one, and why."""

    at: float
    task_name: str
    group_id: int
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class ProducerOverview:
    """A process that writes, and its lease.

    Attributes:
        owner: its name, as in `Transition.owner`.
        host: its machine.
        pid: its process id there.
        started_at: seconds since 1970.
        expires_in: seconds until what it runs is given to others, unless it renews; negative if that time is over.
        running: groups that it runs.
    """

    owner: str
    host: str
    pid: int
    started_at: float
    expires_in: float
    running: int


@dataclass(frozen=True, slots=True)
class Overview:
    """What `ReplayBuffer.overview` found.

    Attributes:
        at: when it was asked, by the database's clock; seconds since 1970.
        tasks: each task by its name.
        last_step: the last step at which anything was consumed; 0 before the first.
        committed_step: the last committed one; None before the first commit.
        version: the policy's newest version that the database knows of; None where it knows of none.
        rewinds: the first first. Their number is that of the timeline.
        producers: processes that write or wrote last, with their leases.
        failures: the last few groups that failed or were filtered, the last first; of late only.
        abandoned: running groups that none of these runs.
        rate_seconds: the seconds up to `at` that rates are counted over.
        last_change: when a group changed its status last, in seconds since 1970; None in an empty buffer.
        schema_version: of the database.
        database_bytes: its size; on PostgreSQL that of the buffer's tables.
        free_bytes: of these, what is used again before the file grows; None where the database does not tell.
        payload_groups: committed groups whose tokens are there: those that `prune` may take them from.
        payload_bytes: the bytes of these tokens.
        prefix_groups: groups with tokens stored while they ran, and not yet in a payload.
        prefix_bytes: the bytes of these.
    """

    at: float
    tasks: Mapping[str, TaskOverview]
    last_step: int
    committed_step: int | None
    version: int | None
    rewinds: Sequence[RewindRecord]
    producers: Sequence[ProducerOverview]
    failures: Sequence[FailureRecord]
    abandoned: int
    rate_seconds: float
    last_change: float | None
    schema_version: int
    database_bytes: int
    free_bytes: int | None
    payload_groups: int
    payload_bytes: int
    prefix_groups: int
    prefix_bytes: int

    @property
    def timeline(self) -> int:
        """The number of the run's timeline: how often it was rewound."""
        return len(self.rewinds)


def overview(conn: Connection, window: float) -> Overview:
    """Ask everything, with rates over the last `window` seconds at most."""
    now = queries.clock(conn)
    waiting = _waiting(conn)
    version = _version(conn, waiting)
    seconds, last_change, rates = _rates(conn, now, window)
    running = queries.running_by_owner(conn)
    producers = [_producer(row, now, running) for row in queries.producers(conn)]
    payloads, prefixes, size = queries.committed_payloads(conn), queries.stored_prefixes(conn), queries.database_size(conn)
    tasks = {row.task_name: _task(conn, row, waiting.get(row.task_name, []), version, rates, seconds) for row in queries.task_rows(conn)}
    return Overview(
        at=now,
        tasks=tasks,
        last_step=queries.last_step(conn),
        committed_step=committed_step(conn),
        version=version,
        rewinds=[RewindRecord(real(row.at), whole(row.step), whole(row.fork)) for row in queries.rewinds(conn)],
        producers=producers,
        failures=[_failure(row) for row in queries.newest_failures(conn, _FAILURES_SHOWN, _MOST_TRANSITIONS)],
        abandoned=sum(running.values()) - sum(producer.running for producer in producers),
        rate_seconds=seconds,
        last_change=last_change,
        schema_version=whole(queries.meta_value(conn, "schema_version")),
        database_bytes=size.bytes,
        free_bytes=size.free,
        payload_groups=payloads.n,
        payload_bytes=int(real(payloads.bytes)),
        prefix_groups=prefixes.n,
        prefix_bytes=int(real(prefixes.bytes)),
    )


_Waiting = Mapping[str, Sequence[Any]]


def _waiting(conn: Connection) -> _Waiting:
    by_task: dict[str, list[Any]] = {}
    for row in queries.waiting_versions(conn):
        by_task.setdefault(row.task_name, []).append(row)
    return by_task


def _version(conn: Connection, waiting: _Waiting) -> int | None:
    # What waits was sampled by the policy: effective versions never lie beyond it. They are newer than what was written
    # down at the last batch while the next one is being produced.
    told = (queries.meta_value(conn, "committed_version") or "").partition(" at step ")[0]
    sampled = [row.freshest for rows in waiting.values() for row in rows]
    known = [*queries.recorded_versions(conn), *([told] if told else []), *sampled]
    return max(map(whole, known), default=None)


def _task(
    conn: Connection, row: Any, waiting: Sequence[Any], version: int | None, rates: Mapping[tuple[str, str], int], seconds: float
) -> TaskOverview:
    name = row.task_name
    completed, consumed = (rates.get((name, status.value), 0) * 60 / seconds for status in (Status.COMPLETED, Status.CONSUMED))
    return TaskOverview(
        drawn=whole(row.drawn),
        pruned=whole(row.pruned),
        last_step=queries.last_step(conn, name),
        counts=queries.counts(conn, name),
        staleness=_staleness(waiting, version),
        by_staleness={} if version is None else {version - whole(row.oldest_version): row.n for row in reversed(waiting)},
        account=account(conn, name, WINDOW),
        completed_per_minute=completed,
        consumed_per_minute=consumed,
    )


def _staleness(waiting: Sequence[Any], version: int | None) -> Staleness | None:
    """Of rows of versions, ascending, each with its number of groups."""
    if version is None or not waiting:
        return None
    behind = [version - whole(row.oldest_version) for row in reversed(waiting)]
    up_to = list(accumulate(row.n for row in reversed(waiting)))
    middle = next(stale for stale, n in zip(behind, up_to, strict=True) if 2 * n >= up_to[-1])
    return Staleness(up_to[-1], behind[0], middle, behind[-1])


def _rates(conn: Connection, now: float, window: float) -> tuple[float, float | None, Mapping[tuple[str, str], int]]:
    """Over how many seconds, when the last change was, and how many groups of a task went to a status in these seconds."""
    newest = queries.newest_changes(conn, _MOST_TRANSITIONS)
    if not newest.n:
        return window, None, {}
    # A run younger than the window, or one too busy for it: rates are over what its changes reach back.
    seconds = max(_LEAST_SECONDS, min(window, now - real(newest.oldest)))
    found = queries.changes_since(conn, now - seconds, _MOST_TRANSITIONS)
    return seconds, real(newest.newest), {(row.task_name, row.target): row.n for row in found}


def _failure(row: Any) -> FailureRecord:
    return FailureRecord(real(row.at), row.task_name, whole(row.group_id), Status(row.target), row.reason)


def _producer(row: Any, now: float, running: Mapping[str | None, int]) -> ProducerOverview:
    return ProducerOverview(
        owner=row.owner,
        host=row.host,
        pid=whole(row.pid),
        started_at=real(row.started_at),
        expires_in=real(row.expires_at) - now,
        running=running.get(row.owner, 0),
    )


def whole(value: Any) -> int:
    """A whole number; SQLite lets whoever edits a file put text there."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise _edited(value) from None


def real(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise _edited(value) from None


def _edited(value: Any) -> CorruptPayloadError:
    return CorruptPayloadError(f"where a number belongs stands {value!r}; the database was edited: restore it from a copy")
