"""What `millrace status` says beside the counts: steps, versions, rewinds, staleness, rates, leases and sizes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, Status
from producer.cli.units import parse_bytes, parse_seconds, shown_bytes, shown_groups, shown_seconds
from tests.buffer.groups import a_group, draw, put_all, url
from tests.cli.command import asked, environment, said


def made(folder: Path, doing: Callable[[ReplayBuffer], Awaitable[None]]) -> Path:
    """A database to which this was done."""

    async def do() -> None:
        async with ReplayBuffer.open(url(folder)) as buffer:
            await doing(buffer)

    asyncio.run(do())
    return folder / "run.db"


async def rewound(buffer: ReplayBuffer) -> None:
    """Three steps, two of them committed and one undone; what waits lies 0, 1 and 1 versions behind, one group was given up."""
    await put_all(buffer, [a_group(n, version=version) for n, version in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 1))])
    for step in (1, 2, 3):
        await buffer.take("math", 1, step=step, version=step - 1)
    await buffer.commit(2, version=2)
    await buffer.prune(keep_steps=1, rows=True)
    await buffer.resume(step=2)
    await draw(buffer, 0, 1, 2)
    await buffer.claim("math", 2, statuses=[Status.PENDING])


def test_everything_that_the_overview_has_is_there(tmp_path: Path) -> None:
    db = made(tmp_path, rewound)
    found = json.loads(said("status", db, "--json"))
    overview = asked(db, lambda buffer: buffer.overview())
    own = json.loads(json.dumps(asdict(overview)))
    moving = {"at", "rate_seconds", "producers", "tasks"}
    assert {key: found[key] for key in own if key not in moving} == {key: own[key] for key in own if key not in moving}
    for key in ("drawn", "pruned", "last_step", "counts", "staleness"):
        assert found["tasks"]["math"][key] == own["tasks"]["math"][key]
    assert set(found) == set(own) | {"drawn", "timeline"}
    assert (found["version"], found["timeline"], found["committed_step"], found["last_step"]) == (2, 1, 2, 2)
    assert found["tasks"]["math"]["staleness"] == {"groups": 3, "least": 0, "median": 1, "most": 1}
    (one,) = found["producers"]
    assert (one["pid"], one["running"], one["alive"]) == (os.getpid(), 2, True)


def test_the_page_says_it_in_words(tmp_path: Path) -> None:
    page = said("status", made(tmp_path, rewound))
    for part in (
        "run.db: 8 prompts drawn, last step 2",
        "committed up to step 2",
        "version   2, on timeline 1: rewound to step 2 ",
        "in 1 committed group",
        f"/{os.getpid()}, begun ",
        "runs 2 groups",
        "0 / 1 / 1",
    ):
        assert part in page
    rows = [line.split() for line in page.splitlines()]
    assert len(rows) < 24, "it fits into a small terminal"
    assert ["running", "2"] in rows
    assert ["given", "up", "1"] in rows
    assert ["all", "drawn", "8"] in rows


def test_an_empty_buffer_has_a_status(tmp_path: Path) -> None:
    async def nothing(buffer: ReplayBuffer) -> None:
        return None

    db = made(tmp_path, nothing)
    page, found = said("status", db), json.loads(said("status", db, "--json"))
    assert "nothing was drawn yet" in page
    assert "version   not known" in page
    assert (found["drawn"], found["tasks"], found["version"], found["last_change"]) == (0, {}, None, None)


KILLED = """
import asyncio, os, signal, sys
from buffer import ReplayBuffer, Status
from tests.buffer.groups import draw

async def main():
    async with ReplayBuffer.open(f"sqlite:///{sys.argv[1]}") as buffer:
        await draw(buffer, 0, 1)
        await buffer.claim("math", 2, statuses=[Status.PENDING])
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_producer_that_was_killed_has_ended(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run.db")], env=environment(), timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (one,) = json.loads(said("status", tmp_path / "run.db", "--json"))["producers"]
    assert (one["alive"], one["running"]) == (False, 2)
    assert "has ended, and left 2 groups running" in said("status", tmp_path / "run.db")


@pytest.mark.parametrize("columns", [80, 160])
def test_long_names_of_tasks_are_cut_to_the_width(tmp_path: Path, columns: int) -> None:
    name = "a-task/with-a-very-long-name/" + "x" * 200

    async def one(buffer: ReplayBuffer) -> None:
        await buffer.put(a_group(1, task_name=name))

    page = said("status", made(tmp_path, one), columns=columns)
    shown = max((line.strip().split("…")[0] for line in page.splitlines() if "…" in line), key=len)
    assert (name.startswith(shown), len(shown) > columns - 70) == (True, True)
    assert all(len(line) <= columns for line in page.splitlines())
    assert list(json.loads(said("status", tmp_path / "run.db", "--json"))["tasks"]) == [name]


# --- sizes and durations


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("4096", 4096), ("10GB", 10**10), ("10 gb", 10**10), ("1.5MB", 1_500_000), ("2GiB", 2**31), ("3kB", 3000), ("1TiB", 2**40)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("2h", 7200.0), ("1.5d", 129600.0), ("5min", 300.0)]
)
def test_durations_are_read(text: str, expected: float) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "10XB", "nan", "inf", "9" * 400, "1,5", "٣"])
@pytest.mark.parametrize("parse", [parse_bytes, parse_seconds])
def test_what_is_none_is_refused_with_examples(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(Exception, match="give one like"):
        parse(text)


def test_sizes_and_durations_are_shown_short() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1 kB", 999_999: "1 MB", 1_234_567: "1.23 MB", 5 * 10**12: "5 TB", 10**16: "10,000 TB"}
    assert {n: shown_bytes(n) for n in sizes} == sizes
    durations = {0: "0 s", 119: "119 s", 120: "2 min", 7199: "120 min", 7200: "2 h", 10 * 86400: "10 d"}
    assert {n: shown_seconds(n) for n in durations} == durations
    assert [shown_groups(n) for n in (0, 1, 1000)] == ["0 groups", "1 group", "1,000 groups"]
