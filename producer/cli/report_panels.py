"""The charts of a report as numbers: what is drawn, before anybody says how. Names of tasks are escaped here, once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from buffer import RunReport, Status
from buffer.report import StepReport
from producer.cli.safe import escaped

COLOURS = 8
"""So many can be told apart."""

MOST_TASKS = COLOURS
"""Lines of one chart."""

_LONGEST_NAME = 40

_LOG_FROM = 20
"""A largest value that many times the median is far from the others."""

_ENDED = {
    Status.COMPLETED.value: 0,
    Status.INTERRUPTED.value: 2,
    Status.EXPIRED.value: 4,
    Status.FILTERED.value: 3,
    Status.FAILED.value: 1,
    Status.DISCARDED.value: 7,
}
_WASTED = {name: _ENDED[name] for name in ("filtered", "failed", "discarded")} | {"left_out": 5}
"""Names with their colours: one status has one in all charts."""

Value = float | None
Of = Callable[[StepReport], Value]


@dataclass(frozen=True, slots=True)
class Series:
    """Values in the order of `Panel.steps`, None where there is none; `colour` is the number of one of `COLOURS`, faint or not."""

    name: str
    values: Sequence[Value]
    colour: int
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart.

    Attributes:
        title: what is drawn, and its unit.
        steps: the first and the last step of each part.
        series: lines, or parts of bars that stand on each other.
        stacked: whether they are.
        share: whether values are fractions, to be shown in per cent.
        spread: whether a few values may be so large that the axis should be logarithmic.
        width: steps of a part.
    """

    title: str
    steps: Sequence[tuple[int, int]]
    series: Sequence[Series]
    width: int
    stacked: bool = False
    share: bool = False
    spread: bool = False

    @property
    def logarithmic(self) -> bool:
        """Whether the axis is to be so: else one long pause would press all other values to the ground."""
        known = [value for one in self.series for value in one.values if value is not None]
        return self.spread and bool(known) and min(known) > 0 and max(known) > _LOG_FROM * median(known)


def shown_name(name: object) -> str:
    """A name that is short, and that nothing obeys."""
    text = escaped(str(name)[: _LONGEST_NAME + 1])
    return text if len(str(name)) <= _LONGEST_NAME else text[:_LONGEST_NAME] + "…"


def shown_tasks(report: RunReport) -> list[str]:
    """The tasks that have a line of their own: those that were trained on most."""
    tokens: dict[str, int] = {}
    for step in report.steps:
        tokens[step.task_name] = tokens.get(step.task_name, 0) + step.tokens
    most = sorted(tokens, key=lambda name: (-tokens[name], name))[:MOST_TASKS]
    return sorted(most)


def panels(report: RunReport) -> list[Panel]:
    """All charts; none where no batch was handed out."""
    if not report.steps:
        return []
    made = _Panels(report)
    return [
        made.lines("Reward, mean", lambda step: step.reward_mean, ("raw score", made.score)),
        made.lines("Response length, tokens", lambda step: step.length_mean, ("longest", lambda step: step.length_max)),
        made.lines("Staleness, versions", lambda step: step.staleness_mean, ("stalest", lambda step: step.staleness_max)),
        made.bars("Wasted tokens, by reason", _WASTED, lambda step, reason: step.wasted.get(reason, 0)),
        made.lines("Seconds a step", lambda step: step.seconds, spread=True),
        made.bars("Groups that ended, by status", _ENDED, lambda step, status: step.ended.get(status, 0)),
        made.lines("Groups whose rewards are all equal", lambda step: step.zero_variance, share=True),
        made.lines("Responses cut at the limit", lambda step: step.truncated, share=True),
    ]


class _Panels:
    def __init__(self, report: RunReport) -> None:
        assert report.first is not None
        self._first, self._width, self._report = report.first, report.width, report
        self._tasks = shown_tasks(report)
        self._at = {(step.task_name, self._bin(step)): step for step in report.steps}
        self._bins = sorted({number for _, number in self._at})
        self._steps = [self._range(number) for number in self._bins]

    def _bin(self, step: StepReport) -> int:
        assert step.first is not None
        return (step.first - self._first) // self._width

    def _range(self, number: int) -> tuple[int, int]:
        first = self._first + number * self._width
        return first, min(first + self._width - 1, self._report.last or first)

    def score(self, step: StepReport) -> Value:
        """The raw score, where some reward is something else."""
        differs = any(one.score_mean not in (None, one.reward_mean) for one in self._report.steps)
        return step.score_mean if differs else None

    def lines(self, title: str, of: Of, beside: tuple[str, Of] | None = None, *, share: bool = False, spread: bool = False) -> Panel:
        """A line for each task; a faint one beside it where there is one task only."""
        series = [Series(shown_name(name), self._values(name, of), colour) for colour, name in enumerate(self._tasks)]
        if beside is not None and len(self._tasks) == 1:
            own = self._values(self._tasks[0], beside[1])
            if any(value is not None for value in own):
                series = [Series("mean", series[0].values, 0), Series(beside[0], own, 0, faint=True)]
        return Panel(title, self._steps, series, self._width, share=share, spread=spread)

    def _values(self, name: str, of: Of) -> list[Value]:
        return [None if (step := self._at.get((name, number))) is None else of(step) for number in self._bins]

    def bars(self, title: str, names: Mapping[str, int], of: Callable[[StepReport, str], int]) -> Panel:
        """Sums over all tasks, a part of the bar for each name that has any."""
        by_bin: dict[int, list[StepReport]] = {number: [] for number in self._bins}
        for (_, number), step in self._at.items():
            by_bin[number].append(step)
        sums = {name: [float(sum(of(step, name) for step in by_bin[number])) for number in self._bins] for name in names}
        series = [Series(name, sums[name], colour) for name, colour in names.items()]
        return Panel(title, self._steps, [one for one in series if any(one.values)], self._width, stacked=True)
