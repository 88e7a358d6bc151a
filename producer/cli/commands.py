"""The commands of `millrace`. They only read, so they work while another process writes."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from buffer import ReplayBuffer
from buffer.errors import ReplayBufferError
from producer.cli import records

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

app = typer.Typer(
    help="Look into a run's replay buffer. Nothing here writes, and a run may go on meanwhile.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)

Url = Annotated[str, typer.Argument(metavar="URL", help="The database: a path like run.db, or sqlite:///run.db.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def status(
    url: Url,
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", min=0.1, help="Show it again and again, until Ctrl-C.")] = None,
    as_json: AsJson = False,
) -> None:
    """Groups by task and status, prompts drawn, the last step."""

    async def show(buffer: ReplayBuffer) -> None:
        if watch is not None:
            await _watch(buffer, url, watch, as_json)
        else:
            _print_status(url, await records.status_of(buffer), as_json)

    _look(url, show)


def _print_status(url: str, found: records.Record, as_json: bool, indent: int | None = 2) -> None:
    from producer.cli.views import status_view

    if as_json:
        _print_json(found, indent)
    else:
        _console().print(status_view(_name(url), found))


async def _watch(buffer: ReplayBuffer, url: str, seconds: float, as_json: bool) -> NoReturn:
    """Until a signal ends it. What is no terminal gets one status after the other, as JSON one on a line."""
    from rich.live import Live

    from producer.cli.views import status_view

    console = _console()
    redraws = console.is_terminal and not as_json
    with Live(console=console, auto_refresh=False) if redraws else nullcontext() as live:
        while True:
            found = await records.status_of(buffer)
            if isinstance(live, Live):
                live.update(status_view(_name(url), found), refresh=True)
            else:
                _print_status(url, found, as_json, indent=None)
            await asyncio.sleep(seconds)


@app.command()
def show(
    url: Url,
    group_id: Annotated[int, typer.Argument(metavar="GROUP_ID", min=0, max=2**63 - 1, help="As `query` and `show` print it.")],
    as_json: AsJson = False,
) -> None:
    """One group: its prompt, and what became of each rollout."""
    from producer.cli.views import print_group

    group = _look(url, lambda buffer: buffer.get(group_id))
    if as_json:
        _print_json(records.group_in_full(group))
    else:
        print_group(_console(), group)


@app.command()
def query(
    url: Url,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="Groups of this task only.")] = None,
    status: Annotated[list[str] | None, typer.Option(metavar="STATUS", help="Groups of this status only; may be repeated.")] = None,
    step: Annotated[int | None, typer.Option(metavar="N", min=0, max=2**31, help="Groups consumed at this step only.")] = None,
    error: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Groups with this text in an error of theirs; '' for any error.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=2**31, help="The most groups.")] = 20,
    offset: Annotated[int, typer.Option(metavar="N", min=0, max=2**31, help="Leave out so many first.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A table of groups, oldest first."""
    from producer.cli.views import query_view

    async def ask(buffer: ReplayBuffer) -> list[records.Record]:
        known = await buffer.task_names()
        if task is not None and task not in known:
            raise ValueError(f"there is no task {task!r} in this run; its tasks are {known}")
        groups = await buffer.query(task_name=task, status=status or (), step=step, error=error, limit=limit, offset=offset)
        return [records.group_in_short(group) for group in groups]

    found = _look(url, ask)
    if as_json:
        _print_json(found)
    else:
        console = _console()
        console.print(query_view(found, limit, console.width))


@app.command()
def audit(url: Url, as_json: AsJson = False) -> None:
    """Check that each drawn prompt is in exactly one group, and that counters and rows agree; exit status 1 if not."""
    from producer.cli.views import audit_view

    report = _look(url, lambda buffer: buffer.audit())
    if as_json:
        _print_json(records.audit_of(report))
    else:
        _console().print(audit_view(report))
    raise typer.Exit(0 if report.ok else 1)


# -- around all of them ---------------------------------------------------------------------------------------


def _look(url: str, question: Callable[[ReplayBuffer], Awaitable[T]]) -> T:
    """The answer of the database at `url`; what keeps it from answering is one line on stderr and exit status 2."""

    ended_by: list[signal.Signals] = []

    async def ask() -> T:
        _end_once(ended_by)
        async with _open(url) as buffer:
            return await question(buffer)

    try:
        return asyncio.run(ask())
    except asyncio.CancelledError:
        raise typer.Exit(128 + ended_by[0]) from None
    except BrokenPipeError:
        raise
    except (ReplayBufferError, ValueError, OSError, RecursionError) as error:
        _refuse(error)


def _end_once(ended_by: list[signal.Signals]) -> None:
    """Let the first SIGINT or SIGTERM cancel the running task, and write down which; those that follow change nothing."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def end(by: signal.Signals) -> None:
        ended_by.append(by)
        for either in (signal.SIGINT, signal.SIGTERM):
            # Ignored by the system, not by the loop: a closing loop would give them back their way of breaking in.
            loop.remove_signal_handler(either)
            signal.signal(either, signal.SIG_IGN)
        task.cancel()

    for either in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(either, end, either)


def _open(url: str) -> ReplayBuffer:
    """The buffer, to look at only; a plain path is one of a file, and a file that is not there is not made."""
    full = url if "://" in url else f"sqlite:///{Path(url).absolute()}"
    buffer = ReplayBuffer.open(full, read_only=True)
    path = Path(full.partition(":///")[2])
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path or URL of a run's database")
    return buffer


def _name(url: str) -> str:
    return Path(url.partition(":///")[2] or url).name


def _refuse(error: Exception) -> NoReturn:
    from producer.cli.safe import escaped

    print(f"millrace: {escaped(str(error))[:1000]}", file=sys.stderr)
    raise typer.Exit(2) from None


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _print_json(value: object, indent: int | None = 2) -> None:
    from producer.cli.safe import to_json

    print(to_json(value, indent=indent), flush=True)
