"""What a killed process leaves of a SQLite buffer.

While a file is written to, SQLite appends to its log (`-wal`) and leaves the file itself alone, until a log of 64 MB is
worked into it. The process's death takes nothing back of what it wrote. So what a kill leaves is the file, and the log up to
some byte: which byte decides when it was. A test chooses the byte, also in the middle of a transaction, and opens the copy.
The thread beside the writer that moves the log into the file before that is held, since it would change the file between a
call and the copy. `tests/buffer/test_kill.py` kills real processes, with that thread; here each moment can be met, and met again.
"""

import shutil
import sqlite3
from pathlib import Path

LONGEST = 2**25
"""Bytes of log, far from where SQLite works it into the file."""


def log_size(database: Path) -> int:
    """Bytes of the log, which only grows while nothing works it in."""
    log = _log(database)
    return log.stat().st_size if log.exists() else 0


def left_by_kill(database: Path, size: int, folder: Path) -> Path:
    """A copy in `folder` of what is there if the process dies when `size` bytes of the log are written."""
    folder.mkdir()
    copy = folder / database.name
    shutil.copyfile(database, copy)
    _log(copy).write_bytes(_log(database).read_bytes()[:size])
    return copy


def empty_log(database: Path) -> None:
    """Work the log into the file. Behind a torn transaction it would not grow: new ones are written over the rest."""
    connection = sqlite3.connect(database)
    try:
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.close()
    assert not busy, "nobody else reads or writes meanwhile"
    assert log_size(database) == 0


def _log(database: Path) -> Path:
    return database.with_name(database.name + "-wal")
