"""Opening and closing a buffer, and how its methods reach the database: writes through one actor, reads beside it."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from buffer import arguments as args
from buffer import operations, queries
from buffer.backends import Backend, backend_of
from buffer.errors import BufferClosedError, ReplayBufferError, ResumeRequiredError
from buffer.operations import Opening, Operation
from buffer.progress import Progress
from buffer.requests import Request
from buffer.rollout import RolloutGroup
from buffer.status import Status
from buffer.store import Reader, Reading, Writer, Writing, in_a_thread, uninterrupted
from buffer.transactor import Producer, Transactor, new_owner
from buffer.waiting import Waiters

T = TypeVar("T")

Load = Callable[[Any], Awaitable[list[RolloutGroup]]]
"""Gives the groups that an operation named, by their ids mostly, or those of them that can be had."""

_READER_THREADS = 2
_NOT_OPEN = "the buffer is not open; use `async with ReplayBuffer.open(url) as buffer`"


class Access:
    """The threads and connections of an open buffer; `ReplayBuffer` and its parts stand on it."""

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
        self._backend = self._new_backend(url, synchronous)
        self._lease = args.seconds("lease", lease)
        self._max_crashes = args.whole_or_none("max_crashes", max_crashes, at_least=1)
        self._patience = args.seconds("reconnect_timeout", reconnect_timeout)
        self._read_only = read_only
        self._waiters = Waiters(self._backend, read_only=read_only)
        self._writer: Writing | None = None
        self._reader: Reading | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = False
        self._handing_out: set[asyncio.Future[None]] = set()
        self._needs_resume = False
        self._released = 0
        self._progress = Progress()
        self._counts: Counter[tuple[str, Status]] | None = None

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise ReplayBufferError("this buffer is open already; open another ReplayBuffer for another use")
        self._loop, self._closing, self._counts = self._usable(asyncio.get_running_loop()), False, None
        try:
            if not self._read_only:
                await self._open_writer(self._loop)
            self._reader = self._new_reader()
            await self._read(self._backend.check)
            self._reader.patience = self._patience
        except BaseException:
            await self.close()
            raise
        return self

    def _usable(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        if not getattr(loop, "waits_for_threads", True):
            raise ReplayBufferError(
                f"{type(loop).__name__} does not wait for this buffer's threads; open an InlineReplayBuffer in virtual time"
            )
        return loop

    async def _open_writer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._backend.lock()
        transactor = Transactor(self._backend, Producer(new_owner(), self._lease), self._patience)
        tick: Callable[[queries.Transaction], object]
        if self._backend.alone:
            # Whoever wrote before is dead, and its groups are released at the opening; none can be lost later.
            tick, leave = partial(queries.prolong, lease=self._lease), None
        else:
            tick, leave = partial(operations.release_dead, max_crashes=self._max_crashes), operations.closing
        self._writer = self._new_writer(transactor, loop, tick, leave)
        await self._writer.start()
        opening = Opening(alone=self._backend.alone, max_crashes=self._max_crashes)
        self._needs_resume, self._released = await self._write(operations.opened, opening)
        if self._backend.alone:
            # Nobody else changes them: what is stored and what this process commits is all there is to know.
            self._counts = Counter(await self._write(operations.counted, None))

    def _new_backend(self, url: str, synchronous: str) -> Backend:
        return backend_of(url, synchronous)

    def _new_writer(
        self,
        transactor: Transactor,
        loop: asyncio.AbstractEventLoop,
        tick: Callable[[queries.Transaction], object],
        leave: Callable[[queries.Transaction], object] | None,
    ) -> Writing:
        return Writer(transactor, loop, on_commit=self._committed, tick=tick, every=self._lease / 3, leave=leave)

    def _new_reader(self) -> Reading:
        return Reader(self._backend, _READER_THREADS)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on which this buffer was opened, and on which alone it works. `BufferClosedError` where it is not open."""
        if self._loop is None or self._closing:
            raise BufferClosedError(_NOT_OPEN)
        return self._loop

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
            if end_listener is not None:
                await in_a_thread(end_listener)
            if reader is not None:
                await reader.close()
            if writer is not None:
                await writer.close()
        finally:
            self._backend.unlock()
            self._loop = None

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

    async def _hand_out(self, operation: Operation, argument: Any, undo: Operation, load: Load | None = None) -> list[RolloutGroup]:
        """The groups that `operation` names, or what `load` gives of them, else all.

        If the caller is cancelled before it has them, or they do not load, `undo` gives them back.
        """
        request, loop = self._submit(operation, argument), asyncio.get_running_loop()
        handed_out = loop.create_future()
        self._handing_out.add(handed_out)
        try:
            named = await request.answer
            return await (load or self._loaded)(named) if named else []
        except BaseException:
            self._undo(request, undo)
            raise
        finally:
            self._handing_out.discard(handed_out)
            if not handed_out.done():
                handed_out.set_result(None)

    async def _loaded(self, group_ids: list[int]) -> list[RolloutGroup]:
        return await self._read_on(queries.load_groups, group_ids)

    async def _sound(self, group_ids: list[int]) -> list[RolloutGroup]:
        """Those that decode. The others fail: nobody can run them, and else each claim would meet them again."""
        groups, damaged = await self._read_on(queries.load_sound, group_ids)
        if damaged:
            await self._write(operations.fail, damaged)
        return groups

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

    def _check_resumed(self) -> None:
        if self._needs_resume:
            raise ResumeRequiredError(
                "batches of this run were consumed but never committed; call resume(step=...) with the step of the checkpoint "
                "that training goes on from (0 for none) before taking"
            )
