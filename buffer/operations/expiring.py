"""Expiring what is too stale, in slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from buffer import queries as q
from buffer.codec import encode_group
from buffer.queries import Transaction
from buffer.rollout import RolloutGroup
from buffer.staleness import Level, oldest_fresh
from buffer.status import Status, check_transition

_SLICE_GROUPS, _SLICE_TOKENS = 64, 2**18
"""Most groups, and about the most tokens, that one expiry rewrites: others wait for the writer meanwhile."""

_BEFORE_ALL = (-(2**62), 0)


@dataclass(frozen=True, slots=True)
class Expire:
    """A wish to expire the next slice of a task's stale groups, behind the place `after` (oldest_version, group_id)."""

    task_name: str
    version: int
    max_staleness: int
    level: Level
    after: tuple[int, int] = _BEFORE_ALL


class Expired(NamedTuple):
    """How many groups of a slice expired, and behind which place the next one begins; None at the end."""

    n: int
    after: tuple[int, int] | None


def expire(tx: Transaction, requests: Sequence[Expire]) -> list[Expired]:
    """Move stale groups to expired, their stale members reset."""
    return [_expire_slice(tx, request) for request in requests]


def _expire_slice(tx: Transaction, request: Expire) -> Expired:
    below = oldest_fresh(request.version, request.max_staleness)
    found = q.stale(tx.conn, request.task_name, below, request.level, request.after, _SLICE_GROUPS)
    before = accumulate((row.tokens for row in found), initial=0)
    rows = [row for row, tokens in zip(found, before, strict=False) if tokens < _SLICE_TOKENS]
    n = _expire_groups(tx, q.load_groups(tx.conn, [row.group_id for row in rows]), request)
    at_the_end = len(rows) == len(found) < _SLICE_GROUPS
    return Expired(n, None if at_the_end else (rows[-1].oldest_version, rows[-1].group_id))


def _expire_groups(tx: Transaction, groups: Sequence[RolloutGroup], request: Expire) -> int:
    stored = {group.group_id: group.status for group in groups}
    expired = [group for group in groups if _reset_stale(group, request)]
    if expired:
        reason = f"too stale at version {request.version} with max_staleness={request.max_staleness}, by {request.level}"
        q.store_expired(tx, [encode_group(group) for group in expired], [stored[group.group_id] for group in expired], reason, q.STALE)
    return len(expired)


def _reset_stale(group: RolloutGroup, request: Expire) -> bool:
    """Reset the members that are too stale, and say whether there are any; the others stay as they are."""
    stale = [r for r in group.rollouts if r.too_stale(request.version, request.max_staleness, request.level)]
    for rollout in stale:
        check_transition(rollout.status, Status.EXPIRED, f"rollout {rollout.rollout_id}")
        rollout.reset()
        rollout.status = Status.EXPIRED
    return bool(stale)
