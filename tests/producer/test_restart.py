"""A run that is killed and started again, any number of times, trains on what a run without a crash trains on, each prompt once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = """
import asyncio, itertools, json, os, signal, sys

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import lognormal_lengths
from buffer import ReplayBuffer
from producer import AsyncProduceStrategy, ReplayPromptSampler, SyncProduceStrategy

folder, kind, dataset_kind, kill_at = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
judged = itertools.count(1)


def reward(state):
    if next(judged) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(state.row["answer"] % 3)


def dataset():
    rows = [{"prompt_ids": [10 + index], "answer": index} for index in range(9)]
    if dataset_kind == "list":
        return rows
    workers, batch_size, shuffle = json.loads(dataset_kind)
    collate = list if batch_size else lambda row: row
    generator = torch.Generator().manual_seed(4)
    return StatefulDataLoader(
        rows, batch_size=batch_size, num_workers=workers, shuffle=shuffle, generator=generator, collate_fn=collate
    )


async def main():
    lengths = lognormal_lengths(12, 1.0, longest=60)
    async with ReplayBuffer.open(f"sqlite:///{folder}/run.db") as buffer, SimulatedEngine(lengths=lengths) as engine:
        loop = SingleTurnAgentLoop(engine, reward=reward, sampling=SamplingParams(max_tokens=64, seed=3))
        sampler = ReplayPromptSampler(dataset(), buffer, group_size=2)
        strategy = SyncProduceStrategy(buffer) if kind == "sync" else AsyncProduceStrategy(buffer, staleness_threshold=1.0)
        checkpoint = f"{folder}/trained.json"
        trained = json.load(open(checkpoint)) if os.path.exists(checkpoint) else []
        await buffer.resume(step=len(trained))
        for step in range(len(trained) + 1, 9):
            batch = await strategy.produce_batch(loop, sampler, 2, "math", step=step)
            trained.append([[g.group_id, *g.position, g.rollouts[0].row["answer"], [s.response_ids.tolist() for s in g.rollouts]]
                            for g in batch.groups])
            with open(checkpoint + ".new", "w") as file:
                json.dump(trained, file)
            os.replace(checkpoint + ".new", checkpoint)
            await buffer.commit(step)
        report = await buffer.audit()
        assert report.ok, report.problems
        print(json.dumps({"drawn": report.drawn["math"]}))


asyncio.run(main())
"""


def run(folder: Path, kind: str, dataset: str, kill_at: int = -1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(folder), kind, dataset, str(kill_at)]
    with (folder / "errors.txt").open("w+") as errors:
        # To a file: a pipe is open until the workers of a killed process are gone, and the next process must not need that.
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, text=True, timeout=120, check=False)
        errors.seek(0)
        done.stderr = errors.read()
        return done


def finished_after(folder: Path, kind: str, dataset: str, kills: list[int]) -> list[Any]:
    """The batches trained on by a run that is killed at these judgements, once in each process."""
    folder.mkdir()
    for kill_at in kills:
        killed = run(folder, kind, dataset, kill_at)
        assert killed.returncode == -9, killed.stderr
    whole = run(folder, kind, dataset)
    assert whole.returncode == 0, whole.stderr
    trained: list[Any] = json.loads((folder / "trained.json").read_text())
    return trained


DATASETS = ["list", "[2, 4, true]", "[2, null, true]", "[0, 2, false]"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_sync_batches_equal_those_of_a_run_without_a_crash(tmp_path: Path, dataset: str) -> None:
    whole = finished_after(tmp_path / "whole", "sync", dataset, [])
    killed = finished_after(tmp_path / "killed", "sync", dataset, [5, 9] if dataset != "list" else [1, 6, 2, 11])
    assert killed == whole
    assert [group[0] for batch in whole for group in batch] == list(range(1, 17))


@pytest.mark.parametrize("dataset", DATASETS[:2])
def test_async_trains_on_every_prompt_at_most_once_and_loses_none(tmp_path: Path, dataset: str) -> None:
    trained = finished_after(tmp_path / "killed", "async", dataset, [3, 7, 9])
    groups = [group for batch in trained for group in batch]
    assert len(groups) == 16
    places = [(epoch, offset) for _, epoch, offset, *_ in groups]
    assert len(set(places)) == 16
    first = [answer for _, epoch, _, answer, _ in groups if epoch == 0]
    assert len(set(first)) == len(first)
