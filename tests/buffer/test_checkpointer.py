"""Shows that SQLite's log is moved into the file while a buffer writes, without the writer's doing."""

import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from buffer import ReplayBuffer
from buffer.backends import sqlite
from buffer.backends.checkpointer import Checkpointer, move
from tests.buffer.groups import a_group, put_all, url


def _written(path: Path) -> sqlite3.Connection:
    """A connection whose log is never moved by itself, with one row in it."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in ("PRAGMA journal_mode = WAL", "PRAGMA wal_autocheckpoint = 0", "CREATE TABLE t (x)", "INSERT INTO t VALUES (1)"):
        connection.execute(statement)
    return connection


def _rows_of_the_file_alone(path: Path, copy: Path) -> list[tuple[int]]:
    shutil.copy(path, copy)
    connection = sqlite3.connect(copy)
    try:
        return connection.execute("SELECT x FROM t").fetchall()
    finally:
        connection.close()


def test_what_was_committed_reaches_the_file_beside_an_open_writer(tmp_path: Path) -> None:
    path, began = tmp_path / "x.db", threading.Semaphore(0)
    writer = _written(path)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.set_trace_callback(lambda _: began.release())
        return connection

    checkpointer = Checkpointer(connect, 1000)
    checkpointer.start()
    checkpointer.committed()
    assert began.acquire(timeout=30)
    checkpointer.close()  # finishes what it began
    assert _rows_of_the_file_alone(path, tmp_path / "copy.db") == [(1,)]
    writer.close()


def test_without_a_commit_nothing_is_moved(tmp_path: Path) -> None:
    writer = _written(tmp_path / "x.db")
    checkpointer = Checkpointer(lambda: sqlite3.connect(tmp_path / "x.db", check_same_thread=False), 1000)
    checkpointer.start()
    checkpointer.close()
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        _rows_of_the_file_alone(tmp_path / "x.db", tmp_path / "copy.db")
    writer.close()


def test_where_the_file_cannot_be_opened_the_thread_ends_quietly(tmp_path: Path) -> None:
    checkpointer = Checkpointer(lambda: sqlite3.connect(tmp_path / "no folder" / "x.db"), 1000)
    checkpointer.start()
    checkpointer.committed()
    checkpointer.close()


def test_when_the_log_is_long_the_writer_is_told_once_to_move_the_rest(tmp_path: Path) -> None:
    writer, moved = _written(tmp_path / "x.db"), threading.Semaphore(0)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(tmp_path / "x.db", isolation_level=None, check_same_thread=False)
        connection.set_trace_callback(lambda _: moved.release())
        return connection

    checkpointer = Checkpointer(connect, most=1)
    checkpointer.start()
    assert not checkpointer.committed()
    for _ in range(2):  # once as always, and once more since the log is long
        assert moved.acquire(timeout=30)
    checkpointer.close()
    assert checkpointer.committed()
    assert not checkpointer.committed()
    writer.close()


class _EndsMeanwhile(threading.Event):
    """An end that is said at the very moment when the thread has found that it was not."""

    def __init__(self, news: threading.Event) -> None:
        super().__init__()
        self._news = news

    def wait(self, timeout: float | None = None) -> bool:
        before = self.is_set()
        self.set()
        self._news.set()
        return before


def test_an_end_that_comes_with_a_commit_is_heard(tmp_path: Path) -> None:
    writer = _written(tmp_path / "x.db")
    checkpointer = Checkpointer(lambda: sqlite3.connect(tmp_path / "x.db", check_same_thread=False), 1000)
    checkpointer._end = _EndsMeanwhile(checkpointer._news)
    checkpointer.start()
    checkpointer.committed()
    checkpointer._thread.join(30)
    assert not checkpointer._thread.is_alive()
    writer.close()


async def test_while_groups_are_put_the_writer_moves_the_rest_and_the_log_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_the_writer: list[int] = []
    monkeypatch.setattr(sqlite, "_CHECKPOINT_PAGES", 32)  # 1 MiB
    monkeypatch.setattr(sqlite, "move", lambda connection: by_the_writer.append(move(connection)))
    log, salts, n = tmp_path / "run.db-wal", set[bytes](), 0
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        while len(salts) < 3 or not any(by_the_writer):
            await put_all(buffer, [a_group(n + own, tokens=10_000) for own in range(1, 5)])
            n += 4
            salts.add(log.read_bytes()[16:24])  # of its header: others whenever it begins anew
        assert (await buffer.audit()).ok


async def test_the_thread_ends_with_the_buffer_and_leaves_no_log(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n) for n in range(1, 20)])
        assert _threads() == 1
    assert _threads() == 0
    assert not (tmp_path / "run.db-wal").exists()


def _threads() -> int:
    return sum(thread.name == "millrace-checkpointer" for thread in threading.enumerate())
