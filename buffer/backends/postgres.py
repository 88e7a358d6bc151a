"""PostgreSQL through psycopg 3 (the extra `postgres`): any number of processes write. Nothing else imports psycopg."""

import json
import os
import selectors
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from buffer import queries, schema
from buffer.backends.base import Backend, OnChange, first_of
from buffer.errors import DatabaseError
from buffer.queries import Overtaken

try:
    import psycopg
except ImportError as error:
    raise ImportError("a postgresql:// URL needs psycopg 3: pip install 'millrace[postgres]', or use 'sqlite:///run.db'") from error

_OPENING = "SELECT pg_advisory_xact_lock(hashtext('millrace ' || current_schema()))"
"""Two processes that open an empty database at once would both make its tables."""

_BUSY = "fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500"
_MOVING = "fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000"
_LARGE = "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500"
_OUT_OF_LINE = "toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_threshold = 2000"
_STORAGE = (
    # Arrays of numbers hardly shrink, and to try costs more than to write them.
    "ALTER TABLE payloads ALTER COLUMN arrays SET STORAGE EXTERNAL",
    "ALTER TABLE prefixes ALTER COLUMN arrays SET STORAGE EXTERNAL",
    # Small ones whose rows change in every transaction: there is room for the new row beside the old one.
    *(f"ALTER TABLE {name} SET ({_BUSY})" for name in ("counts", "producers", "tasks")),
    # Large ones whose rows change a few times each: what is dead is cleaned up before it is much.
    *(f"ALTER TABLE {name} SET ({_MOVING})" for name in ("groups", "rollouts", "prefixes")),
    # Rows that are written, and deleted when they are not needed any more. Their bytes lie in tables beside them, with settings of
    # their own, counted in pieces of 2 KiB.
    f"ALTER TABLE payloads SET ({_LARGE})",
    *(f"ALTER TABLE {name} SET ({_OUT_OF_LINE})" for name in ("payloads", "prefixes")),
)
"""How PostgreSQL keeps the tables; no part of the schema's version."""

_HANGING = "-c idle_in_transaction_session_timeout=30s"
"""A process that was stopped in the midst of a transaction holds locks that others wait for."""

_REDO = ("40001", "40P01", "55P03")
"""A serialization failure, a deadlock, a lock not available: what was rolled back may be done again."""


class PostgreSQL(Backend):
    """A database on a server, or a schema of one where the URL sets the search path (`?options=-csearch_path%3Dname`)."""

    alone = False
    elsewhere = "give another database, or a schema of its own with ?options=-csearch_path%3Dits_name"

    def __init__(self, url: URL) -> None:
        self._url = url.set(drivername="postgresql+psycopg")
        super().__init__(_shown(url))

    def connect(self, *, read_only: bool, pool_size: int = 1) -> Engine:
        # A host that vanished is noticed within a minute, not within the hours that are the systems' default.
        arguments: dict[str, Any] = {"connect_timeout": 10, "keepalives_idle": 20, "keepalives_interval": 10, "keepalives_count": 3}
        arguments |= {"tcp_user_timeout": 50_000, "application_name": f"millrace {'reader' if read_only else 'writer'}"}
        arguments = {name: value for name, value in arguments.items() if name not in self._url.query}
        if not read_only:
            arguments["options"] = " ".join((*self._url.normalized_query.get("options", ()), _HANGING))
        engine = create_engine(
            self._url,
            connect_args=arguments,
            poolclass=QueuePool,
            pool_size=pool_size,
            max_overflow=0,
        )

        @event.listens_for(engine, "connect")
        def configure(connection: psycopg.Connection[Any], record: Any) -> None:
            _connections.add(connection)
            connection.read_only = read_only or None
            # A reader's transaction sees one state of the database; a writer's statement what is committed when it begins.
            level = psycopg.IsolationLevel
            connection.isolation_level = level.REPEATABLE_READ if read_only else level.READ_COMMITTED

        return engine

    def prepare(self, conn: Connection) -> None:
        with conn.begin():
            conn.execute(text(_OPENING))
            if inspect(conn).get_table_names():
                self._bring_forward(conn)
                _make_missing_indexes(conn)
            else:
                _require_schema(conn)
                self.create(conn)

    def create(self, conn: Connection) -> None:
        super().create(conn)
        for statement in _STORAGE:
            conn.execute(text(statement))

    def begin(self, conn: Connection, owner: str, lease: float) -> tuple[int, float] | None:
        return queries.renew(conn, owner, lease)

    def finish(self, tx: queries.Transaction) -> None:
        more = [[task, status.value] for (task, status), n in sorted(tx.deltas.items()) if n > 0]
        if more:
            said = json.dumps(more, separators=(",", ":"))
            queries.notify(tx.conn, said if len(said) < _LONGEST_NOTE else "")

    def abandon(self, conn: Connection) -> None:
        _driver(conn).rollback()

    def is_lost(self, conn: Connection) -> bool:
        if conn.closed or conn.invalidated:
            return True
        # Where the server went in the midst of a pipeline the driver does not call it closed, but it is good for nothing.
        with suppress(psycopg.Error):
            _driver(conn).rollback()
            return _driver(conn).closed
        return True

    def is_broken(self, error: DBAPIError) -> bool:
        # libpq gives no state where there was no server to give one.
        return error.connection_invalidated or (_state(error.orig) or "57P")[:3] in ("57P", "080")

    def is_passing(self, error: BaseException) -> bool:
        return isinstance(error, Overtaken) or (isinstance(error, DBAPIError) and _state(error.orig) in _REDO)

    def listen(self, on_change: OnChange) -> "PostgresListener":
        return PostgresListener(self, on_change)

    def _errors(self) -> tuple[type[Exception], ...]:
        return (*super()._errors(), psycopg.Error)

    def remedy(self, cause: BaseException) -> str:
        state = _state(cause)
        return _BY_STATE[state] if state in _BY_STATE else first_of(_BY_MESSAGE, str(cause))


