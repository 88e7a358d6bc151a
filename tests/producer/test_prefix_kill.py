"""Killed with SIGKILL in mid-response, a running rollout loses no more tokens than the interval, and a finished sibling nothing.

A child produces over a real file and says each token as it is decoded, each checkpoint when the buffer acknowledged it, and
each judgement. It is killed; the file is held against what it had said; the next child goes on.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import Decoder, Request, Step, policy_for
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import ReplayPromptSampler, SyncProduceStrategy

ROOT = Path(__file__).parents[2]
KILLS, INTERVAL, RATE = 4, 40, 40.0
GROUPS, SHORT, LONG = 2, 12, 400
ARRAYS = ("response_ids", "logprobs", "loss_mask", "versions")


def main() -> None:
    """The child; with a rate of 0 it decodes as fast as it can, to the end."""
    asyncio.run(_produce(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))


async def _produce(folder: Path, version: int, rate: float) -> None:
    async with (
        Saying(f"sqlite:///{folder}/run.db") as buffer,
        SimulatedEngine(policy=Telling(), tokens_per_second=rate or None) as engine,
    ):
        await engine.update_weights({"seed": version}, version)
        await buffer.resume(step=0)
        loop = SingleTurnAgentLoop(engine, reward=_judged, sampling=SamplingParams(max_tokens=1000))
        sampler = ReplayPromptSampler([{"prompt_ids": [10]}] * 50, buffer, group_size=3, shuffle=False)
        strategy = SyncProduceStrategy(buffer, checkpoint_tokens=INTERVAL, checkpoint_seconds=None)
        await strategy.produce_batch(loop, sampler, GROUPS, "math", step=1)
        _say("done")


async def _judged(state: RolloutState) -> float:
    _say("judged", rollout=state.rollout_id)
    return float(state.response_ids.size)


class Saying(ReplayBuffer):
    """Says what is durable."""

    async def checkpoint(self, group: RolloutGroup) -> None:
        await super().checkpoint(group)
        held = {state.rollout_id: [state.response_ids.size, state.status is Status.COMPLETED] for state in group.rollouts}
        _say("durable", held=held)


class Telling:
    """Says each token before anyone gets it. The first member of a group is short."""

    def __init__(self) -> None:
        def length(request: Request) -> int:
            return SHORT if str(request.session_id).endswith("-0") else LONG

        self._inner = policy_for(None, length, 0, 64, 0)
        self.vocab_size, self.eos_token_ids = self._inner.vocab_size, self._inner.eos_token_ids

    def start(self, request: Request, params: SamplingParams) -> Decoder:
        decode = self._inner.start(request, params)

        def step(context: Sequence[int], weights: int) -> Step:
            _say("decoded", rollout=request.session_id, tokens=len(context))  # the prompt is one token
            return decode(context, weights)

        return step


def _say(what: str, **more: Any) -> None:
    # Straight to the pipe: what was said before the kill is read after it.
    os.write(1, (json.dumps({"what": what, **more}) + "\n").encode())


class Ledger:
    """What children said, outside the database."""

    def __init__(self) -> None:
        self.decoded: dict[str, int] = {}
        self.durable: dict[str, int] = {}
        self.judged: Counter[str] = Counter()
        self.whole: set[str] = set()
        self.again: set[str] = set()
        self.generated: Counter[str] = Counter()
        self.stored: dict[str, list[RolloutState]] = defaultdict(list)

    def read(self, lines: list[str]) -> None:
        self.decoded, self.durable = {}, {}
        known = frozenset(self.whole)
        for said in map(json.loads, lines):
            match said["what"]:
                case "decoded":
                    self.decoded[said["rollout"]] = said["tokens"]
                    self.generated[said["rollout"]] += 1
                    self.again |= known & {said["rollout"]}
                case "judged":
                    self.judged[said["rollout"]] += 1
                    self.again |= known & {said["rollout"]}
                case "durable":
                    self.durable |= {name: held for name, (held, _) in said["held"].items()}
                    self.whole |= {name for name, (_, whole) in said["held"].items() if whole}

    async def hold_against(self, folder: Path) -> None:
        """Open what the kill left, and see what each rollout lost."""
        async with ReplayBuffer.open(f"sqlite:///{folder}/run.db") as buffer:
            report = await buffer.audit()
            assert report.ok, report.problems
            groups = await buffer.query(task_name="math")
        assert {group.status for group in groups} == {Status.INTERRUPTED}
        states = {state.rollout_id: state for group in groups for state in group.rollouts}
        for name, state in states.items():
            assert len({getattr(state, array).size for array in ARRAYS}) == 1
            held = state.response_ids.size
            assert held >= self.durable.get(name, 0), "what was acknowledged is there"
            assert held >= self.decoded.get(name, 0) - INTERVAL, "no more is lost than the interval"
            if name in self.whole:
                assert (state.status, state.score, held) == (Status.COMPLETED, float(SHORT), SHORT)
            self.stored[name].append(state)


@pytest.mark.timeout(300)
def test_killed_in_mid_response_no_rollout_loses_more_than_the_interval(tmp_path: Path) -> None:
    ledger, moments = Ledger(), random.Random(1)
    for version in range(KILLS):
        # Past the first checkpoint of this process, somewhere on the way to one of the next.
        ledger.read(_killed_after(1 + moments.randint(0, 2), moments.random() * 0.4, tmp_path, version))
        assert ledger.durable, "it was checkpointed, and killed before the end"
        asyncio.run(ledger.hold_against(tmp_path))
    ledger.read(_run(tmp_path, KILLS))
    groups = asyncio.run(_consumed(tmp_path))
    assert len(ledger.whole) >= GROUPS, "finished siblings were checkpointed"
    assert not ledger.again, "and neither generated nor judged again"
    assert all(ledger.judged[name] == 1 for name in ledger.whole)
    for state in (state for group in groups for state in group.rollouts):
        assert state.response_ids.size == (SHORT if state.index == 0 else LONG)
        assert ledger.generated[state.rollout_id] <= state.response_ids.size + KILLS * INTERVAL
        for kept in ledger.stored[state.rollout_id]:
            for name in ARRAYS:
                np.testing.assert_array_equal(getattr(state, name)[: kept.response_ids.size], getattr(kept, name))
    longest = [state for group in groups for state in group.rollouts if state.index > 0]
    assert all(set(state.versions.tolist()) == set(range(KILLS + 1)) for state in longest), "each process added its part"


async def _consumed(folder: Path) -> list[RolloutGroup]:
    async with ReplayBuffer.open(f"sqlite:///{folder}/run.db") as buffer:
        report = await buffer.audit()
        assert report.ok, report.problems
        groups = await buffer.query(task_name="math")
    assert [group.status for group in groups] == [Status.CONSUMED] * GROUPS
    return groups


def _child(folder: Path, version: int, rate: float) -> "subprocess.Popen[str]":
    program = "from tests.producer.test_prefix_kill import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder), str(version), str(rate)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def _run(folder: Path, version: int) -> list[str]:
    with _child(folder, version, 0.0) as child:
        assert child.stdout is not None
        said = child.stdout.readlines()
    assert json.loads(said[-1]) == {"what": "done"}
    return said


def _killed_after(checkpoints: int, delay: float, folder: Path, version: int) -> list[str]:
    """What a child said that was killed a moment after so many checkpoints of its groups."""
    with _child(folder, version, RATE) as child:
        assert child.stdout is not None
        said: list[str] = []
        while sum('"durable"' in line for line in said) < GROUPS * checkpoints:
            said.append(child.stdout.readline())
            assert said[-1], "it ended by itself"
        # Not for synchronisation: a kill at the very moment of a line would always hit the same statement.
        timer = threading.Timer(delay, child.send_signal, [signal.SIGKILL])
        timer.start()
        said += child.stdout.readlines()
        timer.join()
    assert child.returncode == -signal.SIGKILL, said[-3:]
    return [line for line in said if line.endswith("\n")]
