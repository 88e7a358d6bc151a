"""Shows which files can be opened, how the others are refused, and that a refusal or a full disk leaves nothing half-written."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status
from buffer.errors import BufferLockedError, DatabaseError, ForeignDatabaseError, SchemaVersionError
from tests.buffer.groups import a_group, ids, put_all, url

ROOT = Path(__file__).parents[2]


async def filled(folder: Path, n: int = 3) -> Path:
    """A closed database with `n` groups."""
    async with ReplayBuffer.open(url(folder)) as buffer:
        await put_all(buffer, [a_group(group_id) for group_id in range(1, n + 1)])
    return folder / "run.db"


def python(program: str, *arguments: object) -> str:
    """What a child process prints that runs the program, with the tests' helpers at hand."""
    head = "import asyncio, os, sys\nfrom buffer import ReplayBuffer, Status\nfrom tests.buffer.groups import a_group, put_all, url\n"
    command = [sys.executable, "-c", head + program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def assert_intact(folder: Path, expected: list[int], name: str = "run.db") -> None:
    """It opens for writing, adds up and holds these groups."""
    async with ReplayBuffer.open(url(folder, name)) as buffer:
        assert (await buffer.audit()).ok
        assert ids(await buffer.query(limit=10_000)) == expected


# -- URLs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("run.db", "is not a database URL; give one like 'sqlite:///run.db'"),
        ("", "is not a database URL"),
        ("mysql://user:secret@host/db", r"mysql://user:\*\*\*@host/db': only SQLite and PostgreSQL are supported"),
        ("sqlite://", "names no file, and a buffer in memory would not be durable"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite://host/run.db", "names no file"),
    ],
)
def test_a_bad_url_is_refused_at_construction(bad: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayBuffer.open(bad)


def test_an_unknown_way_of_writing_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="synchronous='OFF' is unknown; choose one of"):
        ReplayBuffer.open("sqlite:///run.db", synchronous="OFF")


@pytest.mark.parametrize("name", ["a b.db", "what?mode=memory.db", "50%20.db", "ruñ-运行.db", "a#b.db", "a'b;c.db", "-x@y:z.db"])
@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
async def test_any_path_is_taken_as_it_stands(tmp_path: Path, name: str, synchronous: str) -> None:
    async with ReplayBuffer.open(url(tmp_path, name), synchronous=synchronous) as buffer:
        await buffer.put(a_group(1))
        assert set(os.listdir(tmp_path)) == {name, name + ".lock", name + "-wal", name + "-shm"}
        async with ReplayBuffer.open(url(tmp_path, name), read_only=True) as reader:
            assert await reader.count("math", "completed") == 1
    await assert_intact(tmp_path, [1], name)


async def test_a_relative_path_stays_where_it_was_when_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = ReplayBuffer.open("sqlite:///run.db")
    monkeypatch.chdir("/")
    async with buffer:
        await buffer.put(a_group(1))
    await assert_intact(tmp_path, [1])


async def test_a_new_file_has_the_settings_that_speed_and_readers_need(tmp_path: Path) -> None:
    connection = sqlite3.connect(await filled(tmp_path))
    assert [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "page_size")] == ["wal", 32768]
    connection.close()


# -- one writer ------------------------------------------------------------------------------------------------------------


async def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    link = tmp_path / "link.db"
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        link.symlink_to(tmp_path / "run.db")
        for name in ("run.db", "link.db"):
            with pytest.raises(BufferLockedError, match=rf"run.db is being written by process {os.getpid()}; .* read_only=True"):
                await ReplayBuffer.open(url(tmp_path, name)).__aenter__()
        await buffer.put(a_group(1))
    await assert_intact(tmp_path, [1])


SECOND = """
async def main(folder):
    try:
        async with ReplayBuffer.open(f"sqlite:///{folder}/run.db"):
            print("opened")
    except OSError as error:
        print(type(error).__name__, error)
asyncio.run(main(sys.argv[1]))
"""


async def test_a_second_writing_process_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)):
        said = await asyncio.to_thread(python, SECOND, tmp_path)
        assert said.startswith("BufferLockedError")
        assert f"process {os.getpid()}" in said
    assert await asyncio.to_thread(python, SECOND, tmp_path) == "opened\n"


