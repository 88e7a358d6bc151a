"""A program ends when it is done: neither a reward that hangs nor a dataset's threads and workers keep it."""

import subprocess
import sys
from pathlib import Path

RUN = """
import asyncio, sys, threading

from torchdata.stateful_dataloader import StatefulDataLoader

from agent_loop import SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer
from producer import AsyncProduceStrategy, ReplayPromptSampler
from producer.errors import FailureBudgetError


def stuck(state):
    threading.Event().wait()


async def main():
    loader = StatefulDataLoader([{"prompt_ids": [10]}] * 50, batch_size=4, num_workers=2, collate_fn=list)
    async with ReplayBuffer.open(f"sqlite:///{sys.argv[1]}/run.db") as buffer, SimulatedEngine(lengths=3) as engine:
        loop = SingleTurnAgentLoop(engine, reward=stuck, reward_timeout=0.05, max_attempts=1)
        try:
            await AsyncProduceStrategy(buffer).produce_batch(loop, ReplayPromptSampler(loader, buffer), 2, "math")
        except FailureBudgetError as error:
            print(error)


asyncio.run(main())
print("ended")
"""


def test_a_program_with_hung_rewards_and_open_workers_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "reward stuck took longer than 0.05 s" in done.stdout
    assert done.stdout.endswith("ended\n")
    assert done.stderr == ""
