"""A buffer without threads, for simulations: it does everything in the event loop, in the same order each time.

    submit ... submit -> (the end of this turn of the loop) -> one transaction -> answers

The statements, the operations and the database are those of every SQLite buffer; only who does them differs.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Connection

from buffer.backends import Backend
from buffer.backends.sqlite import SQLite
from buffer.errors import BufferClosedError
from buffer.operations import Operation
from buffer.queries import Deltas, Transaction
from buffer.replay_buffer import ReplayBuffer
from buffer.requests import OnCommit, Request, presentable, refuse, resolve, transact
from buffer.transactor import Transactor

T = TypeVar("T")


class InlineReplayBuffer(ReplayBuffer):
    """A `ReplayBuffer` whose writing and reading block the event loop for as long as they take.

    On a virtual clock no time passes meanwhile, and two runs do the same in the same order. It is for simulations: the
    database is a real one on SQLite and its rules are the same, but nothing is forced to the disk (`synchronous = OFF`), so it
    survives the death of the process and not the loss of power; and a slow disk holds up all that shares the loop. Times in
    the database are those of the event loop's clock.

    ```python
    async with InlineReplayBuffer.open("sqlite:////tmp/simulated.db") as buffer: ...
    ```
    """

    def _usable(self, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
        return loop

    def _new_backend(self, url: str, synchronous: str) -> Backend:
        if not url.startswith("sqlite:"):
            raise ValueError(
                f"{url!r}: an InlineReplayBuffer is for simulations and needs SQLite; give a URL like 'sqlite:///simulated.db'"
            )
        return _InlineSQLite(url, "OFF")

    def _new_writer(
        self,
        transactor: Transactor,
        loop: asyncio.AbstractEventLoop,
        tick: Callable[[Transaction], object],
        leave: Callable[[Transaction], object] | None,
    ) -> "InlineWriter":
        # No lease is ever renewed: on SQLite nobody is there to take a group from a process that lives.
        return InlineWriter(transactor, loop, on_commit=self._committed)

    def _new_reader(self) -> "InlineReader":
        return InlineReader(self._backend)


class _InlineSQLite(SQLite):
    """Without the thread that moves the log into the file: the writer's own checkpoints do, at the log's limit.

    Its transactions are many and small, and each writes whole pages: small ones cost less. What a statement may have to undo is kept
    in memory, not in a file of its own.
    """

    writer_settings = ("page_size = 4096", "temp_store = MEMORY", *SQLite.writer_settings[1:])

    def begin(self, conn: Connection, owner: str, lease: float) -> tuple[int, float] | None:
        return 0, asyncio.get_running_loop().time()

    def committed(self) -> None:
        return


class InlineWriter:
    """Does operations in order, in the event loop; those that were asked for in one turn of it, in one transaction."""

    def __init__(self, transactor: Transactor, loop: asyncio.AbstractEventLoop, *, on_commit: OnCommit) -> None:
        self._transactor, self._loop, self._on_commit = transactor, loop, on_commit
        self._waiting: list[Request] = []
        self._closed = False

    def start(self) -> "asyncio.Future[None]":
        """Connect; the future says at once what came of it."""
        opened: asyncio.Future[None] = self._loop.create_future()
        try:
            self._transactor.open()
            opened.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised to whoever waits, as from the thread
            self._closed = True
            self._transactor.close()
            opened.set_exception(presentable(error))
        return opened

    def submit(self, operation: Operation, argument: Any) -> Request:
        """Ask for an operation. It is done even if whoever waits for its answer is cancelled."""
        if self._closed:
            raise BufferClosedError("the buffer is closed; open it again with ReplayBuffer.open(url)")
        request = Request(operation, argument, self._loop.create_future())
        self._waiting.append(request)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._serve)
        return request

    def _serve(self) -> None:
        batch, self._waiting = self._waiting, []
        deltas: Deltas = Counter()
        try:
            answers = transact(self._transactor, batch, deltas)
        except BaseException as error:  # noqa: BLE001 - nothing is certain any more: those who wait are told
            self._end()
            refuse(batch, error)
            return
        if deltas:
            self._on_commit(deltas)
        resolve(answers)

    async def close(self) -> None:
        """Do what was asked for, then let go of the database."""
        if not self._closed:
            self._serve()
            self._end()

    def _end(self) -> None:
        self._closed = True
        self._transactor.close()


class InlineReader:
    """Reads in the event loop, on a connection of its own; others have a turn before each read."""

    def __init__(self, backend: Backend) -> None:
        self.patience = 0.0
        self._backend, self._engine = backend, backend.connect(read_only=True)

    async def read(self, query: Callable[..., T], *arguments: Any) -> T:
        """`query(connection, *arguments)` in a transaction that sees one state of the database."""
        await asyncio.sleep(0)
        with self._backend.translated(), self._engine.connect() as conn, conn.begin():
            return query(conn, *arguments)

    async def close(self) -> None:
        """Let go of the connection."""
        self._engine.dispose()
