"""Moving what SQLite's write-ahead log holds into the file, beside the writer."""

import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress

_SHORTEST, _LONGEST = 0.05, 1.0
_MUCH = 128
"""Pages that one time moves (4 MiB); while it is more, the next comes soon."""


class Checkpointer:
    """A thread that checkpoints while the writer writes, so that no commit waits until 64 MB are copied.

    The writer's own checkpoint, at the limit of the log, then finds little left to do, and the log begins anew. Nothing depends
    on this thread: an error that it meets is met by the writer too, who says so.

    Lives from `start` to `close`. It sleeps while nothing is committed.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._news, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="millrace-checkpointer", daemon=True)

    def start(self) -> None:
        """Start the thread, unless the program is ending: then the writer's own checkpoint has all to do."""
        with suppress(RuntimeError):
            self._thread.start()

    def committed(self) -> None:
        """Say that the log has something new."""
        self._news.set()

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
            _, _, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            # Fewer than before: the log began anew.
            new = moved - before if moved >= before else moved
            pause, before = _SHORTEST if new >= _MUCH else min(2 * pause, _LONGEST), moved
