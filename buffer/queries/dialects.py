"""Statements for many rows, and where the two databases speak differently: INSERT that changes what is there, and numbers
that never repeat."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Boolean, ColumnElement, Connection, CursorResult, Integer, Table, bindparam, case, func, select, text
from sqlalchemy import Sequence as DatabaseSequence
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType

from buffer import schema as t

Change = Callable[[Any], dict[str, Any]]


class Many:
    """A statement that is executed with many rows, on SQLite several times as fast as SQLAlchemy does it: that looks at each row.

    Values go to the driver as they are: it must know their types, as it does of all our columns.
    """

    def __init__(self, statement: Any) -> None:
        self._statement = statement
        self._compiled: dict[tuple[str, ...], tuple[str, Sequence[str] | None, dict[str, Any]]] = {}

    def execute(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Execute it with rows that all have the keys of the first; gives how many rows of the database that changed."""
        sql, names, constants = self._for(conn, tuple(rows[0]))
        given = [{**constants, **row} for row in rows] if constants else rows
        return conn.exec_driver_sql(sql, [tuple([row[name] for name in names]) for row in given] if names else list(given)).rowcount

    def _for(self, conn: Connection, keys: tuple[str, ...]) -> tuple[str, Sequence[str] | None, dict[str, Any]]:
        """The text for rows of these keys, the order of its parameters if they have no names, and those that no row gives."""
        place = (conn.dialect.name, *keys)
        if place not in self._compiled:
            compiled = self._statement.compile(dialect=conn.dialect, column_keys=list(keys), for_executemany=True)
            constants = {name: value for name, value in compiled.params.items() if name not in keys}
            self._compiled[place] = (str(compiled), compiled.positiontup, constants)
        return self._compiled[place]


