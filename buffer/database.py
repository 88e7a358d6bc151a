"""Opening a database: connections with the settings that durability and speed need, and clear refusals."""

import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateIndex

from buffer import migrations, queries, schema
from buffer.errors import (
    BufferLockedError,
    DatabaseError,
    ForeignDatabaseError,
    ReplayBufferError,
    SchemaVersionError,
)

_PAGE_SIZE = 32768
_CHECKPOINT_PAGES = 64 * 2**20 // _PAGE_SIZE
_SYNCHRONOUS = ("NORMAL", "FULL")


def parse_url(url: str) -> URL:
    """The URL of a database we can open, its path absolute and without links; anything else is refused with what is possible."""
    try:
        backend = make_url(url).get_backend_name()
    except (ArgumentError, ValueError):
        raise ValueError(f"{url!r} is not a database URL; give one like 'sqlite:///run.db'") from None
    if backend != "sqlite":
        shown = make_url(url).render_as_string()
        raise ValueError(f"{shown!r}: only SQLite is supported; give a URL like 'sqlite:///run.db'")
    # Taken as it stands: in a path '?' and '%' are letters, and cutting at one would open another file.
    path = url.partition(":///")[2]
    if path in ("", ":memory:"):
        raise ValueError(f"{url!r} names no file, and a buffer in memory would not be durable; give one like 'sqlite:///run.db'")
    if "\0" in path:
        raise ValueError(f"{url!r} holds a null character, which no name of a file does")
    return URL.create("sqlite", database=str(Path(path).resolve()))


def check_synchronous(synchronous: str) -> str:
    """One of the ways to write that SQLite has and we promise something for."""
    if synchronous not in _SYNCHRONOUS:
        raise ValueError(f"synchronous={synchronous!r} is unknown; choose one of {_SYNCHRONOUS}")
    return synchronous


def connect(url: URL, *, read_only: bool, pool_size: int = 1) -> Engine:
    """A SQLAlchemy engine whose every transaction is BEGIN IMMEDIATE when it writes, and cannot write when it reads."""
    path = Path(url.database or "")
    mode = "ro" if read_only else "rwc"
    # The path is quoted by as_uri, so that a '?' in it cannot become an option.
    address = f"{path.absolute().as_uri()}?mode={mode}"
    engine = create_engine(
        "sqlite+pysqlite://",
        creator=lambda: _connect(path, address),
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
    )
    settings = _READER_SETTINGS if read_only else _WRITER_SETTINGS

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: Any) -> None:
        _apply(connection, settings)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that first reads and then writes can fail half-way; IMMEDIATE cannot.
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _connect(path: Path, address: str) -> sqlite3.Connection:
    if path.is_dir():
        raise DatabaseError(f"{path} is a folder; give the name of a file in it")
    return sqlite3.connect(address, uri=True, timeout=30, isolation_level=None, check_same_thread=False)


_READER_SETTINGS = ("query_only = ON", "cache_size = -4096", "trusted_schema = OFF")
_WRITER_SETTINGS = (
    f"page_size = {_PAGE_SIZE}",  # of a file that is still empty: before the first transaction, later it has no effect
    "foreign_keys = ON",
    "cache_size = -8192",
    "trusted_schema = OFF",
)


def file_settings(synchronous: str) -> tuple[str, ...]:
    """Settings that are kept in the file, and those that go with them."""
    return (
        "journal_mode = WAL",
        f"synchronous = {synchronous}",
        f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
        f"journal_size_limit = {2 * _CHECKPOINT_PAGES * _PAGE_SIZE}",
    )


def _apply(connection: sqlite3.Connection, settings: Iterable[str]) -> None:
    for setting in settings:
        connection.execute(f"PRAGMA {setting}")


def prepare(conn: Connection, synchronous: str) -> None:
    """Make a connection fit for writing: the database is ours, brought forward to this version, or was empty and is now; else refuse."""
    with conn.begin():
        is_new = not inspect(conn).get_table_names()
        if not is_new:
            _stored_version(conn, to_migrate=True)
    # Only now: they change the file, and somebody else's is left as it was.
    _apply(_driver(conn), file_settings(synchronous))
    with conn.begin():
        if is_new:
            schema.metadata.create_all(conn)
        else:
            migrations.migrate(conn, _stored_version(conn, to_migrate=True), schema.SCHEMA_VERSION)
            _make_missing_indexes(conn)
        queries.set_meta_value(conn, "schema_version", str(schema.SCHEMA_VERSION))


