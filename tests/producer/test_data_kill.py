"""Killed with SIGKILL at any moment, a trainer on a `BufferDataset` goes on with the same batches at the same steps, none twice, none lost.

A child trains over a real database in a thread, beside a producer at work on the event loop, with batches taken ahead. It says each batch
that it was handed. It is killed again and again; what all children said is held against each other, the checkpoint and the database.
"""

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from torch.utils.data import DataLoader

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer, RolloutState, Status
from producer import AsyncProduceStrategy, Producer, ReplayPromptSampler
from producer.data import BufferDataset
from producer.experience import AdvantageConfig, ExperienceMaker
from tests.zygote import Moment, Say, Zygote

KILLS, STEPS, BATCH, MEMBERS = 12, 24, 2, 2
SAID = ["handed", "saving", "saved", "committed"]


def a_maker() -> ExperienceMaker:
    return ExperienceMaker(AdvantageConfig("rloo", normalise=True))


async def train(say: Say, folder: str) -> None:
    """The child: from its checkpoint to the last step."""
    path = Path(folder) / "checkpoint.json"
    checkpoint = json.loads(path.read_text()) if path.exists() else {"dataset": {"step": 0}, "trained": {}}
    rows = [{"prompt_ids": [1 + n]} for n in range(1000)]
    async with ReplayBuffer.open(f"sqlite:///{folder}/run.db", max_crashes=None) as buffer, SimulatedEngine(seed=1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=score, sampling=SamplingParams(max_tokens=6, seed=1))
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, progress=False)
        sampler = ReplayPromptSampler(rows, buffer, group_size=MEMBERS, shuffle=False)
        async with Producer(strategy, loop, sampler, "math") as producer:
            maker = a_maker()
            dataset = BufferDataset(producer, BATCH, make=maker, prefetch=2, last_step=STEPS, tensors=False)

            def fit() -> None:
                dataset.load_state_dict(checkpoint["dataset"])
                say("resumed")
                for experience in DataLoader(dataset, batch_size=None):
                    groups = sorted(set(experience.group_ids.tolist()))
                    learned = {"groups": groups, "moments": experience.running.to_json(), "sum": float(abs(experience.advantages).sum())}
                    say("handed", step=dataset.step, **learned)
                    checkpoint["trained"][str(dataset.step)] = learned
                    if dataset.step % 3 == 0:
                        say("saving")
                        save(path, checkpoint | {"dataset": dataset.state_dict()})
                        say("saved")
                        dataset.commit(dataset.step)
                        say("committed")
                dataset.commit(STEPS)  # again, for one that was killed behind its last checkpoint

            await asyncio.to_thread(fit)


def score(state: RolloutState) -> float:
    return float(state.response_ids.sum() % 17)


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Whole, or not at all."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(checkpoint))
    os.replace(fresh, path)


async def test_killed_at_any_moment_every_batch_is_trained_once_and_at_its_step(tmp_path: Path) -> None:
    chance, handed, killed = random.Random(7), dict[int, Any](), 0
    with Zygote("tests.producer.test_data_kill:train", "torchdata.stateful_dataloader") as zygote:
        for attempt in range(KILLS + 1):
            child = zygote.start(folder=str(tmp_path))
            if attempt < KILLS:
                killed += child.killed(Moment.any(chance, at_start=0.3, lines=12, whats=SAID))
            else:
                child.ended()
            for said in child.lines:
                if said["what"] == "handed":
                    learned = {name: said[name] for name in ("groups", "moments", "sum")}
                    # The same batch at the same step, and the same numbers from it, in every life.
                    assert handed.setdefault(said["step"], learned) == learned
    assert killed >= KILLS // 2
    trained = json.loads((tmp_path / "checkpoint.json").read_text())["trained"]
    assert {int(step): learned for step, learned in trained.items()} == handed
    assert sorted(handed) == list(range(1, STEPS + 1))
    every = [group for learned in handed.values() for group in learned["groups"]]
    assert len(set(every)) == len(every) == STEPS * BATCH
    async with ReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer:
        assert (await buffer.audit(payloads=True)).problems == []
        assert await buffer.count("math", Status.ARCHIVED) == STEPS * BATCH
        maker = a_maker()
        for step in range(1, STEPS + 1):
            experience = maker.make_experience(await buffer.query(step=step))
            assert sorted(set(experience.group_ids.tolist())) == handed[step]["groups"]
            assert maker.state.running is not None
            # As if nothing had ever been killed.
            assert maker.state.running.to_json() == handed[step]["moments"]
        assert (await buffer.load_state("experience", step=STEPS) or {}).items() >= maker.state_dict().items()
