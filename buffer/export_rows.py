"""Groups to and from the rows of a file: one row a rollout, what belongs to the group repeated in each.

A row is a mapping with every name of `COLUMNS`. Token arrays are arrays, everything nested is JSON as text, so that any
reader of tables finds one type in a column. Pure functions; the formats themselves are in `buffer.export`.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.codec import finite, is_utf8, to_json
from buffer.rollout import Position, RolloutGroup, RolloutState

FORMAT = 1
"""Of the columns; a file of a later one is refused."""

Row = dict[str, Any]


class Kind(Enum):
    """What a column holds; token arrays by their type."""

    WHOLE = "int64"
    NUMBER = "float64"
    TEXT = "text"
    JSON = "json"
    INT32 = "int32"
    FLOAT32 = "float32"
    UINT8 = "uint8"

    @property
    def is_array(self) -> bool:
        """Whether it holds a list of numbers a row."""
        return self in (Kind.INT32, Kind.FLOAT32, Kind.UINT8)


COLUMNS: Mapping[str, Kind] = {
    "format": Kind.WHOLE,
    "group_id": Kind.WHOLE,
    "task_name": Kind.TEXT,
    "epoch": Kind.WHOLE,
    "position": Kind.WHOLE,
    "group_status": Kind.TEXT,
    "consumed_step": Kind.WHOLE,
    "filter_reason": Kind.TEXT,
    "members": Kind.WHOLE,
    "member": Kind.WHOLE,
    "status": Kind.TEXT,
    "attempts": Kind.WHOLE,
    "interruptions": Kind.WHOLE,
    "error": Kind.TEXT,
    "row": Kind.JSON,
    "prompt": Kind.TEXT,
    "messages": Kind.JSON,
    "prompt_ids": Kind.INT32,
    "media": Kind.JSON,
    "sampling": Kind.JSON,
    "response_ids": Kind.INT32,
    "logprobs": Kind.FLOAT32,
    "loss_mask": Kind.UINT8,
    "versions": Kind.INT32,
    "timelines": Kind.INT32,
    "finish_reason": Kind.TEXT,
    "text": Kind.TEXT,
    "turns": Kind.JSON,
    "score": Kind.NUMBER,
    "reward": Kind.NUMBER,
    "reward_parts": Kind.JSON,
    "metrics": Kind.JSON,
    "escaped": Kind.JSON,  # names of the row's text columns that hold JSON, because their text is no UTF-8
}

_RENAMED = {"index": "member"}
_OF_GROUP = ("group_id", "task_name", "consumed_step", "filter_reason")
_OF_MEMBER = tuple(
    name
    for name in RolloutState.__dataclass_fields__
    # The group's id and task are the member's; `timeline` is the reading run's, and `dropped` of the process that wrote it.
    if name not in (*_OF_GROUP, "timeline", "dropped")
)


def rows_of(group: RolloutGroup) -> list[Row]:
    """The group's rows, in the order of its members.

    Raises `ValueError` where it cannot be written without loss: a score that is not finite, an extra that is not JSON.
    """
    shared: Row = {name: getattr(group, name) for name in _OF_GROUP}
    epoch, offset = (None, None) if group.position is None else group.position
    shared |= {"format": FORMAT, "epoch": epoch, "position": offset, "group_status": group.status.value, "members": len(group.rollouts)}
    return [_row_of(rollout, shared) for rollout in group.rollouts]


def _row_of(rollout: RolloutState, shared: Row) -> Row:
    row = shared | {_RENAMED.get(name, name): getattr(rollout, name) for name in _OF_MEMBER}
    row["status"] = rollout.status.value
    escaped = []
    for name, value in row.items():
        kind = COLUMNS[name]
        if value is None:
            continue
        if kind is Kind.JSON:
            row[name] = to_json(value, f"{name} of rollout {rollout.rollout_id}")
        elif kind is Kind.NUMBER:
            row[name] = finite(value, name, rollout)
        elif kind is Kind.TEXT and not isinstance(value, str):
            # SQLite lets whoever edits a file put anything into a column.
            raise ValueError(f"rollout {rollout.rollout_id}: {name} is {value!r:.100}; it must be text")
        elif kind is Kind.TEXT and not is_utf8(value):
            row[name] = json.dumps(value)
            escaped.append(name)
    return row | {"escaped": json.dumps(escaped)}


def same_rows(one: Iterable[Row], other: Iterable[Row]) -> bool:
    """Whether two groups' rows are equal, arrays bit by bit."""
    return [_comparable(row) for row in one] == [_comparable(row) for row in other]


def _comparable(row: Row) -> Row:
    # As values, not as text: the order of a mapping's keys says nothing.
    return {
        name: value if value is None else value.tobytes() if kind.is_array else json.loads(value) if kind is Kind.JSON else value
        for name, kind in COLUMNS.items()
        for value in [row[name]]
    }


