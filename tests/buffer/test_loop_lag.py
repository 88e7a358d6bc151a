"""Shows that the event loop and the writer do not wait for each other: shown by the order of things, not by clocks."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, operations, queries
from buffer.codec import snapshot
from tests.buffer.groups import a_group, draw, put_all, url

pytestmark = pytest.mark.usefixtures("backend")


async def test_counting_answers_while_a_long_write_is_under_way(tmp_path: Path) -> None:  # case 15
    under_way, go_on = threading.Event(), threading.Event()

    def long_write(tx: queries.Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
        """As long as this test wants, in the midst of its transaction, which wrote already."""
        results = operations.put(tx, arguments)
        under_way.set()
        assert go_on.wait(60)
        return results

    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await draw(buffer, *range(3000), group_size=1)
        async with asyncio.TaskGroup() as tasks:
            long = tasks.create_task(buffer._write(long_write, operations.Put(snapshot(a_group(10_000, tokens=100_000)))))
            await asyncio.to_thread(under_way.wait, 60)
            put = tasks.create_task(buffer.put(a_group(10_001)))
            assert await buffer.count("math", "pending") == 3000
            assert await buffer.count("math", "completed") == 0
            assert len(await buffer.query(limit=50)) == 50
            assert (await buffer.audit()).ok
            assert not long.done()
            assert not put.done()
            go_on.set()
        assert await buffer.count("math", "completed") == 2


async def test_counting_answers_beside_the_largest_of_writes(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        counted = [0]
        async with asyncio.TaskGroup() as tasks:
            puts = [tasks.create_task(buffer.put(a_group(1 + n, tokens=100_000))) for n in range(40)]
            while not all(put.done() for put in puts):
                counted.append(await buffer.count("math", "completed"))
        assert counted == sorted(counted)
        assert await buffer.count("math", "completed") == 40


async def test_a_loop_that_never_idles_does_not_keep_writes_from_completing(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        done = False

        async def spin() -> int:
            turns = 0
            while not done:
                turns += 1
                await asyncio.sleep(0)
            return turns

        async with asyncio.TaskGroup() as tasks:
            spinning = tasks.create_task(spin())
            await put_all(buffer, [a_group(n) for n in range(1, 30)])
            assert len(await buffer.take("math", 20, step=1)) == 20
            done = True
        assert spinning.result() > 60, "the loop went round while the writer wrote"


async def test_what_is_asked_for_at_once_is_answered_at_once(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        finished: list[int] = []

        async def put(n: int) -> None:
            await buffer.put(a_group(n))
            finished.append(n)

        async with asyncio.TaskGroup() as tasks:
            for n in range(1, 201):
                tasks.create_task(put(n))
        assert finished == sorted(finished), "answers come in the order of asking"
