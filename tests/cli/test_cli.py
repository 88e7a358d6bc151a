"""The command `millrace`, run as users run it: processes, real files, a real terminal, and texts that would take it over."""

import importlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, Status
from producer import ReplayPromptSampler
from tests.cli.command import (
    HOSTILE_ID,
    HOSTILE_TASK,
    MILLRACE,
    ROOT,
    asked,
    environment,
    hostile_group,
    in_process,
    millrace,
    refused,
    said,
    shown,
)

# --- what it says


async def test_status_has_the_counts_of_the_buffer(db: Path) -> None:
    found = json.loads(shown("status", db, "--json"))
    async with ReplayBuffer.open(f"sqlite:///{db}", read_only=True) as buffer:
        assert {name: task["counts"] for name, task in found["tasks"].items()} == {
            name: {str(status): n for status, n in (await buffer.counts(name)).items()} for name in await buffer.task_names()
        }
        assert found["drawn"] == sum((await buffer.audit()).drawn.values())
    assert (found["last_step"], found["tasks"]["demo"]["last_step"], found["tasks"][HOSTILE_TASK]["last_step"]) == (2, 2, 0)


async def test_show_has_everything_of_a_group(db: Path) -> None:
    async with ReplayBuffer.open(f"sqlite:///{db}", read_only=True) as buffer:
        (group,) = await buffer.query(status=Status.CONSUMED, limit=1)
    found = json.loads(shown("show", db, group.group_id, "--json"))
    assert (found["group_id"], found["status"], found["consumed_step"]) == (group.group_id, "consumed", 2)
    assert (found["row"], found["prompt_ids"]) == (dict(group.rollouts[0].row), group.rollouts[0].prompt_ids.tolist())
    for record, rollout in zip(found["rollouts"], group.rollouts, strict=True):
        assert record["response_ids"] == rollout.response_ids.tolist()
        assert record["logprobs"] == pytest.approx(rollout.logprobs.tolist())
        assert record["versions"] == rollout.versions.tolist()
        assert (record["score"], record["reward"]) == (rollout.score, rollout.reward)
    page = shown("show", db, group.group_id)
    for part in (f"group {group.group_id} of task demo: consumed", "at step 2", "rollout 3", "score", "trainable"):
        assert part in page


async def test_show_tells_the_prompt_and_its_images_apart_from_the_turns_that_a_loop_added(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "2+2?"}]}]
    row = {"messages": chat, "images": ["data:image/png;base64," + "A" * 9000]}
    async with ReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}") as buffer:
        group = await ReplayPromptSampler([row], buffer, group_size=2).sample("tools")
        for state in group.rollouts:
            state.append([1, 2], logprobs=[-0.1, -0.1])
            state.messages = [*chat, {"role": "tool", "content": f"result {state.index}"}]
            state.text, state.finish_reason, state.score, state.status = "four", "stop", 1.0, Status.COMPLETED
        await buffer.put(group)
    found = json.loads(shown("show", tmp_path / "run.db", group.group_id, "--json"))
    assert (found["messages"], found["media"]) == (chat, row["images"])
    assert [rollout["messages"][1:] for rollout in found["rollouts"]] == [[{"role": "tool", "content": f"result {n}"}] for n in (0, 1)]
    page = shown("show", tmp_path / "run.db", group.group_id)
    assert "data:image/png;base64,AAA" in page
    assert "A" * 200 not in page
    assert "result 0" not in page


def ids_of(*filters: object) -> list[int]:
    return [record["group_id"] for record in json.loads(said("query", *filters, "--json"))]


