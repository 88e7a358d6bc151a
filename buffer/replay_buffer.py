"""`ReplayBuffer`: the durable home of every group of rollouts, and the only door to it."""

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from buffer import database, operations, queries
from buffer.codec import encode_group, to_json
from buffer.errors import BufferClosedError, ReplayBufferError, ResumeRequiredError
from buffer.operations import Claim, Draw, DrawnRow, Operation, ResumeReport, Take
from buffer.policies import Fifo, TakePolicy
from buffer.rollout import RolloutGroup
from buffer.status import CLAIMABLE, Status, parse_status
from buffer.store import Reader, Writer

T = TypeVar("T")

_READER_THREADS = 2


@dataclass(frozen=True, slots=True)
class DatasetCursor:
    """Where a task's dataset goes on: `state` is what the last draw left (None before the first)."""

    moves: int
    state: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What `ReplayBuffer.audit` found; `problems` is empty when the conservation law holds."""

    drawn: Mapping[str, int]
    counts: Mapping[str, Mapping[Status, int]]
    problems: Sequence[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything adds up."""
        return not self.problems


class ReplayBuffer:
    """Groups of rollouts in a database, each with a status; everything it says is stored is durable.

    ```python
    async with ReplayBuffer.open("sqlite:///run.db") as buffer:
        await buffer.put(group)
    ```

    All methods are coroutines of the event loop on which the buffer was opened; none blocks it.
    """

    def __init__(self, url: str, *, read_only: bool = False, synchronous: str = "NORMAL") -> None:
        self._url = database.parse_url(url)
        self._read_only, self._synchronous = read_only, synchronous
        self._lock = database.FileLock(Path(self._url.database or ""))
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._needs_resume = False
        self._released = 0

    @classmethod
    def open(cls, url: str, *, read_only: bool = False, synchronous: str = "NORMAL") -> "ReplayBuffer":
        """A buffer over the database at `url`, to be entered with `async with`; the file is made if it is missing.

        Args:
            url: `sqlite:///run.db`, relative to the working directory, or `sqlite:////abs/olute.db`.
            read_only: look only; works while another process writes.
            synchronous: "NORMAL" survives the death of the process at any moment; "FULL" also the loss of power,
                for an fsync per transaction.

        Raises, on entering:
            BufferLockedError: another process writes to this file.
            DatabaseError: the file cannot be opened, or is no buffer of this version (see `buffer.errors`).
        """
        return cls(url, read_only=read_only, synchronous=synchronous)

    async def __aenter__(self) -> Self:
        if self._reader is not None:
            raise ReplayBufferError("this buffer is open already; open another ReplayBuffer for another use")
        if not self._read_only:
            await self._open_writer()
        engine = database.connect(self._url, read_only=True, pool_size=_READER_THREADS)
        self._reader = Reader(engine, self._url, _READER_THREADS)
        try:
            await self._reader.read(lambda conn: database.check_version(conn))
        except BaseException:
            await self.close()
            raise
        return self

    async def _open_writer(self) -> None:
        self._lock.acquire()
        try:
            engine = database.connect(self._url, read_only=False, synchronous=self._synchronous)
            await asyncio.to_thread(self._prepare, engine)
        except BaseException:
            self._lock.release()
            raise
        self._writer = Writer(engine, self._url, asyncio.get_running_loop())
        self._writer.start()
        self._released = await self._write(operations.release_all, None)

    def _prepare(self, engine: Any) -> None:
        with database.translated(self._url), engine.connect() as conn, conn.begin():
            database.prepare(conn)
            self._needs_resume = bool(queries.consumed_after(conn, -1))

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish what was asked for and let go of the file; closing twice is fine."""
        writer, self._writer = self._writer, None
        reader, self._reader = self._reader, None
        try:
            if reader is not None:
                await reader.close()
        finally:
            if writer is not None:
                await writer.close()
            self._lock.release()

    # -- storing and handing out --------------------------------------------------------------------------------

    async def put(self, group: RolloutGroup) -> None:
        """Store what came of a group; durable on return. A group the database never saw is added.

        The buffer keeps a copy: what happens to `group` afterwards does not reach it.

        Raises:
            IllegalTransitionError: the stored group cannot become what this one is (it is final, say).
            DuplicateGroupError: another group has this group's position.
            ValueError: a row or an extra that is not JSON.
        """
        await self._write(operations.put, encode_group(group))

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
        _require_task(task_name)
        if n < 0:
            raise ValueError(f"n={n} groups cannot be taken; it must be 0 or more")
        if self._needs_resume:
            raise ResumeRequiredError(
                "batches of this run were consumed but never committed; call resume(step=...) with the step of the checkpoint "
                "that training goes on from (0 for none) before taking"
            )
        if n == 0:
            return []
        request = Take(task_name, n, step, version, policy or Fifo())
        return await self._hand_out(operations.take, request, operations.give_back)

    async def commit(self, step: int) -> int:
        """Make everything consumed up to `step` final: the trainer's checkpoint is on disk. Gives the number of groups."""
        committed: int = await self._write(operations.commit, step)
        return committed

    async def resume(self, step: int) -> ResumeReport:
        """Rewind to the trainer's checkpoint of `step`: what was consumed after it will be handed out again.

        Raises:
            StepError: a later step is committed.
        """
        version, rewound = await self._write(operations.resume, step)
        self._needs_resume = False
        return ResumeReport(step, version, rewound, self._released, await self._all_counts())

    # -- producing ----------------------------------------------------------------------------------------------

    async def cursor(self, task_name: str) -> DatasetCursor:
        """Where the task's dataset goes on."""
        _require_task(task_name)
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
        _require_task(task_name)
        request = Draw(task_name, list(rows), group_size, moves, to_json(cursor, "the dataset cursor"))
        ids: list[int] = await self._write(operations.draw, request)
        return ids

    async def claim(self, task_name: str, n: int, *, statuses: Sequence[Status], exclude: Collection[int] = ()) -> list[RolloutGroup]:
        """Up to `n` waiting groups to run, from now on running: first those in `statuses[0]`, then the next.

        `exclude` names groups that are not wanted now.
        """
        _require_task(task_name)
        wanted = [parse_status(status) for status in statuses]
        if refused := [status for status in wanted if status not in CLAIMABLE]:
            raise ValueError(f"groups that are {refused[0]} cannot be run; those that can are {sorted(CLAIMABLE)}")
        request = Claim(task_name, wanted, n, frozenset(exclude))
        return await self._hand_out(operations.claim, request, operations.release) if n > 0 else []

    async def start(self, group_ids: Sequence[int]) -> list[RolloutGroup]:
        """Move given groups to running and hand them out."""
        ids = list(group_ids)
        return await self._hand_out(_start_and_name, ids, operations.release) if ids else []

    async def release(self, group_ids: Sequence[int]) -> None:
        """Running groups that will not be run after all become interrupted, with what was stored of them."""
        if group_ids:
            await self._write(operations.release, list(group_ids))

    # -- asking -------------------------------------------------------------------------------------------------

    async def count(self, task_name: str, status: Status | str) -> int:
        """Groups of the task with this status; costs the same whatever the size of the buffer."""
        _require_task(task_name)
        return await self._read(queries.count, task_name, parse_status(status))

    async def counts(self, task_name: str) -> dict[Status, int]:
        """Groups of the task by status, every status present."""
        _require_task(task_name)
        return await self._read(queries.counts, task_name)

    async def task_names(self) -> list[str]:
        """The tasks of this run."""
        return await self._read(queries.task_names)

    async def last_step(self) -> int:
        """The last step at which anything was consumed; 0 before the first."""
        return await self._read(queries.last_step)

    async def get(self, group_id: int) -> RolloutGroup:
        """One group, payload included; `UnknownGroupError` if there is none."""
        (group,) = await self._read(queries.load_groups, [group_id])
        return group

    async def query(
        self, *, task_name: str | None = None, status: Status | str | Collection[Status | str] = (), limit: int = 100, offset: int = 0
    ) -> list[RolloutGroup]:
        """Groups by task and status, oldest first, payloads included."""
        if limit < 0 or offset < 0:
            raise ValueError(f"limit={limit} and offset={offset} must be 0 or more")
        wanted = [parse_status(s) for s in ([status] if isinstance(status, str) else status)]
        return await self._read(_find_and_load, task_name, wanted, limit, offset)

    async def audit(self) -> AuditReport:
        """Check the conservation law: drawn prompts = groups over all statuses, counters = rows, no orphans."""
        return await self._read(_audit)

    # -- inside -------------------------------------------------------------------------------------------------

    async def _write(self, operation: Operation, argument: Any) -> Any:
        # Shielded: the writer does what it was asked for, whether or not the asker waits.
        return await asyncio.shield(self._submit(operation, argument))

    def _submit(self, operation: Operation, argument: Any) -> "asyncio.Future[Any]":
        if self._read_only:
            raise ReplayBufferError("this buffer was opened with read_only=True; open it without to write")
        if self._writer is None:
            raise BufferClosedError("the buffer is not open; use `async with ReplayBuffer.open(url) as buffer`")
        return self._writer.submit(operation, argument)

    async def _hand_out(self, operation: Operation, argument: Any, undo: Operation) -> list[RolloutGroup]:
        """Groups that `operation` names, loaded; if the caller is cancelled before it has them, `undo` gives them back."""
        answer = self._submit(operation, argument)
        try:
            ids = await asyncio.shield(answer)
            return await self._read(queries.load_groups, ids) if ids else []
        except BaseException:
            answer.add_done_callback(lambda done: self._undo(done, undo))
            raise

    def _undo(self, done: "asyncio.Future[Any]", undo: Operation) -> None:
        if not done.cancelled() and done.exception() is None and done.result() and self._writer is not None:
            self._submit(undo, done.result())

    async def _read(self, query: Callable[..., T], *arguments: Any) -> T:
        if self._reader is None:
            raise BufferClosedError("the buffer is not open; use `async with ReplayBuffer.open(url) as buffer`")
        return await self._reader.read(query, *arguments)

    async def _all_counts(self) -> dict[str, dict[Status, int]]:
        return await self._read(_counts_by_task)