class Upsert:
    """INSERT that changes the row of the same keys where there is one; `change` is given what would be inserted.

    Without `change` the row that is there stays. Built once: to build a statement costs several times what a database
    needs for it.
    """

    def __init__(self, table: Table, keys: Sequence[str], change: Change | None = None, *, returning: Any = None) -> None:
        self._statements = {"sqlite": _built(sqlite.insert(table), keys, change, returning)}
        self._statements["postgresql"] = _built(postgresql.insert(table), keys, change, returning)
        self._many = {name: Many(statement) for name, statement in self._statements.items()}

    def execute(self, conn: Connection, parameters: dict[str, Any]) -> CursorResult[Any]:
        """Execute it with one row."""
        result: CursorResult[Any] = conn.execute(self._statements[conn.dialect.name], parameters)
        return result

    def execute_many(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Execute it with rows, as `Many` does."""
        return self._many[conn.dialect.name].execute(conn, rows)


def _built(statement: Any, keys: Sequence[str], change: Change | None, returning: Any) -> Any:
    if change is None:
        return statement.on_conflict_do_nothing(index_elements=keys)
    statement = statement.on_conflict_do_update(index_elements=keys, set_=change(statement.excluded))
    return statement if returning is None else statement.returning(returning)


class _each(FunctionElement[int]):
    """The ids of one parameter, as a query."""

    inherit_cache = True
    type = Integer()


@compiles(_each, "sqlite")
def _each_on_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    (ids,) = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(SELECT value FROM json_each({ids}))"


@compiles(_each, "postgresql")
def _each_on_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    (ids,) = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(SELECT unnest(CAST({ids} AS BIGINT[])))"


def is_among(column: ColumnElement[int], name: str) -> ColumnElement[bool]:
    """Whether a column is among the ids that the parameter `name` has from `ids_of`.

    SQLAlchemy's own IN has a parameter an id, and is written anew for each list.
    """
    return column.op("IN", is_comparison=True)(_each(bindparam(name, type_=NullType())))


def ids_of(conn: Connection, ids: Sequence[int]) -> str | list[int]:
    """A parameter for `is_among`."""
    return json.dumps(ids) if conn.dialect.name == "sqlite" else list(ids)


_RESERVE = Upsert(t.sequences, ["name"], lambda new: {"last": t.sequences.c.last + new.last}, returning=t.sequences.c.last)
_RESERVE_BEYOND = Upsert(
    t.sequences, ["name"], lambda new: {"last": case((new.last > t.sequences.c.last, new.last), else_=t.sequences.c.last)}
)


def reserve(conn: Connection, name: str, n: int) -> Sequence[int]:
    """Take the next `n` numbers of a sequence, ascending; sequences start at 1 and never repeat a number.

    On PostgreSQL other processes may have numbers in between.
    """
    if conn.dialect.name == "postgresql":
        return _from_sequence(conn, t.NUMBERS[name], n)
    last: int = _RESERVE.execute(conn, {"name": name, "last": n}).scalar_one()
    return range(last - n + 1, last + 1)


def _from_sequence(conn: Connection, sequence: DatabaseSequence, n: int) -> Sequence[int]:
    numbers = select(sequence.next_value()).select_from(func.generate_series(1, bindparam("n")).alias("each"))
    return sorted(conn.scalars(numbers, {"n": n}))


_SMALL_GAP = 10_000
_LAST_OF_SEQUENCE = text("SELECT coalesce(pg_sequence_last_value(CAST(:name AS regclass)), 0)")
_SET_SEQUENCE = text("SELECT setval(CAST(:name AS regclass), :number)")


def reserve_beyond(conn: Connection, name: str, number: int) -> None:
    """See to it that the sequence never gives `number` or anything below it."""
    if conn.dialect.name == "sqlite":
        _RESERVE_BEYOND.execute(conn, {"name": name, "last": number})
        return
    sequence = t.NUMBERS[name]
    gap = number - conn.scalars(_LAST_OF_SEQUENCE, {"name": sequence.name}).one()
    if gap > _SMALL_GAP:
        # It sets the sequence back if others drew more than the gap since it was read: no process is that fast.
        conn.execute(_SET_SEQUENCE, {"name": sequence.name, "number": number})
    elif gap > 0:
        _from_sequence(conn, sequence, gap)


def last_number(conn: Connection, name: str) -> int:
    """The last number that the sequence gave; 0 before the first."""
    if conn.dialect.name == "postgresql":
        given: int = conn.scalars(_LAST_OF_SEQUENCE, {"name": t.NUMBERS[name].name}).one()
        return given
    last: int | None = conn.scalar(select(t.sequences.c.last).where(t.sequences.c.name == name))
    return last or 0


class contains_text(FunctionElement[bool]):
    """Whether a column holds a part, literally; of letters, ASCII's capital ones count as small ones."""

    inherit_cache = True
    type = Boolean()


@compiles(contains_text, "sqlite")
def _contains_on_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    column, part = (compiler.process(clause, **options) for clause in element.clauses)
    return f"instr(lower({column}), lower({part})) > 0"


@compiles(contains_text, "postgresql")
def _contains_on_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    # The collation decides what lower() does: "C" knows ASCII only, as SQLite does.
    column, part = (compiler.process(clause, **options) for clause in element.clauses)
    return f'strpos(lower({column} COLLATE "C"), lower({part} COLLATE "C")) > 0'


_CLOCK = text("SELECT extract(epoch FROM clock_timestamp())::float8")


def clock(conn: Connection) -> float:
    """Seconds since 1970, by the clock that all who use the database share."""
    if conn.dialect.name == "sqlite":
        return time.time()
    now: float = conn.scalars(_CLOCK).one()
    return now


_CHANNEL = "millrace_"
_NOTIFY = text(f"SELECT pg_notify('{_CHANNEL}' || CAST('groups' AS regclass)::oid, :payload)")
_CHANNEL_HERE = text(f"SELECT '{_CHANNEL}' || CAST('groups' AS regclass)::oid")


def notify(conn: Connection, payload: str) -> None:
    """Tell all who listen on this buffer, when the transaction is committed. For PostgreSQL only."""
    conn.execute(_NOTIFY, {"payload": payload})


def listen(conn: Connection) -> None:
    """Be told. For PostgreSQL only; another buffer in the same database has another channel."""
    channel = conn.scalars(_CHANNEL_HERE).one()
    conn.exec_driver_sql(f'LISTEN "{channel}"')
