"""Moving what SQLite's write-ahead log holds into the file, beside the writer."""

import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress

_SHORTEST, _LONGEST = 0.01, 1.0
_MUCH = 64
"""Pages that one time moves (2 MiB); while it is more, the next comes soon."""


class Checkpointer:
    """A thread that checkpoints while the writer writes, so that no commit waits until all of a long log is copied.

    While commits follow one another there is always something left that came meanwhile, and only where nothing is left does
    the log begin anew. So when `most` pages have been moved, the writer is told to move the rest itself, between two
    commits: little, as the thread has been there just before. Nothing depends on this thread: SQLite's own checkpoint, at a
    higher limit, moves what it does not.

    Lives from `start` to `close`. It sleeps while nothing is committed.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection], most: int) -> None:
        self._connect, self._most = connect, most
        self._news, self._end = threading.Event(), threading.Event()
        self._is_long = False
        self._thread = threading.Thread(target=self._run, name="millrace-checkpointer", daemon=True)

    def start(self) -> None:
        """Start the thread, unless the program is ending: then SQLite's own checkpoint has all to do."""
        with suppress(RuntimeError):
            self._thread.start()

    def committed(self) -> bool:
        """Say that the log has something new; whether the writer is to `move` the rest now."""
        is_long, self._is_long = self._is_long, False
        self._news.set()
        return is_long

    def close(self) -> None:
        """Finish what is under way and end the thread."""
        self._end.set()
        self._news.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with suppress(sqlite3.Error):
            connection = self._connect()
            try:
                self._serve(connection)
            finally:
                connection.close()

    def _serve(self, connection: sqlite3.Connection) -> None:
        pause, before = _SHORTEST, 0
        while self._news.wait() and not self._end.wait(pause):
            self._news.clear()
            if self._end.is_set():  # said just before: what woke us has been cleared, and would not come again
                return
            moved = move(connection)
            if moved >= self._most:
                moved = move(connection)  # what came meanwhile: the writer is left with still less
                self._is_long = True
            # Fewer than before: the log began anew.
            new = moved - before if moved >= before else moved
            pause, before = _SHORTEST if new >= _MUCH else min(2 * pause, _LONGEST), moved


def move(connection: sqlite3.Connection) -> int:
    """Copy into the file what can be without waiting; how many pages of the log have been by now, 0 where another is at it."""
    busy, _, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return 0 if busy else moved
