"""The commands of `millrace` that only read, so they work while another process writes."""

import asyncio
from contextlib import aclosing, nullcontext
from typing import Annotated, Literal, NoReturn

import typer

from buffer import ReplayBuffer, RolloutGroup, Status, Transition
from producer.cli import records
from producer.cli.asking import AsJson, Url, console, look, name_of, print_json, refuse
from producer.cli.units import parse_seconds

app = typer.Typer(
    help="Look into a run's replay buffer, and keep it in order. A run may go on while you look.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

GroupId = Annotated[int, typer.Argument(metavar="GROUP_ID", min=0, max=2**63 - 1, help="As `query` prints it.")]
Task = Annotated[str | None, typer.Option(metavar="TASK", help="Groups of this task only.")]
Statuses = Annotated[list[Status] | None, typer.Option(metavar="STATUS", help="Groups of this status only; may be repeated.")]
Order = Literal["oldest", "newest", "changed", "stalest", "best", "worst"]

_MOST = 2**31

_LEAST_BETWEEN = 0.25
"""Seconds between two pages of `--live`, however much is committed."""


@app.command()
def status(
    url: Url,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Fill the screen with it: tokens, waste, biases, failures too.")] = False,
    every: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="Between two pages, or with --live at most; 2 if not given.")
    ] = 2.0,
    as_json: AsJson = False,
) -> None:
    """How the run stands: groups, steps, staleness, rates, leases."""
    if live and (as_json or not console().is_terminal):
        raise typer.BadParameter("it fills a terminal's screen; use --watch for what is none", param_hint="--live")

    async def show(buffer: ReplayBuffer) -> None:
        if live:
            await _live(buffer, url, every)
        elif watch:
            await _watch(buffer, url, every, as_json)
        else:
            _print_status(url, await records.status_of(buffer), as_json)

    look(url, show)


def _print_status(url: str, found: records.Record, as_json: bool, indent: int | None = 2) -> None:
    from producer.cli.status_view import status_view

    if as_json:
        print_json(found, indent)
    else:
        screen = console()
        screen.print(status_view(name_of(url), found, screen.width))


async def _watch(buffer: ReplayBuffer, url: str, seconds: float, as_json: bool) -> NoReturn:
    """Until a signal ends it. What is no terminal gets one status after the other, as JSON one on a line."""
    from rich.live import Live

    from producer.cli.status_view import status_view

    screen = console()
    redraws = screen.is_terminal and not as_json
    with Live(console=screen, auto_refresh=False) if redraws else nullcontext() as live:
        while True:
            found = await records.status_of(buffer)
            if isinstance(live, Live):
                live.update(status_view(name_of(url), found, screen.width), refresh=True)
            else:
                _print_status(url, found, as_json, indent=None)
            await asyncio.sleep(seconds)


async def _live(buffer: ReplayBuffer, url: str, seconds: float) -> None:
    """Until a signal ends it; the terminal then shows again what it did before. What is committed is shown at once."""
    from rich.live import Live

    from producer.cli.live_view import Pace, live_view

    pace = Pace()
    with Live(console=console(), screen=True, auto_refresh=False) as live:
        async with aclosing(buffer.changes(seconds)) as changes:
            async for _ in changes:
                found = await records.status_of(buffer)
                pace.look(found)
                live.update(live_view(name_of(url), found, pace), refresh=True)
                await asyncio.sleep(_LEAST_BETWEEN)


@app.command()
def metrics(url: Url, as_json: AsJson = False) -> None:
    """How the run stands, as text for Prometheus."""
    from producer.cli.prometheus import exposition, records_of

    found = look(url, records.status_of)
    if as_json:
        print_json(records_of(found))
        return
    try:
        print(exposition(found), end="")
    except ImportError as error:
        refuse(error)