def test_query_filters_and_pages(db: Path) -> None:
    groups = asked(db, lambda buffer: buffer.query(task_name="demo", status=[Status.ARCHIVED, Status.CONSUMED]))
    ids = [group.group_id for group in groups]
    wanted = (db, "--task", "demo", "--status", "archived", "--status", "consumed")
    assert ids_of(*wanted) == ids
    assert ids_of(*wanted, "--limit", 3, "--offset", 2) == ids[2:5]
    assert ids_of(*wanted, "--offset", 1000) == []
    assert "no such groups" in said("query", *wanted, "--offset", 1000)
    at_two = json.loads(shown("query", db, "--step", 2, "--json"))
    assert (len(at_two), {record["consumed_step"] for record in at_two}) == (4, {2})
    for text in ("boom [red]", ""):
        assert ids_of(db, "--error", text) == [HOSTILE_ID]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--min-version 3", {"min_version": 3}),
        ("--max-version 0", {"max_version": 0}),
        ("--min-reward 0.5 --max-reward 0.75", {"min_reward": 0.5, "max_reward": 0.75}),
        ("--min-attempts 1", {"min_attempts": 1}),
        ("--min-age 1h", {"min_age": 3600.0}),
        ("--max-age 1.5d", {"max_age": 129600.0}),
        ("--order newest", {"order": "newest"}),
        ("--order worst --limit 5", {"order": "worst", "limit": 5}),
    ],
)
def test_each_filter_and_order_is_the_buffers(db: Path, words: str, arguments: dict[str, Any]) -> None:
    expected = asked(db, lambda buffer: buffer.query(**{"limit": 20, **arguments}))
    assert ids_of(db, *words.split()) == [group.group_id for group in expected]


def test_bounds_that_exclude_all_are_refused(db: Path) -> None:
    refused(in_process("query", db, "--min-reward", 1, "--max-reward", 0), "min_reward=1.0 lies above max_reward=0.0")


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_tables_fit_and_cut_nothing_but_the_note(db: Path, columns: int) -> None:
    commands = (("status",), ("query",), ("show", HOSTILE_ID), ("history", HOSTILE_ID), ("audit",))
    pages = [said(name, db, *arguments, columns=columns) for name, *arguments in commands]
    assert all(len(line) <= columns for page in pages for line in page.splitlines())
    rows = [line.split() for line in pages[1].splitlines() if " demo " in line]
    assert pages[1].splitlines()[1].split() == ["group", "task", "status", "step", "place", "tokens", "versions", "score", "note"]
    assert {row[2] for row in rows} <= set(map(str, Status))


def test_history_tells_every_change(db: Path) -> None:
    (group,) = asked(db, lambda buffer: buffer.query(step=1, limit=1))
    changes = asked(db, lambda buffer: buffer.history(group.group_id))
    found = json.loads(shown("history", db, group.group_id, "--json"))
    assert [(c["at"], c["source"], c["target"], c["step"], c["owner"]) for c in found] == [
        (c.at, c.source, c.target, c.step, c.owner) for c in changes
    ]
    assert json.loads(said("show", db, group.group_id, "--json"))["history"] == found
    page = said("history", db, group.group_id).splitlines()
    rows = [line.split()[2] for line in page if line.startswith(" 2")]
    assert rows == ["pending", "running", "completed", "consumed", "archived"]
    assert f"{len(changes)} changes, ran once, archived since" in said("show", db, group.group_id)


def test_audit_is_fine_or_says_what_is_wrong(db: Path, tmp_path: Path) -> None:
    assert "every prompt is accounted for" in shown("audit", db)
    assert json.loads(said("audit", db, "--json")) == json.loads(said("audit", db, "--payloads", "--json"))
    broken = Path(shutil.copy(db, tmp_path / "broken.db"))
    with sqlite3.connect(broken) as connection:
        connection.execute("update counts set n = n + 1 where status = 'archived'")
        connection.execute("update groups set tokens = 7 where group_id = ?", [HOSTILE_ID])
        connection.execute("update rollouts set tokens = tokens + 3 where group_id = ? and member = 0", [HOSTILE_ID])
    done, as_json = millrace("audit", broken), in_process("audit", broken, "--json")
    assert (done.returncode, as_json.returncode) == (1, 1)
    assert "wrong: task 'demo': 5 counted as archived, 4 rows are" in done.stdout
    found = json.loads(as_json.stdout)
    tokens = "of failed groups 4 tokens (4 of them in 1 whole responses) are counted, 7 tokens (4 of them in 1 whole responses) are in rows"
    assert (found["ok"], found["problems"]) == (
        False,
        ["task 'demo': 5 counted as archived, 4 rows are", f"task {HOSTILE_TASK!r}: {tokens}"],
    )
    deeper = json.loads(in_process("audit", broken, "--payloads", "--json").stdout)["problems"]
    assert any(f"group {HOSTILE_ID}" in problem for problem in deeper)


