"""Shows that a run's batches come again from its database as they were handed out, without an engine."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer import ReplayBuffer, RolloutState, Status
from producer import AsyncProduceStrategy, ProducedBatch, ProduceStrategy, ReplayPromptSampler, ReplaySource, SyncProduceStrategy
from producer.errors import ProducerError
from tests.buffer.groups import plain

STEPS = 5
STRATEGIES: list[Callable[..., ProduceStrategy]] = [
    SyncProduceStrategy,
    lambda buffer, **options: AsyncProduceStrategy(buffer, staleness_threshold=1.0, **options),
]


def judged(state: RolloutState) -> float:
    return random.Random(state.text or str(state.response_ids.tolist())).random()


async def run(buffer: ReplayBuffer, make: Callable[..., ProduceStrategy], *tasks: str, steps: int = STEPS) -> list[ProducedBatch]:
    """A run of some steps, every second of them committed."""
    batches = []
    async with SimulatedEngine(seed=1, lengths=lognormal_lengths(median=12, sigma=1.0, longest=60)) as engine:
        loop = SingleTurnAgentLoop(engine, reward=judged, sampling=SamplingParams(max_tokens=64, seed=1))
        strategy = make(buffer, progress=False)
        rows: list[dict[str, Any]] = [{"prompt_ids": [1 + number % 40], "number": number} for number in range(100)]
        samplers = {task: ReplayPromptSampler(rows, buffer, group_size=3) for task in tasks}
        for step in range(1, steps + 1):
            batches += [await strategy.produce_batch(loop, samplers[task], 6, task, step=step) for task in tasks]
            await engine.update_weights({"seed": step + 1}, version=step)
            if step % 2 == 0:
                await buffer.commit(step, version=step)
    return batches


def assert_equal(again: ProducedBatch, batch: ProducedBatch) -> None:
    assert again.step == batch.step
    assert [plain(group) for group in again.groups] == [plain(group) for group in batch.groups]
    assert again.metrics == {name: value for name, value in batch.metrics.items() if name.startswith("batch/")}


@pytest.mark.parametrize("make", STRATEGIES, ids=["sync", "async"])
async def test_batches_come_again_equal_in_every_field(make: Callable[..., ProduceStrategy], buffer: ReplayBuffer) -> None:
    batches = await run(buffer, make, "math")
    again = [batch async for batch in ReplaySource(buffer, "math").batches()]
    assert len(again) == STEPS
    assert {group.status for batch in again for group in batch.groups} == {Status.CONSUMED}
    for replayed, batch in zip(again, batches, strict=True):
        assert_equal(replayed, batch)


async def test_nothing_of_the_run_changes_and_readers_may_replay(buffer: ReplayBuffer, url: str) -> None:
    batches = await run(buffer, SyncProduceStrategy, "math")
    before = await buffer.counts("math")
    async with ReplayBuffer.open(url, read_only=True) as reader:
        again = [batch async for batch in ReplaySource(reader, "math").batches(2, 4)]
    assert [batch.step for batch in again] == [2, 3, 4]
    for replayed, batch in zip(again, batches[1:4], strict=True):
        assert_equal(replayed, batch)
    assert await buffer.counts("math") == before


async def test_tasks_are_told_apart(buffer: ReplayBuffer) -> None:
    batches = await run(buffer, SyncProduceStrategy, "math", "code", steps=2)
    for place, task in enumerate(("math", "code")):
        again = [batch async for batch in ReplaySource(buffer, task).batches()]
        for replayed, batch in zip(again, batches[place::2], strict=True):
            assert_equal(replayed, batch)
    assert [batch async for batch in ReplaySource(buffer, "none").batches()] == []


async def test_a_step_that_was_rewound_comes_as_it_was_trained_on_last(buffer: ReplayBuffer) -> None:
    await run(buffer, SyncProduceStrategy, "math", steps=3)
    await buffer.resume(2)
    taken = await buffer.take("math", 4, step=3)
    (again,) = [batch async for batch in ReplaySource(buffer, "math").batches(3)]
    assert [plain(group) for group in again.groups] == [plain(group) for group in sorted(taken, key=lambda group: group.group_id)]


@pytest.mark.parametrize("rows", [False, True])
async def test_pruned_steps_are_refused_before_the_first_batch(rows: bool, buffer: ReplayBuffer) -> None:
    await run(buffer, SyncProduceStrategy, "math")
    await buffer.prune(keep_last=8, rows=rows)  # of 24 committed groups: steps 1 and 2, and of step 3 some
    with pytest.raises(ProducerError, match=r"tokens of step 3 were pruned; replay with first=4"):
        await anext(ReplaySource(buffer, "math").batches())
    assert [batch.step async for batch in ReplaySource(buffer, "math").batches(4)] == [4, 5]


async def test_what_cannot_be_replayed_is_refused(buffer: ReplayBuffer) -> None:
    for first, last in ((0, None), (2, 1)):
        with pytest.raises(ValueError, match="are no steps to replay"):
            await anext(ReplaySource(buffer, "math").batches(first, last))
    with pytest.raises(ValueError, match="names no task"):
        ReplaySource(buffer, "")
    with pytest.raises(TypeError, match="is no ReplayBuffer"):
        ReplaySource("run.db", "math")  # type: ignore[arg-type]