def _make_missing_indexes(conn: Connection) -> None:
    """An index is no part of the schema's version: a file from before it was thought of gets it now."""
    for table in schema.metadata.tables.values():
        for index in table.indexes:
            conn.execute(CreateIndex(index, if_not_exists=True))


def check(conn: Connection) -> None:
    """Refuse to read a database that is not ours, or of another schema version."""
    _stored_version(conn, to_migrate=False)


def _stored_version(conn: Connection, *, to_migrate: bool) -> int:
    """The schema version of our database; one that is not ours is refused, and one that cannot be used or brought forward."""
    tables = set(inspect(conn).get_table_names())
    if schema.meta.name not in tables:
        what = f"holds other tables ({', '.join(sorted(tables)[:3])})" if tables else "is empty"
        raise ForeignDatabaseError(f"the database {what} and is no Millrace buffer; give another file")
    if queries.meta_value(conn, "unfinished") is not None:
        raise DatabaseError("the database is a fork that was broken off; delete it, and fork again")
    stored, current = queries.meta_value(conn, "schema_version") or "none", schema.SCHEMA_VERSION
    older = stored != str(current) and migrations.migratable(stored, current)
    if stored == str(current) or (older and to_migrate):
        return int(stored)
    newer = stored.isdigit() and int(stored) > current
    forward = "open it for writing once, as `millrace migrate` does" if older else "restore it from a copy"
    remedy = "install a newer Millrace" if newer else forward
    raise SchemaVersionError(f"the database has schema version {stored}, this Millrace knows {current}; {remedy}", stored)


def abandon(conn: Connection) -> None:
    """Leave no transaction open after a failure: a COMMIT that failed (a full disk) may not have ended its own."""
    if _driver(conn).in_transaction:
        _driver(conn).rollback()


def _driver(conn: Connection) -> sqlite3.Connection:
    connection = conn.connection.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    return connection


class FileLock:
    """The right to write to a SQLite file: one process has it, and loses it when it dies."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + ".lock")
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock or raise `BufferLockedError` naming who has it."""
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DatabaseError(f"{self._path} cannot be made ({error.strerror}); the folder must exist and be writable") from error
        try:
            self._lock(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        _held.add(self)

    def _lock(self, handle: int) -> None:
        name = self._path.name.removesuffix(".lock")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise BufferLockedError(
                f"{name} is being written by process {holder}; a SQLite buffer has one writer: "
                "close the other, or open this one with read_only=True"
            ) from None
        except OSError as error:
            raise DatabaseError(f"{self._path} cannot be locked ({error.strerror}); {_remedy(str(error))}") from error

    def release(self) -> None:
        """Give it up; the file stays, since removing it would let two processes lock two files of one name."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            _held.discard(self)
            os.close(handle)


_held: set[FileLock] = set()
"""The locks that this process has, those of buffers that nobody closed included."""


def _let_go_in_child() -> None:
    # A forked child (a dataloader's worker) has a copy of the descriptor, and would hold the lock after we died. The lock
    # forgets it too: closed again when the child unwinds, its number may be another file's by then.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn the driver's errors into ours, with the file and what to do."""
    try:
        yield
    except ReplayBufferError:
        raise
    except (DBAPIError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        raise DatabaseError(f"{url.database}: {cause}; {_remedy(str(cause))}") from error
    except UnicodeDecodeError as error:
        raise DatabaseError(f"{url.database}: {error}; {_remedy('malformed')}") from error


def _remedy(message: str) -> str:
    for part, remedy in _REMEDIES.items():
        if part in message:
            return remedy
    return "nothing of this transaction was stored"


_REMEDIES = {
    "unable to open": "the folder must exist and be writable, and a buffer opened read-only must exist",
    "readonly": "make the file and its folder writable, or open it with read_only=True; nothing was stored",
    "full": "make room on the disk; nothing of this transaction was stored",
    "No space left": "make room on the disk",
    "disk I/O error": "look at the disk (room, limits on file size, health); nothing of this transaction was stored",
    "not a database": "the file is something else; give another one",
    "malformed": "the file is damaged: restore it from a copy",
    "locked": "another program holds the file; close it",
}
