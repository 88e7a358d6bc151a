"""What functions of a set gave is in the database before the others have ended: after SIGKILL only what was missing is asked."""

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_loop import RewardFunction, RewardSet, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import ReplayPromptSampler, SyncProduceStrategy
from tests.buffer.groups import url
from tests.zygote import Moment, Say, Zygote

TASK, GROUPS, MEMBERS = "math", 2, 3


class Counting(SimulatedEngine):
    """Counts requests."""

    requests = 0

    async def generate(self, *arguments: Any, **options: Any) -> Any:
        self.requests += 1
        return await super().generate(*arguments, **options)


def sampler_of(buffer: ReplayBuffer) -> ReplayPromptSampler:
    rows = [{"prompt_ids": [10 + index], "data_source": "sums"} for index in range(40)]
    return ReplayPromptSampler(rows, buffer, group_size=MEMBERS, shuffle=False)


class Saying(ReplayBuffer):
    """Says which checkpoints are durable, and how many parts are in them."""

    say: Say

    async def checkpoint(self, group: RolloutGroup) -> None:
        parts = sum(len(state.reward_parts) for state in group.rollouts)  # as they were when the copy was made
        await super().checkpoint(group)
        if parts == MEMBERS and all(state.finished for state in group.rollouts):
            self.say("durable", group=group.group_id)


async def produce(say: Say, url: str, patient: bool) -> None:
    """The child; unless it is patient, its slow function takes for ever."""
    async with Saying(url) as buffer, Counting(lengths=5) as engine:
        buffer.say = say
        await buffer.resume(step=0)

        async def quick(state: RolloutState) -> float:
            say("quick", rollout=state.rollout_id)
            return 0.25

        async def slow(state: RolloutState) -> float:
            say("slow", rollout=state.rollout_id)
            if not patient:
                await asyncio.Event().wait()
            return float(state.index)

        rewards = RewardSet({"quick": quick, "slow": RewardFunction(slow, timeout=3600)}, recipes={"sums": {"quick": 1.0, "slow": 2.0}})
        loop = SingleTurnAgentLoop(engine, reward=rewards)
        strategy = SyncProduceStrategy(buffer, checkpoint_seconds=0.05)
        await strategy.produce_batch(loop, sampler_of(buffer), GROUPS, TASK, step=1)
        say("done", requests=engine.requests)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.producer.test_reward_set_stored:produce", "buffer.backends.postgres") as started:
        yield started


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("backend")
def test_killed_in_mid_scoring_only_what_was_missing_is_asked_again(tmp_path: Path, zygote: Zygote) -> None:
    address = url(tmp_path)
    child = zygote.start(url=address, patient=False)
    assert child.killed(Moment(GROUPS, 0.0, "durable")), child.lines[-3:]
    asyncio.run(_holds_parts_without_scores(address))
    child = zygote.start(url=address, patient=False)
    assert child.killed(Moment(GROUPS * MEMBERS, 0.0, "slow")), child.lines[-3:]  # nothing new to store
    assert "quick" not in {line["what"] for line in child.lines}
    said = zygote.start(url=address, patient=True).ended()
    assert said[-1] == {"what": "done", "requests": 0}
    assert Counter(line["what"] for line in said) == {"slow": GROUPS * MEMBERS, "done": 1}
    asyncio.run(_holds_scores(address))


async def _holds_parts_without_scores(address: str) -> None:
    async with ReplayBuffer.open(address) as buffer:
        assert (await buffer.audit(payloads=True)).ok
        groups = await buffer.query(task_name=TASK)
    assert [group.statuses for group in groups] == [[Status.INTERRUPTED] * MEMBERS] * GROUPS
    for state in (state for group in groups for state in group.rollouts):
        assert (state.finish_reason, state.score, state.reward_parts) == ("stop", None, {"quick": 0.25})


async def _holds_scores(address: str) -> None:
    async with ReplayBuffer.open(address) as buffer:
        assert (await buffer.audit(payloads=True)).ok
        groups = await buffer.query(task_name=TASK)
    for state in (state for group in groups for state in group.rollouts):
        assert (state.score, state.reward) == (0.25 + 2.0 * state.index,) * 2
        assert state.reward_parts == {"quick": 0.25, "slow": float(state.index)}
        assert set(state.metrics) == {"reward_seconds/quick", "reward_seconds/slow"}


@pytest.mark.sqlite
def not_of_the_second(state: RolloutState) -> float | None:
    return 1 / (state.index - 1) if state.index else None


async def test_parts_are_found_by_sql_and_are_metrics_of_their_batch(tmp_path: Path) -> None:
    failing = {"skipped": RewardFunction(not_of_the_second, on_error="skip"), "filled": RewardFunction(not_of_the_second, on_error=-4.0)}
    rewards = RewardSet({"one": lambda state: 1.0, "place": lambda state: state.index} | failing)
    async with ReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer, SimulatedEngine(lengths=5) as engine:
        agent_loop = SingleTurnAgentLoop(engine, reward=rewards)
        batch = await SyncProduceStrategy(buffer).produce_batch(agent_loop, sampler_of(buffer), GROUPS, TASK)
    told = {name.removeprefix("batch/"): value for name, value in batch.metrics.items() if "part/" in name or "/reward_" in name}
    seconds = {name: told.pop(name) for name in list(told) if name.startswith("reward_seconds/")}
    for name in ("reward_mean", "reward_std", "reward_max"):
        told.pop(name)
    assert told == {
        "part/one_mean": 1.0,
        "part/one_std": 0.0,
        "part/one_max": 1.0,
        "part/place_mean": 1.0,
        "part/place_std": pytest.approx((2 / 3) ** 0.5),
        "part/place_max": 2.0,
        "part/skipped_mean": 1.0,
        "part/skipped_std": 0.0,
        "part/skipped_max": 1.0,
        "part/filled_mean": -1.5,
        "part/filled_std": 2.5,
        "part/filled_max": 1.0,
        **{f"reward_{mark}": GROUPS for mark in ("no_say/skipped", "no_say/filled", "skipped/skipped", "filled/filled")},
    }
    assert len(seconds) == 3 * 4
    assert min(seconds.values()) >= 0
    query = "SELECT avg(json_extract(member.value, '$.reward_parts.place')) FROM payloads, json_each(payloads.extras) AS member"
    with sqlite3.connect(tmp_path / "run.db") as connection:
        assert connection.execute(query).fetchone() == (1.0,)
