"""Shows that several processes that draw one dataset for one task, on PostgreSQL, draw each prompt once."""

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer import ReplayBuffer
from tests import postgres
from tests.buffer.groups import url

ROOT = Path(__file__).parents[2]

DRAWING = """
import asyncio, sys
from pathlib import Path
from buffer import ReplayBuffer
from producer import PromptSampler
from tests.buffer.groups import url
async def main(folder):
    rows = [{"prompt_ids": [1, n], "number": n} for n in range(25)]
    async with ReplayBuffer.open(url(Path(folder))) as buffer:
        sampler = PromptSampler(rows, group_size=1, seed=3)
        print("open", flush=True)
        sys.stdin.readline()
        for n in range(15):
            await sampler.sample_many("math", 1 + n % 3, buffer=buffer)
        print("end", flush=True)
asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
def address(tmp_path: Path, server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    yield url(tmp_path)
    postgres.drop_schemas(server.address)


async def line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 60)).strip()


async def test_two_processes_draw_each_prompt_once(tmp_path: Path, address: str) -> None:
    command, pipe = [sys.executable, "-c", DRAWING, str(tmp_path)], asyncio.subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    drawing = [await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe) for _ in range(2)]
    assert [await line(process) for process in drawing] == [b"open", b"open"]
    for process in drawing:
        assert process.stdin is not None
        process.stdin.write(b"go on\n")
    assert [await line(process) for process in drawing] == [b"end", b"end"]
    assert [await process.wait() for process in drawing] == [0, 0]
    async with ReplayBuffer.open(address) as buffer:
        groups = await buffer.query(limit=100)
        places = sorted((group.position.epoch, group.position.offset) for group in groups if group.position)
        assert places == [(n // 25, n % 25) for n in range(60)]
        for epoch in (0, 1):
            numbers = [group.rollouts[0].row["number"] for group in groups if group.position and group.position.epoch == epoch]
            assert sorted(numbers) == list(range(25)), "each row once an epoch"
        assert (await buffer.audit()).ok
