"""Judging a group is repeated and nothing else, whatever stops it, SIGKILL too; groups kept without failed members are trained on."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import EngineError
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from producer import AsyncProduceStrategy, ReplayPromptSampler, SyncProduceStrategy, make_experience
from tests.buffer.groups import url
from tests.zygote import Moment, Say, Zygote

TASK, GROUPS, MEMBERS = "math", 2, 3


class Counting(SimulatedEngine):
    """Counts requests by rollout."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.requests: Counter[str] = Counter()

    async def generate(self, *arguments: Any, session_id: str, **others: Any) -> Any:
        self.requests[session_id] += 1
        return await super().generate(*arguments, session_id=session_id, **others)


def sampler_of(buffer: ReplayBuffer) -> ReplayPromptSampler:
    rows = [{"prompt_ids": [10 + index], "answer": index} for index in range(40)]
    return ReplayPromptSampler(rows, buffer, group_size=MEMBERS, shuffle=False)


def ranks(group: RolloutGroup) -> list[float]:
    return [float(state.index) for state in group.rollouts]


@pytest.mark.usefixtures("backend")
async def test_a_slow_judge_of_a_surplus_group_is_stopped_and_only_the_judging_is_repeated(tmp_path: Path) -> None:  # case 34
    never, judged = asyncio.Event(), Counter[int]()

    async def judge(group: RolloutGroup) -> list[float]:
        answer = group.rollouts[0].row["answer"]
        judged[answer] += 1
        if answer >= 2 and judged[answer] == 1:
            await never.wait()
        return ranks(group)

    async with ReplayBuffer.open(url(tmp_path)) as buffer, Counting(lengths=5) as engine:
        loop = SingleTurnAgentLoop(engine, group_reward=judge, reward_timeout=3600.0)
        sampler = sampler_of(buffer)
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, interrupt_timeout=3600.0)
        batch = await strategy.produce_batch(loop, sampler, 2, TASK)
        assert [group.rollouts[0].row["answer"] for group in batch.groups] == [0, 1]
        waiting = await buffer.query(status=Status.INTERRUPTED)
        assert {(state.finish_reason, state.score, state.response_ids.size) for group in waiting for state in group.rollouts} == {
            ("stop", None, 5)
        }
        again = await SyncProduceStrategy(buffer).produce_batch(loop, sampler, len(waiting), TASK)
        assert {group.group_id for group in again.groups} == {group.group_id for group in waiting}
        assert all([state.score for state in group.rollouts] == [0.0, 1.0, 2.0] for group in again.groups)
        assert set(engine.requests.values()) == {1}
        assert (await buffer.audit()).ok


# -- killed while a group is judged -----------------------------------------------------------------------------


async def produce(say: Say, url: str, patient: bool) -> None:
    """The child; unless it is patient, its judge takes for ever."""
    async with Saying(url) as buffer, Counting(lengths=5) as engine:
        buffer.say = say
        await buffer.resume(step=0)

        async def judge(group: RolloutGroup) -> list[float]:
            say("judging", group=group.group_id)
            if not patient:
                await asyncio.Event().wait()
            return ranks(group)

        loop = SingleTurnAgentLoop(engine, group_reward=judge, reward_timeout=3600.0)
        await SyncProduceStrategy(buffer).produce_batch(loop, sampler_of(buffer), GROUPS, TASK, step=1)
        say("done", requests=engine.requests.total())


class Saying(ReplayBuffer):
    """Says which checkpoints are durable."""

    say: Say

    async def checkpoint(self, group: RolloutGroup) -> None:
        await super().checkpoint(group)
        self.say("durable", group=group.group_id)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.producer.test_group_rewards_stored:produce", "buffer.backends.postgres") as started:
        yield started


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("backend")
def test_killed_while_groups_are_judged_they_are_judged_again_and_not_sampled_again(tmp_path: Path, zygote: Zygote) -> None:
    address = url(tmp_path)
    for moment in (Moment(GROUPS, 0.0, "durable"), Moment(GROUPS, 0.0, "judging")):  # the second process has nothing new to store
        child = zygote.start(url=address, patient=False)
        assert child.killed(moment), child.lines[-3:]
        asyncio.run(_holds_whole_groups_without_scores(address))
    said = zygote.start(url=address, patient=True).ended()
    assert said[-1] == {"what": "done", "requests": 0}
    assert Counter(line["what"] for line in said)["judging"] == GROUPS
    asyncio.run(_holds_judged_groups(address))


