"""Shows that the event loop and the writer do not wait for each other: shown by the order of things, not by clocks."""

import asyncio
from pathlib import Path

from buffer import ReplayBuffer
from tests.buffer.groups import a_group, draw, put_all, url


async def test_counting_answers_while_a_long_write_is_under_way(tmp_path: Path) -> None:  # case 15
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await draw(buffer, *range(3000), group_size=1)
        large = [a_group(10_000 + n, size=2, tokens=100_000) for n in range(40)]
        async with asyncio.TaskGroup() as tasks:
            puts = [tasks.create_task(buffer.put(group)) for group in large]
            await asyncio.sleep(0)  # now all of them are asked for
            assert await buffer.count("math", "pending") == 3000
            assert await buffer.counts("code")
            assert not puts[-1].done(), "all but the first are in one transaction, and it is still being written"
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
