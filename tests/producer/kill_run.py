"""A training run as a user would write it, that tells a ledger what it does; killed by `test_kills.py`."""

import json
import os
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agent_loop import SamplingParams
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_costs import CostModel
from buffer import ReplayBuffer, processes
from producer import ReplayPromptSampler
from tests.producer.kill_plan import ORDERS, Plan, Task
from tests.producer.kill_told import ToldBuffer, ToldLoop, digest, judge, judge_on_a_thread, judge_together
from tests.producer.kill_ways import WAYS, Batches, Part, engines_of
from tests.zygote import Say


def dataset(task: Task, seed: int) -> Any:
    """Rows that are told apart by their answer."""
    rows = [{"prompt_ids": [1 + index], "answer": index} for index in range(task.size)]
    if task.workers is None:
        return rows
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(
        rows,
        batch_size=task.rows_a_read,
        num_workers=task.workers,
        shuffle=task.shuffle,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=list if task.rows_a_read else _itself,
    )


def _itself(row: Any) -> Any:
    return row


class Trainer:
    """What was trained on, by step and task, and its checkpoint."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "checkpoint.json"
        self.trained: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    @property
    def step(self) -> int:
        """The last step."""
        return len(self.trained)

    def train(self, step: int, batches: Batches) -> None:
        """Learn the batches."""
        self.trained[str(step)] = {name: [[group.group_id, *map(digest, group.rollouts)] for group in groups] for name, groups in batches}

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self.trained))
        os.replace(fresh, self._path)


def on_a_machine_of_its_own() -> None:
    """Others see from now on that this process is not on their machine, so that its lease is all they know of it."""
    elsewhere = secrets.token_hex(4)
    processes.__dict__["machine"] = lambda: elsewhere


async def run(say: Say, plan: dict[str, Any], draws: int = 0) -> None:
    """The program of a child: train as planned; or, to know what comes in which order, only draw so many prompts of each task."""
    asked = Plan.of(plan)
    options = {} if asked.lease is None else {"lease": asked.lease}
    if asked.lease is not None:
        on_a_machine_of_its_own()
    async with ToldBuffer.open(asked.url, max_crashes=None, **options) as buffer, AsyncExitStack() as engines:
        assert isinstance(buffer, ToldBuffer)
        buffer.say = say
        if draws:
            for task in asked.tasks:
                await _sampler(task, buffer, replace(asked, order=None)).sample_many(task.name, draws)
            return
        await _train(say, asked, buffer, await _parts(say, asked, buffer, engines))


async def _parts(say: Say, plan: Plan, buffer: ReplayBuffer, engines: AsyncExitStack) -> list[Part]:
    """Each task with what runs it. They share an engine, except where each is produced in the background by itself."""
    rewards = (partial(judge, say), partial(judge_on_a_thread, say))
    parts: list[Part] = []
    for task, reward in zip(plan.tasks, rewards, strict=True):
        if not parts or plan.way == "background":
            costs = CostModel(tokens_per_second=plan.tokens_per_second, update_seconds=plan.update_seconds)
            engine = SimulatedEngine(seed=plan.seed, vocab_size=16, costs=costs)
            await engines.enter_async_context(engine)
        judged = {"group_reward": partial(judge_together, say)} if plan.judged_together else {"reward": reward}
        parts.append(Part(task.name, task.batch_size, _loop(engine, say, judged), _sampler(task, buffer, plan), engine))
    return parts


def _sampler(task: Task, buffer: ReplayBuffer, plan: Plan) -> ReplayPromptSampler:
    order = None if plan.order is None else ORDERS[plan.order]
    seed = plan.seed
    return ReplayPromptSampler(dataset(task, seed), buffer, group_size=plan.members, shuffle=task.shuffle, seed=seed, order=order)


def _loop(engine: SimulatedEngine, say: Say, judged: dict[str, Any]) -> ToldLoop:
    loop = ToldLoop(engine, sampling=SamplingParams(max_tokens=24, seed=3), **judged)
    loop.say = say
    return loop


async def _train(say: Say, plan: Plan, buffer: ReplayBuffer, parts: Sequence[Part]) -> None:
    trainer = Trainer(plan.folder)
    report = await buffer.resume(step=trainer.step, future=plan.future)
    for engine in engines_of(parts):
        await engine.update_weights({"seed": report.version}, version=report.version)
    async with WAYS[plan.way](plan, buffer, parts) as way:
        for step in range(trainer.step + 1, plan.steps + 1):
            batches = await way.batches(step)
            version = parts[0].engine.version
            say("handed", staleness=[group.staleness(version) for _, groups in batches for group in groups])
            trainer.train(step, batches)
            say("updating", step=step)
            await way.update(version + 1)
            say("updated", step=step)
            if step % plan.every == 0 or step == plan.steps:
                say("saving", step=step)
                trainer.save()
                say("saved", step=step)
                await buffer.commit(step, version=version + 1)
    await buffer.commit(plan.steps)  # again, for one that was killed behind its last checkpoint
