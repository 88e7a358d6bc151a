"""What a report asks: sums by task over the steps of training. Rows come by bin (a few steps together where there are many), never
by group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Row,
    Select,
    String,
    and_,
    case,
    cast,
    func,
    literal,
    null,
    select,
    true,
    union_all,
)

from buffer import schema as t
from buffer.staleness import NO_VERSION
from buffer.status import Status

_g, _r, _t, _s = t.groups.c, t.rollouts.c, t.transitions.c, t.steps.c


def _plain(number: int) -> ColumnElement[int]:
    """A number in the text of a statement: as a parameter, PostgreSQL would not see that what is selected is grouped by."""
    return literal(number, BigInteger, literal_execute=True)


_LARGEST = 1e300
"""Rewards beyond it are not finite numbers that a sum has room for."""

OF_NO_USE = (Status.FILTERED, Status.FAILED, Status.DISCARDED)
"""Statuses whose groups' tokens are wasted while they have them."""

_ENDS = (Status.COMPLETED, Status.INTERRUPTED, Status.EXPIRED, *OF_NO_USE)


@dataclass(frozen=True, slots=True)
class Bins:
    """Steps `first` to `last`, every `width` of them together; of these tasks, or of all where there is none."""

    first: int
    last: int
    width: int
    tasks: Sequence[str] = ()

    def of(self, step: Any) -> ColumnElement[int]:
        """The number of the bin of a step, from 0."""
        number: ColumnElement[int] = ((step - _plain(self.first)) // _plain(self.width)).label("bin")
        return number

    def hold(self, step: Any) -> ColumnElement[bool]:
        """Whether a step is in one of them."""
        found: ColumnElement[bool] = step.between(self.first, self.last)
        return found

    def ours(self, task_name: Any) -> ColumnElement[bool]:
        """Whether a task is asked for."""
        return task_name.in_(list(self.tasks)) if self.tasks else true()


def step_range(conn: Connection, tasks: Sequence[str]) -> tuple[int, int] | None:
    """The first and the last step at which groups of these tasks (of any) were consumed and not given back; None without any."""
    asked = select(func.min(_g.consumed_step), func.max(_g.consumed_step)).where(_g.consumed_step.is_not(None))
    low, high = conn.execute(asked.where(_g.task_name.in_(list(tasks))) if tasks else asked).one()
    return None if low is None else (low, high)


_FIRST = select(_g.task_name, func.min(_g.created_at).label("at")).group_by(_g.task_name)


def first_drawn(conn: Connection) -> dict[str, float]:
    """When the first group of each task came into being, of those whose rows are there."""
    return {row.task_name: row.at for row in conn.execute(_FIRST)}


# -- what was trained on ----------------------------------------------------------------------------------------

# In a group that was consumed every member with an error is left out of it.
_counts = _r.error.is_(None)


def _finite(column: Any) -> ColumnElement[float]:
    """A member's number where it is one, NULL where it is none or the member is left out."""
    return case((and_(_counts, column.between(-_LARGEST, _LARGEST)), column))


_TOLD = _finite(_r.reward), _finite(_r.score)
_MEMBERS = (
    func.count().label("rollouts"),
    func.sum(case((_counts, 1), else_=0)).label("trained"),
    func.sum(case((_counts, _r.tokens), else_=0)).label("tokens"),
    func.max(case((_counts, _r.tokens))).label("longest"),
    func.sum(case((and_(_counts, _r.finish_reason == "length"), 1), else_=0)).label("truncated"),
    func.count(_TOLD[0]).label("rewards"),
    func.sum(_TOLD[0]).label("reward"),
    func.min(_TOLD[0]).label("least_reward"),
    func.max(_TOLD[0]).label("most_reward"),
    func.count(_TOLD[1]).label("scores"),
    func.sum(_TOLD[1]).label("score"),
)


def trained_by_step(conn: Connection, bins: Bins) -> list[Row[Any]]:
    """Sums over the groups consumed at each bin's steps, by task and bin, ascending; bins without any are left out."""
    return list(conn.execute(_trained(bins)))


def _trained(bins: Bins) -> Select[Any]:
    behind = case((_g.oldest_version < NO_VERSION, _s.version - _g.oldest_version))
    of_group = (
        select(_g.task_name, _g.consumed_step, _g.tokens.label("sampled"), behind.label("behind"), _s.version, *_MEMBERS)
        .select_from(t.groups.join(t.rollouts, _r.group_id == _g.group_id).outerjoin(t.steps, _s.step == _g.consumed_step))
        .where(bins.hold(_g.consumed_step), bins.ours(_g.task_name))
        .group_by(_g.group_id, _s.version)
        .subquery()
    )
    c = of_group.c
    sums = [func.sum(c[name]).label(name) for name in ("rollouts", "trained", "tokens", "sampled", "truncated", "rewards", "scores")]
    return (
        select(
            c.task_name,
            bins.of(c.consumed_step),
            func.min(c.consumed_step).label("first"),
            func.max(c.consumed_step).label("last"),
            func.count(c.consumed_step.distinct()).label("steps"),
            func.max(c.version).label("version"),
            func.count().label("groups"),
            *sums,
            func.sum(c.reward).label("reward"),
            func.min(c.least_reward).label("least_reward"),
            func.max(c.most_reward).label("most_reward"),
            func.sum(c.score).label("score"),
            func.max(c.longest).label("longest"),
            func.sum(case((c.rewards > 0, 1), else_=0)).label("rewarded"),
            func.sum(case((c.least_reward == c.most_reward, 1), else_=0)).label("alike"),
            func.count(c.behind).label("versioned"),
            func.sum(c.behind).label("behind"),
            func.max(c.behind).label("furthest_behind"),
        )
        .group_by(c.task_name, "bin")
        .order_by(c.task_name, "bin")
    )


# -- what happened meanwhile ------------------------------------------------------------------------------------


def handed_out_at(conn: Connection, bins: Bins) -> list[Row[Any]]:
    """When the last batch of each bin was handed out: rows of task_name, bin and at, ascending."""
    marks = _marks(bins).subquery()
    asked = select(marks.c.task_name, bins.of(marks.c.step), func.max(marks.c.at).label("at")).where(bins.hold(marks.c.step))
    return list(conn.execute(asked.group_by(marks.c.task_name, "bin").order_by(marks.c.task_name, "bin")))


def ended_by_step(conn: Connection, bins: Bins) -> list[Row[Any]]:
    """How many groups ended how, and the tokens of those that are of no use as they stand, before each bin's batches were handed out.

    Rows of task_name, bin, status, n and tokens; bin is None for what happened since the last batch.
    """
    happened = union_all(_marks(bins), _ends(bins), _of_no_use(bins)).subquery()
    c = happened.c
    next_step = func.min(c.step).over(partition_by=c.task_name, order_by=c.at.desc()).label("next_step")
    placed = select(c.task_name, next_step, c.status, c.n, c.tokens).subquery().c
    asked = (
        select(
            placed.task_name,
            bins.of(placed.next_step),
            placed.status,
            func.sum(placed.n).label("n"),
            func.sum(placed.tokens).label("tokens"),
        )
        .where(placed.status.is_not(None), placed.next_step.is_(None) | bins.hold(placed.next_step))
        .group_by(placed.task_name, "bin", placed.status)
    )
    return list(conn.execute(asked))


def _marks(bins: Bins) -> Select[Any]:
    """When each step's batch was handed out, for the last time."""
    handed_out = t.transitions.join(t.groups, and_(_g.group_id == _t.group_id, _g.consumed_step == _t.step))
    return (
        select(_g.task_name, func.max(_t.at).label("at"), _t.step, _text(None), _whole(0, "n"), _whole(0, "tokens"))
        .select_from(handed_out)
        .where(_t.target == Status.CONSUMED.value, bins.ours(_g.task_name))
        .group_by(_g.task_name, _t.step)
    )


def _ends(bins: Bins) -> Select[Any]:
    """Each time that a group ended; what a rewind gave back did not."""
    return (
        select(_g.task_name, _t.at, cast(null(), BigInteger).label("step"), _t.target, _whole(1, "n"), _whole(0, "tokens"))
        .select_from(t.transitions.join(t.groups, _g.group_id == _t.group_id))
        .where(_t.target.in_([status.value for status in _ENDS]), func.coalesce(_t.source, "") != Status.CONSUMED.value)
        .where(bins.ours(_g.task_name))
    )


def _of_no_use(bins: Bins) -> Select[Any]:
    statuses = [status.value for status in OF_NO_USE]
    return select(
        _g.task_name, _g.updated_at.label("at"), cast(null(), BigInteger).label("step"), _g.status, _whole(0, "n"), _g.tokens
    ).where(_g.status.in_(statuses), _g.tokens > 0, bins.ours(_g.task_name))


def _text(value: None) -> Any:
    return cast(null(), String).label("status")


def _whole(value: int, name: str) -> Any:
    return literal(value, BigInteger).label(name)
