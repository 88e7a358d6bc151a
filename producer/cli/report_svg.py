"""Charts as coordinates for the template: it draws them, and escapes every text. Nothing here makes markup."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from producer.cli.report_panels import Panel, Series, Value

WIDTH, HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 8.0, 8.0, 22.0


class Tick(NamedTuple):
    """Where a mark of an axis stands, and what it says."""

    at: float
    text: str


class Bar(NamedTuple):
    """A part of a bar."""

    colour: int
    x: float
    y: float
    width: float
    height: float


class Hit(NamedTuple):
    """A strip over the chart, and what is said of it when it is pointed at."""

    x: float
    width: float
    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Path:
    """A line as SVG's commands; values with nothing beside them are dots."""

    colour: int
    faint: bool
    commands: str
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """What the template draws of one panel."""

    title: str
    legend: Sequence[tuple[int, bool, str]]
    across: Sequence[Tick] = ()
    up: Sequence[Tick] = ()
    paths: Sequence[Path] = ()
    bars: Sequence[Bar] = ()
    hits: Sequence[Hit] = ()
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT
    empty: bool = False


def chart(panel: Panel) -> Chart:
    """The panel as coordinates; one without any value says that it is empty."""
    legend = [(one.colour, one.faint, one.name) for one in panel.series]
    heights = _tops(panel) if panel.stacked else [value for one in panel.series for value in one.values if _is_number(value)]
    if not heights:
        return Chart(panel.title, legend, empty=True)
    across, up = _Axis.of_steps(panel), _Axis.of_values(heights, panel)
    return Chart(
        panel.title,
        legend,
        across=across.ticks(),
        up=up.ticks(),
        paths=[] if panel.stacked else [_path(panel, one, across, up) for one in panel.series],
        bars=list(_bars(panel, across, up)) if panel.stacked else [],
        hits=[_hit(panel, number, across) for number in range(len(panel.steps))],
    )


def _is_number(value: Value) -> bool:
    return value is not None and math.isfinite(value)


def _tops(panel: Panel) -> list[float]:
    """How high the bars are; none where there is nothing to stack."""
    return [sum(one.values[number] or 0.0 for one in panel.series) for number in range(len(panel.steps))] if panel.series else []


# -- axes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to coordinates, with marks at round numbers."""

    low: float
    high: float
    start: float
    end: float
    marks: Sequence[float]
    say: Callable[[float], str]
    log: bool = False

    @classmethod
    def of_steps(cls, panel: Panel) -> "_Axis":
        first, last = panel.steps[0][0], panel.steps[-1][1]
        marks = [mark for mark in nice_marks(first, last, 6) if abs(mark - round(mark)) < 1e-9 and first <= mark <= last]
        return cls(first - 0.5, last + 0.5, _LEFT, WIDTH - _RIGHT, marks or [first], lambda step: f"{step:,.0f}")

    @classmethod
    def of_values(cls, values: Sequence[Value], panel: Panel) -> "_Axis":
        known = [value for value in values if value is not None]
        low, high = min(known), max(known)
        start, end = HEIGHT - _BOTTOM, _TOP
        if panel.logarithmic:
            marks = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
            return cls(marks[0], marks[-1], start, end, marks, short, log=True)
        if panel.stacked or panel.share or low == high or low > 0 >= low - (high - low):
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:  # all of them are 0
            high = 0.1 if panel.share else 1.0
        marks = nice_marks(low, high, 4)
        return cls(min(low, marks[0]), max(high, marks[-1]), start, end, marks, partial(short, share=panel.share))

    def at(self, value: float) -> float:
        low, high, this = (math.log10(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        part = (this - low) / (high - low) if high > low else 0.5
        return round(self.start + part * (self.end - self.start), 2)

    def ticks(self) -> list[Tick]:
        return [Tick(self.at(mark), self.say(mark)) for mark in self.marks]


def nice_marks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many; around them where the two are equal."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / about
    unit: float = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)] or [low]


def short(value: float, *, share: bool = False) -> str:
    """A number of few characters: 0.25, 12k, 3.4M; a share in per cent."""
    if share:
        return f"{100 * value:.3g}%"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (size if size > 1e3 else 1e4):
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


# -- what is drawn ----------------------------------------------------------------------------------------------


def _path(panel: Panel, series: Series, across: _Axis, up: _Axis) -> Path:
    commands, dots = list[str](), list[tuple[float, float]]()
    for stretch in _stretches(panel, series):
        points = [(across.at(sum(panel.steps[number]) / 2), up.at(value)) for number, value in stretch]
        if len(points) == 1:
            dots += points
        else:
            commands.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points))
    return Path(series.colour, series.faint, "".join(commands), dots)


def _stretches(panel: Panel, series: Series) -> Iterator[list[tuple[int, float]]]:
    """The values that follow each other without a gap."""
    stretch: list[tuple[int, float]] = []
    for number, value in enumerate(series.values):
        if value is not None and math.isfinite(value):
            stretch.append((number, value))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _bars(panel: Panel, across: _Axis, up: _Axis) -> Iterator[Bar]:
    for number, (first, last) in enumerate(panel.steps):
        left, right, below = across.at(first - 0.45), across.at(last + 0.45), 0.0
        for one in panel.series:
            if value := one.values[number]:
                y = up.at(below + value)
                yield Bar(one.colour, left, y, max(0.4, round(right - left, 2)), round(up.at(below) - y, 2))
                below += value


def _hit(panel: Panel, number: int, across: _Axis) -> Hit:
    first, last = panel.steps[number]
    said = [(one.name, one.values[number]) for one in panel.series]
    lines = [f"{name}: {short(value, share=panel.share)}" for name, value in said if value is not None and (value or not panel.stacked)]
    left = across.at(first - 0.5)
    return Hit(left, round(across.at(last + 0.5) - left, 2), [f"step {first}" if first == last else f"steps {first} to {last}", *lines])
