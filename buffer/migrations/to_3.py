"""Schema 2 to 3: how much was sampled of each group is kept beside its tokens, and its sums beside the counts."""

from sqlalchemy import Connection

_BIG = {"sqlite": "INTEGER", "postgresql": "BIGINT"}

_COLUMNS = (
    ("groups", "finished INTEGER DEFAULT '0' NOT NULL"),
    ("groups", "finished_tokens {big} DEFAULT '0' NOT NULL"),
    ("counts", "tokens {big} DEFAULT '0' NOT NULL"),
    ("counts", "finished {big} DEFAULT '0' NOT NULL"),
    ("counts", "finished_tokens {big} DEFAULT '0' NOT NULL"),
)

_TABLE = """CREATE TABLE given_up (
    task_name VARCHAR NOT NULL, reason VARCHAR NOT NULL, tokens {big} NOT NULL, finished {big} NOT NULL,
    finished_tokens {big} NOT NULL, PRIMARY KEY (task_name, reason)
)"""

_ENDED = "('completed', 'filtered', 'consumed', 'archived', 'discarded')"
_WHOLE = f"""FROM rollouts WHERE rollouts.group_id = groups.group_id
    AND (finish_reason IN ('stop', 'length') OR rollouts.status IN {_ENDED})
    AND NOT (error IS NOT NULL AND rollouts.status IN {_ENDED})"""
_OF_COUNTS = "FROM groups WHERE groups.task_name = counts.task_name AND groups.status = counts.status"

_DATA = (
    f"UPDATE groups SET finished = (SELECT count(*) {_WHOLE}), finished_tokens = (SELECT coalesce(sum(tokens), 0) {_WHOLE})",
    f"""UPDATE counts SET tokens = (SELECT coalesce(sum(tokens), 0) {_OF_COUNTS}),
        finished = (SELECT coalesce(sum(finished), 0) {_OF_COUNTS}),
        finished_tokens = (SELECT coalesce(sum(finished_tokens), 0) {_OF_COUNTS})
        WHERE status != 'running'""",
)
"""What was given up before is not known."""


def migrate(conn: Connection) -> None:
    """Add the columns and the table, and fill them from what is there."""
    big = _BIG[conn.dialect.name]
    for table, column in _COLUMNS:
        conn.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column.format(big=big)}")
    conn.exec_driver_sql(_TABLE.format(big=big))
    for statement in _DATA:
        conn.exec_driver_sql(statement)
