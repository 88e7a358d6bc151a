"""The ways in which a run that is killed makes its batches and updates its weights."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer, RolloutGroup
from producer import AsyncProduceStrategy, Producer, RedundantMembers, ReplayPromptSampler, SyncProduceStrategy, TaskManager, TrainingTask
from producer.strategy import ProduceStrategy
from tests.producer.kill_plan import POLICIES, Plan, Way
from tests.producer.kill_told import ToldLoop

Batches = list[tuple[str, Sequence[RolloutGroup]]]
"""Of a step, by task."""


@dataclass(frozen=True)
class Part:
    """A task with what runs it."""

    name: str
    batch_size: int
    loop: ToldLoop
    sampler: ReplayPromptSampler
    engine: SimulatedEngine


def engines_of(parts: Sequence[Part]) -> list[SimulatedEngine]:
    """Each once."""
    return list(dict.fromkeys(part.engine for part in parts))


class InTurn:
    """Strategies one after the other, step by step; here each batch stops what runs."""

    def __init__(self, plan: Plan, buffer: ReplayBuffer, parts: Sequence[Part]) -> None:
        self.plan, self.buffer, self.parts, self.stack = plan, buffer, parts, AsyncExitStack()

    async def __aenter__(self) -> Self:
        self.strategies = await self._entered()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stack.__aexit__(kind, error, trace)

    async def _entered(self) -> list[ProduceStrategy]:
        sync = SyncProduceStrategy(self.buffer, **options(self.plan))
        return [sync] if self.plan.over_issue is None else [over_issuing(self.plan, self.buffer), sync]

    async def batches(self, step: int) -> Batches:
        """Those of a step."""
        strategy = self.strategies[step % len(self.strategies)]
        calls = [(part.name, strategy.produce_batch(part.loop, part.sampler, part.batch_size, part.name, step=step)) for part in self.parts]
        return await _all(calls, at_once=self.plan.over_issue is not None)

    async def update(self, version: int) -> None:
        """Give the engines these weights."""
        for engine in engines_of(self.parts):
            await engine.update_weights({"seed": version}, version=version)


class Kept(InTurn):
    """A strategy that keeps what runs."""

    async def _entered(self) -> list[ProduceStrategy]:
        return [await self.stack.enter_async_context(over_issuing(self.plan, self.buffer, in_flight="keep"))]


class InBackground(InTurn):
    """A `Producer` of each task."""

    async def _entered(self) -> list[ProduceStrategy]:
        strategies: list[ProduceStrategy] = [over_issuing(self.plan, self.buffer) for _ in self.parts]
        made = [Producer(strategy, part.loop, part.sampler, part.name) for strategy, part in zip(strategies, self.parts, strict=True)]
        self.producers = [await self.stack.enter_async_context(producer) for producer in made]
        return strategies

    async def batches(self, step: int) -> Batches:
        """Those of a step."""
        each = zip(self.producers, self.parts, strict=True)
        return await _all([(part.name, producer.next_batch(part.batch_size, step=step)) for producer, part in each], at_once=True)

    async def update(self, version: int) -> None:
        """Give the engines these weights in flight."""
        async with AsyncExitStack() as updated:
            for producer in self.producers:
                await updated.enter_async_context(producer.update_weights({"seed": version}, version, mode=self.plan.mode))


class Managed(InTurn):
    """A `TaskManager`; of its two tasks one keeps what runs."""

    async def _entered(self) -> list[ProduceStrategy]:
        strategies: list[ProduceStrategy] = [over_issuing(self.plan, self.buffer, in_flight=kept) for kept in ("keep", "interrupt")]
        tasks = [
            TrainingTask(part.name, part.loop, part.sampler, strategy, self.plan.weights[part.name])
            for part, strategy in zip(self.parts, strategies, strict=True)
        ]
        shared = None if self.plan.max_in_flight is None else 2 * self.plan.max_in_flight
        self.manager = await self.stack.enter_async_context(TaskManager(self.buffer, tasks, max_in_flight=shared))
        return strategies

    async def batches(self, step: int) -> Batches:
        """Those of a step."""
        batch = await self.manager.produce_batch(self.plan.total, step)
        return [(part.name, [group for group in batch.groups if group.task_name == part.name]) for part in self.parts]


WAYS: dict[Way, type[InTurn]] = {"strategies": InTurn, "keep": Kept, "background": InBackground, "manager": Managed}


def options(plan: Plan) -> dict[str, Any]:
    """Of every strategy."""
    trigger, step = plan.tail
    return {
        "enable_partial_rollout": plan.keep_tokens,
        "max_staleness": plan.max_staleness,
        "on_stale": plan.on_stale,
        "tail_batch_trigger_size": trigger,
        "tail_batch_candidate_step": step,
        "redundant": RedundantMembers(plan.redundant, bias="accept") if plan.redundant else None,
        "max_in_flight": plan.max_in_flight,
        "checkpoint_tokens": plan.checkpoint_tokens,
        "checkpoint_seconds": None,
        "policy": None if plan.waits else POLICIES[plan.policy](),  # a bound that is waited for has its own
    }


def over_issuing(plan: Plan, buffer: ReplayBuffer, **more: Any) -> AsyncProduceStrategy:
    """As planned."""
    assert plan.over_issue is not None
    return AsyncProduceStrategy(buffer, staleness_threshold=plan.over_issue, **options(plan), **more)


async def _all(calls: Sequence[tuple[str, Any]], *, at_once: bool) -> Batches:
    if not at_once:
        return [(name, (await call).groups) for name, call in calls]
    async with asyncio.TaskGroup() as group:
        running = [(name, group.create_task(call)) for name, call in calls]
    return [(name, task.result().groups) for name, task in running]
