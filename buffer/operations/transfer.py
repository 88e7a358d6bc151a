"""Putting groups back as they stood elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass

from buffer import queries as q
from buffer.codec import EncodedGroup, encode
from buffer.errors import DuplicateGroupError, IllegalTransitionError, StepError
from buffer.operations.consuming import committed_step
from buffer.queries import Transaction
from buffer.status import Status


@dataclass(frozen=True, slots=True)
class Restore:
    """A wish to add groups as they stood elsewhere, consumed at `steps` (None: not consumed).

    `skip_known`: pass over ids that are there; else they are refused.
    """

    encoded: Sequence[EncodedGroup]
    steps: Sequence[int | None]
    skip_known: bool = False


def restore(tx: Transaction, requests: Sequence[Restore]) -> list[int]:
    """Add groups that count as drawn; gives how many each request added."""
    return [_restore_one(tx, request) for request in requests]


def _restore_one(tx: Transaction, request: Restore) -> int:
    known = q.known(tx.conn, [e.group_id for e in request.encoded])
    if known and not request.skip_known:
        raise DuplicateGroupError(f"group {min(known)} is in the database already; put_restored() adds groups, put() stores results")
    new = [(e, step) for e, step in zip(request.encoded, request.steps, strict=True) if e.group_id not in known]
    if not new:
        return 0
    for e, step in new:
        if e.status is Status.RUNNING:
            raise IllegalTransitionError(f"group {e.group_id} is running elsewhere; nobody would run it here: mark it interrupted")
        if (step is not None) != (e.status in (Status.CONSUMED, Status.ARCHIVED)):
            raise IllegalTransitionError(
                f"group {e.group_id} is {e.status} and consumed_step={step}; consumed and archived groups have a step"
            )
    now = q.timeline(tx.conn)
    new = [(e if e.timeline == now.number else encode(e.snapshot, now), step) for e, step in new]
    check_steps(
        tx,
        max((step for e, step in new if step is not None and e.status is Status.ARCHIVED), default=None),
        min((step for e, step in new if step is not None and e.status is Status.CONSUMED), default=None),
    )
    _add(tx, [e for e, _ in new], [step for _, step in new])
    return len(new)


def check_steps(tx: Transaction, archived: int | None, consumed: int | None) -> None:
    """Make `archived` the committed step at least; refuse what is consumed at a step that is final."""
    refuse_steps(q.first_consumed(tx.conn), committed_step(tx.conn), archived, consumed)
    if archived is not None and archived > (committed_step(tx.conn) or 0):
        q.set_meta_value(tx.conn, "committed_step", str(archived))


def refuse_steps(first_consumed: int | None, committed: int | None, archived: int | None, consumed: int | None) -> None:
    """Raise `StepError` where steps of groups that come from elsewhere do not go with those of this buffer.

    Args:
        first_consumed: of this buffer, not committed.
        committed: the last step committed here.
        archived: the last step committed there.
        consumed: the first step consumed there, not committed.
    """
    if archived is not None and first_consumed is not None and first_consumed <= archived:
        raise StepError(
            f"these groups are committed up to step {archived}, and here step {first_consumed} is consumed and not committed; "
            "commit or resume first, or put them into a new database"
        )
    if consumed is not None and consumed <= max(committed or 0, archived or 0):
        raise StepError(
            f"some of these groups are consumed at step {consumed} and not committed, and here everything up to step "
            f"{max(committed or 0, archived or 0)} is final; put them into a new database"
        )


def _add(tx: Transaction, encoded: Sequence[EncodedGroup], steps: Sequence[int | None]) -> None:
    q.reserve_beyond(tx.conn, "group", max(e.group_id for e in encoded))
    for task_name in sorted({e.task_name for e in encoded}):
        q.add_drawn(tx.conn, task_name, sum(e.task_name == task_name for e in encoded))
    q.insert_restored(tx, encoded, steps)
