"""Recording drawn prompts together with the cursor behind them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buffer import queries as q
from buffer.codec import GROUP_COLUMNS, MEMBER_COLUMNS, EncodedGroup, decode_group, encode_group
from buffer.queries import Transaction
from buffer.rollout import Position, RolloutGroup, RolloutState
from buffer.staleness import Timeline
from buffer.status import Status


@dataclass(frozen=True, slots=True)
class DrawnRow:
    """One prompt as the dataset gave it; `error` says why it cannot be run."""

    row: Any
    position: Position
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """Prompts taken from a dataset whose cursor had moved `moves` times and now stands at `cursor` (JSON).

    `start`: their groups run at once, and are handed out; those of rows with an error are not.
    """

    task_name: str
    rows: Sequence[DrawnRow]
    group_size: int
    moves: int
    cursor: str
    start: bool = False


def draw(tx: Transaction, draws: Sequence[Draw]) -> list[dict[int, RolloutGroup | None]]:
    """Record drawn prompts and the cursor behind them together; gives the new groups by id, those that run as they are handed out."""
    return [_draw_one(tx, request) for request in draws]


def _draw_one(tx: Transaction, request: Draw) -> dict[int, RolloutGroup | None]:
    q.move_cursor(tx.conn, request.task_name, request.moves, request.cursor, len(request.rows))
    if not request.rows:
        return {}
    ids = q.reserve(tx.conn, "group", len(request.rows))
    encoded = [_encode_drawn(group_id, drawn, request) for group_id, drawn in zip(ids, request.rows, strict=True)]
    q.insert_groups(tx, encoded, start=request.start)
    if not request.start:
        return dict.fromkeys(ids)
    timeline = q.timeline(tx.conn)
    return {e.group_id: _running(e, timeline) for e in encoded if e.status is Status.PENDING}


def _running(e: EncodedGroup, timeline: Timeline) -> RolloutGroup:
    """The group as it would be read now; it was written with these values."""
    row = {**e.group, "group_id": e.group_id, "task_name": e.task_name, "status": Status.RUNNING.value, "consumed_step": None}
    members = [[member[name] for name in MEMBER_COLUMNS] for member in e.rollouts]
    payload = (e.extras, e.arrays) if e.arrays else None
    return decode_group([row[name] for name in GROUP_COLUMNS], members, e.prompt, payload, timeline=timeline)


def _encode_drawn(group_id: int, drawn: DrawnRow, request: Draw) -> EncodedGroup:
    if drawn.error is None:
        group = RolloutGroup.from_row(
            group_id, drawn.row, group_size=request.group_size, task_name=request.task_name, position=drawn.position
        )
        return encode_group(group)
    row = drawn.row if isinstance(drawn.row, Mapping) else {"value": repr(drawn.row)}
    rollouts = [
        RolloutState(group_id, index, request.task_name, Status.FAILED, error=drawn.error, row=row) for index in range(request.group_size)
    ]
    return encode_group(RolloutGroup(group_id, rollouts, request.task_name, drawn.position))


def cursor(tx: Transaction, task_names: Sequence[str]) -> list[tuple[int, str | None]]:
    """Where each task's dataset goes on, as of the operations before this one."""
    return [q.cursor(tx.conn, task_name) for task_name in task_names]
