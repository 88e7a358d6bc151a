"""The page of `millrace status --live`. Every string from the database goes through `producer.cli.safe`."""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from producer.cli.records import Record
from producer.cli.safe import one_line
from producer.cli.units import shown_bytes, shown_seconds
from producer.cli.views import number, table

_BARS = "▁▂▃▄▅▆▇█"
_BAR_WIDTH = 12
_MOST_STALENESS = 7
"""Rows of the histogram; what is staler stands in the last."""

_FAILURES, _NAME = 5, 20
"""Rows, and characters of a task's name."""


class Pace:
    """Tokens a second of each task, from what was generated between one look and the next."""

    def __init__(self, looks: int = 40) -> None:
        self._seen: deque[tuple[float, Mapping[str, int]]] = deque(maxlen=looks + 1)

    def look(self, status: Record) -> None:
        """Remember what there is now."""
        generated = {name: task["account"]["generated"] for name, task in status["tasks"].items()}
        if not self._seen or status["at"] > self._seen[-1][0]:
            self._seen.append((status["at"], generated))

    def of(self, task_name: str) -> list[float]:
        """The tokens a second between the looks so far, the oldest first."""
        return [
            max(0, new.get(task_name, 0) - old.get(task_name, 0)) / (now - before) for (before, old), (now, new) in pairwise(self._seen)
        ]


def live_view(name: str, status: Record, pace: Pace) -> RenderableType:
    """The run now: for each task its groups, tokens and staleness, and how fast it goes; at the end what failed lately."""
    head = Text.assemble((str(one_line(name)), "bold"), f"  {status['drawn']:,} prompts drawn  step {number(status['last_step'])}")
    head.append(f"  version {'not known' if status['version'] is None else number(status['version'])}")
    head.append(f"  {shown_bytes(status['database_bytes'])}  {_producers(status)}")
    tasks = [_task(task_name, task, pace.of(task_name)) for task_name, task in status["tasks"].items()]
    nothing = [] if tasks else [Text("nothing was drawn yet", "dim")]
    return Group(head, *tasks, *nothing, *_failures(status), Text("Ctrl-C ends it", "dim"))


def _producers(status: Record) -> str:
    alive = [one for one in status["producers"] if one["alive"] is not False and one["expires_in"] > 0]
    running = sum(one["running"] for one in alive)
    who = "no producer" if not alive else "1 producer" if len(alive) == 1 else f"{len(alive)} producers"
    return f"{who}, {running:,} running"


def _task(name: str, task: Record, paces: list[float]) -> Panel:
    columns = Table.grid(padding=(0, 3))
    columns.add_row(_groups(task), _tokens(task["account"]), _staleness(task))
    title = Text.assemble((str(one_line(name, _NAME)), "bold"), f" step {number(task['last_step'])}")
    return Panel(Group(columns, _speed(task, paces)), title=title, title_align="left", box=box.ROUNDED, padding=(0, 1))


def _groups(task: Record) -> Table:
    shown = _plain("groups")
    for state, n in task["counts"].items():
        if n:
            shown.add_row(str(state), f"{n:,}")
    if task["pruned"]:
        shown.add_row("given up", f"{task['pruned']:,}")
    return shown


def _tokens(account: Record) -> Table:
    shown = _plain("tokens")
    wasted = sum(account["wasted"].values())
    for name, n in (("generated", account["generated"]), ("trained", account["trained"]), ("waiting", account["waiting"])):
        shown.add_row(name, f"{n:,}")
    share = f" ({wasted / account['generated']:.1%})" if account["generated"] else ""
    shown.add_row("wasted", f"{wasted:,}{share}", style="yellow" if wasted else "")
    for reason, n in account["wasted"].items():
        if n:
            shown.add_row(f"  {reason}", f"{n:,}", style="dim")
    shown.add_row("length bias", _percent(account["length_bias"]))
    shown.add_row("coverage bias", _percent(account["coverage_bias"]))
    shown.add_row("overdue prompts", f"{account['overdue']:,}")
    return shown


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.1%}"


def _staleness(task: Record) -> Table:
    """A bar for each staleness of what waits."""
    shown, counted = _plain("staleness", 3), dict[int, int]()
    for staleness, n in task["by_staleness"].items():
        at = min(max(0, int(staleness)), _MOST_STALENESS)
        counted[at] = counted.get(at, 0) + n
    most = max(counted.values(), default=0)
    for at in range(max(counted, default=-1) + 1):
        n = counted.get(at, 0)
        label = f"{at}+" if at == _MOST_STALENESS else str(at)
        shown.add_row(label, f"{n:,}", "█" * round(_BAR_WIDTH * n / most) or ("▏" if n else ""))
    if not counted:
        shown.add_row("", "", Text("nothing waits", "dim"))
    return shown


def _speed(task: Record, paces: list[float]) -> Text:
    now = f"{paces[-1]:,.0f}" if paces else "-"
    minute = f"{task['completed_per_minute']:,.1f} completed, {task['consumed_per_minute']:,.1f} consumed"
    return Text.assemble(("tokens/s ", "bold"), now, " ", (_spark(paces), "cyan"), ("   groups/min ", "bold"), minute)


def _spark(values: list[float]) -> str:
    most = max(values, default=0.0)
    return "".join(_BARS[round((len(_BARS) - 1) * value / most)] for value in values) if most > 0 else ""


def _failures(status: Record) -> Iterator[RenderableType]:
    if not status["failures"]:
        return
    shown = table("when", "group", "task", "status", right=("when", "group"))
    for column in shown.columns:
        column.min_width = len(str(column.header))
    shown.add_column("reason", no_wrap=True, overflow="ellipsis", ratio=1)
    shown.expand = True
    rows = [_failure(status, one) for one in status["failures"][:_FAILURES]]
    for row in rows:
        shown.add_row(*row)
        for column, cell in zip(shown.columns[:-1], row, strict=False):
            column.min_width = max(column.min_width or 0, cell.cell_len)
    yield Text("failed or filtered lately", "bold")
    yield shown


def _failure(status: Record, one: Record) -> list[Text]:
    ago = Text(f"{shown_seconds(max(0.0, status['at'] - one['at']))} ago")
    return [ago, number(one["group_id"]), one_line(one["task_name"], _NAME), Text(str(one["status"])), one_line(one["reason"] or "")]


def _plain(title: str, columns: int = 2) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False, title=title, title_justify="left", title_style="bold")
    for column in range(columns):
        made.add_column(justify="right" if column == 1 else "left", no_wrap=True)
    return made
