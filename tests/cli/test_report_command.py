"""`millrace report` makes a page that stands by itself, shows whatever a run holds and obeys none of it; a picture, and numbers. It works
beside a run that goes on, on runs of every size, and says in one line what keeps it from making one."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, RunReport, Status
from producer.cli.report_page import html, page
from producer.cli.report_panels import Panel, Series, panels
from producer.cli.report_svg import chart, nice_marks, short
from tests import postgres
from tests.buffer.groups import a_group, put_all, url
from tests.cli.command import HOSTILE, HOSTILE_TASK, Done, asked, millrace, refused
from tests.cli.command import in_process as any_command

PNG = b"\x89PNG\r\n\x1a\n"
SCRIPT = "<script>alert('ta$k')</script>&amp;_\"'`{{ 7 * 7 }}"

VOID = {"meta", "link", "br", "hr", "img"}


def report(*arguments: object) -> Done:
    """The command, in this process."""
    from producer.cli.report import app

    assert app  # its module registers the command
    return any_command("report", *arguments)


class Read(HTMLParser):
    """A page as a browser reads it: its tags, what stands in them, and its text. A tag that is not closed is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.said, self.inside = Counter[str](), list[tuple[str, str, str]](), list[str](), list[str]()
        self.feed(text)
        self.close()
        assert self.inside == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] != "style":
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def checked(path: Path) -> Read:
    """The page at `path`: it asks for nothing, runs nothing, and has no character that anything obeys."""
    text = path.read_text()
    assert all(character.isprintable() or character == "\n" for character in text)
    read = Read(text)
    assert not {"script", "iframe", "object", "embed", "img", "form", "base"} & set(read.tags)
    for tag, name, value in read.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "href", "xlink:href", "action") or value == "data:,"
        assert not re.search(r"(nan|inf)", value) or name in ("content", "aria-label", "class"), (tag, name, value)
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [value for tag, _, value in read.attributes if tag == "meta" and value.startswith("default-src")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return read


def made(folder: Path, doing: Callable[[ReplayBuffer], Awaitable[None]]) -> Path:
    """A database to which this was done."""

    async def do() -> None:
        async with ReplayBuffer.open(url(folder)) as buffer:
            await doing(buffer)

    asyncio.run(do())
    return folder / "run.db"


async def two_tasks(buffer: ReplayBuffer) -> None:
    """Five steps of two tasks, one of a hostile name; rewards that rise, some None, failures with hostile reasons, a rewind."""
    for step in range(1, 6):
        for k, task in enumerate(("math", SCRIPT)):
            group = a_group(10 * step + k, task_name=task, tokens=5 + step, version=step - 1)
            group.rollouts[0].reward = None if step == 3 else step / 10
            group.rollouts[1].reward = 0.0
            await buffer.put(group)
            await buffer.take(task, 1, step=step, version=step)
    failed = a_group(100, Status.FAILED, task_name=SCRIPT, tokens=7)
    failed.rollouts[0].error = f"{SCRIPT} {HOSTILE}"
    await buffer.put(failed)
    await buffer.commit(4, version=5)
    await buffer.resume(step=4)
    await put_all(buffer, [a_group(101, Status.FILTERED)])


def test_a_page_shows_charts_and_tables_and_obeys_nothing_that_stands_in_the_run(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    done = report(made(tmp_path, two_tasks), "--out", out)
    assert (done.returncode, done.stdout) == (0, f"report of steps 1 to 4 saved to {out}\n")
    read = checked(out)
    assert (read.tags["svg"], read.tags["figure"]) == (7, 8), "nothing was wasted before a batch"
    assert read.tags["path"] >= 2 * 4
    shown = SCRIPT[:40] + "…"
    for part in ("run.db", "math", shown, "2 tasks, steps 1 to 4.", "rewound to step 4 (version 5)", "\\u001b[2J", "ta$k"):
        assert part in read.text, part
    assert "49" not in re.findall(r"\{\{.*?\}\}", read.text), "no template in a name is evaluated"
    legend = [item for item in read.said if item in ("math", shown)]
    assert len(legend) >= 6


def test_the_hostile_group_and_a_name_of_controls_are_shown_as_escapes(db: Path, tmp_path: Path) -> None:
    read = checked(report_of(db, tmp_path))
    assert "ta[red]sk\\u001b[2J" in read.text
    assert HOSTILE_TASK not in read.text
    assert "\\u202egnp.exe" in read.text


def report_of(db: Path, folder: Path, *more: object) -> Path:
    out = folder / "r.html"
    done = report(db, "--out", out, *more)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def test_numbers_are_those_of_the_report(tmp_path: Path) -> None:
    db = made(tmp_path, two_tasks)
    done = report(db, "--json", "--task", "math", "--min-step", 2)
    found = json.loads(done.stdout)
    assert (found["path"], found["first"], found["last"], found["width"]) == (None, 2, 4, 1)
    assert [step["reward_mean"] for step in found["steps"]] == [0.1, 0.0, 0.2]
    assert [step["staleness_max"] for step in found["steps"]] == [1, 1, 1]
    assert list(found["tasks"]) == ["math"]
    assert found["since"] == [{"task_name": "math", "ended": {"completed": 1, "filtered": 1}, "wasted": {"filtered": 6}}]
    assert found["rewinds"][0]["step"] == 4
    assert list(tmp_path.glob("*.html")) == [], "numbers alone make no file"
    both = json.loads(report(db, "--json", "--out", tmp_path / "r.html").stdout)
    assert (both["path"], (tmp_path / "r.html").exists()) == (str(tmp_path / "r.html"), True)


def test_a_picture_has_any_name(tmp_path: Path) -> None:
    async def odd(buffer: ReplayBuffer) -> None:
        for number, task in enumerate((SCRIPT, r"$\frac{1}$", "_hidden", "数学 🧮"), 1):
            await buffer.put(a_group(number, task_name=task))
            await buffer.take(task, 1, step=1, version=0)

    out = tmp_path / "r.PNG"
    done = report(made(tmp_path, odd), "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_bytes().startswith(PNG)


async def nothing(buffer: ReplayBuffer) -> None:
    """An empty run."""


async def useless(buffer: ReplayBuffer) -> None:
    """A run that never handed out a batch."""
    await put_all(buffer, [a_group(1, Status.FAILED), a_group(2, Status.FILTERED)])


async def one_step(buffer: ReplayBuffer) -> None:
    """A run of one step, without rewards."""
    group = a_group(1)
    for state in group.rollouts:
        state.reward = state.score = None
    await buffer.put(group)
    await buffer.take("math", 1, step=7, version=3)


async def many_tasks(buffer: ReplayBuffer) -> None:
    """More tasks than colours."""
    for number in range(1, 13):
        await buffer.put(a_group(number, task_name=f"task {number}", tokens=number))
        await buffer.take(f"task {number}", 1, step=1 + number % 3, version=0)


async def a_long_pause(buffer: ReplayBuffer) -> None:
    """Steps of next to no time; the test makes one of them last a day."""
    await put_all(buffer, [a_group(n) for n in range(1, 31)])
    for step in range(1, 31):
        await buffer.take("math", 1, step=step, version=0)


@pytest.mark.parametrize(
    ("run", "charts", "said"),
    [
        (nothing, 0, "No batch was handed out yet."),
        (useless, 0, "No batch was handed out yet."),
        (one_step, 5, "Task math, steps 7 to 7."),
        (many_tasks, 7, "Lines are of the 8 tasks"),
        (a_long_pause, 7, "steps 1 to 30"),
    ],
)
def test_runs_of_every_size_have_a_page_and_a_picture(
    tmp_path: Path, run: Callable[[ReplayBuffer], Awaitable[None]], charts: int, said: str
) -> None:
    db = made(tmp_path, run)
    read = checked(report_of(db, tmp_path))
    assert said in read.text
    assert read.tags["svg"] == charts
    if run in (nothing, one_step):  # a picture takes its time
        assert report(db, "--out", tmp_path / "r.png").returncode == 0
        assert (tmp_path / "r.png").read_bytes().startswith(PNG)


def test_steps_without_a_batch_are_said_to_have_none(tmp_path: Path) -> None:
    db = made(tmp_path, one_step)
    done = report(db, "--out", tmp_path / "r.html", "--min-step", 8, "--max-step", 9)
    assert "no batch was handed out in these steps" in done.stdout
    assert "the run has steps up to 7" in checked(tmp_path / "r.html").text


def found(db: Path, **asking: Any) -> RunReport:
    return asked(db, lambda buffer: buffer.report(**asking))


def test_one_long_pause_does_not_press_all_other_times_to_the_ground(tmp_path: Path) -> None:
    db = made(tmp_path, a_long_pause)
    from tests.buffer.groups import edit

    edit(tmp_path, "UPDATE transitions SET at = 1000 + step WHERE target = 'consumed'")
    edit(tmp_path, "UPDATE transitions SET at = at + 86400 WHERE target = 'consumed' AND step > 20")
    edit(tmp_path, "UPDATE groups SET created_at = 1000")
    (seconds,) = [panel for panel in panels(found(db)) if panel.spread]
    assert sorted(set(seconds.series[0].values)) == [1.0, 86401.0]
    drawn = chart(seconds)
    assert [tick.text for tick in drawn.up] == ["1", "10", "100", "1000", "10k", "100k"]
    html("run.db", found(db), [])


def test_what_is_drawn_lies_within_the_frame(tmp_path: Path) -> None:
    for panel in panels(found(made(tmp_path, two_tasks))):
        drawn = chart(panel)
        points = [tuple(map(float, point.split())) for path in drawn.paths for point in re.split("[ML]", path.commands) if point]
        points += [dot for path in drawn.paths for dot in path.dots]
        points += [(x, y) for bar in drawn.bars for x, y in ((bar.x, bar.y), (bar.x + bar.width, bar.y + bar.height))]
        points += [(tick.at, drawn.top) for tick in drawn.across] + [(drawn.left, tick.at) for tick in drawn.up]
        for x, y in points:
            assert drawn.left - 0.01 <= x <= drawn.right + 0.01, (panel.title, x)
            assert drawn.top - 0.01 <= y <= drawn.bottom + 0.01, (panel.title, y)


def test_marks_are_round_and_numbers_short() -> None:
    assert nice_marks(0, 80, 4) == [0, 20, 40, 60, 80]
    assert nice_marks(-1, 1, 4) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert nice_marks(5, 5, 4), "around a single value too"
    assert len(nice_marks(0.0, 1e300, 4)) <= 6
    assert [short(value) for value in (0, 0.25, 1234, 12345, 3.4e6, -2e9)] == ["0", "0.25", "1234", "12.3k", "3.4M", "-2G"]
    assert short(0.125, share=True) == "12.5%"


@pytest.mark.parametrize(("values", "low", "high"), [([0, 0], "0", "1"), ([3, 3], "0", "3"), ([-2, -2], "-2", "0"), ([2, 4], "0", "4")])
def test_values_that_are_all_equal_have_an_axis_from_0(values: list[float], low: str, high: str) -> None:
    drawn = chart(Panel("", [(1, 1), (2, 2)], [Series("", values, 0)], 1))
    assert (drawn.up[0].text, drawn.up[-1].text) == (low, high)


def test_the_page_tells_of_waste_and_bias_over_the_whole_run(tmp_path: Path) -> None:
    shown = page("run.db", found(made(tmp_path, two_tasks)))
    assert shown.waste.head == ["task", "filtered", "failed"]
    assert sorted(map(tuple, shown.waste.rows))[1][1:] == ("6", "0")
    assert dict(shown.tiles)["rewinds"] == "1"
    assert [row[-1] for row in shown.steps.rows] == ["0"] * 8


async def test_it_is_made_beside_a_run_that_goes_on(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await two_tasks(buffer)
        done = await asyncio.to_thread(millrace, "report", tmp_path / "run.db", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        await buffer.put(a_group(200, version=5))
        assert len(await buffer.take("math", 2, step=5, version=5)) == 2
    assert checked(tmp_path / "report.html").tags["svg"] == 7
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == [], "nothing is left beside it"


def test_over_postgresql(server: postgres.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    made(tmp_path, two_tasks)
    read = checked(report_of(url(tmp_path), tmp_path))  # type: ignore[arg-type]  # an address
    postgres.drop_schemas(server.address)
    assert read.tags["svg"] == 7


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--out", "r.txt"], "r.txt must end in .html or .png"),
        (["--out", "r"], "r must end in .html or .png"),
        (["--out", "missing/r.html"], "there is no folder missing for r.html"),
        (["--out", "folder.html"], "folder.html is a folder"),
        (["--task", "none"], "there is no task 'none' in this run"),
        (["--min-step", 3, "--max-step", 2], "min_step=3 lies above max_step=2"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], reason: str) -> None:
    db = made(tmp_path, one_step)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    refused(report(db, *arguments), reason)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".html", ".new", ".txt") and path.is_file()]


def test_what_is_no_run_is_said_in_one_line_and_no_file_is_made(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    (tmp_path / "other.db").write_text("Not a database, but what its owner wants to keep.\n" * 99)
    damaged = made(tmp_path, one_step)
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    refused(report(tmp_path / "absent.db", "--out", out), "there is no file")
    refused(report(tmp_path / "other.db", "--out", out), "file is not a database")
    refused(report(damaged, "--out", out), "malformed")
    assert not out.exists()


@pytest.mark.parametrize(("library", "name"), [("jinja2", "r.html"), ("matplotlib", "r.png")])
def test_without_its_library_it_says_which_extra_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, name: str) -> None:
    db = made(tmp_path, one_step)
    monkeypatch.setitem(sys.modules, library, None)
    refused(report(db, "--out", tmp_path / name), "pip install 'millrace[report]'")
    assert report(db, "--json").returncode == 0


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser on this machine")
def test_a_browser_draws_it_light_and_dark_and_runs_nothing(tmp_path: Path) -> None:
    from matplotlib.image import imread

    assert CHROMIUM is not None
    out = report_of(made(tmp_path, two_tasks), tmp_path)
    corners = []
    for scheme in (1, 0):
        picture = tmp_path / f"{scheme}.png"
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--window-size=390,2400", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", out.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = imread(picture)
        corners.append(pixels[2, 2, :3].mean())
        assert len({tuple(pixel) for row in pixels[::7, ::7] for pixel in row.round(2)}) > 20, "it is drawn"
    assert corners[0] > 0.9
    assert corners[1] < 0.2
