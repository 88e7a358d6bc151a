"""Tables and pages for a terminal. Every string from the database goes through `producer.cli.safe`."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from buffer import AuditReport, RolloutGroup, RolloutState, Status, Transition
from buffer.rows import drawn_fields, drawn_messages
from producer.cli.records import Record, version_span
from producer.cli.safe import clock, lines_of, one_line

MOST_LINES, MOST_CHARACTERS, MOST_TOKENS = 20, 2000, 40
"""Of one text, or of one list of token ids, that `show` prints."""

_TASK_WIDTH = 24
"""Characters of a task's name in the narrow table."""


def audit_view(report: AuditReport) -> RenderableType:
    """Prompts drawn and groups counted by task, and what is wrong."""
    shown = table("task", "drawn", "counted", "given up", right=("drawn", "counted", "given up"))
    for name, drawn in report.drawn.items():
        counted = sum(report.counts.get(name, {}).values())
        shown.add_row(one_line(name, _TASK_WIDTH), number(drawn), number(counted), number(report.pruned.get(name, 0)))
    problems = [Text.assemble(("wrong: ", "bold red"), one_line(problem, 500)) for problem in report.problems]
    return Group(shown, *(problems or [Text("every prompt is accounted for", "green")]))


def query_view(groups: Sequence[Record], limit: int, width: int) -> RenderableType:
    """A row for each group, as wide as `width`: the note gets what the others leave."""
    if not groups:
        return Text("no such groups", "dim")
    names = ("group", "task", "status", "step", "place", "tokens", "versions", "score")
    rows = [_query_row(group, width) for group in groups]
    used = 2 + sum(1 + max(len(name), *(row[column].cell_len for row in rows)) for column, name in enumerate(names))
    shown = table(*names, "note", right=("group", "step", "tokens", "score"))
    shown.padding = 0
    for group, row in zip(groups, rows, strict=True):
        note = one_line(_note(group))
        note.truncate(max(8, width - used), overflow="ellipsis")
        shown.add_row(*row, note)
    found = "1 group" if len(groups) == 1 else f"{len(groups):,} groups"
    return Group(shown, Text(found + ("; perhaps more: see --limit and --offset" if len(groups) == limit else ""), "dim"))


