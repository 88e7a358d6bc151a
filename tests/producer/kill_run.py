"""A training run as a user would write it, that tells a ledger what it does; killed by `test_kills.py`."""

import asyncio
import json
import os
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import Fifo, FreshestFirst, ReplayBuffer, RolloutGroup, RolloutState, StalestFirst, processes
from buffer.staleness import NO_VERSION
from producer import AsyncProduceStrategy, ProducedBatch, ReplayPromptSampler, SyncProduceStrategy
from producer.strategy import ProduceStrategy
from tests.zygote import Say

POLICIES = {"fifo": Fifo, "freshest": FreshestFirst, "stalest": StalestFirst}


@dataclass(frozen=True)
class Task:
    """A task of the run: its dataset of `size` rows, how it is read, and how many groups of it make a batch."""

    name: str
    size: int
    batch_size: int
    shuffle: bool = False
    workers: int | None = None  # of a StatefulDataLoader; None reads the list itself
    rows_a_read: int | None = None  # its batch_size


@dataclass(frozen=True)
class Plan:
    """What a run does, JSON-able as a dict.

    Attributes:
        folder: of the checkpoint.
        url: of the database.
        seed: of the shuffles.
        steps: batches of each task.
        every: a checkpoint and a commit each so many steps.
        over_issue: None makes every batch with `SyncProduceStrategy`; else every other one with `AsyncProduceStrategy`, with
            this threshold, and those of all tasks at once.
        keep_tokens: partial rollouts.
        max_staleness: of the strategies.
        checkpoint_tokens: of the strategies; None checkpoints no running group.
        policy: which completed groups they take first where there is no bound, a key of `POLICIES`.
        future: of `resume`.
        lease: of the buffer. None is its default. With one, each process acts as one on a machine of its own: that it is dead
            is only known when its lease ends.
    """

    folder: str
    url: str
    tasks: tuple[Task, ...]
    seed: int = 0
    steps: int = 10
    every: int = 1
    over_issue: float | None = None
    keep_tokens: bool = True
    max_staleness: int | None = None
    checkpoint_tokens: int | None = None
    policy: str = "fifo"
    future: Literal["keep", "expire"] = "keep"
    lease: float | None = None

    @classmethod
    def of(cls, plan: dict[str, Any]) -> "Plan":
        """The plan that `asdict` took apart."""
        return cls(**plan | {"tasks": tuple(Task(**task) for task in plan["tasks"])})


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


def digest(state: RolloutState) -> int:
    """Of a response's tokens, log-probabilities and versions."""
    parts = (state.response_ids, state.logprobs, state.versions)
    return zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))


def members(group: RolloutGroup) -> list[tuple[str, int, int, int, int]]:
    """Of each member its status, tokens, digest, the version its staleness is counted from, and its newest version."""
    return [
        (
            state.status,
            int(state.response_ids.size),
            digest(state),
            int(state.effective_versions.min(initial=NO_VERSION)),
            int(state.versions.max(initial=0)),
        )
        for state in group.rollouts
    ]


class ToldBuffer(ReplayBuffer):
    """Says before what it is asked for, and after what was acknowledged."""

    say: Say

    async def draw(self, task_name: str, rows: Sequence[Any], **options: Any) -> list[int]:
        """See `ReplayBuffer`."""
        self.say("drawing", task=task_name)
        ids = await super().draw(task_name, rows, **options)
        self.say("drawn", task=task_name, groups=ids, rows=[[*row.position, row.row["answer"]] for row in rows])
        return ids

    async def claim(self, task_name: str, n: int, **options: Any) -> list[RolloutGroup]:
        """See `ReplayBuffer`."""
        self.say("claiming", task=task_name)
        groups = await super().claim(task_name, n, **options)
        self.say("claimed", groups=[group.group_id for group in groups])
        return groups

    async def put(self, group: RolloutGroup) -> None:
        """See `ReplayBuffer`."""
        self.say("storing", group=group.group_id)
        await super().put(group)
        self.say("stored", group=group.group_id, status=group.status, members=members(group))

    async def checkpoint(self, group: RolloutGroup) -> None:
        """See `ReplayBuffer`."""
        held = members(group)
        self.say("checkpointing", group=group.group_id)
        await super().checkpoint(group)
        self.say("checkpointed", group=group.group_id, members=held)

    async def take(self, task_name: str, n: int, *, step: int, **options: Any) -> list[RolloutGroup]:
        """See `ReplayBuffer`."""
        self.say("taking", task=task_name, step=step)
        groups = await super().take(task_name, n, step=step, **options)
        self.say("taken", task=task_name, step=step, groups=[group.group_id for group in groups])
        return groups

    async def expire(self, task_name: str, **options: Any) -> int:
        """See `ReplayBuffer`."""
        self.say("expiring", task=task_name, version=options["version"])
        n = await super().expire(task_name, **options)
        self.say("expired", task=task_name, n=n)
        return n

    async def commit(self, step: int, **options: Any) -> int:
        """See `ReplayBuffer`."""
        self.say("committing", step=step)
        n = await super().commit(step, **options)
        self.say("committed", step=step)
        return n

    async def resume(self, step: int, **options: Any) -> Any:
        """See `ReplayBuffer`."""
        self.say("resuming", step=step)
        report = await super().resume(step, **options)
        self.say("resumed", step=step, version=report.version, rewound=report.rewound, released=report.released)
        return report


