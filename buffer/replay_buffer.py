"""`ReplayBuffer`: the durable home of every group of rollouts, and the only door to it."""

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from buffer import arguments as args
from buffer import audit, forking, operations, queries, transfer
from buffer.audit import AuditReport
from buffer.backends import backend_of
from buffer.codec import snapshot, to_json
from buffer.errors import BufferClosedError, IllegalTransitionError, ReplayBufferError, ResumeRequiredError
from buffer.forking import ForkReport
from buffer.numbers import TOO_LARGE
from buffer.operations import (
    Checkpoint,
    Claim,
    Commit,
    Draw,
    DrawnRow,
    Expire,
    Expired,
    Opening,
    Operation,
    Prune,
    PrunedSlice,
    ResumeReport,
    Rewind,
    Rewound,
    Take,
)
from buffer.overview import Overview, overview
from buffer.policies import Fifo, TakePolicy
from buffer.progress import Progress
from buffer.queries import Filters, RecordedStep
from buffer.rollout import RolloutGroup
from buffer.staleness import Level
from buffer.status import CLAIMABLE, Status, parse_status
from buffer.store import Reader, Request, Writer, in_a_thread, uninterrupted
from buffer.transactor import Producer, Transactor, new_owner
from buffer.waiting import Waiters

T = TypeVar("T")

_READER_THREADS = 2
_AUDIT_SLICE = 64


@dataclass(frozen=True, slots=True)
class DatasetCursor:
    """Where a task's dataset goes on: `state` is what the last draw left (None before the first)."""

    moves: int
    state: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of a group's status, as `ReplayBuffer.history` tells it.

    Attributes:
        at: seconds since 1970.
        source: the status before; None where the group came into being.
        target: the status after.
        owner: the process that wrote it: host, process id and a random part.
        step: of the trainer, where the group was handed out.
        version: the newest among its trainable tokens then; None without one.
        reason: an error, a filter's reason, staleness, a rewind; None where the statuses say it all.
    """

    at: float
    source: Status | None
    target: Status
    owner: str
    step: int | None
    version: int | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What `ReplayBuffer.prune` gave up: payloads and their bytes, and rows of groups whose payloads were gone."""

    payloads: int
    payload_bytes: int
    rows: int


_NOT_OPEN = "the buffer is not open; use `async with ReplayBuffer.open(url) as buffer`"


