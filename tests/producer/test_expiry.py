"""A group that expired runs again only where it was stale."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer import ReplayBuffer, RolloutGroup, RolloutState, StalestFirst, Status
from producer import AsyncProduceStrategy, Producer, ReplayPromptSampler, SyncProduceStrategy
from tests.buffer.groups import url

TASK = "math"


async def test_after_expiry_only_the_stale_member_is_generated_and_scored(buffer: ReplayBuffer) -> None:  # case 10
    group = RolloutGroup(1, [RolloutState(1, index, TASK, prompt_ids=[5]) for index in range(2)], TASK)
    for state, version in zip(group.rollouts, (0, 4), strict=True):
        state.append([7, 8], logprobs=[-0.5, -0.25], version=version)
        state.status, state.finish_reason, state.score, state.reward = Status.COMPLETED, "stop", 0.5, 0.5
    await buffer.put(group)
    assert await buffer.expire(TASK, version=5, max_staleness=3) == 1

    generated: list[int] = []
    scored: list[int] = []

    class Noting(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            generated.append(state.index)
            return await super().generate(state)

    def score(state: RolloutState) -> float:
        scored.append(state.index)
        return 1.0

    async with SimulatedEngine(lengths=3) as engine:
        await engine.update_weights({"seed": 1}, version=5)
        loop = Noting(engine, reward=score, sampling=SamplingParams(max_tokens=8, seed=1))
        sampler = ReplayPromptSampler([{"prompt_ids": [6]}], buffer, group_size=2)
        batch = await SyncProduceStrategy(buffer).produce_batch(loop, sampler, 1, TASK)
    assert (generated, scored) == ([0], [0])
    assert (batch.metrics["produce/started"], batch.metrics["batch/staleness_max"]) == (1, 1)
    again, kept = batch.groups[0].rollouts
    assert (batch.groups[0].group_id, again.versions.tolist(), again.score) == (1, [5, 5, 5], 1.0)
    assert (kept.versions.tolist(), kept.response_ids.tolist(), kept.score) == ([4, 4], [7, 8], 0.5)


async def test_nothing_older_than_the_bound_is_handed_out(buffer: ReplayBuffer) -> None:
    """Over twenty updates, with long and short responses and twice as many groups started as a batch needs."""
    dataset = [{"prompt_ids": [6 + n % 50]} for n in range(40)]
    lengths = lognormal_lengths(10, 1.2, longest=200, seed=1)
    async with SimulatedEngine(lengths=lengths, max_length=1024) as engine:
        loop = SingleTurnAgentLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=200, seed=1))
        sampler = ReplayPromptSampler(dataset, buffer, group_size=2)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=1)
        bounds, ages = [], list[float]()
        for step in range(1, 21):
            batch = await strategy.produce_batch(loop, sampler, 4, TASK, step=step)
            bounds += [group.staleness(engine.version) for group in batch.groups]
            ages.append(batch.metrics["batch/staleness_max"])
            await engine.update_weights({"seed": step}, version=step)
    assert len(bounds) == 80
    assert max(bounds) == max(ages) == 1, "some of it is stale, none of it too stale"
    assert (await buffer.audit()).ok


async def test_what_a_weight_update_makes_too_stale_meanwhile_is_not_handed_out(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=4) as engine:

        class Updating(SingleTurnAgentLoop):
            async def generate(self, state: RolloutState) -> RolloutState:
                state = await super().generate(state)
                if state.row["n"] == 1 and engine.version == 0:
                    await engine.update_weights({"seed": 1}, version=1)
                return state

        loop = Updating(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=8, seed=1))
        sampler = ReplayPromptSampler([{"prompt_ids": [6], "n": n} for n in range(9)], buffer, group_size=1, shuffle=False)
        batch = await SyncProduceStrategy(buffer, max_staleness=0).produce_batch(loop, sampler, 3, TASK)
    assert [group.staleness(1) for group in batch.groups] == [0, 0, 0]
    assert (await buffer.audit()).ok


class AtExpiry(ReplayBuffer):
    """Calls back when what is too stale at a version after the first was looked for."""

    then: Callable[[], Awaitable[None]] | None = None

    async def expire(self, task_name: str, *, version: int, **options: Any) -> int:
        n = await super().expire(task_name, version=version, **options)
        if version > 0 and self.then is not None:
            await self.then()
        return n


class Held(ReplayPromptSampler):
    """What it has claimed it gives out on `release`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.claimed, self.release = asyncio.Event(), asyncio.Event()

    async def sample_many(self, *arguments: Any, **named: Any) -> list[RolloutGroup]:
        groups = await super().sample_many(*arguments, **named)
        self.claimed.set()
        await self.release.wait()
        return groups


