"""SQLite: a file, one writing process, any number of readers."""

import fcntl
import os
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateIndex

from buffer import schema
from buffer.backends.base import Backend, first_of
from buffer.backends.checkpointer import Checkpointer, move
from buffer.errors import BufferLockedError, DatabaseError

_PAGE_SIZE = 32768
_CHECKPOINT_PAGES = 64 * 2**20 // _PAGE_SIZE


class SQLite(Backend):
    """The database in a file. One process has the right to write, by a lock beside the file, and loses it when it dies."""

    alone = True
    elsewhere = "give another file"
    writer_settings: tuple[str, ...] = (
        f"page_size = {_PAGE_SIZE}",  # of a file that is still empty: before the first transaction, later it has no effect
        "foreign_keys = ON",
        "cache_size = -8192",
        "trusted_schema = OFF",
    )

    def __init__(self, url: str, synchronous: str = "NORMAL") -> None:
        self._path = _path_of(url)
        self._synchronous = synchronous
        self._lock = FileLock(self._path)
        self._checkpointer: Checkpointer | None = None
        self._writing: sqlite3.Connection | None = None
        super().__init__(str(self._path))

    def connect(self, *, read_only: bool, pool_size: int = 1) -> Engine:
        engine = create_engine(
            "sqlite+pysqlite://",
            creator=lambda: _connect(self._path, "ro" if read_only else "rwc"),
            poolclass=QueuePool,
            pool_size=pool_size,
            max_overflow=0,
        )
        settings = _READER_SETTINGS if read_only else self.writer_settings

        @event.listens_for(engine, "connect")
        def configure(connection: sqlite3.Connection, record: Any) -> None:
            _apply(connection, settings)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A deferred transaction that first reads and then writes can fail half-way; IMMEDIATE cannot.
            connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

        return engine

    def lock(self) -> None:
        self._lock.acquire()

    def unlock(self) -> None:
        self._lock.release()

    def prepare(self, conn: Connection) -> None:
        with conn.begin():
            is_new = not inspect(conn).get_table_names()
            if not is_new:
                self._stored_version(conn, to_migrate=True)
        # Only now: they change the file, and somebody else's is left as it was.
        self._writing = _driver(conn)
        _apply(self._writing, file_settings(self._synchronous))
        # The checkpointer is there before; this is for where it is not.
        _apply(self._writing, [f"wal_autocheckpoint = {2 * _CHECKPOINT_PAGES}"])
        with conn.begin():
            if is_new:
                self.create(conn)
            else:
                self._bring_forward(conn)
                _make_missing_indexes(conn)

    def committed(self) -> None:
        if self._checkpointer is None:
            self._checkpointer = Checkpointer(lambda: _connect(self._path, "rw"), _CHECKPOINT_PAGES)
            self._checkpointer.start()
        if self._checkpointer.committed() and self._writing is not None:
            # What was committed stays so, whatever this meets; the next commit meets it too, and says so.
            with suppress(sqlite3.Error):
                move(self._writing)

    def traces(self) -> object:
        # A commit writes to the log, a checkpoint to the file.
        return tuple(_trace(path) for path in (self._path, self._path.with_name(self._path.name + "-wal")))

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = self._writing = None

    def abandon(self, conn: Connection) -> None:
        # A COMMIT that failed (a full disk) may not have ended its transaction.
        if _driver(conn).in_transaction:
            _driver(conn).rollback()

    def _errors(self) -> tuple[type[Exception], ...]:
        return (*super()._errors(), sqlite3.Error)

    def remedy(self, cause: BaseException) -> str:
        return first_of(_REMEDIES, "malformed" if isinstance(cause, UnicodeDecodeError) else str(cause))


def _trace(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _path_of(url: str) -> Path:
    """The file that a URL names, absolute and without links."""
    # Taken as it stands: in a path '?' and '%' are letters, and cutting at one would open another file.
    path = url.partition(":///")[2]
    if path in ("", ":memory:"):
        raise ValueError(f"{url!r} names no file, and a buffer in memory would not be durable; give one like 'sqlite:///run.db'")
    if "\0" in path:
        raise ValueError(f"{url!r} holds a null character, which no name of a file does")
    return Path(path).resolve()


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    if path.is_dir():
        raise DatabaseError(f"{path} is a folder; give the name of a file in it")
    # The path is quoted by as_uri, so that a '?' in it cannot become an option.
    return sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=30, isolation_level=None, check_same_thread=False)


_READER_SETTINGS = ("query_only = ON", "cache_size = -4096", "trusted_schema = OFF")


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


def _make_missing_indexes(conn: Connection) -> None:
    """An index is no part of the schema's version: a file from before it was thought of gets it now."""
    for table in schema.metadata.tables.values():
        for index in table.indexes:
            conn.execute(CreateIndex(index, if_not_exists=True))


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
            raise DatabaseError(f"{self._path} cannot be locked ({error.strerror}); {first_of(_REMEDIES, str(error))}") from error

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


_REMEDIES = (
    ("unable to open", "the folder must exist and be writable, and a buffer opened read-only must exist"),
    ("readonly", "make the file and its folder writable, or open it with read_only=True; nothing was stored"),
    ("full", "make room on the disk; nothing of this transaction was stored"),
    ("No space left", "make room on the disk"),
    ("disk I/O error", "look at the disk (room, limits on file size, health); nothing of this transaction was stored"),
    ("not a database", "the file is something else; give another one"),
    ("no such table", "the file is damaged: restore it from a copy"),
    ("no such column", "the file is damaged: restore it from a copy"),
    ("malformed", "the file is damaged: restore it from a copy"),
    ("locked", "another program holds the file; close it"),
)