# --- what others wrote stays text


@pytest.mark.parametrize(
    "command", [("show", HOSTILE_ID), ("history", HOSTILE_ID), ("query",), ("status",), ("audit",)], ids=lambda words: words[0]
)
@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
def test_no_character_that_a_terminal_obeys_is_printed(db: Path, command: tuple[object, ...], as_json: bool) -> None:
    name, *arguments = command
    out = said(name, db, *arguments, *(["--json"] if as_json else []))
    assert [character for character in out if not character.isprintable() and character != "\n"] == []
    if as_json:
        assert out.isascii()


def test_hostile_text_is_shown_as_it_stands_and_cannot_pass_for_lines_of_ours(db: Path) -> None:
    out = said("show", db, HOSTILE_ID, columns=200)
    for part in (r"[red]red[/red] [link=http://x]y[/link] \u001b[2J\u001b]0;title\u0007 \u202egnp.exe\u202c \u009b31m", r"\u007f \r "):
        assert out.count(part) >= 3, "prompt, text and error"
    assert [line for line in out.splitlines() if line.startswith("rollout")] == [
        r"rollout 0: completed, finished by [red]stop\u001b[2J",
        "rollout 1: failed, not finished",
    ]
    assert r"[red]part\u001b[2J 1.0" in out
    assert "  │ rollout 0: completed" in out
    assert len(out.splitlines()) < 80
    assert "characters more; --json shows all" in out


def test_json_gives_hostile_text_back_unchanged(db: Path) -> None:
    found, group = json.loads(shown("show", db, HOSTILE_ID, "--json")), hostile_group()
    assert found["task_name"] == HOSTILE_TASK
    assert found["row"] == group.rollouts[0].row
    stored = [record["text"] for record in found["rollouts"]]
    assert stored == [group.rollouts[0].text, None]
    assert found["rollouts"][0]["turns"][1] == {"role": "environment", "start": 3, "end": 4}


def test_a_terminal_without_unicode_gets_escapes(db: Path) -> None:
    plain = environment() | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*MILLRACE, "show", str(db), str(HOSTILE_ID)], capture_output=True, timeout=60, check=True, env=plain)
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    "edit",
    [
        "update rollouts set score = 'a' || char(27) || 'b', reward = 'x'",
        "update rollouts set error = x'1b5b', finish_reason = 7",
        "update tasks set drawn = 'many' || char(27)",
        "update groups set consumed_step = 'then', epoch = 'never' || char(27)",
        "update transitions set at = 'then' || char(27), step = 'x', reason = char(27), owner = char(27)",
        "update producers set host = char(27), pid = 'x' || char(27), started_at = 'then', expires_at = char(27)",
        "update groups set payload_bytes = char(27), oldest_version = 'old'",
    ],
)
def test_a_file_that_was_edited_is_no_traceback(db: Path, tmp_path: Path, edit: str) -> None:
    edited = Path(shutil.copy(db, tmp_path / "edited.db"))
    with sqlite3.connect(edited) as connection:
        connection.execute(edit)
    for command in (("status",), ("query",), ("show", HOSTILE_ID), ("history", HOSTILE_ID), ("audit", "--payloads")):
        done = in_process(command[0], edited, *command[1:])
        assert done.returncode in (0, 1)
        assert "\x1b" not in done.stdout + done.stderr


# --- what cannot be answered


def foreign(folder: Path) -> Path:
    path = folder / "foreign.db"
    with sqlite3.connect(path) as connection:
        connection.execute('create table "[red]\x1b[2J" (a)')
    return path


