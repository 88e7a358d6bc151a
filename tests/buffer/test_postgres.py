"""Shows that on PostgreSQL what was asked for is done exactly once, whatever becomes of the server and the connections."""

import asyncio
import os
import random
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from buffer import ReplayBuffer, Status
from buffer.errors import BufferClosedError, DatabaseError, ForeignDatabaseError, SchemaVersionError
from tests import postgres
from tests.buffer.groups import a_group, draw, finished, ids, put_all, rows, url

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def on_postgresql(server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    yield
    postgres.drop_schemas(server.address)


# -- what can be opened ------------------------------------------------------------------------------------------------


async def refusal(address: str, **options: Any) -> str:
    with pytest.raises(DatabaseError) as caught:
        await ReplayBuffer.open(address, **options).__aenter__()
    said = str(caught.value)
    assert "\n" not in said
    assert "secret" not in said
    return f"{type(caught.value).__name__} {said}"


async def test_what_cannot_be_reached_is_named_with_what_to_do(server: postgres.Server) -> None:
    where = server.address.partition("host=")[2]
    said = await refusal("postgresql://me:secret@127.0.0.1:1/run?connect_timeout=5")
    assert "postgresql://me:***@127.0.0.1:1/run" in said or "postgresql://me@127.0.0.1:1/run" in said
    assert "a PostgreSQL server must run there" in said
    assert "make the database with CREATE DATABASE" in await refusal(f"postgresql://postgres:secret@/absent?host={where}")
    assert "make the user with CREATE ROLE" in await refusal(f"postgresql://nobody_here:secret@/postgres?host={where}")
    assert "make it with CREATE SCHEMA" in await refusal(f"{server.address}&options=-csearch_path%3Dabsent")
    assert "invalid" in await refusal(f"{server.address}&absent=1")


async def test_a_wrong_password_is_told_and_not_shown(server: postgres.Server) -> None:
    where = server.address.partition("host=")[2]
    with postgres.password_needed(server.address, "careful", "right-secret"):
        for given in (":wrong-secret", ""):
            said = await refusal(f"postgresql://careful{given}@/postgres?host={where}")
            assert said.startswith(f"DatabaseError postgresql://careful{':***' if given else ''}@/postgres?host=")
            assert ('password authentication failed for user "careful"' if given else "no password supplied") in said
            assert said.endswith("give the right user and password in the URL")
        async with ReplayBuffer.open(f"postgresql://careful:right-secret@/postgres?host={where}") as buffer:
            assert await buffer.task_names() == []


async def test_a_user_who_may_only_read_reads(server: postgres.Server, tmp_path: Path) -> None:
    address = url(tmp_path)
    async with ReplayBuffer.open(address) as buffer:
        await buffer.put(a_group(1))
    schema = address.rpartition("%3D")[2]
    postgres.execute(
        server.address,
        "DROP ROLE IF EXISTS guest",
        "CREATE ROLE guest LOGIN",
        f"GRANT USAGE ON SCHEMA {schema} TO guest",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO guest",
    )
    guest = address.replace("postgres:@", "guest:@")
    said = await refusal(guest)
    assert "permission denied" in said
    assert "use read_only=True" in said
    async with ReplayBuffer.open(guest, read_only=True) as reader:
        assert await reader.count("math", Status.COMPLETED) == 1


async def test_databases_that_are_none_of_ours_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    foreign, empty, newer = (url(tmp_path, name) for name in ("foreign", "empty", "newer"))
    postgres.execute(foreign, "CREATE TABLE accounts (id int)")
    for read_only in (False, True):
        said = await refusal(foreign, read_only=read_only)
        assert said.startswith(ForeignDatabaseError.__name__)
        assert "other tables (accounts)" in said
        assert "a schema of its own" in said
    assert "the database is empty" in await refusal(empty, read_only=True)
    async with ReplayBuffer.open(newer):
        pass
    postgres.execute(newer, "UPDATE millrace_meta SET value = '999' WHERE key = 'schema_version'")
    assert (await refusal(newer)).startswith(SchemaVersionError.__name__)
    assert postgres.execute(foreign, "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()") == [(1,)]


async def test_many_that_open_an_empty_database_at_once_make_it_once(tmp_path: Path) -> None:
    address = url(tmp_path)
    buffers = [ReplayBuffer.open(address) for _ in range(4)]
    async with asyncio.TaskGroup() as tasks:
        for buffer in buffers:
            tasks.create_task(buffer.__aenter__())
    await buffers[0].put(a_group(1))
    assert [await buffer.count("math", Status.COMPLETED) for buffer in buffers] == [1] * 4
    for buffer in buffers:
        await buffer.close()


async def test_arrays_are_stored_as_they_are(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)):
        pass
    kept = "SELECT attstorage::text FROM pg_attribute WHERE attname = 'arrays' AND attrelid IN ('payloads'::regclass, 'prefixes'::regclass)"
    assert postgres.execute(url(tmp_path), kept) == [("e",), ("e",)]


