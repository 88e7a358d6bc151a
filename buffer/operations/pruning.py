"""Giving up what committed groups hold, in slices: deleting large payloads is slow, and others write in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from sqlalchemy import Connection

from buffer import queries as q
from buffer.operations.consuming import committed_step
from buffer.queries import Transaction

_SLICE_BYTES, _SLICE_GROUPS = 2**21, 64


@dataclass(frozen=True, slots=True)
class Prune:
    """A wish to give up the next slice of payloads up to `bounds`; without, of rows without payloads."""

    bounds: q.Bounds | None


class PrunedSlice(NamedTuple):
    """What one slice gave up."""

    payloads: int
    payload_bytes: int
    rows: int


def prune(tx: Transaction, requests: Sequence[Prune]) -> list[PrunedSlice]:
    """Give up a slice for each; one that gave up nothing was the last."""
    return [_prune_rows(tx) if request.bounds is None else _prune_payloads(tx, request.bounds) for request in requests]


def _prune_payloads(tx: Transaction, bounds: q.Bounds) -> PrunedSlice:
    found = q.prunable(tx.conn, bounds, _SLICE_GROUPS)
    before = accumulate((row.payload_bytes for row in found), initial=0)
    rows = [row for row, size in zip(found, before, strict=False) if size < _SLICE_BYTES]
    q.drop_payloads(tx, [row.group_id for row in rows])
    return PrunedSlice(len(rows), sum(row.payload_bytes for row in rows), 0)


def prune_bounds(conn: Connection, keep_steps: int | None, keep_last: int | None, max_bytes: int | None) -> q.Bounds:
    """Up to where payloads go, as things stand. Found once, by a reader: it looks at every group that has one."""
    step = None if keep_steps is None else (committed_step(conn) or 0) - keep_steps
    seqs = [
        None if keep_last is None else q.seq_before_last(conn, keep_last),
        None if max_bytes is None else q.seq_within_bytes(conn, max_bytes),
    ]
    return q.Bounds(step, max((seq for seq in seqs if seq is not None), default=None))


def _prune_rows(tx: Transaction) -> PrunedSlice:
    rows = q.pruned(tx.conn, _SLICE_GROUPS)
    q.drop_groups(tx, rows)
    return PrunedSlice(0, 0, len(rows))
