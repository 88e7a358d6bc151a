"""The writer, an actor that owns the writing connection and its thread, and the reader beside it."""

import asyncio
import atexit
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import DBAPIError

from buffer.ahead import Ahead, Preparable
from buffer.backends import Backend
from buffer.errors import BufferClosedError, DatabaseError
from buffer.operations import Operation
from buffer.queries import Deltas, Transaction
from buffer.requests import Answer, OnCommit, Request, presentable, refuse, resolve, transact
from buffer.transactor import Transactor, pauses

_GROUP_COMMIT = 64
"""Most requests in one transaction: bounds how long the first of them waits."""

_MUCH = 2**20
"""Bytes after which a transaction takes no more requests: those that follow are prepared while it is committed."""

T = TypeVar("T")


class Writing(Protocol):
    """What a buffer asks of its writer, on whatever thread that works."""

    def start(self) -> "asyncio.Future[None]":
        """Connect; the future tells when the database is open, or why it cannot be."""

    def submit(self, operation: Operation, argument: Any) -> Request:
        """Ask for an operation. It is done even if whoever waits for its answer is cancelled."""

    async def close(self) -> None:
        """Do what was asked for, then let go of the database."""


class Reading(Protocol):
    """What a buffer asks of its reader."""

    patience: float

    async def read(self, query: Callable[..., T], *arguments: Any) -> T:
        """`query(connection, *arguments)` in a transaction that sees one state of the database."""

    async def close(self) -> None:
        """Wait for reads under way and let go of the connections."""


