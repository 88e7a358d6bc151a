"""Giving up what committed groups hold, in slices: deleting large payloads is slow, and others write in between."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from buffer import queries as q
from buffer.operations.consuming import committed_step
from buffer.queries import Transaction

_SLICE_BYTES, _SLICE_GROUPS = 2**21, 64


@dataclass(frozen=True, slots=True)
class Prune:
    """A wish to give up the next slice of payloads beyond any of these bounds, or with `rows` of rows without payloads."""

    keep_steps: int | None
    keep_last: int | None
    max_bytes: int | None
    rows: bool = False


class PrunedSlice(NamedTuple):
    """What one slice gave up."""

    payloads: int
    payload_bytes: int
    rows: int


def prune(tx: Transaction, requests: Sequence[Prune]) -> list[PrunedSlice]:
    """Give up a slice for each; one that gave up nothing was the last."""
    return [_prune_rows(tx) if request.rows else _prune_payloads(tx, request) for request in requests]


def _prune_payloads(tx: Transaction, request: Prune) -> PrunedSlice:
    bounds = _bounds(tx, request)
    if bounds == q.Bounds(None, None):
        return PrunedSlice(0, 0, 0)
    found = q.prunable(tx.conn, bounds, _SLICE_GROUPS)
    before = accumulate((row.payload_bytes for row in found), initial=0)
    rows = [row for row, size in zip(found, before, strict=False) if size < _SLICE_BYTES]
    q.drop_payloads(tx, [row.group_id for row in rows])
    return PrunedSlice(len(rows), sum(row.payload_bytes for row in rows), 0)


def _bounds(tx: Transaction, request: Prune) -> q.Bounds:
    step = None if request.keep_steps is None else (committed_step(tx.conn) or 0) - request.keep_steps
    seqs = [
        None if request.keep_last is None else q.seq_before_last(tx.conn, request.keep_last),
        None if request.max_bytes is None else q.seq_within_bytes(tx.conn, request.max_bytes),
    ]
    return q.Bounds(step, max((seq for seq in seqs if seq is not None), default=None))


def _prune_rows(tx: Transaction) -> PrunedSlice:
    rows = q.pruned(tx.conn, _SLICE_GROUPS)
    q.drop_groups(tx, rows)
    return PrunedSlice(0, 0, len(rows))