def _query_row(group: Record, width: int) -> list[Text]:
    place, score, step = group["position"], group["score_mean"], group["consumed_step"]
    task = one_line(group["task_name"])
    task.truncate(max(12, width // 5), overflow="ellipsis")
    cells = (
        group["status"],
        "" if step is None else step,
        "" if place is None else f"{place['epoch']}:{place['offset']}",
        f"{group['tokens']:,}",
        _span(group["versions"]),
        "" if score is None else f"{score:.3g}",
    )
    return [one_line(group["group_id"]), task, *map(one_line, cells)]


def _note(group: Record) -> str:
    """Why it was filtered, or what went wrong first."""
    return next((str(text) for text in (group["filter_reason"], *group["errors"]) if text), "")


def number(value: object) -> Text:
    """A number to read. A file that somebody edited may have text in a column of numbers: SQLite lets them."""
    if isinstance(value, float):
        return Text(f"{value:g}")
    return Text(f"{value:,}") if isinstance(value, int) else one_line(value)


def _span(versions: Sequence[int] | None) -> str:
    if versions is None:
        return ""
    return str(versions[0]) if versions[0] == versions[1] else f"{versions[0]}-{versions[1]}"


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table without a frame, as wide as what stands in it."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    return made


def history_view(group_id: int, changes: Sequence[Transition], width: int) -> RenderableType:
    """A row for each change; the reason gets what the others leave, and is wrapped."""
    owners = list(dict.fromkeys(change.owner for change in changes))
    shown = table("when", "became", "step", "version", *(["by"] if len(owners) > 1 else []), right=("step", "version"))
    shown.add_column("reason", overflow="fold")
    for change in changes:
        step, version = ("" if value is None else number(value) for value in (change.step, change.version))
        by = [_process(change.owner)] if len(owners) > 1 else []
        shown.add_row(clock(change.at), str(change.target), step, version, *by, one_line(change.reason or ""))
    head = Text(f"group {group_id}: {_changes(len(changes))}", "bold")
    return Group(head, shown, Text.assemble("all by ", _process(owners[0]), style="dim") if len(owners) == 1 else "")


def _process(owner: str) -> Text:
    """Host and process, without the part that makes the name unique."""
    return one_line(str(owner).rpartition("/")[0] or owner, 24)


# -- one group ------------------------------------------------------------------------------------------------


def print_group(console: Console, group: RolloutGroup, history: Sequence[Transition]) -> None:
    """A group: what it is, its prompt, and each rollout."""
    console.print(Text.assemble((f"group {group.group_id}", "bold"), " of task ", one_line(group.task_name), f": {group.status}"))
    first = group.rollouts[0]
    where = None if group.position is None else f"epoch {group.position.epoch}, offset {group.position.offset}"
    _field(console, "position", where)
    _field(console, "consumed", None if group.consumed_step is None else f"at step {group.consumed_step}")
    _field(console, "filtered", group.filter_reason)
    _field(console, "drawn", clock(history[0].at) if history else None)
    _field(console, "history", _summary(history))
    _field(console, "sampling", first.sampling or None)
    _field(
        console,
        "row",
        {key: value for key, value in first.row.items() if key not in ("prompt", "messages", "prompt_ids", "media", "images")} or None,
    )
    for name, text in _prompt(first):
        _field(console, name, None, text)
    for rollout in group.rollouts:
        _print_rollout(console, rollout)


def _summary(history: Sequence[Transition]) -> str | None:
    if not history:
        return None
    ran, rewound = (sum(test(change) for change in history) for test in (_is_start, _is_rewind))
    told = [_changes(len(history)), _did("ran", ran), *([_did("rewound", rewound)] if rewound else [])]
    return f"{', '.join(told)}, {history[-1].target} since {clock(history[-1].at)}"


def _did(what: str, n: int) -> str:
    """That something was done so often."""
    return f"never {what}" if n == 0 else f"{what} {({1: 'once', 2: 'twice'}).get(n, f'{n} times')}"


def _changes(n: int) -> str:
    return "1 change" if n == 1 else f"{n:,} changes"


def _is_start(change: Transition) -> bool:
    return change.target is Status.RUNNING


def _is_rewind(change: Transition) -> bool:
    return (change.source, change.target) == (Status.CONSUMED, Status.COMPLETED)


def _prompt(rollout: RolloutState) -> Iterator[tuple[str, str]]:
    if rollout.prompt is not None:
        yield "prompt", rollout.prompt
    for message in drawn_messages(rollout.row, rollout.messages) or []:  # its text holds the turns that its loop added
        content = message.get("content")
        yield f"prompt, {message.get('role')}", content if isinstance(content, str) else str(content)
    if media := drawn_fields(rollout.row).get("media") or rollout.media:
        yield "images", "\n".join(f"{image!s:.100}" for image in media)
    if rollout.prompt is None and not rollout.messages and rollout.prompt_ids is not None:
        yield f"prompt, {rollout.prompt_ids.size} tokens", _ids(rollout.prompt_ids)


def _print_rollout(console: Console, rollout: RolloutState) -> None:
    finish = "not finished" if rollout.finish_reason is None else f"finished by {rollout.finish_reason}"
    console.print()
    console.print(Text.assemble((f"rollout {rollout.index}", "bold"), f": {rollout.status}, ", one_line(finish)))
    span = version_span([rollout])
    versions = "" if span is None else f", version {span[0]}" if span[0] == span[1] else f", versions {_span(span)}"
    _field(console, "tokens", f"{rollout.response_ids.size:,} ({int(rollout.loss_mask.sum()):,} trainable){versions}{_timeline(rollout)}")
    _field(console, "attempts", f"{rollout.attempts} failed, {_did('interrupted', rollout.interruptions)}")
    judged = [f"{name} {number(value)}" for name, value in (("score", rollout.score), ("reward", rollout.reward)) if value is not None]
    judged += [f"{name} {value}" for name, value in {**rollout.reward_parts, **rollout.metrics}.items()]
    _field(console, "judged", ", ".join(judged) or None)
    _field(console, "error", None, rollout.error)
    if rollout.text is not None:
        _field(console, "text", None, rollout.text)
    elif rollout.response_ids.size:
        _field(console, "ids", None, _ids(rollout.response_ids))


def _timeline(rollout: RolloutState) -> str:
    """Said only of tokens sampled after a rewind."""
    newest = int(rollout.timelines.max(initial=0))
    return f", timeline {newest}" if newest else ""


def _ids(ids: Any) -> str:
    more = "" if ids.size <= MOST_TOKENS else f" and {ids.size - MOST_TOKENS:,} more"
    return " ".join(map(str, ids[:MOST_TOKENS].tolist())) + more


def _field(console: Console, name: str, value: object | None, text: object | None = None) -> None:
    """A line for a `value`, or a name above a `text` behind a bar that no line of it gets past."""
    if value is not None:
        _print_behind(console, Text.assemble("  ", (f"{name:<9}", "dim")), Text(" " * 11), one_line(value, 500))
    if text is None:
        return
    console.print(Text.assemble("  ", one_line(name)), style="dim")
    lines, left_out = lines_of(str(text), MOST_LINES, MOST_CHARACTERS)
    bar = Text("  │ ", "dim")
    for line in lines:
        _print_behind(console, bar, bar, line)
    if left_out:
        console.print(Text(f"  └ and {left_out:,} characters more; --json shows all", "dim"))


def _print_behind(console: Console, first: Text, later: Text, line: Text) -> None:
    """Wrap `line` and print every part behind a margin, so that nothing in it can pass for a line of ours."""
    for number, part in enumerate(line.wrap(console, max(20, console.width - len(first))) or [Text()]):
        console.print(Text.assemble(later if number else first, part), soft_wrap=True)
