"""Shows that who waits for groups is woken when they are there, loses no wake-up, and is told when they cannot come."""

import asyncio
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status
from buffer.errors import BufferClosedError, ReplayBufferError
from tests.buffer.groups import a_group, url

pytestmark = pytest.mark.usefixtures("backend")


async def test_many_wait_while_groups_come(buffer: ReplayBuffer) -> None:
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        waits = {n: tasks.create_task(buffer.wait_for("math", "completed", n)) for n in (1, 2, 5, 9, 10)}
        for n in range(1, 11):
            tasks.create_task(buffer.put(a_group(n)))
            await asyncio.sleep(0)
    assert all(wait.result() >= n for n, wait in waits.items())


async def test_what_is_there_is_not_waited_for(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    assert await buffer.wait_for("math", Status.COMPLETED) == 1
    assert await buffer.wait_for("math", Status.FAILED, 0) == 0


async def test_after_the_timeout_it_is_an_error(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, task_name="code"))
    with pytest.raises(TimeoutError):
        await buffer.wait_for("math", "completed", timeout=0.05)


async def test_closing_tells_who_waits(tmp_path: Path) -> None:
    buffer = await ReplayBuffer.open(url(tmp_path)).__aenter__()
    waiting = asyncio.get_running_loop().create_task(buffer.wait_for("math", "completed"))
    await buffer.put(a_group(1, Status.FAILED))
    await buffer.close()
    with pytest.raises(BufferClosedError):
        await waiting


@pytest.mark.sqlite
async def test_a_reader_of_a_file_is_not_told_and_says_so(buffer: ReplayBuffer, tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as reader:
        with pytest.raises(ReplayBufferError, match=r"is not told what the writing process stores; .* or use PostgreSQL"):
            await reader.wait_for("math", "completed", timeout=5)


async def test_a_name_that_no_database_takes_is_refused(buffer: ReplayBuffer) -> None:
    with pytest.raises(ValueError, match="task_name"):
        await buffer.wait_for("ma\0th", "completed")