FORKING = """
import signal
async def main(folder):
    async with ReplayBuffer.open(f"sqlite:///{folder}/run.db") as buffer:
        await buffer.put(a_group(1))
        child = os.fork()
        if child == 0:
            os.close(1), os.close(2)
            signal.pause()
        print(child, flush=True)
        os._exit(0)  # as if killed: nothing is closed
asyncio.run(main(sys.argv[1]))
"""


async def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    child = int(await asyncio.to_thread(python, FORKING, tmp_path))
    try:
        os.kill(child, 0)
        await assert_intact(tmp_path, [1])
    finally:
        os.kill(child, 9)


UNWINDING = """
from buffer.backends.sqlite import FileLock
from pathlib import Path
lock = FileLock(Path(sys.argv[1]) / "run.db")
lock.acquire()
child = os.fork()
if child == 0:
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]  # one of them gets the number that the lock had
    try:
        sys.exit(5)
    finally:
        lock.release()
        for other in others:
            os.close(other)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lock._handle is not None)
"""


async def test_a_forked_child_that_unwinds_closes_nothing_twice(tmp_path: Path) -> None:
    assert await asyncio.to_thread(python, UNWINDING, tmp_path) == "5 True\n"


# -- readers beside a writer -----------------------------------------------------------------------------------------------

READING = """
async def main(folder):
    async with ReplayBuffer.open(f"sqlite:///{folder}/run.db", read_only=True) as buffer:
        for line in sys.stdin:
            assert (await buffer.audit()).ok
            print(await buffer.count("math", Status.COMPLETED), flush=True)
asyncio.run(main(sys.argv[1]))
"""


async def test_a_reader_in_another_process_sees_what_is_stored_while_it_reads(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        program = "import asyncio, sys\nfrom buffer import ReplayBuffer, Status\n" + READING
        reader = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(tmp_path), cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert reader.stdin is not None
        assert reader.stdout is not None
        for n in range(5):
            reader.stdin.write(b"count\n")
            assert int(await reader.stdout.readline()) == n
            await buffer.put(a_group(n + 1))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(put_all(buffer, [a_group(n) for n in range(100, 200)]))
            seen = []
            for _ in range(20):
                reader.stdin.write(b"count\n")
                seen.append(int(await reader.stdout.readline()))
        assert seen == sorted(seen), "while the writer writes, a reader goes only forward"
        reader.stdin.close()
        assert await reader.wait() == 0


async def test_a_finished_run_can_be_read(tmp_path: Path) -> None:
    await filled(tmp_path)
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as one, ReplayBuffer.open(url(tmp_path), read_only=True) as two:
        assert await one.count("math", "completed") == await two.count("math", "completed") == 3


# -- files that are something else ------------------------------------------------------------------------------------------


def newer(path: Path) -> None:
    _execute(path, "UPDATE millrace_meta SET value = '999' WHERE key = 'schema_version'")


def of_an_odd_version(path: Path) -> None:
    _execute(path, "UPDATE millrace_meta SET value = '²' WHERE key = 'schema_version'")


def of_no_version(path: Path) -> None:
    _execute(path, "DELETE FROM millrace_meta")


def foreign(path: Path) -> None:
    path.unlink()
    _execute(path, "CREATE TABLE accounts (id INTEGER)")


def text(path: Path) -> None:
    path.write_text("Not a database, but what its owner wants to keep.\n" * 99)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_in_its_head(path: Path) -> None:
    os.truncate(path, 50)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _execute(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


CASES: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (newer, SchemaVersionError, "schema version 999, this Millrace knows 5; install a newer Millrace"),
    (of_no_version, SchemaVersionError, "schema version none, .*; restore it from a copy"),
    (of_an_odd_version, SchemaVersionError, "schema version ², .*; restore it from a copy"),
    (foreign, ForeignDatabaseError, r"other tables \(accounts\) and is no Millrace buffer; give another file"),
    (text, DatabaseError, "run.db: file is not a database; the file is something else; give another one"),
    (truncated, DatabaseError, "run.db: database disk image is malformed; the file is damaged: restore it from a copy"),
    (cut_in_its_head, DatabaseError, "run.db: database disk image is malformed; the file is damaged: restore it from a copy"),
    (a_folder, DatabaseError, "run.db is a folder; give the name of a file in it"),
]


@pytest.mark.parametrize("read_only", [False, True], ids=["writing", "reading"])
@pytest.mark.parametrize(("change", "error", "message"), CASES, ids=[change.__name__ for change, _, _ in CASES])
async def test_what_is_no_buffer_of_ours_is_refused_and_left_as_it_was(
    tmp_path: Path, change: Callable[[Path], None], error: type[Exception], message: str, read_only: bool
) -> None:
    path = await filled(tmp_path)
    change(path)
    before = _bytes(path)
    for _ in range(2):
        with pytest.raises(error, match=message):
            await ReplayBuffer.open(url(tmp_path), read_only=read_only).__aenter__()
    assert _bytes(path) == before


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


async def test_reading_what_does_not_exist_or_is_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"unable to open database file; .* a buffer opened read-only must exist"):
        await ReplayBuffer.open(url(tmp_path), read_only=True).__aenter__()
    assert os.listdir(tmp_path) == []
    (tmp_path / "run.db").touch()
    with pytest.raises(ForeignDatabaseError, match="the database is empty and is no Millrace buffer"):
        await ReplayBuffer.open(url(tmp_path), read_only=True).__aenter__()
    await assert_intact(tmp_path, [])  # a writer makes an empty file a buffer


