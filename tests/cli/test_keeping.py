"""The commands of `millrace` that write: what they do, what they ask first, and that they leave alone what a trainer writes to."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from buffer import Status
from tests.cli.command import HOSTILE_ID, MILLRACE, ROOT, asked, environment, in_process, millrace, refused, said, shown


@pytest.fixture
def copy(db: Path, tmp_path: Path) -> Path:
    """A database that a test may change."""
    return Path(shutil.copy(db, tmp_path / "copy.db"))


def with_tokens(db: Path, status: Status) -> list[int]:
    groups = asked(db, lambda buffer: buffer.query(status=status))
    return [group.group_id for group in groups if any(rollout.response_ids.size for rollout in group.rollouts)]


# --- export and import


def test_what_is_exported_is_imported_elsewhere(db: Path, tmp_path: Path) -> None:
    path, there = tmp_path / "run.parquet", tmp_path / "there.db"
    n = sum(sum(counts.values()) for counts in json.loads(said("audit", db, "--json"))["counts"].values())
    assert shown("export", db, path) == f"{n} groups written to {path}\n"
    assert shown("import", there, path) == f"{n} groups added\n"
    assert json.loads(said("import", there, path, "--json")) == {"path": str(path), "groups": 0}
    assert json.loads(said("audit", there, "--payloads", "--json")) == json.loads(said("audit", db, "--json"))
    for group in asked(db, lambda buffer: buffer.query(limit=3)):
        before, after = (json.loads(said("show", where, group.group_id, "--json")) for where in (db, there))
        assert {key: after[key] for key in after if key != "history"} == {key: before[key] for key in before if key != "history"}


def test_export_filters_and_replaces_only_when_told(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    assert json.loads(said("export", db, path, "--task", "demo", "--status", "archived", "--json")) == {"path": str(path), "groups": 4}
    before = path.read_bytes()
    refused(in_process("export", db, path), "some.jsonl is there already; give another name, or --overwrite")
    assert path.read_bytes() == before
    said("export", db, path, "--overwrite")
    assert len(path.read_bytes()) > len(before)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("export", "run.csv"), "use .parquet, .jsonl or .jsonl.gz"),
        (("export", "absent/run.jsonl"), "absent"),
        (("export", "run.jsonl", "--task", "absent"), "there is no task 'absent'"),
        (("import", "absent.jsonl"), "there is no file"),
        (("import", "copy.db"), "use .parquet, .jsonl or .jsonl.gz"),
        (("import", "notes.jsonl"), "notes.jsonl"),
        (("fork", "copy.db", "--step", "1"), "copy.db"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_leaves_everything_as_it_was(
    copy: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(copy.parent)
    Path("notes.jsonl").write_text('{"no": "groups"}\n')
    before = json.loads(said("audit", copy, "--json"))
    refused(in_process(command[0], "copy.db", *command[1:]), reason)
    assert json.loads(said("audit", copy, "--json")) == before
    assert {path.name for path in copy.parent.iterdir()} <= {"copy.db", "copy.db-wal", "copy.db-shm", "copy.db.lock", "notes.jsonl"}


@pytest.mark.parametrize("name", ["absent.jsonl", "notes.jsonl", "notes.parquet", "notes.csv"])
def test_no_database_is_made_for_a_file_that_is_none(tmp_path: Path, name: str) -> None:
    for other in ("notes.jsonl", "notes.parquet", "notes.csv"):
        (tmp_path / other).write_text("no groups\n")
    assert in_process("import", tmp_path / "new.db", tmp_path / name).returncode == 1
    assert not (tmp_path / "new.db").exists()


# --- prune


def test_prune_gives_up_what_lies_beyond_and_says_what(copy: Path) -> None:
    assert len(with_tokens(copy, Status.ARCHIVED)) == 4
    done = json.loads(said("prune", copy, "--keep-last", 1, "--yes", "--json"))
    assert (done["payloads"], done["rows"], done["payload_bytes"] > 0) == (3, 0, True)
    assert len(with_tokens(copy, Status.ARCHIVED)) == 1
    assert shown("prune", copy, "--max-bytes", "0B", "--rows", "--yes").startswith("gave up the tokens of 1 group (")
    assert (with_tokens(copy, Status.ARCHIVED), len(with_tokens(copy, Status.CONSUMED))) == ([], 4)
    assert "every prompt is accounted for" in said("audit", copy)


@pytest.mark.parametrize(("typed", "left"), [("y\n", 0), ("YES\n", 0), ("n\n", 4), ("\n", 4), ("", 4)])
def test_prune_asks_first(copy: Path, typed: str, left: int) -> None:
    done = in_process("prune", copy, "--keep-steps", 0, typed=typed)
    assert done.stderr.startswith("copy.db has 4 committed groups with ")
    assert "Give up what lies beyond these bounds, for good? [y/N]" in done.stderr
    assert (len(with_tokens(copy, Status.ARCHIVED)), done.returncode) == (left, 1 if left else 0)
    assert (done.stdout == "") == bool(left)
    assert ("nothing was given up" in done.stderr) == bool(left)


def test_prune_asks_nobody_who_is_not_there(copy: Path) -> None:
    words = [*MILLRACE, "prune", str(copy), "--keep-steps", "0"]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False, env=environment())
    assert (done.returncode, done.stdout, len(with_tokens(copy, Status.ARCHIVED))) == (1, b"", 4)


def test_ctrl_c_at_the_question_gives_nothing_up(copy: Path) -> None:
    words = [*MILLRACE, "prune", str(copy), "--keep-steps", "0"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stderr is not None
        assert process.stderr.read(1)  # it asks
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
    assert (process.returncode, out, b"Traceback" in error) == (130, b"", False)
    assert len(with_tokens(copy, Status.ARCHIVED)) == 4


# --- fork


def test_a_fork_is_the_run_at_a_step(copy: Path) -> None:
    made = json.loads(said("fork", copy, copy.with_name("first.db"), "--step", 1, "--json"))
    assert (made["step"], made["rewound"]) == (1, 4)
    again = shown("fork", copy, f"sqlite:///{copy.with_name('second.db')}", "--step", 0)
    assert again.startswith(f"{made['groups']} groups copied to second.db, as at step 0 and version 0: 8 groups will be handed out again")
    counts = json.loads(said("status", copy.with_name("second.db"), "--json"))["tasks"]["demo"]["counts"]
    assert (counts["archived"], counts["consumed"]) == (0, 0)


# --- migrate


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A database as the first release made it."""
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.executescript((ROOT / "tests/buffer/data/schema-1.sql").read_text())
    connection.close()
    return tmp_path / "old.db"