async def test_what_is_claimed_while_the_weights_change_is_not_handed_out_too_stale(tmp_path: Path) -> None:
    async with AtExpiry.open(url(tmp_path)) as buffer, SimulatedEngine(lengths=4) as engine:
        assert isinstance(buffer, AtExpiry)
        await buffer.put(a_group(1, Status.INTERRUPTED, None, version=0))
        loop = SingleTurnAgentLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=8, seed=1))
        sampler = Held([{"prompt_ids": [6]}], buffer, group_size=1)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=0.0, max_staleness=0, on_stale="expire", policy=StalestFirst())
        async with Producer(strategy, loop, sampler, TASK) as producer, asyncio.TaskGroup() as tasks:
            await producer.start(1)
            await sampler.claimed.wait()
            await engine.update_weights({"seed": 1}, version=1)
            await buffer.put(a_group(2, Status.COMPLETED, "stop", version=1))

            async def let_it_end() -> None:
                buffer.then = None
                sampler.release.set()
                await some_turns(buffer, 100)

            async def release_in_the_end() -> None:
                await some_turns(buffer, 400)
                sampler.release.set()

            buffer.then = let_it_end
            tasks.create_task(release_in_the_end())
            batch = await producer.next_batch(1)
        assert [group.staleness(1) for group in batch.groups] == [0]


async def some_turns(buffer: ReplayBuffer, n: int) -> None:
    """Long enough for a short group to end, or for an expiry."""
    for _ in range(n):
        await buffer.cursor(TASK)


def a_group(group_id: int, status: Status, reason: Any, *, version: int) -> RolloutGroup:
    state = RolloutState(group_id, 0, TASK, prompt_ids=[6])
    state.append([7, 8], logprobs=[-0.5, -0.25], version=version)
    state.status, state.finish_reason = status, reason
    if status is Status.COMPLETED:
        state.score = state.reward = 1.0
    return RolloutGroup(group_id, [state], TASK)


async def test_what_is_stopped_for_its_staleness_is_not_continued(buffer: ReplayBuffer) -> None:
    continued: list[tuple[int, int]] = []

    class Noting(SingleTurnAgentLoop):
        async def generate(self, state: RolloutState) -> RolloutState:
            continued.append((self.engine.version if self.engine else 0, int(state.response_ids.size)))
            return await super().generate(state)

    async with SimulatedEngine(lengths=lognormal_lengths(40, 1.0, longest=400, seed=1), max_length=1024) as engine:
        loop = Noting(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=400, seed=1))
        sampler = ReplayPromptSampler([{"prompt_ids": [6 + n]} for n in range(40)], buffer, group_size=2, shuffle=False)
        options: dict[str, Any] = {"staleness_threshold": 2.0, "in_flight": "keep", "max_staleness": 0, "on_stale": "expire"}
        async with AsyncProduceStrategy(buffer, **options) as strategy:
            for version in range(1, 6):
                batch = await strategy.produce_batch(loop, sampler, 2, TASK)
                assert {group.staleness(engine.version) for group in batch.groups} == {0}
                await engine.update_weights({"seed": version}, version=version)
        assert (await buffer.audit()).ok
    assert [tokens for _, tokens in continued if tokens] == []
