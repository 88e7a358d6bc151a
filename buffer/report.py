"""How a run went, step by step, in one state of its database: rewards, lengths, staleness, waste and time over the steps of training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from buffer import queries
from buffer.overview import Overview, overview, real, whole
from buffer.queries import Bins
from buffer.status import Status


@dataclass(frozen=True, slots=True)
class StepReport:
    """A task's part of one step of training, or of several together. What is None is not known: nothing had a reward, say.

    Attributes:
        task_name: whose groups.
        first: the first of these steps at which any was handed out.
        last: the last one.
        steps: how many there are of them; 0 for what happened since the last batch.
        version: the policy's newest version at them.
        at: when the last batch was handed out; seconds since 1970.
        seconds: for each step, since the one before, mean.
        groups: handed out.
        rollouts: theirs.
        left_out: of these, members that are not trained on.
        tokens: of the others, those of the environment included.
        reward_mean: over the others; those whose reward is not finite left out, as in the next two.
        reward_min: the least.
        reward_max: the greatest.
        score_mean: of the raw scores.
        length_mean: tokens of a response.
        length_max: of the longest.
        truncated: the fraction of responses that were cut at the limit.
        zero_variance: the fraction of groups whose rewards are all equal.
        staleness_mean: versions between the policy at the step and the oldest trained token of a group.
        staleness_max: of the stalest group.
        ended: groups that ended before the batch was handed out, and after the one before: by the status they got.
        wasted: tokens, by reason, of groups that got their status then and still have it; and of members left out.
    """

    task_name: str
    first: int | None
    last: int | None
    steps: int
    version: int | None
    at: float | None
    seconds: float | None
    groups: int
    rollouts: int
    left_out: int
    tokens: int
    reward_mean: float | None
    reward_min: float | None
    reward_max: float | None
    score_mean: float | None
    length_mean: float | None
    length_max: int | None
    truncated: float | None
    zero_variance: float | None
    staleness_mean: float | None
    staleness_max: int | None
    ended: Mapping[str, int]
    wasted: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RunReport:
    """What `ReplayBuffer.report` found.

    Attributes:
        first: the first step that is looked at; None where nothing was handed out.
        last: the last one.
        width: how many steps are put together in each of `steps`.
        steps: by task and step, ascending.
        since: what happened after the last of them, one for each task; empty where later steps were left out.
        overview: how the run stands now: all of it, whatever was asked for.
    """

    first: int | None
    last: int | None
    width: int
    steps: Sequence[StepReport]
    since: Sequence[StepReport]
    overview: Overview


@dataclass(frozen=True, slots=True)
class Report:
    """A wish for a report: of these tasks (all, where there is none), steps `first` to `last`, in at most `points` parts."""

    tasks: Sequence[str]
    first: int | None
    last: int | None
    points: int


def report(conn: Connection, wish: Report, window: float) -> RunReport:
    """Ask everything. It reads the rows of all groups of these steps and all transitions, and keeps a few numbers of each part."""
    now = overview(conn, window)
    known = queries.step_range(conn, wish.tasks)
    to_the_end = wish.last is None or known is None or whole(known[1]) <= wish.last
    # What comes after the last step is asked for in any case: a run that never handed out a batch has nothing else.
    low, high = (1, 0) if known is None else (whole(known[0]), whole(known[1]))
    first = low if wish.first is None else max(low, wish.first)
    last = high if wish.last is None else min(high, wish.last)
    bins = Bins(first, last, max(1, -(-(last - first + 1) // wish.points)), wish.tasks)
    ended = _Ended(conn, bins)
    began = {} if wish.first not in (None, 1) else _began(conn, now)
    steps = _steps(conn, bins, ended, began)
    names = [name for name in now.tasks if not wish.tasks or name in wish.tasks]
    since = [_since(name, ended) for name in names] if to_the_end else []
    empty = not steps
    return RunReport(None if empty else first, None if empty else last, bins.width, steps, since, now)


class _Ended:
    """How groups ended, and what was wasted of them, by task and bin."""

    def __init__(self, conn: Connection, bins: Bins) -> None:
        self._found: dict[tuple[str, int | None], tuple[dict[str, int], dict[str, int]]] = {}
        for row in queries.ended_by_step(conn, bins):
            groups, tokens = self._found.setdefault((row.task_name, row.bin), ({}, {}))
            if row.n:
                groups[_status(row.status)] = whole(row.n)
            if row.tokens:
                tokens[_status(row.status)] = whole(row.tokens)

    def of(self, task_name: str, at: int | None) -> tuple[dict[str, int], dict[str, int]]:
        """Groups by status, tokens by reason."""
        return self._found.get((task_name, at), ({}, {}))


def _began(conn: Connection, now: Overview) -> dict[str, float]:
    """When each task began; where rows were given up nobody knows."""
    return {name: real(at) for name, at in queries.first_drawn(conn).items() if name in now.tasks and not now.tasks[name].pruned}


def _steps(conn: Connection, bins: Bins, ended: _Ended, began: Mapping[str, float]) -> list[StepReport]:
    at = {(row.task_name, row.bin): real(row.at) for row in queries.handed_out_at(conn, bins)}
    before, steps = dict(began), list[StepReport]()
    for row in queries.trained_by_step(conn, bins):
        name, now = row.task_name, at.get((row.task_name, row.bin))
        since = before.get(name)
        seconds = None if now is None or since is None else max(0.0, now - since) / whole(row.steps)
        steps.append(_step(row, now, seconds, *ended.of(name, row.bin)))
        if now is not None:
            before[name] = now
    return steps


def _step(row: Any, at: float | None, seconds: float | None, ended: dict[str, int], wasted: dict[str, int]) -> StepReport:
    sums = {name: whole(getattr(row, name)) for name in ("groups", "rollouts", "trained", "tokens", "sampled", "steps")}
    left_out = sums["sampled"] - sums["tokens"]
    return StepReport(
        task_name=row.task_name,
        first=whole(row.first),
        last=whole(row.last),
        steps=sums["steps"],
        version=_whole_or_none(row.version),
        at=at,
        seconds=seconds,
        groups=sums["groups"],
        rollouts=sums["rollouts"],
        left_out=sums["rollouts"] - sums["trained"],
        tokens=sums["tokens"],
        reward_mean=_ratio(row.reward, row.rewards),
        reward_min=_real_or_none(row.least_reward),
        reward_max=_real_or_none(row.most_reward),
        score_mean=_ratio(row.score, row.scores),
        length_mean=_ratio(row.tokens, row.trained),
        length_max=_whole_or_none(row.longest),
        truncated=_ratio(row.truncated, row.trained),
        zero_variance=_ratio(row.alike, row.rewarded),
        staleness_mean=_ratio(row.behind, row.versioned),
        staleness_max=_whole_or_none(row.furthest_behind),
        ended=ended,
        wasted=wasted | ({queries.LEFT_OUT: left_out} if left_out > 0 else {}),
    )


def _since(task_name: str, ended: _Ended) -> StepReport:
    """What has no batch yet."""
    groups, tokens = ended.of(task_name, None)
    nothing: dict[str, Any] = dict.fromkeys(_NUMBERS, 0) | dict.fromkeys(_UNKNOWN)
    return StepReport(task_name=task_name, ended=groups, wasted=tokens, **nothing)


_NUMBERS = ("steps", "groups", "rollouts", "left_out", "tokens")
_UNKNOWN = (
    *("first", "last", "version", "at", "seconds", "reward_mean", "reward_min", "reward_max", "score_mean", "length_mean", "length_max"),
    *("truncated", "zero_variance", "staleness_mean", "staleness_max"),
)


def _ratio(total: Any, n: Any) -> float | None:
    return real(total) / count if (count := whole(n)) else None


def _status(value: Any) -> str:
    return Status(value).value


def _whole_or_none(value: Any) -> int | None:
    return None if value is None else whole(value)


def _real_or_none(value: Any) -> float | None:
    return None if value is None else real(value)