# -- lost connections ------------------------------------------------------------------------------------------------------


def terminate(address: str, who: str = "millrace") -> int:
    """End the server's processes for our connections; gives how many."""
    found = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '{who}%' AND pid <> pg_backend_pid()"
    return len(postgres.execute(address, found))


async def produce(buffer: ReplayBuffer, producer: int, n: int) -> list[int]:
    """Put groups of our own, one after the other; gives those that were acknowledged."""
    for number in range(n):
        await buffer.put(a_group(1000 * producer + number + 1, size=1))
    return [1000 * producer + number + 1 for number in range(n)]


async def assert_exactly(buffer: ReplayBuffer, expected: list[int]) -> None:
    report = await buffer.audit()
    assert report.ok, report.problems
    assert ids(await buffer.query(limit=10_000)) == sorted(expected)
    assert await buffer.count("math", Status.COMPLETED) == len(expected)
    taken = await buffer.take("math", len(expected), step=1)
    assert sorted(ids(taken)) == sorted(expected)


async def test_connections_that_are_ended_at_any_moment_lose_nothing_and_double_nothing(tmp_path: Path, server: postgres.Server) -> None:
    generator, done, ended = random.Random(7), threading.Event(), []

    def disturb() -> None:
        # Ever more seldom: a machine that is busy besides gets a transaction through too.
        while not done.wait(generator.uniform(0.02, 0.2) * (1 + len(ended) / 10)):
            ended.append(terminate(server.address))

    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                producers = [tasks.create_task(produce(buffer, n, 25)) for n in range(1, 33)]
                counted = [await buffer.count("math", Status.COMPLETED) for _ in range(20)]
        finally:
            done.set()
            await asyncio.to_thread(disturber.join)
        assert sum(ended) > 0
        assert counted == sorted(counted)
        await assert_exactly(buffer, [group_id for task in producers for group_id in task.result()])


async def test_a_server_that_crashes_and_comes_back_loses_nothing_and_doubles_nothing(tmp_path: Path, server: postgres.Server) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer, asyncio.TaskGroup() as tasks:
        producers = [tasks.create_task(produce(buffer, n, 20)) for n in range(1, 33)]
        await buffer.wait_for("math", Status.COMPLETED, 100)
        await asyncio.to_thread(server.restart)
        await buffer.wait_for("math", Status.COMPLETED, 640)
        await assert_exactly(buffer, [group_id for task in producers for group_id in await task])


