"""Killed with SIGKILL in mid-response, a running rollout loses no more tokens than the interval, and a finished sibling nothing.

A child produces over a real database and says each token as it is decoded, each checkpoint when it is asked for and when the
buffer acknowledged it, and each judgement. It is killed; the database is held against what it had said; the next child goes on.
"""

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import Decoder, FillerPolicy, Request, Step
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import ReplayPromptSampler, SyncProduceStrategy
from tests.buffer.groups import url
from tests.zygote import Moment, Say, Zygote

KILLS, INTERVAL, RATE = 4, 40, 60.0
GROUPS, SHORT, LONG = 2, 12, 400
ARRAYS = ("response_ids", "logprobs", "loss_mask", "versions")


async def produce(say: Say, url: str, version: int, rate: float | None) -> None:
    """The child; without a rate it decodes as fast as it can, to the end."""
    async with Saying(url) as buffer, SimulatedEngine(policy=Telling(say), tokens_per_second=rate) as engine:
        buffer.say = say
        await engine.update_weights({"seed": version}, version)
        await buffer.resume(step=0)

        async def judged(state: RolloutState) -> float:
            say("judged", rollout=state.rollout_id)
            return float(state.response_ids.size)

        loop = SingleTurnAgentLoop(engine, reward=judged, sampling=SamplingParams(max_tokens=1000))
        sampler = ReplayPromptSampler([{"prompt_ids": [10]}] * 50, buffer, group_size=3, shuffle=False)
        strategy = SyncProduceStrategy(buffer, checkpoint_tokens=INTERVAL, checkpoint_seconds=None)
        await strategy.produce_batch(loop, sampler, GROUPS, "math", step=1)
        say("done")


class Saying(ReplayBuffer):
    """Says what is asked to be stored, and what is durable."""

    say: Say

    async def checkpoint(self, group: RolloutGroup) -> None:
        self.say("asked", group=group.group_id)
        await super().checkpoint(group)
        held = {state.rollout_id: [state.response_ids.size, state.status is Status.COMPLETED] for state in group.rollouts}
        self.say("durable", group=group.group_id, held=held)


class Telling:
    """Says each token before anyone gets it. The first member of a group is short."""

    def __init__(self, say: Say) -> None:
        def length(request: Request) -> int:
            return SHORT if str(request.session_id).endswith("-0") else LONG

        self._say, self._inner = say, FillerPolicy(length)
        self.vocab_size, self.eos_token_ids = self._inner.vocab_size, self._inner.eos_token_ids

    def start(self, request: Request, params: SamplingParams) -> Decoder:
        decode = self._inner.start(request, params)

        def step(context: Sequence[int], weights: int) -> Step:
            self._say("decoded", rollout=request.session_id, tokens=len(context))  # the prompt is one token
            return decode(context, weights)

        return step


