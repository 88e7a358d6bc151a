"""Making batches final, and rewinding to a checkpoint: versions newer than it exist on the timeline that ends there only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection

from buffer import queries as q
from buffer.codec import encode_group
from buffer.errors import StepError
from buffer.operations.consuming import committed_step
from buffer.queries import Transaction
from buffer.rollout import RolloutGroup
from buffer.status import TRANSITIONS, Status

_SLICE = 64
"""Groups in memory at once while their staleness is counted anew."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A wish to make what was consumed up to `step` final, with the policy's version there, if it was told."""

    step: int
    version: int | None


def commit(tx: Transaction, requests: Sequence[Commit]) -> list[int]:
    """Archive what was consumed up to each step; gives how many groups that made final."""
    return [_commit_one(tx, request) for request in requests]


def _commit_one(tx: Transaction, request: Commit) -> int:
    rows = q.consumed_up_to(tx.conn, request.step)
    q.move(tx, rows, Status.ARCHIVED)
    committed = committed_step(tx.conn) or 0
    if request.step > committed:
        q.set_meta_value(tx.conn, "committed_step", str(request.step))
    if request.version is not None and request.step >= committed:
        q.set_meta_value(tx.conn, "committed_version", f"{request.version} at step {request.step}")
    return len(rows)


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """What `resume` found and did.

    Attributes:
        step: the step that the trainer resumes from.
        version: of the policy at that checkpoint; give it to `engine.update_weights`.
        rewound: groups consumed after that step that will be handed out again.
        released: groups that were running when their process died, now interrupted.
        timeline: the number of the timeline that begins here: of the versions above `version`, those to come are on it.
        expired: groups with rollouts of versions that were undone, with `future="expire"`.
        counts: groups by task and status, after resuming.
    """

    step: int
    version: int
    rewound: int
    released: int
    timeline: int
    expired: int
    counts: Mapping[str, Mapping[Status, int]]


@dataclass(frozen=True, slots=True)
class Rewind:
    """A wish to go back to the checkpoint of `step`; `expire_future`: rollouts of versions that it undoes are not kept."""

    step: int
    expire_future: bool = False


class Rewound(NamedTuple):
    """The version at the checkpoint, the timeline that begins there, how many groups were given back and how many expired."""

    version: int
    timeline: int
    rewound: int
    expired: int


def resume(tx: Transaction, requests: Sequence[Rewind]) -> list[Rewound]:
    """Rewind to each checkpoint."""
    return [_resume_one(tx, request) for request in requests]


def _resume_one(tx: Transaction, request: Rewind) -> Rewound:
    step, committed = request.step, committed_step(tx.conn)
    if committed is not None and step < committed:
        raise StepError(
            f"step={step} lies before the committed step {committed}, whose batches are final; resume from a checkpoint of step "
            f"{committed} or later, and commit only when you will not go back further"
        )
    version = _version_at(tx.conn, step)
    rows = q.consumed_after(tx.conn, step)
    q.unconsume(tx, rows, f"rewound to step {step}")
    # What the next step saw stays: resuming from here once more must give the same version.
    q.drop_steps_after(tx.conn, step + 1)
    q.drop_shares_after(tx.conn, step)
    q.drop_states_after(tx.conn, step)
    timeline, expired = _begin_timeline(tx, version, request, [row.group_id for row in rows if row.max_version is not None])
    return Rewound(version, timeline, len(rows), expired)


def _begin_timeline(tx: Transaction, version: int, request: Rewind, rewound: Sequence[int]) -> tuple[int, int]:
    """End the timeline, unless nothing was ever sampled on it; gives the number of the present one, and the expired groups.

    `rewound` are counted anew whatever their versions: in a fork they were final when earlier rewinds came.
    """
    ended = q.timeline(tx.conn).number
    if not q.anything_sampled(tx.conn):
        return ended, 0
    q.begin_timeline(tx, ended, version, request.step)
    undone = sorted({*q.newer_than(tx.conn, version), *rewound})
    expired = 0
    for start in range(0, len(undone), _SLICE):
        expired += _requalify(tx, undone[start : start + _SLICE], request, version)
    return ended + 1, expired


def _requalify(tx: Transaction, group_ids: Sequence[int], request: Rewind, fork: int) -> int:
    """Count the staleness of these groups as the present timeline has it; gives how many were expired instead."""
    groups = q.load_groups(tx.conn, group_ids)
    stored = {group.group_id: group.status for group in groups}
    may_expire = [group for group in groups if request.expire_future and _may_expire(group.status)]
    undone = [group for group in may_expire if _reset_newer(group, fork)]
    if undone:
        reason = f"sampled by weights that the rewind to step {request.step} undid"
        q.store_expired(tx, [encode_group(group) for group in undone], [stored[group.group_id] for group in undone], reason, q.UNDONE)
    kept = [encode_group(group) for group in groups if group not in undone]
    q.requalify(tx.conn, [{"id": e.group_id, **{name: e.group[name] for name in ("oldest_version", "freshest_version")}} for e in kept])
    return sum(stored[group.group_id] is not Status.EXPIRED for group in undone)


def _may_expire(status: Status) -> bool:
    """Whether members may be reset; of an expired group those may be that were fresh then."""
    return status is Status.EXPIRED or Status.EXPIRED in TRANSITIONS[status]


def _reset_newer(group: RolloutGroup, fork: int) -> bool:
    """Reset the members with a trainable token of weights newer than the rewind's, and say whether there are any."""
    newer = [r for r in group.rollouts if bool(((r.versions > fork) & (r.loss_mask == 1)).any())]
    for rollout in newer:
        rollout.reset()
        rollout.status = Status.EXPIRED
    return bool(newer)


def _version_at(conn: Connection, step: int) -> int:
    """The policy's version at the checkpoint of `step`: as told to `commit`, else what the next batch saw, else one more
    than this step's batch saw: true where every step makes one update of the weights."""
    told, _, at_step = (q.meta_value(conn, "committed_version") or "").partition(" at step ")
    if at_step == str(step):
        return int(told)
    after = q.step_version(conn, step + 1)
    if after is not None:
        return after
    at = q.step_version(conn, step)
    return step if at is None else at + 1