class ToldLoop(SingleTurnAgentLoop):
    """Says which rollout it generates, how many tokens that had, and when it is done."""

    say: Say

    async def generate(self, state: RolloutState) -> RolloutState:
        """See `AgentLoop`."""
        rollout = [state.group_id, state.index]
        self.say("generating", rollout=rollout, tokens=int(state.response_ids.size))
        state = await super().generate(state)
        self.say("generated", rollout=rollout, reason=state.finish_reason)
        return state


async def judge(say: Say, state: RolloutState) -> float:
    """A reward on the event loop."""
    say("judging", rollout=[state.group_id, state.index])
    await asyncio.sleep(0)
    return float(state.row["answer"] % 3)


def judge_on_a_thread(say: Say, state: RolloutState) -> float:
    """A reward of the other kind."""
    say("judging", rollout=[state.group_id, state.index])
    return float(state.row["answer"] % 3)


class Trainer:
    """What was trained on, by step and task, and its checkpoint."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "checkpoint.json"
        self.trained: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    @property
    def step(self) -> int:
        """The last step."""
        return len(self.trained)

    def train(self, step: int, batches: Sequence[tuple[str, ProducedBatch]]) -> None:
        """Learn the batches."""
        self.trained[str(step)] = {
            name: [[group.group_id, *map(digest, group.rollouts)] for group in batch.groups] for name, batch in batches
        }

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
    async with ToldBuffer.open(asked.url, max_crashes=None, **options) as buffer, SimulatedEngine(seed=asked.seed, vocab_size=16) as engine:
        assert isinstance(buffer, ToldBuffer)
        buffer.say = say
        samplers = {task.name: _sampler(task, buffer, asked.seed) for task in asked.tasks}
        if draws:
            for task in asked.tasks:
                for _ in range(draws):
                    await samplers[task.name].sample(task.name)
            return
        rewards = (partial(judge, say), partial(judge_on_a_thread, say))
        loops = {task.name: _loop(engine, reward, say) for task, reward in zip(asked.tasks, rewards, strict=True)}
        await _train(say, asked, buffer, engine, loops, samplers)


def _sampler(task: Task, buffer: ReplayBuffer, seed: int) -> ReplayPromptSampler:
    return ReplayPromptSampler(dataset(task, seed), buffer, group_size=2, shuffle=task.shuffle, seed=seed)


def _loop(engine: SimulatedEngine, reward: Any, say: Say) -> ToldLoop:
    loop = ToldLoop(engine, reward=reward, sampling=SamplingParams(max_tokens=24, seed=3))
    loop.say = say
    return loop


def _strategies(plan: Plan, buffer: ReplayBuffer) -> list[ProduceStrategy]:
    """One after the other, step by step."""
    options: dict[str, Any] = {
        "enable_partial_rollout": plan.keep_tokens,
        "max_staleness": plan.max_staleness,
        "checkpoint_tokens": plan.checkpoint_tokens,
        "checkpoint_seconds": None,
        "policy": None if plan.max_staleness is not None else POLICIES[plan.policy](),  # a bound that is waited for has its own
    }
    sync = SyncProduceStrategy(buffer, **options)
    return [sync] if plan.over_issue is None else [AsyncProduceStrategy(buffer, staleness_threshold=plan.over_issue, **options), sync]


async def _train(
    say: Say,
    plan: Plan,
    buffer: ReplayBuffer,
    engine: SimulatedEngine,
    loops: dict[str, ToldLoop],
    samplers: dict[str, ReplayPromptSampler],
) -> None:
    trainer, strategies = Trainer(plan.folder), _strategies(plan, buffer)
    report = await buffer.resume(step=trainer.step, future=plan.future)
    await engine.update_weights({"seed": report.version}, version=report.version)
    for step in range(trainer.step + 1, plan.steps + 1):
        strategy = strategies[step % len(strategies)]
        calls = [
            (task.name, strategy.produce_batch(loops[task.name], samplers[task.name], task.batch_size, task.name, step=step))
            for task in plan.tasks
        ]
        trainer.train(step, await _all(calls, at_once=plan.over_issue is not None))
        await engine.update_weights({"seed": engine.version + 1}, version=engine.version + 1)
        if step % plan.every == 0 or step == plan.steps:
            say("saving", step=step)
            trainer.save()
            say("saved", step=step)
            await buffer.commit(step, version=engine.version)
    await buffer.commit(plan.steps)  # again, for one that was killed behind its last checkpoint


async def _all(calls: Sequence[tuple[str, Any]], *, at_once: bool) -> list[tuple[str, ProducedBatch]]:
    if not at_once:
        return [(name, await call) for name, call in calls]
    async with asyncio.TaskGroup() as group:
        running = [(name, group.create_task(call)) for name, call in calls]
    return [(name, task.result()) for name, task in running]


def as_arguments(plan: Plan) -> dict[str, Any]:
    """For `Zygote.start`."""
    return {"plan": asdict(plan)}