async def test_a_commit_whose_answer_is_lost_counts_once(tmp_path: Path, server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    commit = psycopg.Connection.commit

    def commit_and_lose(connection: "psycopg.Connection[Any]") -> None:
        writes = connection.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS and not connection.read_only
        if writes and len(lost) < 10 and threading.current_thread().name == "millrace-writer":
            moment = ("before", "after")[len(lost) % 2]
            lost.append(moment)
            if moment == "after":
                commit(connection)
            with psycopg.connect(server.address, autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s, 10000)", [connection.info.backend_pid])
        commit(connection)
        if writes and lost and connection.closed:
            raise psycopg.OperationalError("the answer was lost")

    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        monkeypatch.setattr(psycopg.Connection, "commit", commit_and_lose)
        drawn = [group_id for n in range(4) for group_id in await draw(buffer, 2 * n, 2 * n + 1)]
        groups = await buffer.start(drawn)
        await put_all(buffer, [finished(group) for group in groups])
        assert set(lost) == {"before", "after"}
        assert len(lost) == 10
        await assert_exactly(buffer, drawn)
        assert [len(await buffer.history(group_id)) for group_id in drawn] == [4] * 8


async def test_a_connection_that_is_not_regained_in_time_ends_the_buffer_with_an_error(tmp_path: Path, server: postgres.Server) -> None:
    buffer = await ReplayBuffer.open(url(tmp_path), reconnect_timeout=0.3).__aenter__()
    await buffer.put(a_group(1))
    server.stop_for_a_while()
    try:
        with pytest.raises(BufferClosedError, match=r"not regained in 0.3 s: what was under way may be stored or not"):
            await buffer.put(a_group(2))
        with pytest.raises(BufferClosedError, match="the buffer is closed"):
            await buffer.put(a_group(3))
        with pytest.raises(DatabaseError, match="a PostgreSQL server must run there"):
            await buffer.count("math", "completed")
        await buffer.close()
    finally:
        server.go_on()
    async with ReplayBuffer.open(url(tmp_path)) as again:
        assert (await again.audit()).ok


FORKING = """
import asyncio, os, sys, time
from buffer import ReplayBuffer
async def main():
    async with ReplayBuffer.open(sys.argv[1]) as buffer:
        await buffer.count("math", "completed")
        worker = os.fork()
        if worker == 0:
            time.sleep(30)
            os._exit(0)
        print(worker, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_forked_child_that_outlives_a_killed_process_does_not_keep_its_connections(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING, url(tmp_path)]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    worker = int(await process.stdout.readline())
    held = os.pidfd_open(worker)
    process.kill()
    postgres.wait_until_idle(url(tmp_path))
    assert not select.select([held], [], [], 0)[0], "it need not end for that"
    signal.pidfd_send_signal(held, signal.SIGKILL)
    os.close(held)
    await process.wait()


# -- waiting ---------------------------------------------------------------------------------------------------------------


async def test_a_commit_of_another_process_wakes_who_waits(tmp_path: Path, server: postgres.Server) -> None:
    async with (
        ReplayBuffer.open(url(tmp_path)) as producer,
        ReplayBuffer.open(url(tmp_path)) as trainer,
        ReplayBuffer.open(url(tmp_path), read_only=True) as reader,
        asyncio.timeout(60),
        asyncio.TaskGroup() as tasks,
    ):
        for waiting in (trainer, reader):
            tasks.create_task(waiting.wait_for("math", "completed", 20))
        for n in range(1, 21):
            if n == 10:
                terminate(server.address, "millrace reader")  # the listeners too: they come back, and look again
            await producer.put(a_group(n))


# -- samplers ----------------------------------------------------------------------------------------------------------------


async def test_many_draws_of_one_task_by_several_buffers_draw_each_prompt_once(tmp_path: Path) -> None:
    async def draws(buffer: ReplayBuffer) -> None:
        for _ in range(20):
            cursor = await buffer.cursor("math")
            offset = (cursor.state or {"offset": 0})["offset"]
            try:
                await buffer.draw("math", rows(offset), group_size=1, moves=cursor.moves, cursor={"offset": offset + 1})
            except RuntimeError:
                continue

    async with ReplayBuffer.open(url(tmp_path)) as one, ReplayBuffer.open(url(tmp_path)) as two:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(draws(one))
            tasks.create_task(draws(two))
        groups = await one.query(limit=100)
        assert sorted(group.position.offset for group in groups if group.position) == list(range(len(groups)))
        assert (await one.audit()).ok
