"""How groups stand: what is asked before a change of them, and what says that one came between."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, func, select

from buffer import schema as t
from buffer.amounts import Amount
from buffer.errors import IllegalTransitionError, UnknownGroupError
from buffer.queries.dialects import Prepared, chunks, ids_of, is_among

_g = t.groups.c


class Standing(NamedTuple):
    """How a group stands: what a move needs to know of it. The timeline is the run's, and known only where it says so."""

    group_id: int
    task_name: str
    status: str
    members: int
    consumed_seq: int
    take: int | None
    owner: str | None
    crashes: int
    max_version: int | None
    tokens: int
    finished: int
    finished_tokens: int
    timeline: int = 0


ROWS = select(*(_g[name] for name in Standing._fields[:-1]))
"""The columns of a `Standing`."""


def amount_in(row: Any) -> Amount:
    """How much was sampled of a group; the row is a `Standing`, or has these columns of it."""
    return Amount(row.tokens, row.finished, row.finished_tokens)


class Standings:
    """A prepared query of `ROWS`, and perhaps the timeline."""

    def __init__(self, statement: Select[Any]) -> None:
        self._statement = Prepared(statement)

    def all(self, conn: Connection, parameters: Mapping[str, Any]) -> list[Standing]:
        """All rows."""
        return [Standing(*row) for row in self._statement.all(conn, parameters)]


_TIMELINE = select(func.coalesce(func.max(t.timelines.c.timeline) + 1, 0)).scalar_subquery().label("timeline")
_KNOWN = Standings(ROWS.add_columns(_TIMELINE).where(is_among(_g.group_id, "ids")))


def known(conn: Connection, group_ids: Sequence[int]) -> dict[int, Standing]:
    """Those of the groups that exist, with the number of the run's timeline."""
    found: dict[int, Standing] = {}
    for chunk in chunks(group_ids):
        found |= {row.group_id: row for row in _KNOWN.all(conn, {"ids": ids_of(conn, chunk)})}
    return found


def rows_of(conn: Connection, group_ids: Sequence[int]) -> list[Standing]:
    """What `known` gives of each, in the order asked for; an unknown id is an error."""
    found = known(conn, group_ids)
    return [found[group_id] for group_id in all_of(group_ids, found)]


def all_of(group_ids: Sequence[int], found: Mapping[int, Any]) -> Sequence[int]:
    """`group_ids`, if all of them were found."""
    if missing := [group_id for group_id in group_ids if group_id not in found]:
        raise UnknownGroupError(f"no group {missing[0]} is in the database; query() lists those that are")
    return group_ids


class Overtaken(IllegalTransitionError):
    """A group changed between the look at it and the change of it. Done again, the transaction sees what it is now."""


def require_rowcount(found: int, expected: int) -> None:
    """Raise `Overtaken` where a statement's WHERE did not hold for all rows."""
    if found != expected:
        raise Overtaken(f"{expected} rows were to change, {found} did: a group is not what it was, or has other members")