class Ledger:
    """What children said, outside the database."""

    def __init__(self) -> None:
        self.decoded: dict[str, int] = {}
        self.durable: dict[str, int] = {}
        self.slowest = self.lost = 0
        self.judged: Counter[str] = Counter()
        self.whole: set[str] = set()
        self.again: set[str] = set()
        self.generated: Counter[str] = Counter()
        self.stored: dict[str, list[RolloutState]] = defaultdict(list)

    def read(self, lines: list[dict[str, Any]]) -> None:
        """Of one process."""
        self.decoded, self.durable = {}, {}
        known, asked = frozenset(self.whole), dict[int, dict[str, int]]()
        durations = [0]
        for said in lines:
            match said["what"]:
                case "decoded":
                    self.decoded[said["rollout"]] = said["tokens"]
                    self.generated[said["rollout"]] += 1
                    self.again |= known & {said["rollout"]}
                case "judged":
                    self.judged[said["rollout"]] += 1
                    self.again |= known & {said["rollout"]}
                case "asked":
                    asked[said["group"]] = dict(self.decoded)
                case "durable":
                    durations.append(self._decoded_since(asked.pop(said["group"])))
                    self.durable |= {name: held for name, (held, _) in said["held"].items()}
                    self.whole |= {name for name, (_, whole) in said["held"].items() if whole}
        self.slowest = max(durations + [self._decoded_since(before) for before in asked.values()])

    def _decoded_since(self, before: dict[str, int]) -> int:
        return max((tokens - before[name] for name, tokens in self.decoded.items() if name in before), default=0)

    @property
    def bound(self) -> int:
        """What may be lost: the interval. It holds while a write takes no more than a quarter of it.

        Where the disk or the server stalled for longer, the tokens decoded meanwhile may be lost too; a checkpoint that
        becomes due during a write waits for it, and may meet such a stall itself.
        """
        return INTERVAL + 2 * max(0, self.slowest - INTERVAL // 4)

    async def hold_against(self, address: str) -> None:
        """Open what the kill left, and see what each rollout lost."""
        async with ReplayBuffer.open(address) as buffer:
            report = await buffer.audit()
            assert report.ok, report.problems
            groups = await buffer.query(task_name="math")
        assert {group.status for group in groups} == {Status.INTERRUPTED}
        self.lost += self.bound
        states = {state.rollout_id: state for group in groups for state in group.rollouts}
        for name, state in states.items():
            assert len({getattr(state, array).size for array in ARRAYS}) == 1
            held = state.response_ids.size
            assert held >= self.durable.get(name, 0), "what was acknowledged is there"
            assert held >= self.decoded.get(name, 0) - self.bound, "no more is lost than the interval"
            if name in self.whole:
                assert (state.status, state.score, held) == (Status.COMPLETED, float(SHORT), SHORT)
            self.stored[name].append(state)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.producer.test_prefix_kill:produce", "buffer.backends.postgres") as started:
        yield started


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("backend")
def test_killed_in_mid_response_no_rollout_loses_more_than_the_interval(tmp_path: Path, zygote: Zygote) -> None:
    ledger, moments, address = Ledger(), random.Random(1), url(tmp_path)
    for version in range(KILLS):
        child = zygote.start(url=address, version=version, rate=RATE)
        # Past the first checkpoint of this process, somewhere on the way to one of the next.
        moment = Moment(GROUPS * (1 + moments.randint(0, 2)), moments.random() * 16 / RATE, "durable")
        assert child.killed(moment), child.lines[-3:]
        ledger.read(child.lines)
        assert ledger.durable, "it was checkpointed, and killed before the end"
        asyncio.run(ledger.hold_against(address))
    said = zygote.start(url=address, version=KILLS, rate=None).ended()
    assert said[-1] == {"what": "done"}
    ledger.read(said)
    groups = asyncio.run(_consumed(address))
    assert len(ledger.whole) >= GROUPS, "finished siblings were checkpointed"
    assert not ledger.again, "and neither generated nor judged again"
    assert all(ledger.judged[name] == 1 for name in ledger.whole)
    for state in (state for group in groups for state in group.rollouts):
        assert state.response_ids.size == (SHORT if state.index == 0 else LONG)
        assert ledger.generated[state.rollout_id] <= state.response_ids.size + ledger.lost
        for kept in ledger.stored[state.rollout_id]:
            for name in ARRAYS:
                np.testing.assert_array_equal(getattr(state, name)[: kept.response_ids.size], getattr(kept, name))
    longest = [state for group in groups for state in group.rollouts if state.index > 0]
    assert all(set(state.versions.tolist()) == set(range(KILLS + 1)) for state in longest), "each process added its part"


async def _consumed(address: str) -> list[RolloutGroup]:
    async with ReplayBuffer.open(address) as buffer:
        report = await buffer.audit()
        assert report.ok, report.problems
        groups = await buffer.query(task_name="math")
    assert [group.status for group in groups] == [Status.CONSUMED] * GROUPS
    return groups
