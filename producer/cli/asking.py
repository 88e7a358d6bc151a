"""Around every command: opening the database, ending by a signal, saying in one line why there is no answer."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar
from urllib.parse import urlsplit

import typer

from buffer import ReplayBuffer
from buffer.errors import ReplayBufferError

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

Url = Annotated[str, typer.Argument(metavar="URL", help="The database: a path like run.db, or a URL like sqlite:///run.db.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def look(url: str, question: Callable[[ReplayBuffer], Awaitable[T]], *, passing: type[Exception] | None = None) -> T:
    """The answer of the database at `url`, which is only read; an error of the kind `passing` is the caller's."""
    return _ask(lambda: _existing(url, read_only=True), question, passing)


def work(url: str, task: Callable[[ReplayBuffer], Awaitable[T]], *, may_create: bool = False) -> T:
    """What comes of a task that writes to the database at `url`; refused while another process writes to a SQLite file."""
    return _ask(lambda: ReplayBuffer.open(full_url(url)) if may_create else _existing(url, read_only=False), task)


def _ask(opened: Callable[[], ReplayBuffer], question: Callable[[ReplayBuffer], Awaitable[T]], passing: type[Exception] | None = None) -> T:
    """The answer; what keeps it from being given is one line on stderr and exit status 1."""
    ended_by: list[signal.Signals] = []

    async def ask() -> T:
        _end_once(ended_by)
        async with opened() as buffer:
            return await question(buffer)

    try:
        return asyncio.run(ask())
    except asyncio.CancelledError:
        raise typer.Exit(128 + ended_by[0]) from None
    except BrokenPipeError:
        raise
    except (ReplayBufferError, ValueError, OSError, RecursionError, ImportError) as error:
        if passing is not None and isinstance(error, passing):
            raise
        refuse(error)


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


def full_url(url: str) -> str:
    """A plain path is a file's."""
    return url if "://" in url else f"sqlite:///{Path(url).absolute()}"


def _existing(url: str, *, read_only: bool) -> ReplayBuffer:
    """The buffer at `url`; a file that is not there is not made."""
    full = full_url(url)
    buffer = ReplayBuffer.open(full, read_only=read_only)
    path = Path(full.partition(":///")[2])
    if full.startswith("sqlite") and not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the path or URL of a run's database")
    return buffer


def name_of(url: str) -> str:
    """What to call the database: no password of a URL is in it."""
    full = full_url(url)
    return Path(full.partition(":///")[2]).name if full.startswith("sqlite") else urlsplit(full).path.strip("/") or "the database"


def refuse(error: Exception) -> NoReturn:
    """End the command: there is no answer, and why."""
    from producer.cli.safe import escaped

    print(f"millrace: {escaped(str(error))[:1000]}", file=sys.stderr)
    raise typer.Exit(1) from None


def console() -> "Console":
    """A console that takes no text for markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def print_json(value: object, indent: int | None = 2) -> None:
    """Print one document."""
    from producer.cli.safe import to_json

    print(to_json(value, indent=indent), flush=True)
