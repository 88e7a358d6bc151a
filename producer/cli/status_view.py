"""The page of `millrace status`. Every string from the database goes through `producer.cli.safe`."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from producer.cli.records import Record
from producer.cli.safe import clock, one_line
from producer.cli.units import shown_bytes, shown_groups, shown_seconds
from producer.cli.views import number, table

_HOST_WIDTH = 24
_NARROWEST, _OTHER_COLUMNS = 12, 56
"""Characters of a task's name at least, and of what stands beside it."""


def status_view(name: str, status: Record, width: int) -> RenderableType:
    """How the run stands, its groups by task and status, what waits and what runs; names are cut to fit into `width`."""
    room = max(_NARROWEST, width - _OTHER_COLUMNS)
    head = Text.assemble(one_line(name), f": {status['drawn']:,} prompts drawn, last step {number(status['last_step'])}")
    lines = [Text.assemble("  ", (f"{name:<10}", "dim"), text) for name, text in _lines(status)]
    if not status["tasks"]:
        return Group(head, *lines, Text("nothing was drawn yet", "dim"))
    return Group(head, *lines, _counts(status, room), _waiting(status, room), _rates_note(status))


def _lines(status: Record) -> Iterator[tuple[str, Text | str]]:
    committed = status["committed_step"]
    yield "committed", "nothing yet" if committed is None else f"up to step {committed:,}"
    yield "version", ("not known" if status["version"] is None else f"{status['version']:,}") + _rewound(status)
    if status["last_change"] is not None:
        yield "changed", f"{_ago(status, status['last_change'])}, at {clock(status['last_change'])}"
    free = status["free_bytes"]
    yield "database", shown_bytes(status["database_bytes"]) + (f", of which {shown_bytes(free)} are free" if free else "")
    yield "payloads", f"{shown_bytes(status['payload_bytes'])} in {shown_groups(status['payload_groups'], 'committed ')}"
    yield from _producers(status)
    if status["prefix_groups"]:
        yield "prefixes", f"{shown_bytes(status['prefix_bytes'])} of {shown_groups(status['prefix_groups'])} under way"


def _rewound(status: Record) -> str:
    if not (rewinds := status["rewinds"]):
        return ""
    last = rewinds[-1]
    return f", on timeline {status['timeline']}: rewound to step {last['step']:,} {_ago(status, last['at'])}"


def _ago(status: Record, at: float) -> str:
    return f"{shown_seconds(max(0.0, status['at'] - at))} ago"


def _counts(status: Record, room: int) -> Table:
    shown, last = table("task", "last step", "status", "groups", right=("last step", "groups")), list(status["tasks"])[-1]
    for task_name, task in status["tasks"].items():
        rows = [(str(state), f"{n:,}") for state, n in task["counts"].items() if n]
        rows += [("given up", f"{task['pruned']:,}")] if task["pruned"] else []
        for place, (state, n) in enumerate(rows):
            first = (one_line(task_name, room), number(task["last_step"])) if place == 0 else ("", "")
            shown.add_row(*first, state, n)
        shown.add_row("", "", "all drawn", f"{task['drawn']:,}", style="bold", end_section=task_name != last)
    return shown


def _waiting(status: Record, room: int) -> Padding:
    """Without the empty lines around it, so that a page of one task fits into 24 lines."""
    columns = ("waiting", "staleness", "completed/min", "consumed/min")
    shown = table("task", *columns, right=columns)
    for task_name, task in status["tasks"].items():
        stale, rates = task["staleness"], (task["completed_per_minute"], task["consumed_per_minute"])
        waits = ("0", "") if stale is None else (f"{stale['groups']:,}", f"{stale['least']:,} / {stale['median']:,} / {stale['most']:,}")
        shown.add_row(one_line(task_name, room), *waits, *(f"{rate:,.1f}" for rate in rates))
    shown.show_edge = False
    return Padding(shown, (0, 0, 0, 1))


def _rates_note(status: Record) -> Text:
    return Text(f"staleness of what waits: least / median / most; rates over the last {shown_seconds(status['rate_seconds'])}", "dim")


def _producers(status: Record) -> Iterator[tuple[str, Text | str]]:
    for one in status["producers"]:
        name = Text.assemble(one_line(one["host"], _HOST_WIDTH), f"/{one['pid']}")
        yield "producer", name.append(f", begun {_ago(status, one['started_at'])}, {_doing(one)}")
    if status["abandoned"]:
        yield "", f"{shown_groups(status['abandoned'], 'running ')} of processes that are gone; who opens it to write interrupts them"


def _doing(one: Record) -> str:
    groups, left = shown_groups(one["running"]), one["expires_in"]
    if one["alive"] is False:
        return f"has ended, and left {groups} running" if one["running"] else "has ended"
    return f"runs {groups}, " + (f"lease for {shown_seconds(left)}" if left > 0 else "its lease ran out")
