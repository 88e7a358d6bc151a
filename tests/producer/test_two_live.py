"""Shows that two producers of one task, both alive, on PostgreSQL, never hand out what is too stale, nor anything twice."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer import Account, ReplayBuffer, RolloutState, Status
from producer import AsyncProduceStrategy, ProducedBatch, PromptSampler, ReplayPromptSampler
from tests import postgres
from tests.buffer.groups import finished, url

BOUND, BATCHES = 1, 8


@pytest.fixture
def address(tmp_path: Path, server: postgres.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(postgres.ADDRESS, server.address)
    yield url(tmp_path)
    postgres.drop_schemas(server.address)


async def produce(
    address: str, engine: SimulatedEngine, in_flight: Literal["interrupt", "keep"], on_stale: Literal["wait", "expire"]
) -> list[ProducedBatch]:
    """As one process of a run does: the weights are updated after each of its batches, and by the other one in between."""
    chance = random.Random(0)

    async def score(state: RolloutState) -> float:
        return chance.random()

    rows = [{"prompt_ids": [10 + n % 40]} for n in range(1000)]
    async with ReplayBuffer.open(address) as buffer:
        sampler = ReplayPromptSampler(rows, buffer, 2, shuffle=False)
        agent_loop = SingleTurnAgentLoop(engine, reward=score, sampling=SamplingParams(max_tokens=320))
        strategy = AsyncProduceStrategy(
            buffer, staleness_threshold=1.0, in_flight=in_flight, max_staleness=BOUND, on_stale=on_stale, watchdog=None
        )
        batches = []
        async with strategy:
            for _ in range(BATCHES):
                batches.append(await strategy.produce_batch(agent_loop, sampler, 4, "math"))
                await engine.update_weights({"seed": 1}, engine.version + 1)
        return batches


@pytest.mark.parametrize("on_stale", ["wait", "expire"])
@pytest.mark.parametrize("in_flight", ["keep", "interrupt"])
async def test_two_producers_of_a_task_keep_its_bound(
    address: str, in_flight: Literal["interrupt", "keep"], on_stale: Literal["wait", "expire"]
) -> None:
    lengths = lognormal_lengths(40, 1.0, longest=300, seed=5)
    costs = CostModel(slots=16, tokens_per_second=2000.0)
    async with SimulatedEngine(lengths=lengths, costs=costs) as engine, asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(produce(address, engine, in_flight, on_stale)) for _ in range(2)]
    batches = [batch for one in both for batch in one.result()]
    assert max(batch.metrics["batch/staleness_max"] for batch in batches) <= BOUND
    handed_out = Counter(group.group_id for batch in batches for group in batch.groups)
    assert handed_out.total() == len(handed_out) == 2 * BATCHES * 4
    async with ReplayBuffer.open(address) as buffer:
        audit = await buffer.audit()
        assert audit.ok, audit.problems
        assert await buffer.count("math", Status.CONSUMED) == len(handed_out)
        assert await buffer.count("math", Status.RUNNING) == 0


class Overtaken(ReplayBuffer):
    """Another producer completes a group of the first weights when a batch was found whole, just before it is taken."""

    other: ReplayBuffer

    async def account(self, task_name: str) -> Account:
        (group,) = await PromptSampler([{"prompt_ids": [1]}], 1).sample_many("math", 1, buffer=self.other)
        await self.other.put(finished(group, version=0))
        return await super().account(task_name)


async def test_what_another_producer_completes_in_the_last_moment_is_not_handed_out_too_stale(address: str) -> None:
    async with Overtaken.open(address) as buffer, ReplayBuffer.open(address) as buffer.other, SimulatedEngine() as engine:
        for version in (1, 2, 3):
            await engine.update_weights({"seed": 1}, version)
        sampler = PromptSampler([{"prompt_ids": [1]}], 1)
        agent_loop = SingleTurnAgentLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=4))
        strategy = AsyncProduceStrategy(buffer, max_staleness=BOUND, watchdog=None)
        batch = await strategy.produce_batch(agent_loop, sampler, 2, "math")
        assert [group.staleness(engine.version) for group in batch.groups] == [0, 0]
        assert (await buffer.oldest_versions("math"))[Status.COMPLETED][0] == 1, "it waits, to expire before the next batch"
