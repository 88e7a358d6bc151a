"""`millrace report`: how a run went over its steps, as one HTML page or one picture, or as numbers."""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from buffer import ReplayBuffer, RunReport
from producer.cli.asking import AsJson, Url, console, look, name_of, print_json, refuse
from producer.cli.commands import require_task
from producer.cli.records import Record, account_of
from producer.cli.safe import escaped
from producer.cli.simulating import app

__all__ = ["app"]

_DEFAULT = Path("report.html")
_MOST_STEP = 2**61
_ENDINGS = (".html", ".png")


@app.command()
def report(
    url: Url,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The file to make: .html or .png; report.html if not given. It is replaced.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Groups of this task only; may be repeated.")] = None,
    min_step: Annotated[int | None, typer.Option(metavar="N", min=1, max=_MOST_STEP, help="From this step on only.")] = None,
    max_step: Annotated[int | None, typer.Option(metavar="N", min=1, max=_MOST_STEP, help="Up to this step only.")] = None,
    points: Annotated[int, typer.Option(metavar="N", min=1, max=5000, help="Parts that steps are put together in, at most.")] = 200,
    as_json: AsJson = False,
) -> None:
    """How the run went: reward, length, staleness, waste, time. A page, or a picture."""
    path = out if out is not None or as_json else _DEFAULT
    write = None if path is None else _writer(path)
    tasks = list(dict.fromkeys(task or []))

    async def ask(buffer: ReplayBuffer) -> RunReport:
        for name in tasks:
            await require_task(buffer, name)
        return await buffer.report(tasks, min_step=min_step, max_step=max_step, points=points)

    found = look(url, ask)
    if path is not None and write is not None:
        try:
            _replace(path, lambda file: write(name_of(url), found, tasks, file))
        except (OSError, ImportError) as error:
            refuse(error)
    if as_json:
        print_json({"path": None if path is None else str(path), **_record(found, tasks)})
    else:
        console().print(_said(found, path or _DEFAULT), soft_wrap=True)


_Write = Callable[[str, RunReport, Sequence[str], BinaryIO], None]


def _writer(path: Path) -> _Write:
    """What makes a file of this ending. What it needs is looked for first: reading a large run takes its time."""
    from producer.cli import report_page, report_png

    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file in it")
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} for {path.name}; make it first")
        match path.suffix.lower():
            case ".html":
                report_page.check_template_library()
                return lambda name, found, tasks, file: _write_text(file, report_page.html(name, found, tasks))
            case ".png":
                report_png.check_plotting()
                return lambda name, found, tasks, file: report_png.draw(name, found, file)
            case _:
                raise ValueError(f"{path} must end in {' or '.join(_ENDINGS)}: that says what the report is made as")
    except (ImportError, ValueError) as error:
        refuse(error)


def _write_text(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def _replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Make the file whole, and only then put it in its place: whoever looks at the one before never sees half of one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".new")
    try:
        with open(handle, "wb") as file:
            write(file)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _said(found: RunReport, path: Path) -> str:
    if found.first is None:
        return f"report saved to {escaped(str(path))}: no batch was handed out in these steps"
    return f"report of steps {found.first:,} to {found.last:,} saved to {escaped(str(path))}"


def _record(found: RunReport, tasks: Sequence[str]) -> Record:
    """The numbers of a report, for `--json`."""
    own = {name: task for name, task in found.overview.tasks.items() if not tasks or name in tasks}
    return {
        "at": found.overview.at,
        "first": found.first,
        "last": found.last,
        "width": found.width,
        "steps": [asdict(step) for step in found.steps],
        "since": [{"task_name": step.task_name, "ended": step.ended, "wasted": step.wasted} for step in found.since],
        "rewinds": [asdict(rewind) for rewind in found.overview.rewinds],
        "tasks": {
            name: {"drawn": task.drawn, "pruned": task.pruned, "counts": task.counts, "account": account_of(task.account)}
            for name, task in own.items()
        },
    }
