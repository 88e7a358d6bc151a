"""Schema 3 to 4: how batches are shared out among tasks is kept."""

from sqlalchemy import Connection

_BIG = {"sqlite": "INTEGER", "postgresql": "BIGINT"}

_TABLE = """CREATE TABLE shares (
    step {big} NOT NULL, task_name VARCHAR NOT NULL, weight FLOAT NOT NULL, groups {big} NOT NULL, carried FLOAT NOT NULL,
    PRIMARY KEY (step, task_name)
)"""


def migrate(conn: Connection) -> None:
    """Add the table; nothing was shared out before."""
    conn.exec_driver_sql(_TABLE.format(big=_BIG[conn.dialect.name]))
