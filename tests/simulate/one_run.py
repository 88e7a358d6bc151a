"""A run in virtual time, as a program: prints what its database holds at the end, and how long it took. See test_inline_buffer."""

import asyncio
import sqlite3
import sys
from pathlib import Path

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer.inline import InlineReplayBuffer
from producer import AsyncProduceStrategy, ReplayPromptSampler
from producer.simulate.virtual_time import run

ROWS = [{"prompt_ids": [n % 60 + 1, n // 60 + 1]} for n in range(40)]


async def train(path: Path, steps: int) -> float:
    """An over-issuing run whose responses are hours long; gives the virtual time at its end."""
    lengths = lognormal_lengths(10, 1.0, longest=100)
    url = f"sqlite:///{path}"
    async with InlineReplayBuffer.open(url) as buffer, SimulatedEngine(lengths=lengths, slots=12, tokens_per_second=0.01) as engine:
        loop = SingleTurnAgentLoop(
            engine, None, reward=lambda state: float(state.response_ids.size), sampling=SamplingParams(max_tokens=100)
        )
        sampler = ReplayPromptSampler(ROWS, buffer, group_size=3)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, enable_partial_rollout=True, progress=False)
        for step in range(1, steps + 1):
            await strategy.produce_batch(loop, sampler, 4, "math", step=step)
            await engine.update_weights({"seed": step}, step)
            await buffer.commit(step, version=step)
        assert (await buffer.audit(payloads=True)).ok
    return asyncio.get_running_loop().time()


def content(path: Path) -> list[str]:
    """Every row of the database, without who made it and when."""
    with sqlite3.connect(path) as conn:
        owner = conn.execute("SELECT owner FROM producers ORDER BY 1").fetchall()
        lines = list(conn.iterdump())
    for (name,) in owner:
        lines = [line.replace(name, "OWNER") for line in lines]
    return [line for line in lines if line.startswith("INSERT") and "producers" not in line and "'opened_at'" not in line]


if __name__ == "__main__":
    database = Path(sys.argv[1])
    print(run(train(database, 6)))
    print("\n".join(content(database)))