class BadRowError(ValueError):
    """A row, by its number from 1, that no export has."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(what)
        self.number = number


def groups_of(rows: Iterable[tuple[int, Row]]) -> Iterator[RolloutGroup]:
    """The groups of numbered rows, each as soon as its last row has come; `BadRowError` where they do not fit together."""
    waiting: list[Row] = []
    number = 0
    for number, row in rows:
        try:
            _check_types(row)
            _check_follows(row, waiting)
            waiting.append(row)
            if len(waiting) == row["members"]:
                yield _group_of(waiting)
                waiting = []
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise BadRowError(number, str(error)) from error
    if waiting:
        raise BadRowError(
            number, f"the file ends after {len(waiting)} of the {waiting[0]['members']} rows of group {waiting[0]['group_id']}"
        )


def check_columns(names: Iterable[str]) -> None:
    """Raise `ValueError` unless these are the columns of an export, in any order."""
    given = set(names)
    if missing := [name for name in COLUMNS if name not in given]:
        raise ValueError(f"column {missing[0]!r} is missing; this is no export of groups")
    if unknown := sorted(given - set(COLUMNS)):
        raise ValueError(f"column {unknown[0]!r} is none of an export's; remove it, or read the file with the Millrace that wrote it")


_TYPES: dict[Kind, tuple[type, ...]] = {Kind.WHOLE: (int,), Kind.NUMBER: (int, float), Kind.TEXT: (str,), Kind.JSON: (str,)}
_MAY_LACK = frozenset({"epoch", "position", "consumed_step", "filter_reason", "error", "prompt", "messages", "prompt_ids", "media"}) | {
    "finish_reason",
    "text",
    "score",
    "reward",
}


def _check_types(row: Row) -> None:
    for name, kind in COLUMNS.items():
        value = row[name]
        if value is None:
            if name not in _MAY_LACK:
                raise ValueError(f"{name} is missing")
        elif kind.is_array:
            if not isinstance(value, np.ndarray):
                raise ValueError(f"{name} is {value!r:.40}, and must be a list of numbers")
        elif not isinstance(value, _TYPES[kind]) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.40}, and must be of type {kind.value}")
        elif kind is Kind.WHOLE and not -(2**63) <= row[name] < 2**63:
            raise ValueError(f"{name} is {value}, which 64 bits do not hold")
        elif kind is Kind.NUMBER and not math.isfinite(row[name]):
            raise ValueError(f"{name} is {value}, and must be finite")


def _check_follows(row: Row, waiting: Sequence[Row]) -> None:
    """The row is the next of the group that waits for it, or the first of one."""
    if row["format"] != FORMAT:
        raise ValueError(f"it has format {row['format']}, this Millrace knows {FORMAT}; install a newer one")
    if row["member"] != len(waiting) or (waiting and row["group_id"] != waiting[0]["group_id"]):
        expected = f"member {len(waiting)} of group {waiting[0]['group_id']}" if waiting else "member 0 of a group"
        raise ValueError(
            f"member {row['member']} of group {row['group_id']} stands where {expected} is to come; rows are missing or out of order"
        )
    if waiting and any(row[name] != waiting[0][name] for name in ("task_name", "epoch", "position", "members", "group_status")):
        raise ValueError(f"group {row['group_id']} is another in this row than in its first")


def _group_of(rows: Sequence[Row]) -> RolloutGroup:
    plain = [_plain(row) for row in rows]
    first = plain[0]
    rollouts = [
        RolloutState(first["group_id"], task_name=first["task_name"], **{name: row[_RENAMED.get(name, name)] for name in _OF_MEMBER})
        for row in plain
    ]
    position = None if first["epoch"] is None else Position(first["epoch"], first["position"])
    group = RolloutGroup(first["group_id"], rollouts, first["task_name"], position, first["consumed_step"], first["filter_reason"])
    if group.status != first["group_status"]:
        raise ValueError(f"group {group.group_id} is said to be {first['group_status']}, its members make it {group.status}")
    return group


def _plain(row: Row) -> Row:
    """The row's values as fields of a rollout."""
    escaped = json.loads(row["escaped"])
    if not isinstance(escaped, list) or any(COLUMNS.get(name) is not Kind.TEXT for name in escaped):
        raise ValueError(f"escaped is {row['escaped']!r:.40}, and must be a JSON list of text columns")
    as_json = [name for name, kind in COLUMNS.items() if kind is Kind.JSON] + escaped
    plain = row | {name: _from_json(name, row[name]) for name in as_json}
    if (plain["epoch"] is None) != (plain["position"] is None):
        raise ValueError("of epoch and position one is missing")
    return plain


_SHAPES: dict[str, type] = {
    "row": dict,
    "sampling": dict,
    "reward_parts": dict,
    "metrics": dict,
    "messages": list,
    "media": list,
    "turns": list,
}


def _from_json(name: str, text: str | None) -> Any:
    if text is None:
        return None
    value = json.loads(text)
    wanted = _SHAPES.get(name, list if COLUMNS[name] is Kind.JSON else str)
    if not isinstance(value, wanted):
        raise ValueError(f"{name} is {text!r:.40}, and must be JSON of a {wanted.__name__}")
    return value


def array_of(name: str, values: Any) -> NDArray[Any]:
    """A list of numbers as the column's array; `ValueError` where it holds anything else."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        raise ValueError(f"{name} is {values!r:.40}, and must be a list of numbers")
    dtype = np.dtype(COLUMNS[name].value)
    cast = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(cast, array):
        raise ValueError(f"{name} holds what is no whole number within the range of {dtype}")
    return cast
