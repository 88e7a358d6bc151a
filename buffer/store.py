"""The writer, an actor that owns the writing connection and its thread, and the reader beside it."""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL

from buffer import queries
from buffer.database import translated
from buffer.errors import BufferClosedError
from buffer.operations import Operation

_GROUP_COMMIT = 64
"""Most requests in one transaction: bounds how long the first of them waits."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    operation: Operation
    argument: Any
    answer: "asyncio.Future[Any]"


class Writer:
    """Does operations in order, all that wait in one transaction; an answer comes when it is durable.

    Lives from `start` to `close`. Requests come from one event loop; the thread wakes it once per transaction.
    """

    def __init__(self, engine: Engine, url: URL, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._url, self._loop = engine, url, loop
        self._mailbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        # Not a daemon: what was asked for before the program ends is still written.
        self._thread = threading.Thread(target=self._run, name="millrace-writer")
        self._closed = False

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, operation: Operation, argument: Any) -> "asyncio.Future[Any]":
        """Ask for an operation. The future is not cancelled with its waiter: what is asked for is done."""
        if self._closed:
            raise BufferClosedError("the buffer is closed; open it again with ReplayBuffer.open(url)")
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._mailbox.put(_Request(operation, argument, answer))
        return answer

    async def close(self) -> None:
        """Do what was asked for, then end the thread."""
        if not self._closed:
            self._closed = True
            self._mailbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        with self._engine.connect() as conn:
            while (batch := self._next_batch()) is not None:
                self._answer(self._transact(conn, batch))

    def _next_batch(self) -> list[_Request] | None:
        """Everything that waits, up to the limit; None at the end."""
        first = self._mailbox.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < _GROUP_COMMIT:
            try:
                request = self._mailbox.get_nowait()
            except queue.Empty:
                break
            if request is None:
                self._mailbox.put(None)
                break
            batch.append(request)
        return batch

    def _transact(self, conn: Connection, batch: Sequence[_Request]) -> list[tuple[_Request, Any, BaseException | None]]:
        try:
            with translated(self._url), conn.begin():
                return self._perform(conn, batch)
        except Exception as error:  # noqa: BLE001 - the one place where an operation's failure becomes its caller's
            if len(batch) == 1:
                return [(batch[0], None, error)]
        # One request among many was bad. The transaction is rolled back; alone, each gets its own answer.
        return [outcome for request in batch for outcome in self._transact(conn, [request])]

    def _perform(self, conn: Connection, batch: Sequence[_Request]) -> list[tuple[_Request, Any, BaseException | None]]:
        deltas: queries.Deltas = queries.Deltas()
        outcomes: list[tuple[_Request, Any, BaseException | None]] = []
        for operation, requests in groupby(batch, key=lambda request: request.operation):
            same = list(requests)
            results = operation(conn, [request.argument for request in same], deltas)
            outcomes += [(request, result, None) for request, result in zip(same, results, strict=True)]
        queries.apply_deltas(conn, deltas)
        return outcomes

    def _answer(self, outcomes: Sequence[tuple[_Request, Any, BaseException | None]]) -> None:
        try:
            self._loop.call_soon_threadsafe(_resolve, outcomes)
        except RuntimeError:
            # The loop is closed, nobody waits any more; what was asked for is stored all the same.
            return


def _resolve(outcomes: Sequence[tuple[_Request, Any, BaseException | None]]) -> None:
    for request, result, error in outcomes:
        if request.answer.done():
            continue
        if error is None:
            request.answer.set_result(result)
        else:
            request.answer.set_exception(error)


class Reader:
    """Reads on connections of its own, on a few threads: never waits for the writer, never blocks the loop."""

    def __init__(self, engine: Engine, url: URL, threads: int) -> None:
        self._engine, self._url = engine, url
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="millrace-reader")

    async def read(self, query: Callable[..., T], *arguments: Any) -> T:
        """`query(connection, *arguments)` in a transaction that sees one state of the database."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read, query, arguments)

    def _read(self, query: Callable[..., T], arguments: Sequence[Any]) -> T:
        with translated(self._url), self._engine.connect() as conn, conn.begin():
            return query(conn, *arguments)

    async def close(self) -> None:
        """Wait for reads under way and end the threads."""
        await asyncio.to_thread(self._pool.shutdown)
        self._engine.dispose()
