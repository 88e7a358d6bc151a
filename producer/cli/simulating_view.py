"""The table of `millrace simulate`."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from producer.cli.safe import one_line
from producer.simulate.sweep import Compared

_NUMBERS = ("faster", "used", "bound", "stale", "waste", "length", "prompts")


def simulation_view(rows: Sequence[Compared]) -> RenderableType:
    """A row for each run, and below them what the columns are."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    shown.add_column("strategy", overflow="fold")
    for name in _NUMBERS:
        shown.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for row in rows:
        outcome = row.outcome
        shown.add_row(
            one_line(row.choice, 200),
            f"{row.speed_up:.2f}",
            f"{outcome.utilisation:.2f}",
            f"{outcome.share_of_bound:.2f}",
            f"{outcome.mean_staleness:.2f} ≤ {outcome.largest_staleness}",
            f"{outcome.wasted:.1%}",
            _bias(outcome.length_bias, "+.1%"),
            _bias(outcome.coverage_bias, ".1%"),
        )
    return Group(shown, Text(_LEGEND, "dim"))


_LEGEND = (
    "faster: than sync; used: of the slots; bound: of an engine that is always full;\n"
    "stale: the mean, and the largest; length: trained on, by all; prompts: overdue"
)


def _bias(value: float | None, shape: str) -> str:
    return "" if value is None else format(value, shape)