def text_file(folder: Path) -> Path:
    path = folder / "notes.txt"
    path.write_text("no database at all, and long enough to be read as one\n" * 100)
    return path


@pytest.mark.parametrize(
    ("database", "reason"),
    [
        (lambda folder: folder / "absent.db", "there is no file"),
        (lambda folder: f"sqlite:///{folder / 'absent.db'}", "there is no file"),
        (lambda folder: folder / "no" / "folder.db", "there is no file"),
        (lambda folder: folder, "is a folder"),
        (foreign, "is no Millrace buffer"),
        (text_file, "not a database"),
        (lambda folder: "mysql://me:secret@host/run", "only SQLite and PostgreSQL are supported"),
        (lambda folder: "sqlite://", "names no file"),
        (lambda folder: "://", "is not a database URL"),
    ],
)
def test_what_cannot_be_opened_is_one_line_and_status_1(tmp_path: Path, database: Callable[[Path], object], reason: str) -> None:
    url = database(tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(millrace("status", url), reason)
    assert sorted(tmp_path.iterdir()) == before, "looking makes no file"


@pytest.mark.parametrize("command", [("status", "--watch"), ("show", "1"), ("query",), ("audit", "--json")], ids=lambda words: words[0])
def test_every_command_refuses_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *arguments = command
    refused(in_process(name, foreign(tmp_path), *arguments), "is no Millrace buffer")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("show", "99999"), "no group 99999"),
        (("history", "99999"), "no group 99999"),
        (("query", "--task", "absent"), "there is no task 'absent'"),
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(db: Path, arguments: tuple[str, ...], reason: str) -> None:
    name, *rest = arguments
    refused(in_process(name, db, *rest), reason)