@pytest.mark.parametrize("read_only", [False, True], ids=["writing", "reading"])
async def test_a_missing_folder_is_named(tmp_path: Path, read_only: bool) -> None:
    with pytest.raises(DatabaseError, match=r"missing/run\.db.* the folder must exist and be writable"):
        await ReplayBuffer.open(url(tmp_path / "missing"), read_only=read_only).__aenter__()


# As root every file is writable: the file system is asked as user 65534 instead, by this thread and those it starts.
AS_NOBODY = """
import ctypes
async def main(folder, mode):
    os.chmod(folder, 0o777)
    async with ReplayBuffer.open(f"sqlite:///{folder}/warm-up.db"):
        pass  # loads every module that is needed
    os.chmod(f"{folder}/run.db", 0o444)
    os.chmod(f"{folder}/run.db.lock", 0o666)
    os.chmod(folder, int(mode, 8))
    if os.geteuid() == 0:
        ctypes.CDLL(None).setfsuid(65534)
    try:
        async with ReplayBuffer.open(f"sqlite:///{folder}/run.db") as buffer:
            print("opened")
    except OSError as error:
        print(type(error).__name__, error)
    try:
        async with ReplayBuffer.open(f"sqlite:///{folder}/new.db") as buffer:
            print("opened")
    except OSError as error:
        print(type(error).__name__, error)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("mode", ["777", "555"], ids=["file", "folder"])
async def test_a_read_only_file_or_folder_is_refused(mode: str, tmp_path: Path) -> None:
    path = await filled(tmp_path)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        os.chmod(parent, 0o711)
    first, second = (await asyncio.to_thread(python, AS_NOBODY, tmp_path, mode)).splitlines()
    os.chmod(tmp_path, 0o700)
    os.chmod(path, 0o600)
    assert first.startswith("DatabaseError")
    assert "readonly database; make the file and its folder writable" in first or "the folder must exist and be writable" in first
    assert second == "opened" if mode == "777" else "the folder must exist and be writable" in second
    await assert_intact(tmp_path, [1, 2, 3])


# -- when the disk is full ---------------------------------------------------------------------------------------------------

FULL_DISK = """
import json, resource
from pathlib import Path
async def main(folder, room):
    stored, refused = [], []
    async def one(buffer, n):
        try:
            await buffer.put(a_group(n, tokens=4000))
            stored.append(n)
        except OSError as error:
            refused.append(f"{type(error).__name__} {error}")
    async with ReplayBuffer.open(url(Path(folder))) as buffer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
        async with asyncio.TaskGroup() as tasks:
            for n in range(10, 110):
                tasks.create_task(one(buffer, n))
        assert (await buffer.audit()).ok
        assert await buffer.count("math", Status.COMPLETED) == len(stored) + 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await one(buffer, 200)
    print(json.dumps([stored, refused]))
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("room", [400_000, 1_500_000, 3_000_000])
async def test_a_full_disk_refuses_what_does_not_fit_and_keeps_the_rest(tmp_path: Path, room: int) -> None:
    await filled(tmp_path)
    stored, refused = json.loads(await asyncio.to_thread(python, FULL_DISK, tmp_path, room))
    assert refused
    assert all(message.startswith("DatabaseError") and "of this transaction was stored" in message for message in refused)
    assert len(stored) + len(refused) == 101
    assert 200 in stored, "once there is room again, it goes on"
    await assert_intact(tmp_path, [1, 2, 3, *sorted(stored)])


