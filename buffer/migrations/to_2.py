"""Schema 1 to 2: owners, timelines, prefixes and the history of every group. There was no PostgreSQL before."""

from sqlalchemy import Connection

_NO_VERSION = 2**62

_TABLES = (
    """CREATE TABLE timelines (
        timeline INTEGER NOT NULL, fork INTEGER NOT NULL, step INTEGER NOT NULL, at FLOAT NOT NULL, PRIMARY KEY (timeline)
    )""",
    """CREATE TABLE producers (
        owner VARCHAR NOT NULL, host VARCHAR NOT NULL, pid INTEGER NOT NULL, started_at FLOAT NOT NULL,
        expires_at FLOAT NOT NULL, transactions INTEGER NOT NULL, PRIMARY KEY (owner)
    )""",
    """CREATE TABLE prefixes (
        group_id INTEGER NOT NULL, number INTEGER NOT NULL, extras TEXT NOT NULL, arrays BLOB NOT NULL,
        PRIMARY KEY (group_id, number), FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
    )""",
    """CREATE TABLE transitions (
        transition_id INTEGER NOT NULL, group_id INTEGER NOT NULL, at FLOAT NOT NULL, source VARCHAR, target VARCHAR NOT NULL,
        owner VARCHAR NOT NULL, step INTEGER, version INTEGER, reason TEXT,
        PRIMARY KEY (transition_id), FOREIGN KEY(group_id) REFERENCES groups (group_id) ON DELETE CASCADE
    )""",
)

_COLUMNS = (
    ("tasks", "pruned INTEGER DEFAULT '0' NOT NULL"),
    ("groups", "owner VARCHAR"),
    ("groups", "crashes INTEGER DEFAULT '0' NOT NULL"),
    ("groups", f"oldest_version INTEGER DEFAULT '{_NO_VERSION}' NOT NULL"),
    ("groups", f"freshest_version INTEGER DEFAULT '{_NO_VERSION}' NOT NULL"),
    ("groups", "payload_bytes INTEGER DEFAULT '0' NOT NULL"),
    ("groups", "pruned_at FLOAT"),
)

_INDEXES_OF_1 = ("groups_versions", "groups_stalest", "groups_freshest")

_DATA = (
    # Of the members' newest versions nothing is known without the payloads: the oldest is a bound that is safe.
    "UPDATE groups SET oldest_version = min_version, freshest_version = min_version WHERE min_version IS NOT NULL",
    """UPDATE groups SET payload_bytes = (
        SELECT length(extras) + length(arrays) FROM payloads WHERE payloads.group_id = groups.group_id
    ) WHERE group_id IN (SELECT group_id FROM payloads)""",
    # What came before is not known; a group's history begins with where it stood.
    """INSERT INTO transitions (group_id, at, source, target, owner, step, version, reason)
        SELECT group_id, updated_at, NULL, status, 'unknown', consumed_step, max_version, 'as it stood in schema 1'
        FROM groups ORDER BY group_id""",
)


def migrate(conn: Connection) -> None:
    """Add the tables and columns, and fill them from what is there."""
    for statement in _TABLES:
        conn.exec_driver_sql(statement)
    for table, column in _COLUMNS:
        conn.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column}")
    for index in _INDEXES_OF_1:
        conn.exec_driver_sql(f"DROP INDEX IF EXISTS {index}")
    for statement in _DATA:
        conn.exec_driver_sql(statement)
