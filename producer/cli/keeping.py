"""The commands of `millrace` that write: to the database, or to a file or database beside it."""

import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from buffer import Overview, PruneReport, ReplayBuffer
from buffer.errors import ReplayBufferError, SchemaVersionError
from buffer.export import read_groups
from producer.cli.asking import AsJson, Url, console, full_url, look, name_of, print_json, refuse, work
from producer.cli.commands import Statuses, Task, app, require_task
from producer.cli.units import parse_bytes, shown_bytes, shown_groups

__all__ = ["app"]


@app.command()
def export(
    url: Url,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file to make: .parquet, .jsonl or .jsonl.gz.")],
    task: Task = None,
    status: Statuses = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write groups to a file for other programs, or for `import`."""
    if path.is_file() and not overwrite:
        refuse(FileExistsError(f"{path} is there already; give another name, or --overwrite"))

    async def write(buffer: ReplayBuffer) -> int:
        await require_task(buffer, task)
        return await buffer.export(path, task_name=task, status=status or (), overwrite=overwrite)

    n = look(url, write)
    _say({"path": str(path), "groups": n}, f"{shown_groups(n)} written to {path}", as_json)


@app.command("import")
def import_(
    url: Url,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file that `export` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Add the groups of a file that `export` wrote. A database that is not there is made."""
    _refuse_what_is_none(path)
    n = work(url, lambda buffer: buffer.import_file(path), may_create=True)
    _say({"path": str(path), "groups": n}, f"{shown_groups(n)} added", as_json)


def _refuse_what_is_none(path: Path) -> None:
    """Before a database is made: the file has to be there, and to begin as one that `export` wrote."""
    if not path.exists():
        refuse(FileNotFoundError(f"there is no file {path}; give one that `millrace export` wrote"))
    try:
        with closing(read_groups(path)) as groups:
            next(groups, None)
    except (ReplayBufferError, ValueError, OSError, ImportError) as error:
        refuse(error)


@app.command()
def prune(
    url: Url,
    keep_steps: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**31, help="Keep the tokens of the last N committed steps.")
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**31, help="Keep the tokens of the last N committed groups.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=parse_bytes, help="Keep at most so much: 500MB, 10GB, 2GiB.")
    ] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Also give up the rows of groups without tokens.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give up the tokens of committed groups beyond any bound. The file keeps its size, and its space is used again."""
    if not rows and keep_steps is keep_last is max_bytes is None:
        raise typer.BadParameter("nothing to give up: say --keep-steps, --keep-last, --max-bytes or --rows")
    # Looked at first also where nobody is asked: a database without a buffer is not to become one.
    now = look(url, lambda buffer: buffer.overview())
    if not yes:
        _ask_first(name_of(url), now)
    report = work(url, lambda buffer: buffer.prune(keep_steps=keep_steps, keep_last=keep_last, max_bytes=max_bytes, rows=rows))
    _say(
        asdict(report),
        _given_up(report, rows),
        as_json,
    )


@app.command()
def migrate(url: Url, as_json: AsJson = False) -> None:
    """Bring a database of an earlier Millrace forward. An older Millrace refuses it afterwards: keep a copy to go back."""

    async def version(buffer: ReplayBuffer) -> int:
        return (await buffer.overview()).schema_version

    try:
        now = look(url, version, passing=SchemaVersionError)
        before, line = str(now), f"nothing to do: {name_of(url)} has schema version {now}, the newest"
    except SchemaVersionError as error:
        before, now = error.stored, work(url, version)
        line = f"{name_of(url)} was brought forward from schema version {before} to {now}"
    _say({"before": int(before), "now": now}, line, as_json)


@app.command()
def fork(
    url: Url,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The copy: a path or a URL, of a database that is new or empty.")],
    step: Annotated[int, typer.Option(metavar="N", min=0, max=2**31, help="Of the checkpoint that a trainer of the copy goes on from.")],
    as_json: AsJson = False,
) -> None:
    """Copy the run into a new database, as at a checkpoint. The run may go on meanwhile, and stays as it is."""
    made = look(url, lambda buffer: buffer.fork(full_url(target), step=step))
    again = f"{shown_groups(made.rewound)} will be handed out again, {shown_groups(made.released)} ran and will go on"
    line = f"{shown_groups(made.groups)} copied to {name_of(target)}, as at step {made.step:,} and version {made.version:,}: {again}"
    _say(asdict(made), line, as_json)


def _ask_first(name: str, now: Overview) -> None:
    from producer.cli.safe import escaped

    there = f"{shown_groups(now.payload_groups, 'committed ')} with {shown_bytes(now.payload_bytes)} of tokens"
    question = f"{escaped(name)} has {there}. Give up what lies beyond these bounds, for good? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        refuse(ReplayBufferError("nothing was given up; say y, or --yes"))


def _given_up(report: PruneReport, rows: bool) -> str:
    tokens = f"gave up the tokens of {shown_groups(report.payloads)} ({shown_bytes(report.payload_bytes)})"
    return tokens + (f", and the rows of {shown_groups(report.rows)}" if rows else "")


def _say(record: dict[str, object], line: str, as_json: bool) -> None:
    from producer.cli.safe import one_line

    if as_json:
        print_json(record)
    else:
        console().print(one_line(line, 1000), soft_wrap=True)
