"""Schema 4 to 5: what parts of a run keep with it by step."""

from sqlalchemy import Connection

_BIG = {"sqlite": "INTEGER", "postgresql": "BIGINT"}

_TABLE = """CREATE TABLE states (
    name VARCHAR NOT NULL, step {big} NOT NULL, state TEXT NOT NULL, PRIMARY KEY (name, step)
)"""


def migrate(conn: Connection) -> None:
    """Add the table; nothing was kept before."""
    conn.exec_driver_sql(_TABLE.format(big=_BIG[conn.dialect.name]))