_connections: "weakref.WeakSet[psycopg.Connection[Any]]" = weakref.WeakSet()
"""Those of this process."""


def _let_go_in_child() -> None:
    # A forked child (a dataloader's worker) has a copy of each socket. If we are killed and it lives on, the server would not
    # see that we are gone, and our transaction would keep its locks. The numbers stay taken: nothing else gets them.
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for connection in list(_connections):
        with suppress(psycopg.Error):
            os.dup2(nowhere, connection.fileno(), inheritable=False)
    os.close(nowhere)


os.register_at_fork(after_in_child=_let_go_in_child)


def _shown(url: URL) -> str:
    """The address without its options, one of which may be a password."""
    host = url.query.get("host")
    address = url.set(query={"host": host} if host else {}, drivername="postgresql", password=None)
    return address.render_as_string()


def _state(error: BaseException | None) -> str | None:
    return getattr(error, "sqlstate", None)


def _driver(conn: Connection) -> "psycopg.Connection[Any]":
    connection = conn.connection.driver_connection
    assert isinstance(connection, psycopg.Connection)
    return connection


def _require_schema(conn: Connection) -> None:
    if conn.scalar(text("SELECT current_schema()")) is None:
        path = conn.scalar(text("SHOW search_path"))
        raise DatabaseError(f"none of the schemas in search_path ({path}) exists, or this user may not use it; make it with CREATE SCHEMA")


def _make_missing_indexes(conn: Connection) -> None:
    """An index is no part of the schema's version; looked up first, since CREATE INDEX IF NOT EXISTS waits for all who write."""
    there = set(conn.scalars(text("SELECT indexname FROM pg_indexes WHERE schemaname = current_schema()")))
    for table in schema.metadata.tables.values():
        for index in table.indexes:
            if index.name not in there:
                index.create(conn)


_LONGEST_NOTE = 4000
"""Bytes; PostgreSQL takes less than 8000. Beyond, it is said only that something changed."""


class PostgresListener:
    """A thread with a connection of its own that waits for what other processes commit; it reconnects by itself."""

    def __init__(self, backend: PostgreSQL, on_change: OnChange) -> None:
        self._backend, self._on_change = backend, on_change
        self._engine = backend.connect(read_only=True)
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="millrace-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        pauses = _pauses()
        while True:
            try:
                with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
                    queries.listen(conn)
                    pauses = _pauses()
                    self._on_change(None)  # What came before is known to nobody.
                    self._wait(_driver(conn))
                    return
            except (DBAPIError, psycopg.Error):
                if self._told_to_end(next(pauses)):
                    return
            finally:
                self._engine.dispose()

    def _wait(self, connection: "psycopg.Connection[Any]") -> None:
        """Pass on what is notified, until the end."""
        while True:
            with selectors.DefaultSelector() as selector:
                selector.register(connection.fileno(), selectors.EVENT_READ)
                selector.register(self._wake_read, selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select()}
            if self._wake_read in ready:
                return
            for note in connection.notifies(timeout=0):
                self._on_change(_parsed(note.payload))

    def _told_to_end(self, within: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            return bool(selector.select(within))


def _parsed(payload: str) -> list[tuple[str, str]] | None:
    with suppress(ValueError):
        return [(task, status) for task, status in json.loads(payload)]
    return None


def _pauses() -> Iterator[float]:
    pause = 0.05
    while True:
        yield pause
        pause = min(2 * pause, 2.0)


_BY_STATE = {
    "28P01": "give the right user and password in the URL",
    "28000": "the server's pg_hba.conf must let this user in from here",
    "3D000": "make the database with CREATE DATABASE, or give another one",
    "3F000": "make the schema with CREATE SCHEMA, or give another one",
    "42501": "the user must be allowed to make and write tables there (GRANT USAGE, CREATE ON SCHEMA); to look only, use read_only=True",
    "25006": "the server or this user can only read: give the primary server, or use read_only=True; nothing was stored",
    "53100": "make room on the server's disk; nothing of this transaction was stored",
    "53300": "close other clients, or raise max_connections of the server",
    "57P03": "the server is starting or stopping: try again in a while",
}
_BY_MESSAGE = (
    ("password", "give the right user and password in the URL"),
    ("pg_hba.conf", "the server's pg_hba.conf must let this user in from here"),
    ("role ", "make the user with CREATE ROLE ... LOGIN, or give another one"),
    ("does not exist", "make the database with CREATE DATABASE, or give another one"),
    ("too many", "close other clients, or raise max_connections of the server"),
    ("remaining connection slots", "close other clients, or raise max_connections of the server"),
    ("starting up", "try again in a while"),
    ("shutting down", "try again in a while"),
    ("invalid connection option", "look at what follows '?' in the URL"),
    ("resolve host", "look at the host in the URL"),
    ("connection", "a PostgreSQL server must run there and let this machine in"),
)