class ReplayBuffer:
    """Groups of rollouts in a database, each with a status; everything it says is stored is durable.

    ```python
    async with ReplayBuffer.open("sqlite:///run.db") as buffer:
        await buffer.put(group)
    ```

    All methods are coroutines of the event loop on which the buffer was opened; none blocks it.
    """

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        synchronous: str = "NORMAL",
        lease: float = 60.0,
        max_crashes: int | None = 20,
        reconnect_timeout: float = 60.0,
    ) -> None:
        self._backend = backend_of(url, synchronous)
        self._lease = args.seconds("lease", lease)
        self._max_crashes = args.whole_or_none("max_crashes", max_crashes, at_least=1)
        self._patience = args.seconds("reconnect_timeout", reconnect_timeout)
        self._read_only = read_only
        self._waiters = Waiters(self._backend, read_only=read_only)
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._handing_out: set[asyncio.Future[None]] = set()
        self._needs_resume = False
        self._released = 0
        self._progress = Progress()
        self._counts: Counter[tuple[str, Status]] | None = None

    @classmethod
    def open(
        cls,
        url: str,
        *,
        read_only: bool = False,
        synchronous: str = "NORMAL",
        lease: float = 60.0,
        max_crashes: int | None = 20,
        reconnect_timeout: float = 60.0,
    ) -> "ReplayBuffer":
        """A buffer over the database at `url`, to be entered with `async with`; the file is made if it is missing.

        Args:
            url: `sqlite:///run.db`, relative to the working directory, or `sqlite:////abs/olute.db`. Or
                `postgresql://user:password@host/database`, which any number of processes may write to (the extra `postgres`).
            read_only: look only; works while another process writes.
            synchronous: "NORMAL" survives the death of the process at any moment; "FULL" also the loss of power,
                for an fsync per transaction. On PostgreSQL the server's own setting holds.
            lease: seconds after which what this process runs is given to others, unless it renews: it does so by itself, also
                while the event loop is blocked.
            max_crashes: a group that so many producers in a row died running, without progress, is failed and no longer
                scheduled; None never fails one.
            reconnect_timeout: seconds for which a lost connection to a server is made anew. Whatever was asked for meanwhile
                waits, and is done exactly once. After it the buffer is closed: what was under way may be stored or not.

        Raises, on entering:
            BufferLockedError: another process writes to this file.
            DatabaseError: the database cannot be opened, or is no buffer of this version (see `buffer.errors`).
        """
        return cls(
            url, read_only=read_only, synchronous=synchronous, lease=lease, max_crashes=max_crashes, reconnect_timeout=reconnect_timeout
        )

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise ReplayBufferError("this buffer is open already; open another ReplayBuffer for another use")
        self._loop, self._closing, self._counts = asyncio.get_running_loop(), False, None
        try:
            if not self._read_only:
                await self._open_writer(self._loop)
            self._reader = Reader(self._backend, _READER_THREADS)
            await self._read(self._backend.check)
            self._reader.patience = self._patience
        except BaseException:
            await self.close()
            raise
        return self

    async def _open_writer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._backend.lock()
        transactor = Transactor(self._backend, Producer(new_owner(), self._lease), self._patience)
        tick: Callable[[queries.Transaction], object]
        if self._backend.alone:
            # Whoever wrote before is dead, and its groups are released at the opening; none can be lost later.
            tick, leave = partial(queries.prolong, lease=self._lease), None
        else:
            tick, leave = partial(operations.release_dead, max_crashes=self._max_crashes), operations.closing
        self._writer = Writer(transactor, loop, on_commit=self._committed, tick=tick, every=self._lease / 3, leave=leave)
        await self._writer.start()
        opening = Opening(alone=self._backend.alone, max_crashes=self._max_crashes)
        self._needs_resume, self._released = await self._write(operations.opened, opening)
        if self._backend.alone:
            # Nobody else changes them: what is stored and what this process commits is all there is to know.
            self._counts = Counter(await self._write(operations.counted, None))

    @property
    def shared(self) -> bool:
        """Whether other processes may write to this database at the same time, as on PostgreSQL."""
        return not self._backend.alone

    def _committed(self, deltas: Mapping[tuple[str, Status], int]) -> None:
        """On the loop, after a transaction of ours and before its answers: by how much each count changed."""
        if self._counts is not None:
            self._counts.update(deltas)
        self._waiters.committed(deltas)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish what was asked for and let go of the file; closing twice is fine.

        A cancellation meanwhile does not keep it from being finished: it is raised at the end.
        """
        if not self._closing and self._loop is not None:
            self._closing = True
            await uninterrupted(self._close())

    async def _close(self) -> None:
        while self._handing_out:
            # Those that are cancelled now still give back what they took, which needs the writer.
            await next(iter(self._handing_out))
        writer, self._writer = self._writer, None
        reader, self._reader = self._reader, None
        end_listener = self._waiters.close()
        try:
            await in_a_thread(end_listener)
            if reader is not None:
                await reader.close()
            if writer is not None:
                await writer.close()
        finally:
            self._backend.unlock()
            self._loop = None

    # -- storing and handing out --------------------------------------------------------------------------------

    async def put(self, group: RolloutGroup) -> None:
        """Store what came of a group; durable on return. A group the database never saw is added.

        The buffer keeps a copy: what happens to `group` afterwards does not reach it.

        Raises:
            IllegalTransitionError: the stored group cannot become what this one is (it is final, say).
            DuplicateGroupError: another group has this group's position.
            ValueError: a row or an extra that is not JSON.
        """
        if not isinstance(group, RolloutGroup):
            raise TypeError(f"put() stores a RolloutGroup, not {type(group).__name__}")
        self._progress.forget(group.group_id)
        await self._write(operations.put, snapshot(group))

    async def checkpoint(self, group: RolloutGroup) -> None:
        """Store what a running group's members hold now; durable on return. The group goes on running.

        Only what is new since it was handed out or checkpointed last is written. If this process dies, the group is offered
        again with it: tokens are not sampled again, finished members are neither sampled nor scored again.

        Raises:
            LeaseLostError: the group is not this process's any more, or does not run.
            IllegalTransitionError: none of its members runs: it is to be `put`.
            ValueError: as of `put`.
        """
        if not isinstance(group, RolloutGroup):
            raise TypeError(f"checkpoint() stores a RolloutGroup, not {type(group).__name__}")
        now = snapshot(group)
        if now.status is not Status.RUNNING:
            raise IllegalTransitionError(f"group {group.group_id} is {now.status} and cannot be checkpointed; put() stores what came of it")
        if not (starts := self._progress.starts(now)):
            return
        asked = self._progress.asked(now)
        try:
            await self._write(operations.checkpoint, Checkpoint(now, starts))
        except (ReplayBufferError, ValueError):
            self._progress.forget(group.group_id)
            raise
        self._progress.stored(asked)

    async def take(
        self, task_name: str, n: int, *, step: int, version: int | None = None, policy: TakePolicy | None = None
    ) -> list[RolloutGroup]:
        """Up to `n` completed groups for training, from now on consumed at `step`.

        Args:
            task_name: whose groups.
            n: the most to take; 0 does nothing.
            step: of the trainer; it must lie behind the last committed one.
            version: of the policy now, kept for `resume`.
            policy: which first; `Fifo()` by default. Groups given back by a rewind always come first, in their old order.

        Raises:
            ResumeRequiredError: an earlier process consumed batches without committing them; call `resume` first.
            StepError: `step` is committed.
        """
        args.require_task(task_name)
        n, step = args.whole_number("n", n, at_least=0), args.step_number(step)
        args.check_policy(policy)
        self._check_open()
        self._check_resumed()
        if n == 0:
            return []
        request = Take(task_name, n, step, args.whole_or_none("version", version), policy or Fifo())
        return await self._hand_out(operations.take, request, operations.give_back)

    async def check_take(self, task_name: str, step: int) -> None:
        """Raise what a `take` at `step` would raise; for whoever has long work to do before it."""
        args.require_task(task_name)
        step = args.step_number(step)
        self._check_open()
        self._check_resumed()
        await self._read(operations.check_step, step)

    def _check_resumed(self) -> None:
        if self._needs_resume:
            raise ResumeRequiredError(
                "batches of this run were consumed but never committed; call resume(step=...) with the step of the checkpoint "
                "that training goes on from (0 for none) before taking"
            )

    async def commit(self, step: int, *, version: int | None = None) -> int:
        """Make everything consumed up to `step` final: the trainer's checkpoint is on disk. Gives the number of groups.

        `version` is the policy's at that checkpoint, kept for `resume`. Without it `resume` says what the next batch saw, or
        counts one update a step.
        """
        request = Commit(args.whole_number("step", step, at_least=0), args.whole_or_none("version", version))
        committed: int = await self._write(operations.commit, request)
        return committed

    async def resume(self, step: int, *, future: Literal["keep", "expire"] = "keep") -> ResumeReport:
        """Rewind to the trainer's checkpoint of `step`: what was consumed after it will be handed out again.

        Weights newer than that checkpoint do not exist any more; a new timeline of versions begins (`report.timeline`).

        Args:
            step: of the checkpoint that training goes on from; 0 for none.
            future: of rollouts that such newer weights sampled. "keep" counts their staleness as the distance: the updates
                that were undone and those made since. "expire" resets these members, whatever their staleness.

        Raises:
            StepError: a later step is committed.
        """
        step = args.whole_number("step", step, at_least=0, hint="0 where there is no checkpoint yet")
        done: Rewound = await self._write(operations.resume, Rewind(step, args.future_is_expired(future)))
        self._needs_resume = False
        counts = await self._all_counts()
        return ResumeReport(step, done.version, done.rewound, self._released, done.timeline, done.expired, counts)

    async def expire(self, task_name: str, *, version: int, max_staleness: int, level: Level | str = Level.SEQUENCE) -> int:
        """Expire completed and interrupted groups with a member too stale to train on; gives how many groups expired.

        Only the stale members are reset, as `RolloutState.reset` does: fresh ones keep every byte, and those of them that
        are completed are neither generated nor scored again when the group runs next. Running it again does nothing.

        Call it between batches: one that is being produced counts on the completed groups that it found. It is done in
        slices, each durable by itself; other writes go on in between. Cancelled, it leaves some slices undone.

        Args:
            task_name: whose groups.
            version: of the policy now; staleness is counted from it (see `buffer.staleness`).
            max_staleness: the largest that is allowed.
            level: "sequence" expires a member with one stale trainable token; the cost is proportional to what expires.
                "token" only one that has no fresh trainable token left; hand out `group.masked(...)` to the trainer then.
                It reads every waiting group with a stale token.
        """
        args.require_task(task_name)
        version = args.whole_number("version", version, at_least=0)
        max_staleness = args.whole_number("max_staleness", max_staleness, at_least=0, hint="0 allows the policy of now only")
        return await self._expire(Expire(task_name, version, max_staleness, args.parse_level(level)))

    async def _expire(self, request: Expire) -> int:
        expired = 0
        while True:
            # One slice a request, the next only when it is done: whoever else waits for the writer has its turn between.
            done: Expired = await self._write(operations.expire, request)
            expired += done.n
            if done.after is None:
                return expired
            request = replace(request, after=done.after)

    async def wait_for(self, task_name: str, status: Status | str, n: int = 1, *, timeout: float | None = None) -> int:
        """Wait until at least `n` groups of the task have this status; gives how many there are.

        Nothing is polled: this process's own commits wake it, and on PostgreSQL those of others (LISTEN/NOTIFY).

        Args:
            task_name: whose groups.
            status: in which they are to be.
            n: how many.
            timeout: seconds to wait; None waits without end.

        Raises:
            TimeoutError: there were too few all the time.
            BufferClosedError: the buffer was closed meanwhile.
            ReplayBufferError: a SQLite buffer opened read-only, which is not told what the writing process stores.
        """
        args.require_task(task_name)
        key, n = (task_name, parse_status(status)), args.whole_number("n", n, at_least=0)
        timeout = None if timeout is None else args.seconds("timeout", timeout)
        self._check_open()
        async with asyncio.timeout(timeout):
            return await self._waiters.until(key, n, partial(self.count, *key))

    # -- producing ----------------------------------------------------------------------------------------------

    async def cursor(self, task_name: str) -> DatasetCursor:
        """Where the task's dataset goes on."""
        args.require_task(task_name)
        # Through the writer, where there is one: a draw whose caller was cancelled may still be on its way.
        answer = self._read(queries.cursor, task_name) if self._read_only else self._write(operations.cursor, task_name)
        moves, state = await answer
        return DatasetCursor(moves, None if state is None else json.loads(state))

    async def draw(self, task_name: str, rows: Sequence[DrawnRow], *, group_size: int, moves: int, cursor: Mapping[str, Any]) -> list[int]:
        """Record prompts taken from the dataset as pending groups, in the transaction that moves the cursor.

        Args:
            rows: the prompts; one with an `error` is recorded as failed.
            group_size: rollouts a prompt.
            moves: of the cursor that the draw started from.
            cursor: where the dataset goes on after it (JSON-able).

        Returns:
            The new groups' ids, in order.

        Raises:
            CursorConflictError: another sampler has moved the cursor.
        """
        args.require_task(task_name)
        size, moved = args.whole_number("group_size", group_size, at_least=1), args.whole_number("moves", moves, at_least=0)
        request = Draw(task_name, list(rows), size, moved, to_json(cursor, "the dataset cursor"))
        ids: list[int] = await self._write(operations.draw, request)
        return ids

    async def claim(self, task_name: str, n: int, *, statuses: Sequence[Status], exclude: Collection[int] = ()) -> list[RolloutGroup]:
        """Up to `n` waiting groups to run, from now on running: first those in `statuses[0]`, then the next.

        `exclude` names groups that are not wanted now.
        """
        args.require_task(task_name)
        n = args.whole_number("n", n, at_least=0)
        wanted = [parse_status(status) for status in statuses]
        if refused := [status for status in wanted if status not in CLAIMABLE]:
            raise ValueError(f"groups that are {refused[0]} cannot be run; those that can are {sorted(CLAIMABLE)}")
        request = Claim(task_name, wanted, n, frozenset(exclude))
        return await self._run(operations.claim, request) if n > 0 else []

    async def start(self, group_ids: Sequence[int]) -> list[RolloutGroup]:
        """Move given groups to running and hand them out."""
        ids = args.plain_ids(group_ids)
        return await self._run(operations.start, ids) if ids else []

    async def _run(self, operation: Operation, argument: Any) -> list[RolloutGroup]:
        groups = await self._hand_out(operation, argument, operations.release_claimed)
        self._progress.handed_out(groups)
        return groups

    async def release(self, group_ids: Sequence[int]) -> None:
        """Running groups that will not be run after all become interrupted, with what was stored of them."""
        if ids := args.plain_ids(group_ids):
            for group_id in ids:
                self._progress.forget(group_id)
            await self._write(operations.release, ids)

    # -- asking -------------------------------------------------------------------------------------------------

    async def count(self, task_name: str, status: Status | str) -> int:
        """Groups of the task with this status; costs the same whatever the size of the buffer."""
        args.require_task(task_name)
        parsed = parse_status(status)
        if self._counts is None:
            return await self._read(queries.count, task_name, parsed)
        self._check_open()
        return self._counts[task_name, parsed]

    async def counts(self, task_name: str) -> dict[Status, int]:
        """Groups of the task by status, every status present."""
        args.require_task(task_name)
        if self._counts is None:
            return await self._read(queries.counts, task_name)
        self._check_open()
        return {status: self._counts[task_name, status] for status in Status}

    async def task_names(self) -> list[str]:
        """The tasks of this run."""
        return await self._read(queries.task_names)

    async def last_step(self, task_name: str | None = None) -> int:
        """The last step at which anything of the task (by default of any task) was consumed; 0 before the first."""
        return await self._read(queries.last_step, task_name)

    async def next_step(self, task_name: str) -> int:
        """The step of the task's next batch where the trainer names none: behind its last one, and behind what is committed."""
        args.require_task(task_name)
        return await self._read(operations.next_step, task_name)

    async def get(self, group_id: int) -> RolloutGroup:
        """One group, payload included; `UnknownGroupError` if there is none."""
        (group,) = await self._read(queries.load_groups, args.plain_ids([group_id]))
        return group

    async def query(
        self,
        *,
        task_name: str | None = None,
        status: Status | str | Collection[Status | str] = (),
        step: int | None = None,
        min_version: int | None = None,
        max_version: int | None = None,
        min_reward: float | None = None,
        max_reward: float | None = None,
        error: str | None = None,
        min_attempts: int | None = None,
        min_age: float | None = None,
        max_age: float | None = None,
        order: Literal["oldest", "newest", "changed", "stalest", "best", "worst"] = "oldest",
        limit: int = 100,
        offset: int = 0,
    ) -> list[RolloutGroup]:
        """Groups of which all holds that is asked, payloads included.

        Args:
            task_name: whose groups.
            status: one, or any of several.
            step: at which they were consumed (and not given back since).
            min_version: no trainable token is older. Groups without trainable tokens have no versions: neither bound finds them.
            max_version: no trainable token is newer.
            min_reward: the mean reward of the members that have one is at least this. Groups without rewards are not found.
            max_reward: that mean is at most this.
            error: some member's error holds this text; capital letters of ASCII count as small ones, "" finds any error.
            min_attempts: some member failed at least so often.
            min_age: they were drawn at least so many seconds ago.
            max_age: at most so many.
            order: "oldest" or "newest" by when they were drawn, last "changed" first, "stalest" first, "best" or "worst" mean
                reward first (those without one last).
            limit: the most groups.
            offset: how many of those found are passed over.
        """
        limit, offset = args.whole_number("limit", limit, at_least=0), args.whole_number("offset", offset, at_least=0)
        filters = Filters(
            task_name,
            [parse_status(s) for s in ([status] if isinstance(status, str) else status)],
            args.whole_or_none("step", step, at_least=1),
            *args.checked_range("version", args.whole_or_none("min_version", min_version), args.whole_or_none("max_version", max_version)),
            *args.checked_range("reward", args.number_or_none("min_reward", min_reward), args.number_or_none("max_reward", max_reward)),
            args.text_or_none("error", error),
            args.whole_or_none("min_attempts", min_attempts),
            *args.drawn_between(min_age, max_age),
            args.one_of("order", order, queries.ORDERS),
        )
        return await self._read(_find_and_load, filters, limit, offset)

    async def history(self, group_id: int) -> list[Transition]:
        """Every change of the group's status, the first first; `UnknownGroupError` if there is no such group."""
        (group_id,) = args.plain_ids([group_id])
        rows = await self._read(queries.history, group_id)
        return [
            Transition(
                row.at, None if row.source is None else Status(row.source), Status(row.target), row.owner, row.step, row.version, row.reason
            )
            for row in rows
        ]

    async def overview(self, *, window: float = 300.0) -> Overview:
        """How the run stands: counts, steps, versions, staleness, rates, leases and sizes, in one state of the database.

        It reads indexes: its cost grows with the groups that wait and with those committed whose tokens are there, and not with
        the others.

        Args:
            window: seconds up to now that rates are counted over; less where the run is younger, or its newest 10,000 changes
                of a status do not reach back so far.
        """
        return await self._read(overview, args.seconds("window", window))

    async def audit(self, *, payloads: bool = False) -> AuditReport:
        """Check the conservation law: drawn prompts = groups over all statuses, counters = rows, no orphans.

        With `payloads` every payload is decoded too, and compared with the columns that are read in its place; that takes
        its time, and is done in slices, of which each sees its own state of the database.
        """
        report = await self._read(audit.audit)
        after: int | None = -TOO_LARGE if payloads else None
        problems = list(report.problems)
        while after is not None:
            found, after = await self._read(audit.audit_payloads, after, _AUDIT_SLICE)
            problems += found
        return replace(report, problems=problems)

    async def prune(
        self, *, keep_steps: int | None = None, keep_last: int | None = None, max_bytes: int | None = None, rows: bool = False
    ) -> PruneReport:
        """Give up payloads of committed groups beyond any of the bounds: their tokens are gone, their rows stay.

        It is done in small slices, each durable by itself; other writes go on in between. The file does not become smaller:
        its free pages are used again. A group whose payload is gone is still found, counted and told the history of.

        Args:
            keep_steps: the payloads of so many steps up to the committed one are kept.
            keep_last: those of so many groups are kept, the last consumed.
            max_bytes: the oldest go until those left take no more.
            rows: also give up the rows of groups without a payload, but for those of each task's last step; `audit` knows how many were.
        """
        bounds = {"keep_steps": keep_steps, "keep_last": keep_last, "max_bytes": max_bytes}
        given = {name: args.whole_or_none(name, bound) for name, bound in bounds.items()}
        if not rows and all(bound is None for bound in given.values()):
            raise ValueError(f"prune() was told nothing to give up; give one of {', '.join(given)}, or rows=True")
        done = await self._prune(Prune(given["keep_steps"], given["keep_last"], given["max_bytes"]))
        return replace(done, rows=(await self._prune(Prune(None, None, None, rows=True))).rows) if rows else done

    async def _prune(self, request: Prune) -> PruneReport:
        total = PruneReport(0, 0, 0)
        while True:
            # One slice a request, the next only when it is done: whoever else waits for the writer has its turn between.
            done: PrunedSlice = await self._write(operations.prune, request)
            if not done.payloads and not done.rows:
                return total
            total = PruneReport(total.payloads + done.payloads, total.payload_bytes + done.payload_bytes, total.rows + done.rows)

    # -- copies -------------------------------------------------------------------------------------------------

    async def export(
        self,
        path: str | os.PathLike[str],
        *,
        task_name: str | None = None,
        status: Status | str | Collection[Status | str] = (),
        overwrite: bool = False,
    ) -> int:
        """Write groups to a file for other programs, or for `import_file`; gives how many.

        While the run goes on: each slice of groups is as it stands when its turn comes, and groups that come into being
        meanwhile are left out. So are those whose tokens were pruned. The file appears when it is whole.

        Args:
            path: ends in .parquet (needs the extra `parquet`), .jsonl or .jsonl.gz; see `buffer.export`.
            task_name: whose groups; by default of all tasks.
            status: one, or any of several; by default any.
            overwrite: replace a file that is there.

        Raises:
            FileExistsError: the file is there.
            ValueError: an unknown ending.
        """
        if task_name is not None:
            args.require_task(task_name)
        statuses = [parse_status(s) for s in ([status] if isinstance(status, str) else status)]
        return await transfer.export(self._read, path, task_name, statuses, overwrite)

    async def import_file(self, path: str | os.PathLike[str]) -> int:
        """Add the groups of a file that `export` wrote, with their ids, statuses and steps; gives how many were added.

        Groups that are here already, as they stand in the file, are passed over: an import that was broken off is begun
        again. What ran when it was exported is interrupted. A file holds no dataset's position: to draw on where a run
        stood, use `fork`. Where batches of the file are consumed and not committed, `take` needs a `resume` first.

        The file is read twice, and nothing is stored before all of it was found good. Then it is stored slice by slice.

        Raises:
            FileFormatError: the file is foreign, damaged or cut off.
            DuplicateGroupError: a group of this id or position is here, and is another.
            StepError: steps of the file do not go with what is committed or consumed here.
        """
        self._check_writable()
        added, consumed = await transfer.import_file(self._read, self._write, path)
        self._needs_resume |= consumed
        return added

    async def put_restored(self, groups: Sequence[RolloutGroup]) -> None:
        """Add groups as they stood in another buffer, consumed and archived ones included, in one transaction.

        Those that were consumed keep their steps, and their order is that of `groups`.

        Raises:
            DuplicateGroupError: a group of this id or position is here.
            IllegalTransitionError: a group is running, or its status and step of consumption disagree.
            StepError: their steps do not go with what is committed or consumed here.
        """
        if groups:
            self._check_writable()
            steps = [group.consumed_step for group in groups]
            request = await self._read(transfer.to_restore, [snapshot(group) for group in groups], steps)
            await self._write(operations.restore, request)
            self._needs_resume |= any(group.status is Status.CONSUMED for group in groups)

    async def fork(self, url: str, *, step: int) -> ForkReport:
        """Copy this run into a new database, as it stands for a trainer at the checkpoint of `step`.

        What was consumed after `step` is completed in the copy, in its order, also where it is committed here; drawn prompts and
        the dataset's position are kept, so that nothing is drawn twice. What runs here is interrupted there. A trainer of the
        fork calls `resume(step=step)`, as after any restart.

        This run may go on: it is read in one transaction, as it was at its beginning. A fork that is broken off leaves a
        database that cannot be opened and says so, or, at its very beginning, an empty file.

        Args:
            url: of the copy; its database must be new or empty.
            step: of the checkpoint; 0 for the state before training.

        Raises:
            StepError: tokens of groups consumed after `step` were pruned; it names the oldest possible step.
            DatabaseError: the other database is not empty, or cannot be written.
        """
        step = args.whole_number("step", step, at_least=0, hint="0 for the state before training")
        target, stop = backend_of(url), threading.Event()
        self._check_open()
        # A thread of its own: it may take minutes, and the others' reads go on.
        reader = Reader(self._backend, 1)
        try:
            return await reader.read(forking.fork, target, step, stop)
        finally:
            stop.set()
            await uninterrupted(reader.close())

    async def recorded_steps(self, task_name: str) -> list[RecordedStep]:
        """The steps at which groups of the task were consumed and not given back, ascending."""
        args.require_task(task_name)
        return await self._read(queries.recorded_steps, task_name)

    async def pruned_to(self) -> int:
        """The last step of which `prune` gave up a group with its row; 0 where there is none. Batches up to it are not whole."""
        return await self._read(queries.rows_pruned_to)

    # -- inside -------------------------------------------------------------------------------------------------

    async def _write(self, operation: Operation, argument: Any) -> Any:
        return await self._submit(operation, argument).answer

    def _check_writable(self) -> None:
        if self._read_only:
            raise ReplayBufferError("this buffer was opened with read_only=True; open it without to write")

    def _submit(self, operation: Operation, argument: Any) -> Request:
        self._check_writable()
        self._check_open()
        if self._writer is None:
            raise BufferClosedError(_NOT_OPEN)
        return self._writer.submit(operation, argument)

    async def _hand_out(self, operation: Operation, argument: Any, undo: Operation) -> list[RolloutGroup]:
        """Groups that `operation` names, loaded; if the caller is cancelled before it has them, `undo` gives them back."""
        request, loop = self._submit(operation, argument), asyncio.get_running_loop()
        handed_out = loop.create_future()
        self._handing_out.add(handed_out)
        try:
            ids = list(await request.answer)
            return await self._read_on(queries.load_groups, ids) if ids else []
        except BaseException:
            self._undo(request, undo)
            raise
        finally:
            self._handing_out.discard(handed_out)
            if not handed_out.done():
                handed_out.set_result(None)

    def _undo(self, request: Request, undo: Operation) -> None:
        failed = request.answer.done() and not request.answer.cancelled() and request.answer.exception() is not None
        if self._writer is not None and not failed:
            # It stands behind the request in the mailbox, so the writer knows by then what came of it.
            self._writer.submit(undo, request)

    async def _read(self, query: Callable[..., T], *arguments: Any) -> T:
        self._check_open()
        return await self._read_on(query, *arguments)

    async def _read_on(self, query: Callable[..., T], *arguments: Any) -> T:
        if self._reader is None:
            raise BufferClosedError(_NOT_OPEN)
        return await self._reader.read(query, *arguments)

    def _check_open(self) -> None:
        if self._loop is None or self._closing:
            raise BufferClosedError(_NOT_OPEN)
        if asyncio.get_running_loop() is not self._loop:
            raise ReplayBufferError("this buffer was opened on another event loop; use it there, or open one read_only=True here")

    async def _all_counts(self) -> dict[str, dict[Status, int]]:
        return await self._read(_counts_by_task)


def _find_and_load(conn: Any, filters: Filters, limit: int, offset: int) -> list[RolloutGroup]:
    return queries.load_groups(conn, queries.find(conn, filters, limit, offset))


def _counts_by_task(conn: Any) -> dict[str, dict[Status, int]]:
    return {task_name: queries.counts(conn, task_name) for task_name in queries.task_names(conn)}
