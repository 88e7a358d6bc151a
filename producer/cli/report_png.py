"""A report as one picture; needs matplotlib (the extra `report`), which nothing else here imports."""

import math
import warnings
from typing import Any, BinaryIO

from buffer import RunReport
from producer.cli.report_page import nothing
from producer.cli.report_panels import Panel, panels
from producer.cli.report_svg import short
from producer.cli.safe import clock, escaped

_COLUMNS, _DPI = 2, 110
_LETTERS = 110
"""Of the names that stand beside each other below a chart."""
_FEW = 30
"""Points of a line that are marked."""

_COLOURS = ("#0067a5", "#c94f00", "#007f5f", "#a8397f", "#8a6800", "#6a4fb3", "#8c4a3f", "#555b61")


def check_plotting() -> None:
    """Raise `ImportError`, with what to do, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a report as a picture needs matplotlib: pip install 'millrace[report]', or ask for .html") from error


def draw(name: str, report: RunReport, file: BinaryIO) -> None:
    """Write the picture as PNG; names are drawn as they are, whatever they mean elsewhere.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_plotting()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = panels(report)
    rows = max(1, -(-len(found) // _COLUMNS))
    lines = max((-(-len(panel.series) // _across(panel)) for panel in found if panel.series), default=1)
    figure = Figure(figsize=(11, (2.45 + 0.15 * lines) * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    steps = nothing(report) if report.first is None else f"steps {report.first:,} to {report.last:,}"
    title = figure.suptitle(f"{escaped(name)}: {steps}, as of {clock(report.overview.at)}", fontsize=12, x=0.01, ha="left")
    title.set_parse_math(False)
    if found:
        for axes, panel in zip(figure.subplots(rows, _COLUMNS).flat, found, strict=True):
            _draw(axes, panel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in letters that its fonts do not have is drawn as boxes
        figure.savefig(file, format="png", dpi=_DPI)


def _draw(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7ea")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.set_xlim(panel.steps[0][0] - 0.5, panel.steps[-1][1] + 0.5)
    axes.locator_params(axis="x", integer=True, nbins=6)
    if panel.logarithmic:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: short(value, share=panel.share))
    (_bars if panel.stacked else _lines)(axes, panel)
    if panel.stacked or panel.share:
        axes.set_ylim(bottom=0)
    if not axes.has_data():
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes, color="#888")
    if panel.stacked or len(panel.series) > 1:
        _legend(axes, panel)


def _lines(axes: Any, panel: Panel) -> None:
    across = [sum(steps) / 2 for steps in panel.steps]
    for series in panel.series:
        values = [math.nan if value is None else value for value in series.values]
        if all(math.isnan(value) for value in values):
            continue
        look = {"color": _COLOURS[series.colour], "alpha": 0.45 if series.faint else 1.0}
        axes.plot(
            across, values, marker="o" if len(values) < _FEW else None, markersize=3, linewidth=1.4, label=_label(series.name), **look
        )


def _bars(axes: Any, panel: Panel) -> None:
    left, wide = [first - 0.45 for first, _ in panel.steps], [last - first + 0.9 for first, last in panel.steps]
    below = [0.0] * len(left)
    for series in panel.series:
        values = [value or 0.0 for value in series.values]
        axes.bar(left, values, wide, below, align="edge", label=_label(series.name), color=_COLOURS[series.colour])
        below = [low + value for low, value in zip(below, values, strict=True)]


def _label(name: str) -> str:
    """To matplotlib, a name that begins with "_" is none."""
    return f" {name}" if name.startswith("_") else name


def _across(panel: Panel) -> int:
    """How many names stand beside each other below a chart."""
    return max(1, _LETTERS // (max(len(series.name) for series in panel.series) + 8))


def _legend(axes: Any, panel: Panel) -> None:
    if not axes.get_legend_handles_labels()[1]:
        return
    # Below, as on the page: within the axes it would lie over some line.
    legend = axes.legend(
        fontsize=7, frameon=False, ncols=_across(panel), loc="upper left", bbox_to_anchor=(0, -0.1), borderaxespad=0, handlelength=1.5
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
