"""Moving groups from one status to the next."""

from collections.abc import Sequence

from sqlalchemy import bindparam, update

from buffer import schema as t
from buffer.queries.dialects import Prepared, chunks, ids_of, is_among
from buffer.queries.standing import Standing, require_rowcount
from buffer.queries.transaction import Transaction
from buffer.status import Status, check_transition

_g = t.groups.c
_MOVE = Prepared(
    update(t.groups)
    .where(is_among(_g.group_id, "ids"), _g.status == bindparam("expected"))
    .values(status=bindparam("status"), owner=bindparam("owner_now"), updated_at=bindparam("now"))
)


def move(tx: Transaction, rows: Sequence[Standing], target: Status, *, reason: str | None = None) -> None:
    """Take groups to `target`; refused where the table does not allow it. What runs is ours."""
    note_moves(tx, rows, target, reason=reason)
    owner = tx.owner if target is Status.RUNNING else None
    for expected in {row.status for row in rows}:
        ids = [row.group_id for row in rows if row.status == expected]
        change = {"expected": expected, "status": target.value, "owner_now": owner, "now": tx.now}
        changed = sum(_MOVE.execute(tx.conn, {"ids": ids_of(tx.conn, chunk), **change}) for chunk in chunks(ids))
        require_rowcount(changed, len(ids))


def note_moves(tx: Transaction, rows: Sequence[Standing], target: Status, *, reason: str | None = None, step: int | None = None) -> None:
    """Check that the groups may go to `target`, and note that they do."""
    for row in {row.status: row for row in rows}.values():
        check_transition(Status(row.status), target, f"group {row.group_id} of task {row.task_name!r}")
    tx.went(rows, target, reason=reason, step=step)
