"""Shows that `millrace status --live` fills a terminal with what the overview says, follows the run, and ends cleanly with Ctrl-C."""

import asyncio
import os
import pty
import re
import select
import signal
import sqlite3
import struct
import subprocess
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import pytest
from rich.console import Console

from buffer import ReplayBuffer, Status
from producer.cli import records
from producer.cli.live_view import Pace, live_view
from tests import postgres
from tests.buffer.groups import a_group, put_all, url
from tests.cli.command import MILLRACE, asked, environment, in_process

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
"""How a terminal is told to show another screen, and the one before again."""


def shown(status: dict[str, Any], pace: Pace | None = None, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the test
    console.print(live_view("run.db", status, pace or Pace()))
    return console.export_text()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Groups that were trained on, that wait 0, 2 and 9 versions behind, that failed and were filtered."""

    async def make() -> None:
        async with ReplayBuffer.open(url(tmp_path)) as buffer:
            await put_all(buffer, [a_group(1, version=9), a_group(2, version=9)])
            await buffer.take("math", 1, step=1, version=9)
            await put_all(buffer, [a_group(3, version=7), a_group(4, Status.INTERRUPTED, version=0)])
            failed, filtered = a_group(5, Status.FAILED, tokens=7), a_group(6, Status.FILTERED)
            failed.rollouts[0].error = "TimeoutError: the judge \x1b[2J took 30 s " + "x" * 200
            await put_all(buffer, [failed, filtered])

    asyncio.run(make())
    return tmp_path / "run.db"


def test_the_page_has_what_the_overview_says(run: Path) -> None:
    page = shown(asked(run, records.status_of))
    words = [line.replace("│", " ").split() for line in page.splitlines()]
    pairs = {(line[place], line[place + 1]) for line in words for place in range(len(line) - 1)}
    for pair in (
        ("generated", "44"),
        ("trained", "6"),
        ("waiting", "18"),
        ("wasted", "20"),
        ("failed", "14"),
        ("filtered", "6"),
        ("7+", "1"),
    ):
        assert pair in pairs
    assert re.search(r"wasted +20 \(45\.5%\)", page)
    assert "TimeoutError: the judge \\u001b[2J took" in page
    assert all(len(line) <= 80 for line in page.splitlines())
    assert len(page.splitlines()) <= 24, "a task fits into a small terminal"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_that_a_terminal_obeys_is_shown(db: Path, width: int) -> None:
    page = shown(asked(db, records.status_of), width=width)
    assert all(character.isprintable() or character == "\n" for character in page)
    assert "[red]" in page, "no markup either"


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    async def make() -> None:
        async with ReplayBuffer.open(url(tmp_path)):
            pass

    asyncio.run(make())
    assert "nothing was drawn yet" in shown(asked(tmp_path / "run.db", records.status_of))


def test_the_pace_is_tokens_by_seconds_between_looks() -> None:
    def at(seconds: float, **generated: int) -> dict[str, Any]:
        return {"at": seconds, "tasks": {name: {"account": {"generated": n}} for name, n in generated.items()}}

    pace = Pace(looks=2)
    for status in (at(0.0, math=0), at(2.0, math=100), at(2.0, math=100), at(4.0, math=100, code=50), at(5.0, math=400)):
        pace.look(status)
    assert pace.of("math") == [0.0, 300.0], "the last two; a look at the same moment is none"
    assert pace.of("code") == [25.0, 0.0]
    assert pace.of("none") == [0.0, 0.0]


@contextmanager
def in_a_terminal(*arguments: object) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    own = {name: value for name, value in environment().items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [*MILLRACE, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs, env=own, start_new_session=True
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def until(terminal: int, wanted: bytes, seen: bytes = b"") -> bytes:
    """What the terminal was sent, up to where this stands in it."""
    while wanted not in seen:
        assert select.select([terminal], [], [], 60)[0], f"{wanted!r} did not come after {seen[-500:]!r}"
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    assert wanted in seen, seen[-500:]
    return seen


def test_it_follows_the_run_and_gives_the_terminal_back(run: Path) -> None:
    with in_a_terminal("status", run, "--live", "--every", "0.1") as (process, terminal):
        seen = until(terminal, b"step 1")
        assert ENTER in seen
        with sqlite3.connect(run) as connection:
            connection.execute("UPDATE groups SET consumed_step = 77 WHERE consumed_step = 1")
        until(terminal, b"step 77")
        process.send_signal(signal.SIGINT)
        seen = until(terminal, LEAVE)
        assert process.wait(60) == 130
    assert b"Traceback" not in seen


def test_what_is_committed_is_shown_at_once(run: Path) -> None:
    with in_a_terminal("status", run, "--live", "--every", "3600") as (process, terminal):
        until(terminal, b"step 1")
        with sqlite3.connect(run) as connection:
            connection.execute("UPDATE groups SET consumed_step = 78 WHERE consumed_step = 1")
        until(terminal, b"step 78")
        process.send_signal(signal.SIGTERM)
        until(terminal, LEAVE)
        assert process.wait(60) == 143


def test_changes_of_another_process_are_told_on_postgresql(
    server: postgres.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(postgres.ADDRESS, server.address)

    async def watch() -> None:
        async with (
            ReplayBuffer.open(url(tmp_path)) as writer,
            ReplayBuffer.open(url(tmp_path), read_only=True) as reader,
            aclosing(reader.changes(3600)) as changes,
        ):
            await anext(changes)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(writer.put(a_group(1)))
                await anext(changes)
            assert (await reader.counts("math"))[Status.COMPLETED] == 1

    asyncio.run(watch())
    postgres.drop_schemas(server.address)


async def test_changes_are_told_of_every_commit(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as writer, ReplayBuffer.open(url(tmp_path), read_only=True) as reader:
        for buffer in (writer, reader):
            async with aclosing(buffer.changes(3600)) as changes:
                await anext(changes)
                number = 1 if buffer is writer else 2
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(writer.put(a_group(number)))
                    await anext(changes)
                assert (await buffer.counts("math"))[Status.COMPLETED] == number
        async with aclosing(reader.changes(0.05)) as changes:
            for _ in range(3):
                await anext(changes)  # in any case, after a while
        with pytest.raises(ValueError, match="every=0"):
            await anext(reader.changes(0))


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_where_there_is_no_terminal_it_is_refused(run: Path, more: list[str]) -> None:
    done = in_process("status", run, "--live", *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"use\s+--watch", done.stderr)
