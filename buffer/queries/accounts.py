"""What an account asks: sums that are kept beside the counts, what runs, and what was drawn lately."""

from sqlalchemy import Connection, bindparam, func, literal, select

from buffer import schema as t
from buffer.amounts import NOTHING, Amount
from buffer.queries.transaction import INTERRUPTED, LEFT_OUT, PRUNED, RESTARTED, STALE, UNDONE
from buffer.status import Status

GIVEN_UP = (STALE, UNDONE, INTERRUPTED, RESTARTED)
"""Why what was sampled is in no group any more; beside what was trained on, and its rows pruned."""

_g = t.groups.c
_c, _u = t.counts.c, t.given_up.c
_HELD = select(_c.status, _c.tokens, _c.finished, _c.finished_tokens).where(_c.task_name == bindparam("task"))
_GIVEN_UP = select(_u.reason, _u.tokens, _u.finished, _u.finished_tokens).where(_u.task_name == bindparam("task"))
_RUNS = _g.status == literal(Status.RUNNING.value, literal_execute=True)
_SUMS = [func.coalesce(func.sum(column), 0) for column in (_g.tokens, _g.finished, _g.finished_tokens)]
# The index of what runs is read; the task is looked up in the rows.
_RUNNING = select(*_SUMS).where(_RUNS, _g.task_name == bindparam("task"))


def held(conn: Connection, task_name: str) -> dict[Status, Amount]:
    """How much was sampled of the groups of the task, by their status, every status present."""
    rows = {Status(status): Amount(*map(int, amount)) for status, *amount in conn.execute(_HELD, {"task": task_name})}
    running = Amount(*map(int, conn.execute(_RUNNING, {"task": task_name}).one()))
    return dict.fromkeys(Status, NOTHING) | rows | {Status.RUNNING: running}


def given_up(conn: Connection, task_name: str) -> dict[str, Amount]:
    """What no group has any more, by why, every reason present."""
    rows = {reason: Amount(*map(int, amount)) for reason, *amount in conn.execute(_GIVEN_UP, {"task": task_name})}
    return dict.fromkeys((*GIVEN_UP, LEFT_OUT, PRUNED), NOTHING) | rows


def drawn_by(conn: Connection, task_name: str, step: int) -> int | None:
    """The newest group that was drawn by the time of the task's last batch up to `step`; None without such a batch."""
    found = [group for status in (Status.CONSUMED, Status.ARCHIVED) if (group := _last_batch(conn, task_name, status, step))]
    return max(found)[1] if found else None


_OURS = (_g.status == bindparam("status"), _g.consumed_step.is_not(None), _g.task_name == bindparam("task"))
_REACHED = select(_g.consumed_step).where(*_OURS, _g.consumed_step <= bindparam("step")).order_by(_g.consumed_step.desc()).limit(1)
_NEWEST_OF_STEP = select(func.max(_g.group_id)).where(*_OURS, _g.consumed_step == bindparam("step"))


def _last_batch(conn: Connection, task_name: str, status: Status, step: int) -> tuple[int, int] | None:
    """The last step up to `step` that has groups of the task in `status`, and the newest of these groups."""
    ours = {"task": task_name, "status": status.value}
    reached = conn.scalar(_REACHED, {**ours, "step": step})
    return None if reached is None else (reached, conn.scalar(_NEWEST_OF_STEP, {**ours, "step": reached}) or 0)


_PRUNED = select(t.tasks.c.pruned).where(t.tasks.c.task_name == bindparam("task"))


def pruned_groups(conn: Connection, task_name: str) -> int:
    """Groups of the task that were trained on and whose rows were given up."""
    return conn.scalar(_PRUNED, {"task": task_name}) or 0


# By id, from the first: as a plain column the task would draw a planner to its index, and to every group of it.
_OF_TASK = (_g.task_name + "") == bindparam("task")
_LATER = select(_g.status, func.count()).where(_g.group_id > bindparam("last"), _OF_TASK).group_by(_g.status)


def drawn_after(conn: Connection, task_name: str, group_id: int) -> dict[Status, int]:
    """Groups of the task that were drawn after this one, by status."""
    return {Status(status): n for status, n in conn.execute(_LATER, {"task": task_name, "last": group_id})}
