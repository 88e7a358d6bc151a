"""Opening a database: connections with the settings that durability and speed need, and clear refusals."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.pool import QueuePool

from buffer import queries, schema
from buffer.errors import (
    BufferLockedError,
    DatabaseError,
    DuplicateGroupError,
    ForeignDatabaseError,
    ReplayBufferError,
    SchemaVersionError,
)

_PAGE_SIZE = 32768
_CHECKPOINT_PAGES = 64 * 2**20 // _PAGE_SIZE
_SYNCHRONOUS = ("NORMAL", "FULL")


def parse_url(url: str) -> URL:
    """The URL of a database we can open; anything else is refused with what is possible."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ValueError(f"{url!r} is not a database URL; give one like 'sqlite:///run.db'") from None
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"{parsed.render_as_string()!r}: only SQLite is supported; give a URL like 'sqlite:///run.db'")
    if parsed.database in (None, "", ":memory:"):
        raise ValueError(f"{url!r} names no file, and a buffer in memory would not be durable; give one like 'sqlite:///run.db'")
    return parsed


def connect(url: URL, *, read_only: bool, synchronous: str = "NORMAL", pool_size: int = 1) -> Engine:
    """A SQLAlchemy engine whose every transaction is BEGIN IMMEDIATE when it writes, and cannot write when it reads."""
    if synchronous not in _SYNCHRONOUS:
        raise ValueError(f"synchronous={synchronous!r} is unknown; choose one of {_SYNCHRONOUS}")
    path = Path(url.database or "")
    mode = "ro" if read_only else "rwc"
    # The path is quoted by as_uri, so that a '?' in it cannot become an option.
    address = f"{path.absolute().as_uri()}?mode={mode}"
    engine = create_engine(
        "sqlite+pysqlite://",
        creator=lambda: sqlite3.connect(address, uri=True, timeout=30, isolation_level=None, check_same_thread=False),
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
    )
    settings = _reader_settings() if read_only else _writer_settings(synchronous)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: Any) -> None:
        for setting in settings:
            connection.execute(f"PRAGMA {setting}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that first reads and then writes can fail half-way; IMMEDIATE cannot.
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _writer_settings(synchronous: str) -> list[str]:
    return [
        f"page_size = {_PAGE_SIZE}",  # before the first table, and before WAL: later it has no effect
        "journal_mode = WAL",
        f"synchronous = {synchronous}",
        f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
        f"journal_size_limit = {2 * _CHECKPOINT_PAGES * _PAGE_SIZE}",
        "cache_size = -8192",
        "foreign_keys = ON",
        "trusted_schema = OFF",
    ]


def _reader_settings() -> list[str]:
    return ["query_only = ON", "cache_size = -4096", "trusted_schema = OFF"]


def prepare(conn: Connection) -> None:
    """Create the schema in an empty database, or see that it is ours and of this version; else refuse."""
    tables = set(inspect(conn).get_table_names())
    if not tables:
        schema.metadata.create_all(conn)
        queries.set_meta_value(conn, "schema_version", str(schema.SCHEMA_VERSION))
        return
    if schema.meta.name not in tables:
        raise ForeignDatabaseError(
            f"the database holds other tables ({', '.join(sorted(tables)[:3])}) and is no Millrace buffer; give another file"
        )
    check_version(conn)


def check_version(conn: Connection) -> None:
    """Refuse a database of another schema version."""
    stored = queries.meta_value(conn, "schema_version")
    if stored != str(schema.SCHEMA_VERSION):
        remedy = (
            "install a newer Millrace" if stored and stored.isdigit() and int(stored) > schema.SCHEMA_VERSION else "restore it from a copy"
        )
        raise SchemaVersionError(f"the database has schema version {stored}, this Millrace knows {schema.SCHEMA_VERSION}; {remedy}")


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
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise BufferLockedError(
                f"{self._path.name.removesuffix('.lock')} is being written by process {holder}; a SQLite buffer has one writer: "
                "close the other, or open this one with read_only=True"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Give it up; the file stays, since removing it would let two processes lock two files of one name."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn the driver's errors into ours, with the file and what to do."""
    try:
        yield
    except ReplayBufferError:
        raise
    except IntegrityError as error:
        raise DuplicateGroupError(f"the database holds this group or prompt already ({error.orig}); nothing was stored") from error
    except (DBAPIError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        raise DatabaseError(f"{url.database}: {cause}; {_remedy(str(cause))}") from error


def _remedy(message: str) -> str:
    for part, remedy in _REMEDIES.items():
        if part in message:
            return remedy
    return "nothing of this transaction was stored"


_REMEDIES = {
    "unable to open": "the folder must exist and be writable, and a buffer opened read-only must exist",
    "readonly": "make the file and its folder writable, or open it with read_only=True; nothing was stored",
    "full": "make room on the disk; nothing of this transaction was stored",
    "disk I/O error": "look at the disk (room, limits on file size, health); nothing of this transaction was stored",
    "not a database": "the file is something else; give another one",
    "malformed": "the file is damaged: restore it from a copy",
    "locked": "another program holds the file; close it",
}
