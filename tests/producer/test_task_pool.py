"""The task pool owns what it starts: results under keys, errors that leave its block, and no task behind it."""

import asyncio
import warnings
from typing import NoReturn

import pytest

from producer.task_pool import TaskPool


class Pool(TaskPool[int]):
    """Waits for what it is told of."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        super().__init__(self.changed.set)

    async def some(self) -> list[int]:
        while not (results := self.taken()):
            self.changed.clear()
            await self.changed.wait()
        return results


async def give(value: int) -> int:
    return value


async def never() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture(autouse=True)
async def no_task_is_left():  # type: ignore[no-untyped-def]
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - {asyncio.current_task()} <= before


async def test_results_come_as_they_are_ready_and_keys_name_what_runs() -> None:
    go = asyncio.Event()

    async def later(value: int) -> int:
        await go.wait()
        return value

    async with Pool() as pool:
        pool.start("slow", later(1))
        pool.start("quick", give(2))
        assert pool.running == ["slow", "quick"]
        assert len(pool) == 2
        assert await pool.some() == [2]
        assert pool.running == ["slow"]
        go.set()
        assert await pool.some() == [1]
        assert len(pool) == 0


async def test_results_that_wait_count_until_they_are_taken() -> None:
    async with Pool() as pool:
        for value in range(3):
            pool.start(value, give(value))
        assert await pool.drained(5.0)
        assert pool.running == []
        assert len(pool) == 3
        assert sorted(pool.taken()) == [0, 1, 2]
        assert len(pool) == 0


async def test_a_key_runs_once_at_a_time_and_again_afterwards() -> None:
    async with Pool() as pool:
        pool.start("a", give(1))
        with pytest.raises(ValueError, match="'a' is running already"):
            pool.start("a", give(2))
        assert await pool.some() == [1]
        go = asyncio.Event()

        async def wait() -> int:
            await go.wait()
            return 3

        pool.start("a", wait())
        for _ in range(3):
            await asyncio.sleep(0)  # the first task's callback comes now, and must not take the second for its own
        assert pool.running == ["a"]
        go.set()
        assert await pool.some() == [3]


async def test_an_error_cancels_the_others_and_leaves_the_block() -> None:
    cancelled = asyncio.Event()

    async def sibling() -> int:
        try:
            await never()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def fail() -> int:
        await asyncio.sleep(0)
        raise OSError("gone")

    async def block() -> None:
        async with Pool() as pool:
            pool.start(1, sibling())
            pool.start(2, fail())
            await pool.some()

    with pytest.raises(ExceptionGroup) as caught:
        await block()
    assert isinstance(caught.value.exceptions[0], OSError)
    assert cancelled.is_set()


async def test_a_task_cancelled_before_its_first_step_is_forgotten_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with Pool() as pool:
            pool.start(1, never())
            pool.cancel()
            assert await pool.drained(5.0)
            assert len(pool) == 0


async def test_drained_says_what_does_not_end_in_time() -> None:
    async with Pool() as pool:
        pool.start(1, never())
        assert not await pool.drained(0.0)
        pool.cancel()
        assert await pool.drained(5.0)


async def test_cancelling_the_block_cancels_what_runs() -> None:
    began = asyncio.Event()

    async def work() -> int:
        began.set()
        return await never()

    async def block() -> None:
        async with Pool() as pool:
            pool.start(1, work())
            await pool.some()

    task = asyncio.create_task(block())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
