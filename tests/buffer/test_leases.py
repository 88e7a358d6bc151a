"""Shows that what a dead or hung producer ran is run by others, once, and that it is told so when it comes back."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status
from buffer.errors import LeaseLostError
from tests import postgres
from tests.buffer.groups import draw, finished, ids, url

ROOT = Path(__file__).parents[2]
WAITING = [Status.INTERRUPTED, Status.PENDING]


@pytest.fixture(autouse=True)
def on_postgresql(server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    yield
    postgres.drop_schemas(server.address)


async def child(program: str, folder: Path) -> asyncio.subprocess.Process:
    """A process of its own that runs the program; it waits for lines and answers with lines."""
    head = "import asyncio, sys\nfrom pathlib import Path\nfrom buffer import ReplayBuffer, Status\nfrom tests.buffer.groups import *\n"
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", head + program, str(folder), cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip()


def say(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go on\n")


RUNNING = """
async def main(folder):
    async with ReplayBuffer.open(url(Path(folder)), lease=LEASE) as buffer:
        groups = await buffer.claim("math", 3, statuses=[Status.PENDING])
        print(len(groups), flush=True)
        sys.stdin.readline()
        for group in groups:
            try:
                await buffer.put(finished(group))
                print("stored", flush=True)
            except Exception as error:
                print(type(error).__name__, flush=True)
asyncio.run(main(sys.argv[1]))
"""


async def test_what_a_killed_producer_ran_is_run_elsewhere(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path), lease=1.0) as buffer:
        await draw(buffer, 0, 1, 2)
        killed = await child(RUNNING.replace("LEASE", "1.0"), tmp_path)
        assert await line(killed) == "3"
        assert await buffer.claim("math", 3, statuses=WAITING) == []
        killed.kill()
        await killed.wait()
        assert await buffer.wait_for("math", Status.INTERRUPTED, 3, timeout=60) == 3
        groups = await buffer.claim("math", 3, statuses=WAITING)
        assert [r.interruptions for group in groups for r in group.rollouts] == [1] * 6
        for group in groups:
            await buffer.put(finished(group))
        assert await buffer.count("math", Status.COMPLETED) == 3
        assert "its producer died" in str((await buffer.history(groups[0].group_id))[2].reason)
        assert (await buffer.audit()).ok


async def test_a_producer_that_hangs_loses_its_groups_and_is_told_when_it_comes_back(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path), lease=1.0) as buffer:
        await draw(buffer, 0, 1, 2)
        hung = await child(RUNNING.replace("LEASE", "1.0"), tmp_path)
        assert await line(hung) == "3"
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            assert await buffer.wait_for("math", Status.INTERRUPTED, 3, timeout=60) == 3
            groups = await buffer.claim("math", 3, statuses=WAITING)
            await buffer.put(finished(groups[0]))
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        say(hung)
        assert [await line(hung) for _ in range(3)] == [LeaseLostError.__name__] * 3
        assert await hung.wait() == 0
        for group in groups[1:]:
            await buffer.put(finished(group))
        assert await buffer.count("math", Status.COMPLETED) == 3
        assert (await buffer.audit()).ok


async def test_a_blocked_event_loop_loses_nothing(tmp_path: Path) -> None:
    other = await child(
        """
async def main(folder):
    async with ReplayBuffer.open(url(Path(folder)), lease=0.6) as buffer:
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(len(await buffer.claim("math", 9, statuses=["interrupted", "pending"])), flush=True)
asyncio.run(main(sys.argv[1]))
""",
        tmp_path,
    )
    assert await line(other) == "open"
    async with ReplayBuffer.open(url(tmp_path), lease=0.6) as buffer:
        groups = await buffer.start(await draw(buffer, 0, 1))
        time.sleep(2.0)  # noqa: ASYNC251 - several leases long; the other process looks for expired ones all the while
        for group in groups:
            await buffer.put(finished(group))
        say(other)
        assert await line(other) == "0"
        assert await other.wait() == 0


async def test_closing_gives_the_groups_back_at_once(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        async with ReplayBuffer.open(url(tmp_path)) as other:
            drawn = await draw(other, 0, 1)
            await other.start(drawn)
        assert ids(await buffer.claim("math", 2, statuses=WAITING)) == drawn


CLAIMING = """
async def main(folder):
    async with ReplayBuffer.open(url(Path(folder))) as buffer:
        print("open", flush=True)
        sys.stdin.readline()
        while groups := await buffer.claim("math", 7, statuses=[Status.PENDING]):
            print(*ids(groups), flush=True)
            for group in groups:
                await buffer.put(finished(group))
        print("end", flush=True)
asyncio.run(main(sys.argv[1]))
"""


async def test_two_producers_claim_every_group_once(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        drawn = await draw(buffer, *range(300), group_size=1)
        producers = [await child(CLAIMING, tmp_path) for _ in range(2)]
        for producer in producers:
            assert await line(producer) == "open"
        for producer in producers:
            say(producer)
        claimed: list[list[int]] = [[], []]
        for mine, producer in zip(claimed, producers, strict=True):
            while (said := await line(producer)) != "end":
                mine += [int(word) for word in said.split()]
            assert await producer.wait() == 0
        assert sorted(claimed[0] + claimed[1]) == drawn
        assert await buffer.count("math", Status.COMPLETED) == 300
        assert (await buffer.audit()).ok