async def _holds_whole_groups_without_scores(address: str) -> None:
    async with ReplayBuffer.open(address) as buffer:
        assert (await buffer.audit(payloads=True)).ok
        groups = await buffer.query(task_name=TASK)
    assert [group.statuses for group in groups] == [[Status.INTERRUPTED] * MEMBERS] * GROUPS
    for state in (state for group in groups for state in group.rollouts):
        assert (state.finish_reason, state.score, state.response_ids.size) == ("stop", None, 5)


async def _holds_judged_groups(address: str) -> None:
    async with ReplayBuffer.open(address) as buffer:
        assert (await buffer.audit(payloads=True)).ok
        groups = await buffer.query(task_name=TASK)
    assert [group.status for group in groups] == [Status.CONSUMED] * GROUPS
    assert [[state.score for state in group.rollouts] for group in groups] == [[0.0, 1.0, 2.0]] * GROUPS


# -- groups without their failed members ------------------------------------------------------------------------


class Failing(SingleTurnAgentLoop):
    """The first member of every group fails on every attempt, after its first tokens."""

    async def generate(self, state: RolloutState) -> RolloutState:
        if state.index == 0:
            await self.extend(state, SamplingParams(max_tokens=2))
            raise EngineError("this one never works")
        return await super().generate(state)


@pytest.mark.usefixtures("backend")
async def test_a_group_is_stored_handed_out_rewound_and_trained_on_without_the_member_that_failed(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer, SimulatedEngine(lengths=5) as engine:
        loop = Failing(engine, reward=lambda state: state.index, min_group_size=2, max_attempts=2, back_off=0.0)
        batch = await SyncProduceStrategy(buffer).produce_batch(loop, sampler_of(buffer), GROUPS, TASK)
        await buffer.resume(step=0)
        (again, _) = await buffer.take(TASK, GROUPS, step=1)
        await buffer.commit(1)
        for group in (*batch.groups, again):
            assert [state.left_out for state in group.rollouts] == [True, False, False]
            assert [state.score for state in group.rollouts] == [None, 1.0, 2.0]
            failed = group.rollouts[0]
            assert (failed.error, failed.attempts, failed.response_ids.size) == ("EngineError: this one never works", 2, 2)
        archived = await buffer.get(again.group_id)
        assert (archived.status, archived.rollouts[0].left_out) == (Status.ARCHIVED, True)
        assert (await buffer.audit(payloads=True)).ok
    experience = make_experience(batch.groups)
    assert experience.metrics["left_out/failed"] == experience.metrics["left_out/total"] == GROUPS
    assert experience.rollout_ids == tuple(f"math-{group.group_id}-{index}" for group in batch.groups for index in (1, 2))


async def test_too_stale_a_member_that_was_left_out_is_run_again(buffer: ReplayBuffer) -> None:
    async with SimulatedEngine(lengths=5) as engine:
        loop = Failing(engine, reward=lambda state: state.index, min_group_size=2, max_attempts=2, back_off=0.0)
        (group,) = await sampler_of(buffer).sample_many(TASK, 1, buffer=buffer)
        await buffer.put(await loop.generate_group(group))
        assert await buffer.count(TASK, Status.COMPLETED) == 1
        await engine.update_weights({"seed": 1}, 3)
        assert await buffer.expire(TASK, version=3, max_staleness=2) == 1
        healed = SingleTurnAgentLoop(engine, reward=lambda state: state.index)
        (batch,) = (await SyncProduceStrategy(buffer).produce_batch(healed, sampler_of(buffer), 1, TASK)).groups
    assert [(state.left_out, state.error, state.score) for state in batch.rollouts] == [(False, None, float(index)) for index in range(3)]
