"""Statements for many rows, and where the two databases speak differently: INSERT that changes what is there, and numbers
that never repeat."""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Connection,
    CursorResult,
    Integer,
    Table,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    select,
    text,
)
from sqlalchemy import Sequence as DatabaseSequence
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType

from buffer import schema as t
from buffer.status import Status

Change = Callable[[Any], dict[str, Any]]

_NONE: Mapping[str, Any] = {}


class _Text(NamedTuple):
    """Of a statement: its text, the order of its parameters if they have no names, and those that nobody gives."""

    sql: str
    names: Sequence[str] | None
    constants: Mapping[str, Any]


class _Compiled:
    """A statement whose text is made once a database. SQLAlchemy's look at each of its uses costs more than SQLite does.

    Values go to the driver as they are, and come from it so: it must know their types, as it does of all our columns.
    """

    def __init__(self, statement: Any) -> None:
        self._statement = statement
        self._texts: dict[tuple[str, ...], _Text] = {}

    def _for(self, conn: Connection, keys: tuple[str, ...]) -> _Text:
        place = (conn.dialect.name, *keys)
        if place not in self._texts:
            # As if for many rows: then nothing is returned that was not asked for.
            compiled = self._statement.compile(dialect=conn.dialect, column_keys=list(keys), for_executemany=True)
            constants = {name: value for name, value in compiled.params.items() if name not in keys}
            self._texts[place] = _Text(str(compiled), compiled.positiontup, constants)
        return self._texts[place]