def _require_task(task_name: str) -> None:
    if not task_name or not isinstance(task_name, str):
        raise ValueError(f"task_name={task_name!r} names no task; give the name of one, as text")


def _start_and_name(conn: Any, requests: Sequence[Sequence[int]], deltas: queries.Deltas) -> list[list[int]]:
    operations.start(conn, requests, deltas)
    return [list(group_ids) for group_ids in requests]


def _find_and_load(conn: Any, task_name: str | None, status: Sequence[Status], limit: int, offset: int) -> list[RolloutGroup]:
    return queries.load_groups(conn, queries.find(conn, task_name, status, limit, offset))


def _counts_by_task(conn: Any) -> dict[str, dict[Status, int]]:
    return {task_name: queries.counts(conn, task_name) for task_name in queries.task_names(conn)}


def _audit(conn: Any) -> AuditReport:
    drawn, rows, stored = queries.drawn_by_task(conn), queries.counted_rows(conn), queries.stored_counts(conn)
    problems = [
        f"task {task!r}: {stored.get((task, status), 0)} counted as {status}, {rows.get((task, status), 0)} rows are"
        for task, status in sorted(set(rows) | set(stored))
        if stored.get((task, status), 0) != rows.get((task, status), 0)
    ]
    for task in sorted(set(drawn) | {task for task, _ in rows}):
        present = sum(n for (name, _), n in rows.items() if name == task)
        if present != drawn.get(task, 0):
            problems.append(f"task {task!r}: {drawn.get(task, 0)} prompts drawn, {present} groups present")
    problems += [f"{n} {what}" for what, n in queries.orphans(conn).items()]
    return AuditReport(drawn, _counts_by_task(conn), problems)
