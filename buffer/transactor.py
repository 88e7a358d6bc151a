"""The writer's connection: each transaction exactly once, whatever becomes of the connection meanwhile."""

import os
import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import NamedTuple, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from buffer import processes, queries
from buffer.backends import Backend
from buffer.errors import DatabaseError
from buffer.queries import Deltas, Transaction

R = TypeVar("R")

_REDOS = 20
"""How often a transaction is done again that others kept from succeeding."""


class Producer(NamedTuple):
    """Who writes: a name that no other process has or had, and for how many seconds its leases hold unless they are renewed."""

    owner: str
    lease: float


def new_owner() -> str:
    """Unique, whatever host and process have been before: a lease is never taken for another's."""
    return f"{socket.gethostname()}/{os.getpid()}/{processes.machine()}-{secrets.token_hex(4)}"


class ConnectionGivenUpError(DatabaseError):
    """The connection was lost and not regained in time: what was under way may be stored or not."""


class _Unregistered(Exception):
    """The database does not know this producer (any more)."""


class Transactor:
    """Owns the writing connection, on the writer's thread.

    Every transaction counts itself in the producer's row. After a lost connection that number says whether the last
    COMMIT came through: then its results stand, else it is done again.
    """

    def __init__(self, backend: Backend, producer: Producer, patience: float) -> None:
        self.begun = False
        """Whether the last transaction had begun before it failed."""
        self._backend, self._producer, self._patience = backend, producer, patience
        self.while_committing: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered for each commit: it lets the interpreter go."""
        self._engine = backend.connect(read_only=False)
        self._conn: Connection | None = None
        self._number = 0

    def open(self) -> None:
        """Connect, see that the database is ours, and register."""
        with self._backend.translated():
            self._conn = self._engine.connect()
            self._backend.prepare(self._conn)
            self._register(self._conn)

    def close(self) -> None:
        """Let go of the connection."""
        self._backend.close()
        if self._conn is not None:
            with suppress(SQLAlchemyError):
                self._conn.close()
        self._engine.dispose()

    def hasten(self) -> None:
        """From now on a lost connection is not waited for."""
        self._patience = 0.0

    def perform(self, work: Callable[[Transaction], R]) -> tuple[R, Deltas]:
        """Do `work` in one transaction; gives its result and by how much each count changed. It raises what `work` raises."""
        waits = pauses()
        redos = iter(range(_REDOS))
        while True:
            done: tuple[R, Deltas] | None = None
            self.begun = False
            try:
                with ExitStack() as committing, self._connection.begin():
                    tx = self._begin()
                    result = work(tx)
                    tx.finish()
                    self._backend.finish(tx)
                    done = result, tx.deltas
                    committing.enter_context(self.while_committing())
                self._backend.committed()
                return done
            except BaseException as error:  # noqa: BLE001 - it is raised again, unless it passes
                counts = self._settle(error, next(waits) if next(redos, None) is not None else None, known=done is not None)
            if counts and done is not None:
                return done

    @property
    def _connection(self) -> Connection:
        assert self._conn is not None, "open() comes first"
        return self._conn

    def _begin(self) -> Transaction:
        begun = self._backend.begin(self._connection, *self._producer)
        if begun is None:
            raise _Unregistered
        self.begun = True
        self._number, now = begun
        return Transaction(self._connection, self._producer.owner, now)

    def _settle(self, error: BaseException, pause: float | None, *, known: bool) -> bool:
        """Whether the transaction that met `error` counts all the same; False: do it again. Else the error is raised.

        `known`: its COMMIT may have been sent.
        """
        if self._backend.is_lost(self._connection):
            if pause is None:
                raise ConnectionGivenUpError(f"{self._backend.name}: the connection is lost again and again ({error})") from error
            stored = self._reconnect()
            if stored is None and known:
                raise ConnectionGivenUpError("the database forgot this producer; what was under way may be stored or not") from error
            return stored == self._number
        try:
            self._backend.abandon(self._connection)
        except Exception as failure:  # noqa: BLE001 - whatever it is, nothing is certain on this connection any more
            raise ConnectionGivenUpError(f"{self._backend.name}: the connection is gone ({failure}); open the buffer again") from error
        if pause is None or not (isinstance(error, _Unregistered) or self._backend.is_passing(error)):
            with self._backend.translated():
                raise error
        if isinstance(error, _Unregistered):
            # Our leases were given away while we hung; what we do from here on is ours again.
            with suppress(DBAPIError):
                self._register(self._connection)
        else:
            time.sleep(pause)
        return False

    def _register(self, conn: Connection) -> None:
        with conn.begin():
            queries.register_producer(conn, *self._producer, socket.gethostname(), os.getpid(), self._number)

    def _reconnect(self) -> int | None:
        """A new connection; gives the number of the last transaction that counts, once the server knows it."""
        deadline = time.monotonic() + self._patience
        with suppress(SQLAlchemyError):
            self._connection.invalidate()
            self._connection.close()
        for pause in pauses():
            conn: Connection | None = None
            try:
                self._conn = conn = self._engine.connect()
                with conn.begin():
                    return queries.transactions_of(conn, self._producer.owner)
            except DBAPIError as error:
                if conn is not None:
                    conn.invalidate()
                    conn.close()
                if time.monotonic() + pause > deadline:
                    raise ConnectionGivenUpError(
                        f"{self._backend.as_ours(error)} (the connection was lost, and not regained in {self._patience:g} s: "
                        "what was under way may be stored or not)"
                    ) from error
            time.sleep(pause)
        raise AssertionError("unreachable: there is always a next pause")


def pauses() -> Iterator[float]:
    """Ever longer, by chance: those who failed because of each other do not meet again."""
    pause = 0.02
    while True:
        yield pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, 1.0)