class Writer:
    """Does operations in order, all that wait in one transaction; an answer comes when it is durable.

    Lives from `start` to `close`. Requests come from one event loop; the thread wakes it once per transaction.

    Args:
        transactor: the writing connection, the thread's from `start` on.
        loop: of those who ask.
        on_commit: see `OnCommit`.
        tick: done every `every` seconds, in a transaction of its own, whether the loop is blocked or not.
        leave: done at the end, where the connection still stands.
    """

    def __init__(
        self,
        transactor: Transactor,
        loop: asyncio.AbstractEventLoop,
        *,
        on_commit: OnCommit | None = None,
        tick: Callable[[Transaction], object] | None = None,
        every: float = 20.0,
        leave: Callable[[Transaction], object] | None = None,
    ) -> None:
        self._transactor, self._loop, self._on_commit = transactor, loop, on_commit
        self._tick, self._every, self._next_tick, self._leave = tick, every, math.inf, leave
        self._mailbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._ahead = Ahead()
        transactor.while_committing = self._ahead.working
        # A daemon, or a buffer that was never closed would keep the program from ending. `_finish` runs at exit, while
        # threads still live: what was asked for before the program ends is written.
        self._thread = threading.Thread(target=self._run, name="millrace-writer", daemon=True)
        self._opened: asyncio.Future[None] = loop.create_future()
        self._closed = False

    def start(self) -> "asyncio.Future[None]":
        """Start the thread; the future tells when the database is open, or why it cannot be."""
        atexit.register(self._finish)
        self._thread.start()
        return self._opened

    def submit(self, operation: Operation, argument: Any) -> Request:
        """Ask for an operation. It is done even if whoever waits for its answer is cancelled."""
        if self._closed:
            raise BufferClosedError("the buffer is closed; open it again with ReplayBuffer.open(url)")
        request = Request(operation, argument, self._loop.create_future())
        self._mailbox.put(request)
        if isinstance(argument, Preparable):
            self._ahead.add(argument)
        return request

    async def close(self) -> None:
        """Do what was asked for, then end the thread."""
        self._closed = True
        self._mailbox.put(None)
        await in_a_thread(self._thread.join)
        atexit.unregister(self._finish)

    def _finish(self) -> None:
        self._mailbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        """Connect, serve, let go. Whatever ends it, everyone who waits is told."""
        error: BaseException | None = None
        batch: list[Request] | None = None
        try:
            self._transactor.open()
            self._ahead.start()
            self._next_tick = time.monotonic() + self._every if self._tick else math.inf
            self._post(resolve, [(self._opened, None, None)])
            while (batch := self._next_batch()) is not None:
                deltas: Deltas = Counter()
                answers = transact(self._transactor, batch, deltas)
                self._post(self._tell, deltas, answers)
            self._go()
        except BaseException as failure:  # noqa: BLE001 - the thread's last words go to those who wait
            error = failure
        self._ahead.close()
        self._transactor.close()
        self._post(self._end, error, batch or [])

    def _go(self) -> None:
        if self._leave is not None:
            self._transactor.hasten()
            # Where the database is away, the leases run out by themselves.
            with suppress(DatabaseError):
                self._transactor.perform(self._leave)

    def _end(self, error: BaseException | None, under_way: Sequence[Request]) -> None:
        """On the loop: nothing is taken any more; what was under way or waits in the mailbox is not known to be done."""
        self._closed = True
        resolve([(self._opened, None, None if error is None else presentable(error))])
        left = list(under_way)
        while not self._mailbox.empty():
            if (request := self._mailbox.get()) is not None:
                left.append(request)
        refuse(left, error)

    def _next_batch(self) -> list[Request] | None:
        """Everything that waits, up to the limit, perhaps nothing; None at the end."""
        self._tick_if_due()
        try:
            first = self._mailbox.get(timeout=self._until_tick())
        except queue.Empty:
            return []
        if first is None:
            return None
        batch, size = [first], first.size
        while len(batch) < _GROUP_COMMIT and size < _MUCH:
            try:
                request = self._mailbox.get_nowait()
            except queue.Empty:
                break
            if request is None:
                self._mailbox.put(None)
                break
            batch.append(request)
            size += request.size
        return batch

    def _until_tick(self) -> float | None:
        return None if self._next_tick == math.inf else max(0.0, self._next_tick - time.monotonic())

    def _tick_if_due(self) -> None:
        if self._tick is None or time.monotonic() < self._next_tick:
            return
        _, deltas = self._transactor.perform(self._tick)
        self._next_tick = time.monotonic() + self._every
        self._post(self._tell, deltas, [])

    def _tell(self, deltas: Deltas, answers: Sequence[Answer]) -> None:
        if deltas and self._on_commit is not None:
            self._on_commit(deltas)
        resolve(answers)

    def _post(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            # The loop is closed, nobody waits any more; what was asked for is stored all the same.
            return


class Reader:
    """Reads on connections of its own, on a few threads: never waits for the writer, never blocks the loop.

    A lost connection is made anew and the query asked again, for up to `patience` seconds (None at first).
    """

    def __init__(self, backend: Backend, threads: int) -> None:
        self.patience = 0.0
        self._backend, self._engine = backend, backend.connect(read_only=True, pool_size=threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="millrace-reader")

    async def read(self, query: Callable[..., T], *arguments: Any) -> T:
        """`query(connection, *arguments)` in a transaction that sees one state of the database."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, query, arguments)

    def _read(self, query: Callable[..., T], arguments: Sequence[Any]) -> T:
        deadline = time.monotonic() + self.patience
        with self._backend.translated():
            for pause in pauses():
                try:
                    with self._engine.connect() as conn, conn.begin():
                        return query(conn, *arguments)
                except DBAPIError as error:
                    if not self._backend.is_broken(error) or time.monotonic() + pause > deadline:
                        raise
                time.sleep(pause)
        raise AssertionError("unreachable: there is always a next pause")

    async def close(self) -> None:
        """Wait for reads under way and end the threads."""
        self.patience = 0.0
        await in_a_thread(self._pool.shutdown)
        self._engine.dispose()


async def in_a_thread(function: Callable[[], object]) -> None:
    """Do a short wait in a thread of its own: the loop's own threads may all be busy for long."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def work() -> None:
        try:
            function()
        finally:
            loop.call_soon_threadsafe(done.set_result, None)

    thread = threading.Thread(target=work, name="millrace-close")
    thread.start()
    await done
    thread.join()


async def uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Do it to the end, come what may; a cancellation meanwhile is raised then."""
    future, cancelled = asyncio.shield(work), None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    future.result()
    if cancelled is not None:
        raise cancelled