class Many(_Compiled):
    """A statement that is executed with many rows, on SQLite several times as fast as SQLAlchemy does it."""

    def execute(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Execute it with rows that all have the keys of the first; gives how many rows of the database that changed."""
        sql, names, constants = self._for(conn, tuple(rows[0]))
        given = [{**constants, **row} for row in rows] if constants else rows
        changed: int = _executed(conn, sql, _tuples(given, names) if names else list(given)).rowcount
        return changed


def _tuples(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[Any, ...]]:
    values = itemgetter(*names)
    return [values(row) for row in rows] if len(names) > 1 else [(values(row),) for row in rows]


class Prepared(_Compiled):
    """A statement that is executed often, with one set of parameters; rows are plain tuples."""

    def rows(self, conn: Connection, parameters: Mapping[str, Any] = _NONE) -> Iterator[tuple[Any, ...]]:
        """One row after the other, as the database gives them."""
        with closing(self._cursor(conn, parameters)) as cursor:
            yield from cursor

    def all(self, conn: Connection, parameters: Mapping[str, Any] = _NONE) -> list[tuple[Any, ...]]:
        """All rows."""
        with closing(self._cursor(conn, parameters)) as cursor:
            rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows

    def value(self, conn: Connection, parameters: Mapping[str, Any] = _NONE) -> Any:
        """The first column of the first row; None where there is no row."""
        rows = self.all(conn, parameters)
        return rows[0][0] if rows else None

    def execute(self, conn: Connection, parameters: Mapping[str, Any]) -> int:
        """Change rows; gives how many."""
        changed: int = self._result(conn, parameters).rowcount
        return changed

    def _cursor(self, conn: Connection, parameters: Mapping[str, Any]) -> Any:
        result = self._result(conn, parameters)
        return result.cursor if isinstance(result, CursorResult) else result

    def _result(self, conn: Connection, parameters: Mapping[str, Any]) -> Any:
        sql, names, constants = self._for(conn, tuple(parameters))
        given = {**constants, **parameters}
        return _executed(conn, sql, given if names is None else tuple([given[name] for name in names]))


def _executed(conn: Connection, sql: str, given: Any) -> Any:
    """The result, or on SQLite the driver's cursor: what SQLAlchemy does around a statement takes longer there than the statement.

    A list of parameters is of as many rows.
    """
    if conn.dialect.name != "sqlite":
        return conn.exec_driver_sql(sql, given)
    cursor = conn.connection.cursor()
    try:
        return cursor.executemany(sql, given) if isinstance(given, list) else cursor.execute(sql, given)
    except sqlite3.Error as error:
        raise DBAPIError.instance(sql, None, error, sqlite3.Error, dialect=conn.dialect) from error


class Insert:
    """INSERT of many rows of some columns, none of them bytes. On PostgreSQL in one statement: there a message a row costs most."""

    def __init__(self, table: Table, columns: Sequence[str]) -> None:
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
        typed = ", ".join(f"{name} {table.c[name].type.compile(dialect)}" for name in columns)
        given = f"SELECT * FROM json_to_recordset(CAST(:rows AS json)) AS given({typed})"
        self._one_by_one = Many(insert(table))
        self._at_once = Prepared(text(f"INSERT INTO {table.name} ({', '.join(columns)}) {given}"))

    def execute(self, conn: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Insert them in order; gives how many."""
        if conn.dialect.name == "sqlite":
            return self._one_by_one.execute(conn, rows)
        return self._at_once.execute(conn, {"rows": json.dumps(rows)})


class Upsert:
    """INSERT that changes the row of the same keys where there is one; `change` is given what would be inserted.

    Without `change` the row that is there stays.
    """

    def __init__(self, table: Table, keys: Sequence[str], change: Change | None = None, *, returning: Any = None) -> None:
        statements = {"sqlite": _built(sqlite.insert(table), keys, change, returning)}
        statements["postgresql"] = _built(postgresql.insert(table), keys, change, returning)
        self._once = {name: Prepared(statement) for name, statement in statements.items()}
        self._many = {name: Many(statement) for name, statement in statements.items()}

    def execute(self, conn: Connection, parameters: dict[str, Any]) -> int:
        """Execute it with one row; gives 0 where it changed none."""
        return self._once[conn.dialect.name].execute(conn, parameters)

    def returned(self, conn: Connection, parameters: dict[str, Any]) -> Any:
        """Execute it with one row; gives the value that it returns."""
        return self._once[conn.dialect.name].value(conn, parameters)

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


def literally(status: Status) -> ColumnElement[str]:
    """A status in the text of a statement, not as a parameter: only then does the planner see that a partial index fits."""
    return literal_column(f"'{status.value}'")


class _pairs(FunctionElement[Any]):
    """The pairs of numbers of one parameter (`[[id, number], ...]` as JSON), as a table of `id` and `number`."""

    inherit_cache = True


@compiles(_pairs, "sqlite")
def _pairs_on_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    (pairs,) = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS number FROM json_each({pairs}))"


@compiles(_pairs, "postgresql")
def _pairs_on_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    (pairs,) = (compiler.process(clause, **options) for clause in element.clauses)
    numbers = f"json_array_elements(CAST({pairs} AS json))"
    return f"(SELECT (value->>0)::bigint AS id, (value->>1)::bigint AS number FROM {numbers} AS pair(value))"


def numbered(name: str) -> Any:
    """A table of `id` and `number`, for UPDATE ... FROM: what the parameter `name` has from `json.dumps` of pairs."""
    return _pairs(bindparam(name, type_=NullType())).table_valued("id", "number", name="numbered")


_CHUNK = 500
"""Ids in one statement."""


def chunks(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    """`ids` in pieces that fit into one statement."""
    return (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))


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
    last: int = _RESERVE.returned(conn, {"name": name, "last": n})
    return range(last - n + 1, last + 1)


_NEXT = {
    sequence.name: Prepared(select(sequence.next_value()).select_from(func.generate_series(1, bindparam("n")).alias("each")))
    for sequence in t.NUMBERS.values()
}


def _from_sequence(conn: Connection, sequence: DatabaseSequence, n: int) -> Sequence[int]:
    return sorted([number for (number,) in _NEXT[sequence.name].all(conn, {"n": n})])


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