async def test_no_room_to_open_is_an_error(tmp_path: Path) -> None:
    program = """
import resource
from pathlib import Path
async def main(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        async with ReplayBuffer.open(url(Path(folder))):
            print("opened")
    except OSError as error:
        print(type(error).__name__, error)
asyncio.run(main(sys.argv[1]))
"""
    assert (await asyncio.to_thread(python, program, tmp_path)).startswith("DatabaseError")
    await assert_intact(tmp_path, [])


async def test_another_program_that_holds_the_file_is_no_end(tmp_path: Path) -> None:
    await filled(tmp_path)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        other = sqlite3.connect(tmp_path / "run.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.TaskGroup() as tasks:
            put = tasks.create_task(buffer.put(a_group(9)))
            assert await buffer.count("math", "completed") == 3, "readers do not wait"
            other.execute("COMMIT")
            await put
        other.close()
    await assert_intact(tmp_path, [1, 2, 3, 9])


# -- ending ------------------------------------------------------------------------------------------------------------------


def test_a_program_that_forgets_to_close_ends_and_has_stored_what_it_asked_for(tmp_path: Path) -> None:
    program = """
from pathlib import Path
async def main(folder):
    buffer = await ReplayBuffer.open(url(Path(folder))).__aenter__()
    for n in range(1, 30):
        asyncio.get_running_loop().create_task(buffer.put(a_group(n)))
    await asyncio.sleep(0)
asyncio.run(main(sys.argv[1]))
"""
    python(program, tmp_path)
    asyncio.run(assert_intact(tmp_path, list(range(1, 30))))


async def test_an_error_in_the_body_closes_the_buffer(tmp_path: Path) -> None:
    async def fail() -> None:
        async with ReplayBuffer.open(url(tmp_path)) as buffer:
            await buffer.put(a_group(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await assert_intact(tmp_path, [1])


async def test_opening_and_closing_leaves_no_file_descriptor_and_no_thread(tmp_path: Path) -> None:
    program = """
import threading
from pathlib import Path
def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count()
async def main(folder):
    counts = []
    for n in range(4):
        async with ReplayBuffer.open(url(Path(folder))) as buffer:
            await buffer.put(a_group(n + 1))
            await buffer.audit()
        counts.append(held())
        try:
            await ReplayBuffer.open(url(Path(folder), "missing/run.db")).__aenter__()
        except OSError:
            counts.append(held())
    print(len(set(counts)), sorted(os.listdir(folder)))
asyncio.run(main(sys.argv[1]))
"""
    assert await asyncio.to_thread(python, program, tmp_path) == "1 ['run.db', 'run.db.lock']\n"


async def test_damage_met_while_reading_is_named(tmp_path: Path) -> None:
    path = await filled(tmp_path, 1)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        _execute(path, "UPDATE payloads SET arrays = zeroblob(7)")
        with pytest.raises(DatabaseError, match="group 1: a payload has 7 bytes, its lengths say otherwise; the database was damaged"):
            await buffer.get(1)
        with pytest.raises(DatabaseError, match="the database was damaged"):
            await buffer.take("math", 1, step=1)
        await buffer.commit(0)  # behind the giving back
        assert await buffer.count("math", Status.COMPLETED) == 1, "what could not be handed out is not consumed"
