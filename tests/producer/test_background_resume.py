"""Stopped or killed behind a batch and resumed, each way to produce goes on with the prompts that come next, once it is asked."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from agent_loop import SamplingParams
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer
from producer import AsyncProduceStrategy, ProducedBatch, Producer, ReplayPromptSampler, SyncProduceStrategy
from tests.buffer.groups import url
from tests.producer.kill_told import ToldBuffer, ToldLoop
from tests.zygote import Moment, Say, Zygote

TASK = "math"
WAYS = ["sync", "async", "keep", "sync in background", "async in background"]


async def run(say: Say, url: str, way: str, batches: int, wait: bool) -> None:
    """The program of a child: go on from the last commit and commit each batch; with `wait`, wait in the end to be killed."""
    rows = [{"prompt_ids": [1 + index], "answer": index} for index in range(8)]
    async with ToldBuffer.open(url) as buffer, SimulatedEngine(lengths=6) as engine, AsyncExitStack() as stack:
        assert isinstance(buffer, ToldBuffer)
        buffer.say = say
        loop = ToldLoop(engine, reward=lambda state: 1.0, sampling=SamplingParams(max_tokens=16))
        loop.say = say
        sampler = ReplayPromptSampler(rows, buffer, group_size=2, shuffle=False)
        first = await buffer.next_step(TASK)
        await buffer.resume(step=first - 1)
        next_batch = await _way(stack, way, buffer, loop, sampler)
        for _ in range(200):
            await asyncio.sleep(0)
        say("asked")
        for step in range(first, first + batches):
            batch = await next_batch(step)
            await buffer.commit(step)
            say("batch", offsets=[group.position.offset for group in batch.groups if group.position])
        if wait:
            await asyncio.Event().wait()


async def _way(stack: AsyncExitStack, way: str, buffer: ReplayBuffer, loop: ToldLoop, sampler: ReplayPromptSampler) -> Any:
    strategy: Any = SyncProduceStrategy(buffer)
    if "sync" not in way or "async" in way:
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, in_flight="keep" if way == "keep" else "interrupt")
    if way == "keep":
        await stack.enter_async_context(strategy)
    if "background" in way:
        producer = await stack.enter_async_context(Producer(strategy, loop, sampler, TASK))

        async def in_background(step: int) -> ProducedBatch:
            return await producer.next_batch(1, step=step)

        return in_background

    async def in_turn(step: int) -> ProducedBatch:
        batch: ProducedBatch = await strategy.produce_batch(loop, sampler, 1, TASK, step=step)
        return batch

    return in_turn


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.producer.test_background_resume:run") as started:
        yield started


def offsets(lines: list[dict[str, Any]]) -> list[list[int]]:
    return [line["offsets"] for line in lines if line["what"] == "batch"]


def before_asked(lines: list[dict[str, Any]]) -> set[str]:
    return {line["what"] for line in lines[: [line["what"] for line in lines].index("asked")]}


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_next_two_batches_are_those_of_a_run_without_the_stop(tmp_path: Path, zygote: Zygote, way: str, killed: bool) -> None:  # case 3
    (tmp_path / "whole").mkdir()
    whole = zygote.start(url=url(tmp_path / "whole"), way=way, batches=3, wait=False).ended()
    first = zygote.start(url=url(tmp_path), way=way, batches=1, wait=killed)
    if killed:
        assert first.killed(Moment(1, 0, "batch"))
    else:
        first.ended()
    rest = zygote.start(url=url(tmp_path), way=way, batches=2, wait=False).ended()
    assert offsets(first.lines) + offsets(rest) == offsets(whole) == [[0], [1], [2]]


@pytest.mark.parametrize("way", WAYS)
def test_resumed_nothing_is_drawn_claimed_or_generated_before_a_batch_is_asked_for(tmp_path: Path, zygote: Zygote, way: str) -> None:
    for _ in range(2):  # case 32
        child = zygote.start(url=url(tmp_path), way=way, batches=1, wait=True)
        assert child.killed(Moment(1, 0, "batch"))
        assert before_asked(child.lines) == {"resuming", "resumed"}
    assert offsets(child.lines) == [[1]]