@pytest.mark.parametrize(
    "arguments",
    [
        "show run.db",
        "show run.db one",
        "history run.db -1",
        "query run.db --limit 0",
        "query run.db --status done",
        "query run.db --order any",
        "query run.db --min-age soon",
        "status run.db --every 0",
        "export run.db",
        "prune run.db",
        "prune run.db --max-bytes 10XB",
        "fork run.db fork.db",
        "x",
    ],
)
def test_wrong_usage_is_status_2(arguments: str) -> None:
    done = in_process(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage" in done.stderr


def test_wrong_usage_is_no_traceback() -> None:
    done = millrace("query", "run.db", "--limit", "0")
    assert (done.returncode, done.stdout, "Usage" in done.stderr, "Traceback" in done.stderr) == (2, "", True, False)


def test_paths_with_letters_of_urls(db: Path, tmp_path: Path) -> None:
    strange = "a b?mode=rw&%41#@:x.db"
    shutil.copy(db, tmp_path / strange)
    for url in (strange, tmp_path / strange, f"sqlite:///{strange}"):
        done = millrace("audit", url, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_early_is_no_traceback(db: Path) -> None:
    for arguments in (["show", str(db), str(HOSTILE_ID), "--json"], ["query", str(db)], ["status", str(db), "--watch", "--every", "0.1"]):
        process = subprocess.Popen([*MILLRACE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        with process.stderr as stream:
            assert stream.read() == ""
        process.wait(timeout=30)


# --- while a run goes on

WRITING = """
import asyncio, sys
from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer
from producer import ReplayPromptSampler, SyncProduceStrategy

async def main():
    rows = [{"prompt_ids": [1 + number % 60]} for number in range(1000)]
    async with ReplayBuffer.open(f"sqlite:///{sys.argv[1]}") as buffer, SimulatedEngine(seed=1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=4))
        sampler, strategy = ReplayPromptSampler(rows, buffer, group_size=2), SyncProduceStrategy(buffer, progress=False)
        for step in range(1, 1_000_000):
            await strategy.produce_batch(loop, sampler, 4, "live", step=step)
            print(step, flush=True)

asyncio.run(main())
"""


def test_it_looks_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with subprocess.Popen([sys.executable, "-c", WRITING, str(path)], stdout=subprocess.PIPE, text=True, env=environment()) as writing:
        try:
            assert writing.stdout is not None
            assert writing.stdout.readline() == "1\n"
            first = json.loads(shown("status", path, "--json"))
            last = writing.stdout.readline()
            while int(last) < first["last_step"] + 2:
                last = writing.stdout.readline()
            second = json.loads(shown("status", path, "--json"))
            assert second["tasks"]["live"]["counts"]["consumed"] >= first["tasks"]["live"]["counts"]["consumed"] + 8
            assert "every prompt is accounted for" in shown("audit", path)
            assert "consumed" in shown("query", path)
            assert writing.poll() is None
        finally:
            writing.kill()


def in_a_terminal(with_signal: signal.Signals | None, *arguments: str) -> tuple[int, bytes]:
    """Run in a terminal until it drew twice, then Ctrl-C or a signal; the exit status and what the terminal got."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*MILLRACE, *arguments], environment())
    before, seen = termios.tcgetattr(terminal), b""
    deadline = time.monotonic() + 40
    while seen.count(b"prompts drawn") < 2 and time.monotonic() < deadline:
        seen += os.read(terminal, 65536)
    if with_signal is None:
        os.write(terminal, b"\x03")
    else:
        os.kill(pid, with_signal)
    while part := read_or_end(terminal):
        seen += part
    assert termios.tcgetattr(terminal) == before
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def read_or_end(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the last process has let go of its terminal
        return b""


@pytest.mark.parametrize(("with_signal", "status"), [(None, 130), (signal.SIGTERM, 143)])
def test_watching_ends_with_the_terminal_as_it_was(db: Path, with_signal: signal.Signals | None, status: int) -> None:
    ended, seen = in_a_terminal(with_signal, "status", str(db), "--watch", "--every", "0.1")
    assert ended == status
    assert b"Traceback" not in seen
    hidden, shown_again = seen.rfind(b"\x1b[?25l"), seen.rfind(b"\x1b[?25h")
    assert 0 <= hidden < shown_again, "the cursor is there again"


def test_watching_into_a_pipe_gives_one_line_of_json_each_time(db: Path) -> None:
    arguments = [*MILLRACE, "status", str(db), "--watch", "--every", "0.1", "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    moving = {"at", "rate_seconds", "tasks", "producers"}
    assert list(lines[0]) == list(lines[2])
    assert {key: lines[0][key] for key in set(lines[0]) - moving} == {key: lines[2][key] for key in set(lines[0]) - moving}
    assert lines[0]["at"] < lines[2]["at"]


def test_an_impatient_ctrl_c_changes_nothing(db: Path) -> None:
    """Twenty signals at once, as a key held down or a signal to the process and to its group: one clean end."""
    arguments = [*MILLRACE, "status", str(db), "--watch", "--every", "0.1", "--json"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(20):
            process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert (process.returncode, error) == (130, "")


# --- how it is installed


def test_what_the_demo_says_to_look_at_next_works(
    db: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a report is written there
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    importlib.import_module("report").report({Status.ARCHIVED: 8}, [0.0, 1.0], db.parent)
    commands = re.findall(r"\.venv/bin/millrace (.+)", capsys.readouterr().out)
    assert [shown(*shlex.split(command)) != "" for command in commands] == [True, True, True]


def test_the_console_command_is_the_module() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"millrace": "producer.cli:main"}
    call = "import sys; from producer.cli import main; sys.argv = ['millrace', '--help']; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=60, check=True, env=environment())
    assert done.stdout == shown("--help")


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import producer, producer.experience", {"typer", "rich", "click", "torch"}),
        ("import producer.cli", {"typer", "rich", "click", "torch"}),
        ("import producer.cli.commands", {"torch", "vllm", "transformers", "rich"}),
    ],
)
def test_what_is_not_loaded(code: str, absent: set[str]) -> None:
    check = f"{code}; import sys; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True, env=environment())
    assert done.stdout.split() == []