def test_an_older_database_is_brought_forward_once(old: Path) -> None:
    refused(in_process("status", old), "the database has schema version 1, this Millrace knows 5; open it for writing once")
    assert shown("migrate", old) == "old.db was brought forward from schema version 1 to 5\n"
    assert said("migrate", old) == "nothing to do: old.db has schema version 5, the newest\n"
    assert json.loads(said("migrate", old, "--json")) == {"before": 5, "now": 5}
    assert "every prompt is accounted for" in said("audit", old, "--payloads")


def test_migrating_says_in_json_what_was_done(old: Path) -> None:
    assert json.loads(said("migrate", old, "--json")) == {"before": 1, "now": 5}


@pytest.mark.parametrize(
    ("stored", "remedy"), [("999", "install a newer Millrace"), ("0", "restore it from a copy"), ("x\x1b", "restore it")]
)
def test_what_no_step_leads_from_is_refused(copy: Path, stored: str, remedy: str) -> None:
    with sqlite3.connect(copy) as connection:
        connection.execute("update millrace_meta set value = ? where key = 'schema_version'", [stored])
    refused(in_process("migrate", copy), remedy)


# --- beside a trainer

WRITER = """
import asyncio, sys
from buffer import ReplayBuffer

async def main():
    async with ReplayBuffer.open(f"sqlite:///{sys.argv[1]}"):
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


def test_what_another_process_writes_to_is_only_read(copy: Path, tmp_path: Path) -> None:
    path, words = tmp_path / "run.jsonl.gz", [sys.executable, "-c", WRITER, str(copy)]
    writing: subprocess.Popen[Any]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as writing:
        assert writing.stdout is not None
        assert writing.stdout.readline() == "open\n"
        assert "groups written" in said("export", copy, path)
        assert "groups copied" in said("fork", copy, tmp_path / "fork.db", "--step", 2)
        being_written = f"copy.db is being written by process {writing.pid}"
        refused(millrace("prune", copy, "--keep-steps", 0, "--yes"), being_written)
        refused(in_process("import", copy, path), being_written)
        assert said("migrate", copy).startswith("nothing to do"), "looking is enough"
        writing.communicate()
    assert writing.returncode == 0
    assert len(with_tokens(copy, Status.ARCHIVED)) == 4


def test_hostile_names_of_files_are_shown_as_text(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    strange = "[red]a\x1b[2J.db"
    copy.rename(strange)
    done = in_process("prune", strange, "--keep-steps", 1, typed="n\n")
    assert "\x1b" not in done.stderr
    for command in (("status",), ("export", "\x1b[2J[red].jsonl"), ("show", HOSTILE_ID), ("fork", "\x1b[2J.db", "--step", 2)):
        out = said(command[0], strange, *command[1:])
        assert "\x1b" not in out
