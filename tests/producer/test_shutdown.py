"""Ctrl-C ends a program that produces: pressed once what runs is stopped and stored, pressed again every row is written all the same."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status

RUN = """
import asyncio, sys, warnings

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer
from producer import AsyncProduceStrategy, Producer, ReplayPromptSampler, SyncProduceStrategy

warnings.simplefilter("error")
folder, kind, stuck = sys.argv[1], sys.argv[2], sys.argv[3] == "stuck"


class Engine(SimulatedEngine):
    long = 0

    async def generate(self, prompt_ids, *arguments, **named):
        self.long += prompt_ids[0] >= 12
        if self.long == 8:
            print("running", flush=True)
        return await super().generate(prompt_ids, *arguments, **named)

    async def interrupt(self, request_ids=None):
        if stuck and request_ids is not None:
            print("interrupting", flush=True)
            await asyncio.sleep(3600)
        await super().interrupt(request_ids)


async def main():
    rows = [{"prompt_ids": [10 + n % 40]} for n in range(500)]
    lengths = lambda request: 3 if request.prompt_ids[0] < 12 else 1_000_000
    async with ReplayBuffer.open(f"sqlite:///{folder}/run.db") as buffer, Engine(
        lengths=lengths, max_length=2_000_000, tokens_per_second=1000
    ) as engine:
        loop = SingleTurnAgentLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=1_500_000, seed=1))
        sampler = ReplayPromptSampler(rows, buffer, group_size=4, shuffle=False)
        strategy = AsyncProduceStrategy(
            buffer, staleness_threshold=2.0, interrupt_timeout=60.0, progress=False, in_flight="keep" if kind == "keep" else "interrupt"
        )
        if kind == "producer":
            async with Producer(strategy, loop, sampler, "math") as producer:
                await producer.next_batch(2)
                await producer.next_batch(2)
        elif kind == "keep":
            async with strategy:
                await strategy.produce_batch(loop, sampler, 2, "math")
                await asyncio.Event().wait()
        else:
            await SyncProduceStrategy(buffer, progress=False).produce_batch(loop, sampler, 2, "math")
            await strategy.produce_batch(loop, sampler, 2, "math")


asyncio.run(main())
"""


async def check_everything_is_stored(folder: Path) -> None:
    async with ReplayBuffer.open(f"sqlite:///{folder / 'run.db'}", read_only=True) as buffer:
        counts = await buffer.counts("math")
        assert counts[Status.RUNNING] == 0
        assert counts[Status.INTERRUPTED] >= 2, "eight rollouts in groups of four ran"
        assert (report := await buffer.audit(payloads=True)).ok, report.problems


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("kind", ["producer", "keep", "interrupt"])
def test_ctrl_c_leaves_every_row_written_and_no_task_behind(tmp_path: Path, kind: str, twice: bool) -> None:
    command = [sys.executable, "-X", "dev", "-W", "ignore::ResourceWarning", "-c", RUN, str(tmp_path), kind, "stuck" if twice else "fine"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = iter(process.stdout)
    assert next(lines) == "running\n"
    process.send_signal(signal.SIGINT)
    if twice:
        assert next(lines) == "interrupting\n"
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=50)
    assert process.returncode == -signal.SIGINT
    # The second one is raised by asyncio in the middle of whatever runs: between the making of a coroutine and its await, say.
    for sign in ("Task was destroyed", *(() if twice else ("never awaited", "never retrieved"))):
        assert sign not in error, error
    asyncio.run(check_everything_is_stored(tmp_path))
