"""A report as one HTML page: the words and tables of it here, the markup in `report.html.jinja` (the extra `report`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from buffer import RunReport, Status
from buffer.accounts import WASTE
from buffer.report import StepReport
from producer.cli.report_panels import MOST_TASKS, panels, shown_name, shown_tasks
from producer.cli.report_svg import Chart, chart, short
from producer.cli.safe import clock, escaped

_TEMPLATE = "report.html.jinja"
_LONGEST_REASON = 500

Rows = Sequence[Sequence[str]]


class Table(NamedTuple):
    """Names of columns, and rows of cells."""

    head: Sequence[str]
    rows: Rows


@dataclass(frozen=True, slots=True)
class Page:
    """What the template shows. Every text is plain: the template makes it HTML."""

    name: str
    what: str
    tiles: Sequence[tuple[str, str]]
    charts: Sequence[Chart]
    nothing: str
    notes: Sequence[str]
    tasks: Table
    statuses: Table
    waste: Table
    failures: Rows
    steps: Table


def check_template_library() -> None:
    """Raise `ImportError`, with what to do, where jinja2 is missing."""
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ImportError("a report in HTML needs jinja2: pip install 'millrace[report]', or ask for --json") from error


def html(name: str, report: RunReport, tasks: Sequence[str]) -> str:
    """The page, in one text that needs no other file.

    Args:
        name: of the run.
        report: of it.
        tasks: those that were asked for; all where there is none.

    Raises:
        ImportError: jinja2 is missing.
    """
    check_template_library()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    text: str = environment.get_template(_TEMPLATE).render(page=page(name, report, tasks))
    return text


def page(name: str, report: RunReport, tasks: Sequence[str] = ()) -> Page:
    """What stands on the page."""
    own = [task for task in report.overview.tasks if not tasks or task in tasks]
    return Page(
        name=escaped(name),
        what=_what(report, own),
        tiles=list(_tiles(report, own)),
        charts=[chart(panel) for panel in panels(report)],
        nothing=nothing(report),
        notes=list(_notes(report)),
        tasks=_tasks(report, own),
        statuses=_statuses(report, own),
        waste=_waste(report, own),
        failures=[list(cells) for cells in _failures(report, own)],
        steps=_steps(report, several=len({step.task_name for step in report.steps}) > 1),
    )


def nothing(report: RunReport) -> str:
    """Why there is no chart."""
    last = report.overview.last_step
    return f"No batch was handed out in these steps; the run has steps up to {last:,}." if last else "No batch was handed out yet."


def _what(report: RunReport, own: Sequence[str]) -> str:
    of = f"Task {shown_name(own[0])}" if len(own) == 1 else f"{len(own)} tasks"
    steps = "no steps" if report.first is None else f"steps {report.first:,} to {report.last:,}"
    return f"{of}, {steps}. As of {clock(report.overview.at)}."


def _tiles(report: RunReport, own: Sequence[str]) -> Iterator[tuple[str, str]]:
    now = report.overview
    accounts = [now.tasks[name].account for name in own]
    trained, generated = sum(account.trained.tokens for account in accounts), sum(account.generated for account in accounts)
    wasted = sum(sum(account.wasted.values()) for account in accounts)
    yield "last step", f"{max((now.tasks[name].last_step for name in own), default=0):,}"
    yield "committed step", "none" if now.committed_step is None else f"{now.committed_step:,}"
    if report.steps:
        reward = _latest(report)
        yield "reward, last steps", "none" if reward is None else short(reward)
    yield "tokens trained on", short(trained)
    yield "tokens wasted", f"{wasted / generated:.1%}" if generated else "none"
    if len(own) == 1:
        yield "length bias", _percent(accounts[0].length_bias)
        yield "coverage bias", _percent(accounts[0].coverage_bias)
    if now.rewinds:
        yield "rewinds", f"{len(now.rewinds):,}"


def _latest(report: RunReport) -> float | None:
    """The mean reward of the last part, over tasks by their rollouts."""
    last = max(step.last or 0 for step in report.steps)
    of_last = [step for step in report.steps if step.last == last and step.reward_mean is not None]
    n = sum(step.rollouts - step.left_out for step in of_last)
    return sum((step.reward_mean or 0.0) * (step.rollouts - step.left_out) for step in of_last) / n if n else None


def _notes(report: RunReport) -> Iterator[str]:
    if report.steps:
        yield (
            "Wasted tokens are those of groups that were filtered, failed or discarded, at the step that came next, and of members that "
            "were left out. Tokens wasted in other ways have no step: the table below has all of them."
        )
        yield "Staleness is counted from the oldest trained token of a group to the policy at the step."
    if report.width > 1:
        yield f"Every point stands for {report.width:,} steps together."
    if len({step.task_name for step in report.steps}) > (shown := len(shown_tasks(report))):
        yield f"Lines are of the {shown} tasks (of at most {MOST_TASKS}) that were trained on most; choose others with --task."
    if any(task.pruned for task in report.overview.tasks.values()):
        yield "Rows of some groups were given up (prune --rows): steps of these are missing."
    for rewind in report.overview.rewinds[-3:]:
        yield f"The run was rewound to step {rewind.step:,} (version {rewind.version:,}), at {clock(rewind.at)}."


# -- tables -----------------------------------------------------------------------------------------------------


def _tasks(report: RunReport, own: Sequence[str]) -> Table:
    head = ("task", "prompts drawn", "last step", "generated", "trained", "waiting", "wasted", "length bias", "coverage bias", "overdue")
    rows = []
    for name in own:
        task, account = report.overview.tasks[name], report.overview.tasks[name].account
        counted = (task.drawn, task.last_step, account.generated, account.trained.tokens, account.waiting.tokens)
        biases = (_percent(account.length_bias), _percent(account.coverage_bias))
        rows.append([shown_name(name), *(f"{n:,}" for n in counted), f"{sum(account.wasted.values()):,}", *biases, f"{account.overdue:,}"])
    return Table(head, rows)


def _statuses(report: RunReport, own: Sequence[str]) -> Table:
    present = [status for status in Status if any(report.overview.tasks[name].counts[status] for name in own)]
    given_up = any(report.overview.tasks[name].pruned for name in own)
    rows = []
    for name in own:
        task = report.overview.tasks[name]
        rows.append([shown_name(name), *(f"{task.counts[status]:,}" for status in present), *([f"{task.pruned:,}"] if given_up else [])])
    return Table(["task", *map(str, present), *(["given up"] if given_up else [])], rows if present or given_up else [])


def _waste(report: RunReport, own: Sequence[str]) -> Table:
    accounts = {name: report.overview.tasks[name].account.wasted for name in own}
    reasons = [reason for reason in WASTE if any(wasted[reason] for wasted in accounts.values())]
    return Table(
        ["task", *reasons], [[shown_name(name), *(f"{wasted[reason]:,}" for reason in reasons)] for name, wasted in accounts.items()]
    )


def _failures(report: RunReport, own: Sequence[str]) -> Iterator[Sequence[str]]:
    for one in report.overview.failures:
        if one.task_name in own:
            reason = escaped(str(one.reason or "")[:_LONGEST_REASON])
            yield clock(one.at), str(one.group_id), shown_name(one.task_name), str(one.status), reason


def _steps(report: RunReport, *, several: bool) -> Table:
    head = (
        *("version", "groups", "rollouts", "left out", "tokens", "reward", "least", "most", "score", "length", "longest", "cut"),
        *("all equal", "staleness", "stalest", "seconds", "wasted"),
    )
    rows = [[_span(step), *([shown_name(step.task_name)] if several else []), *_cells(step)] for step in report.steps]
    return Table(["step", *(["task"] if several else []), *head], rows)


def _span(step: StepReport) -> str:
    return f"{step.first}" if step.first == step.last else f"{step.first} to {step.last}"


def _cells(step: StepReport) -> Iterator[str]:
    for n in (step.version, step.groups, step.rollouts, step.left_out, step.tokens):
        yield "" if n is None else f"{n:,}"
    for value in (step.reward_mean, step.reward_min, step.reward_max, step.score_mean, step.length_mean):
        yield _number(value)
    yield "" if step.length_max is None else f"{step.length_max:,}"
    yield from (_percent(step.truncated), _percent(step.zero_variance), _number(step.staleness_mean))
    yield "" if step.staleness_max is None else f"{step.staleness_max:,}"
    yield _number(step.seconds)
    yield f"{sum(step.wasted.values()):,}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
