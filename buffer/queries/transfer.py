"""What files and forks need: groups in the order to write them, groups put back as they were, and what was recorded by step."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, bindparam, func, select, tuple_, update

from buffer import schema as t
from buffer.codec import EncodedGroup
from buffer.queries.dialects import Upsert, reserve
from buffer.queries.groups import insert_groups
from buffer.queries.standing import ROWS, Standing
from buffer.queries.transaction import Transaction
from buffer.status import Status

_g = t.groups.c
_RECORDED = (Status.CONSUMED.value, Status.ARCHIVED.value)


def stored_order(conn: Connection, task_name: str | None, statuses: Collection[Status]) -> NDArray[np.int64]:
    """Rows of a group's id and its payload's size: groups ever consumed first, in that order, then the others as they came in.

    Groups whose payload was given up are left out. An array, because there may be millions.
    """
    statement = select(_g.group_id, _g.payload_bytes).where(_g.pruned_at.is_(None))
    if task_name is not None:
        statement = statement.where(_g.task_name == task_name)
    if statuses:
        statement = statement.where(_g.status.in_([status.value for status in statuses]))
    found = conn.execute(statement.order_by(_g.consumed_seq, _g.ready_seq, _g.group_id), execution_options={"yield_per": 4096})
    parts = [np.array([tuple(row) for row in rows], np.int64) for rows in found.partitions()]
    return np.concatenate([np.empty((0, 2), np.int64), *parts])


def unpruned(conn: Connection, group_ids: Sequence[int]) -> list[int]:
    """Those of the groups that are there with their payload, in the order given."""
    found = set(conn.scalars(select(_g.group_id).where(_g.group_id.in_(group_ids), _g.pruned_at.is_(None))))
    return [group_id for group_id in group_ids if group_id in found]


def at_positions(conn: Connection, task_name: str, positions: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Which groups of the task stand at these positions (epoch, offset)."""
    place = tuple_(_g.epoch, _g.position)
    found = conn.execute(select(_g.epoch, _g.position, _g.group_id).where(_g.task_name == task_name, place.in_(positions)))
    return {(row.epoch, row.position): row.group_id for row in found}


def first_consumed(conn: Connection) -> int | None:
    """The lowest step at which anything is consumed and not committed."""
    consumed = (_g.status == Status.CONSUMED.value, _g.consumed_step.is_not(None))
    found: int | None = conn.scalar(select(func.min(_g.consumed_step)).where(*consumed))
    return found


_WRITE_PAYLOAD = Upsert(t.payloads, ["group_id"], lambda new: {"extras": new.extras, "arrays": new.arrays})
_PLACE = update(t.groups).where(_g.group_id == bindparam("id")).values(consumed_step=bindparam("step"), consumed_seq=bindparam("seq"))


def insert_restored(tx: Transaction, encoded: Sequence[EncodedGroup], steps: Sequence[int | None]) -> None:
    """Add groups as they stood elsewhere; those with a step were consumed there, in this order."""
    insert_groups(tx, encoded)
    # A new group has nothing beside its tokens; one that comes from elsewhere may: messages, metrics.
    tokenless = [{"group_id": e.group_id, "extras": e.extras, "arrays": e.arrays} for e in encoded if not e.arrays]
    if tokenless:
        _WRITE_PAYLOAD.execute_many(tx.conn, tokenless)
    consumed = [(e.group_id, step) for e, step in zip(encoded, steps, strict=True) if step is not None]
    if consumed:
        seqs = reserve(tx.conn, "consumed", len(consumed))
        tx.conn.execute(_PLACE, [{"id": group_id, "step": step, "seq": seq} for (group_id, step), seq in zip(consumed, seqs, strict=True)])


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step at which groups of a task were consumed.

    Attributes:
        step: of the trainer.
        version: of the policy when the batch was handed out; None where that is not known.
        groups: in the batch.
        pruned: groups of it whose tokens were given up.
    """

    step: int
    version: int | None
    groups: int
    pruned: int


def recorded_steps(conn: Connection, task_name: str) -> list[RecordedStep]:
    """The steps at which groups of the task were consumed and not given back, ascending."""
    batches = (
        select(_g.consumed_step, func.count().label("n"), func.count(_g.pruned_at).label("pruned"))
        .where(_g.status.in_(_RECORDED), _g.consumed_step.is_not(None), _g.task_name == task_name)
        .group_by(_g.consumed_step)
        .subquery()
    )
    joined = batches.outerjoin(t.steps, t.steps.c.step == batches.c.consumed_step)
    statement = select(batches.c.consumed_step, t.steps.c.version, batches.c.n, batches.c.pruned).select_from(joined)
    return [RecordedStep(*row) for row in conn.execute(statement.order_by(batches.c.consumed_step))]


def last_pruned_step(conn: Connection) -> int:
    """The last step of which a group's tokens were given up; 0 where there is none."""
    found: int | None = conn.scalar(select(func.max(_g.consumed_step)).where(_g.pruned_at.is_not(None)))
    return found or 0


def reopen_after(tx: Transaction, step: int) -> None:
    """What is committed at a step later than `step` is only consumed again."""
    later = (_g.status == Status.ARCHIVED.value, _g.consumed_step > step)
    # Not by `move`: in a run that goes on, what is committed stays so.
    rows = [Standing(*row) for row in tx.conn.execute(ROWS.where(*later).order_by(_g.consumed_seq))]
    tx.went(rows, Status.CONSUMED, reason=f"the run was forked at step {step}")
    tx.conn.execute(update(t.groups).where(*later).values(status=Status.CONSUMED.value))