@app.command()
def show(url: Url, group_id: GroupId, as_json: AsJson = False) -> None:
    """One group: its prompt, and what became of each rollout."""
    from producer.cli.views import print_group

    async def ask(buffer: ReplayBuffer) -> tuple[RolloutGroup, list[Transition]]:
        return await buffer.get(group_id), await buffer.history(group_id)

    group, history = look(url, ask)
    if as_json:
        print_json(records.group_in_full(group, history))
    else:
        print_group(console(), group, history)


@app.command()
def query(
    url: Url,
    task: Task = None,
    status: Statuses = None,
    step: Annotated[int | None, typer.Option(metavar="N", min=1, max=_MOST, help="Groups consumed at this step only.")] = None,
    min_version: Annotated[int | None, typer.Option(metavar="N", min=0, max=_MOST, help="None of their trained tokens is older.")] = None,
    max_version: Annotated[int | None, typer.Option(metavar="N", min=0, max=_MOST, help="None of their trained tokens is newer.")] = None,
    min_reward: Annotated[float | None, typer.Option(metavar="X", help="Their mean reward is at least this.")] = None,
    max_reward: Annotated[float | None, typer.Option(metavar="X", help="Their mean reward is at most this.")] = None,
    error: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Groups with this text in an error of theirs; '' for any error.")
    ] = None,
    min_attempts: Annotated[int | None, typer.Option(metavar="N", min=0, max=_MOST, help="A member failed at least so often.")] = None,
    min_age: Annotated[
        float | None, typer.Option(metavar="AGE", parser=parse_seconds, help="Drawn so long ago or longer: 90s, 10m, 2h, 1d.")
    ] = None,
    max_age: Annotated[float | None, typer.Option(metavar="AGE", parser=parse_seconds, help="Drawn so long ago or later.")] = None,
    order: Annotated[Order, typer.Option(metavar="ORDER", help="oldest, newest, changed, stalest, best or worst first.")] = "oldest",
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=_MOST, help="The most groups.")] = 20,
    offset: Annotated[int, typer.Option(metavar="N", min=0, max=_MOST, help="Leave out so many first.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find groups. All that is asked holds of each that is found."""
    from producer.cli.views import query_view

    async def ask(buffer: ReplayBuffer) -> list[records.Record]:
        await require_task(buffer, task)
        groups = await buffer.query(
            task_name=task,
            status=status or (),
            step=step,
            min_version=min_version,
            max_version=max_version,
            min_reward=min_reward,
            max_reward=max_reward,
            error=error,
            min_attempts=min_attempts,
            min_age=min_age,
            max_age=max_age,
            order=order,
            limit=limit,
            offset=offset,
        )
        return [records.group_in_short(group) for group in groups]

    found = look(url, ask)
    if as_json:
        print_json(found)
    else:
        screen = console()
        screen.print(query_view(found, limit, screen.width))


async def require_task(buffer: ReplayBuffer, task: str | None) -> None:
    """Refuse a task that the run does not have: nothing found would be taken for an answer."""
    known = await buffer.task_names()
    if task is not None and task not in known:
        raise ValueError(f"there is no task {task!r} in this run; its tasks are {known}")


@app.command()
def history(url: Url, group_id: GroupId, as_json: AsJson = False) -> None:
    """Every change of a group's status, and why."""
    from producer.cli.views import history_view

    changes = look(url, lambda buffer: buffer.history(group_id))
    if as_json:
        print_json(records.history_of(changes))
    else:
        screen = console()
        screen.print(history_view(group_id, changes, screen.width))


@app.command()
def audit(
    url: Url,
    payloads: Annotated[bool, typer.Option("--payloads", help="Decode every payload too; this takes its time.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that every drawn prompt is in exactly one group. Counters, rows and tokens must agree; exit status 1 if not."""
    from producer.cli.views import audit_view

    report = look(url, lambda buffer: buffer.audit(payloads=payloads))
    if as_json:
        print_json(records.audit_of(report))
    else:
        console().print(audit_view(report))
    raise typer.Exit(0 if report.ok else 1)
