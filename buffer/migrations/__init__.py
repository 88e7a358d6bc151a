"""Bringing a database of an earlier schema forward, with its data, in the transaction that opens it.

Each step is written down as SQL, frozen: it must not change when the tables in `buffer.schema` do.
"""

from collections.abc import Callable, Mapping

from sqlalchemy import Connection

from buffer.migrations import to_2, to_3, to_4, to_5

STEPS: Mapping[int, Callable[[Connection], None]] = {1: to_2.migrate, 2: to_3.migrate, 3: to_4.migrate, 4: to_5.migrate}
"""Schema version -> what makes the next one of it. Indexes are not part of it: opening makes those that are missing."""


def migratable(stored: str, current: int) -> bool:
    """Whether a database of the schema version `stored` can be brought forward to `current`."""
    versions = range(int(stored), current) if stored.isdecimal() else range(0)
    return len(versions) > 0 and all(version in STEPS for version in versions)


def migrate(conn: Connection, stored: int, current: int) -> None:
    """Bring the database from schema version `stored` to `current`; the caller's transaction makes it all or nothing."""
    for version in range(stored, current):
        STEPS[version](conn)
