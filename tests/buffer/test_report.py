"""Shows that a report's numbers are those of the batches that were handed out, summed by hand over the groups that the buffer gives back,
however the steps are put together, and that waste and endings stand at the step that came next."""

import random
from pathlib import Path

import numpy as np
import pytest

from buffer import ReplayBuffer, RolloutGroup, Status
from buffer.errors import CorruptPayloadError
from buffer.report import StepReport
from tests.buffer.groups import a_group, edit, fill, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

S = Status


def various(group_id: int, chance: random.Random, version: int) -> RolloutGroup:
    """A group whose members have all kinds of lengths and rewards; one of them may be left out, or have no reward."""
    group = a_group(
        group_id, size=chance.randint(1, 4), tokens=1, version=max(0, version - chance.randint(0, 2)), task_name=chance.choice("ab")
    )
    for state in group.rollouts:
        state.append(range(chance.randint(0, 9)), trainable=False)
        state.reward, state.score = chance.choice([None, 0.0, 1.0, -2.5]), chance.random()
        state.finish_reason = chance.choice(["stop", "length"])
    if len(group.rollouts) > 1 and chance.random() < 0.3:
        out = group.rollouts[0]
        out.error, out.reward, out.score = "TimeoutError: the judge took 30 s", None, None
    return group


async def trained(buffer: ReplayBuffer, steps: int, seed: int = 1) -> dict[int, list[RolloutGroup]]:
    """A run of so many steps; gives the groups of each, with what was filtered and failed between."""
    chance, group_id, batches = random.Random(seed), 0, dict[int, list[RolloutGroup]]()
    for step in range(1, steps + 1):
        for _ in range(8):
            group_id += 1
            await buffer.put(various(group_id, chance, version=step))
        await put_all(
            buffer, [a_group(group_id + 1, S.FILTERED, task_name="a", tokens=step), a_group(group_id + 2, S.FAILED, task_name="b")]
        )
        group_id += 2
        batches[step] = [*await buffer.take("a", 3, step=step, version=step), *await buffer.take("b", 2, step=step, version=step)]
    return batches


def by_hand(groups: list[RolloutGroup], version: int) -> dict[str, float | None]:
    states = [state for group in groups for state in group.rollouts]
    own = [state for state in states if not state.left_out]
    rewards = [[state.reward for state in group.rollouts if not state.left_out and state.reward is not None] for group in groups]
    told, stale = [reward for of_group in rewards for reward in of_group], [group.staleness(version) for group in groups]
    lengths = [state.response_ids.size for state in own]
    return {
        "groups": len(groups),
        "rollouts": len(states),
        "left_out": len(states) - len(own),
        "tokens": sum(lengths),
        "reward_mean": float(np.mean(told)) if told else None,
        "reward_min": min(told, default=None),
        "reward_max": max(told, default=None),
        "score_mean": float(np.mean([state.score for state in own])),
        "length_mean": float(np.mean(lengths)),
        "length_max": max(lengths),
        "truncated": float(np.mean([state.finish_reason == "length" for state in own])),
        "zero_variance": float(np.mean([len(set(of_group)) == 1 for of_group in rewards if of_group])) if told else None,
        "staleness_mean": float(np.mean([one for one in stale if one is not None])),
        "staleness_max": max(one for one in stale if one is not None),
    }


def found(step: StepReport, names: dict[str, float | None]) -> dict[str, float | None]:
    return {name: getattr(step, name) for name in names}


async def test_each_step_is_what_its_batch_was(buffer: ReplayBuffer) -> None:
    batches = await trained(buffer, 6)
    report = await buffer.report()
    assert (report.first, report.last, report.width, len(report.steps)) == (1, 6, 1, 12)
    for step in report.steps:
        assert step.first is not None
        own = by_hand([group for group in batches[step.first] if group.task_name == step.task_name], step.first)
        assert found(step, own) == pytest.approx(own), step
        assert (step.version, step.steps, step.last) == (step.first, 1, step.first)
        reason, n = ("filtered", 2 * step.first) if step.task_name == "a" else ("failed", 6)
        assert {name: tokens for name, tokens in step.wasted.items() if name != "left_out"} == {reason: n}
        assert step.ended[reason] == 1
        left_out = [state.response_ids.size for group in batches[step.first] for state in group.rollouts if state.left_out]
        assert step.wasted.get("left_out", 0) <= sum(left_out)
    times = [step.at for step in report.steps if step.task_name == "a"]
    assert times == sorted(times), "each step later than the one before"  # type: ignore[type-var]  # none is None
    assert all(step.seconds is not None and step.seconds >= 0 for step in report.steps)
    for name, account in {name: task.account for name, task in report.overview.tasks.items()}.items():
        own_steps = [step for step in report.steps if step.task_name == name]
        for reason in ("filtered", "failed", "left_out"):
            assert sum(step.wasted.get(reason, 0) for step in own_steps) == account.wasted[reason]
        assert sum(step.tokens for step in own_steps) == account.trained.tokens


async def test_steps_are_put_together_and_cut_to_a_range(buffer: ReplayBuffer) -> None:
    batches = await trained(buffer, 7)
    report = await buffer.report(["a"], points=3)
    assert [(step.first, step.last, step.steps) for step in report.steps] == [(1, 3, 3), (4, 6, 3), (7, 7, 1)]
    for step in report.steps:
        assert step.first is not None
        assert step.last is not None
        groups = [group for n in range(step.first, step.last + 1) for group in batches[n] if group.task_name == "a"]
        own = {name: value for name, value in by_hand(groups, 0).items() if not name.startswith("staleness")}
        assert found(step, own) == pytest.approx(own)
        assert step.wasted["filtered"] == 2 * sum(range(step.first, step.last + 1))
    part = await buffer.report(min_step=3, max_step=4)
    whole = await buffer.report()
    assert [step for step in part.steps if step.first == 4] == [step for step in whole.steps if step.first == 4]
    assert {step.first for step in part.steps} == {3, 4}
    assert part.since == [], "there is more after it"
    assert [step.task_name for step in (await buffer.report("b", max_step=7)).since] == ["b"]


async def test_what_ends_after_the_last_batch_waits_for_its_step(buffer: ReplayBuffer) -> None:
    assert (await buffer.report()).since == []
    await put_all(buffer, [a_group(1, S.FAILED, tokens=5), a_group(2), a_group(3)])
    report = await buffer.report()
    assert (report.first, report.steps) == (None, [])
    (since,) = report.since
    assert (since.ended, since.wasted, since.groups, since.reward_mean) == ({"failed": 1, "completed": 2}, {"failed": 10}, 0, None)
    await buffer.take("math", 1, step=1)
    report = await buffer.report()
    (step,), (since,) = report.steps, report.since
    assert (step.ended, step.wasted, since.ended, since.wasted) == ({"failed": 1, "completed": 2}, {"failed": 10}, {}, {})
    assert (step.version, step.staleness_mean) == (None, None), "nobody said which version the policy had"


async def test_a_rewind_takes_steps_back_and_ends_no_group_twice(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n, version=n - 1) for n in (1, 2, 3)])
    for step in (1, 2, 3):
        await buffer.take("math", 1, step=step, version=step - 1)
    await buffer.commit(1)
    await buffer.resume(step=1)
    report = await buffer.report()
    assert [(step.first, step.ended) for step in report.steps] == [(1, {"completed": 3})]
    assert len(report.overview.rewinds) == 1
    await buffer.take("math", 1, step=2, version=1)
    assert [(step.first, step.ended) for step in (await buffer.report()).steps] == [(1, {"completed": 3}), (2, {})]


async def test_rewards_that_are_no_finite_numbers_are_passed_over(buffer: ReplayBuffer, tmp_path: Path, backend: str) -> None:
    group = a_group(1, size=4)
    fill(group.rollouts[0])
    await buffer.put(group)
    await buffer.take("math", 1, step=1)
    values = ["'NaN'", "'Infinity'", "'-Infinity'"] if backend == "postgresql" else ["NULL", "9e999", "'many'"]
    for member, value in enumerate(values, 1):
        edit(tmp_path, f"UPDATE rollouts SET reward = {value} WHERE member = {member}")
    (step,) = (await buffer.report()).steps
    assert (step.reward_mean, step.reward_min, step.reward_max, step.rollouts) == (1.0, 1.0, 1.0, 4)


@pytest.mark.sqlite
async def test_text_where_a_number_belongs_is_named(buffer: ReplayBuffer, tmp_path: Path) -> None:
    await buffer.put(a_group(1))
    await buffer.take("math", 1, step=1, version=1)
    edit(tmp_path, "UPDATE steps SET version = 'seven'")
    with pytest.raises(CorruptPayloadError, match="'seven'"):
        await buffer.report()


async def test_what_cannot_be_asked_is_refused(buffer: ReplayBuffer) -> None:
    with pytest.raises(ValueError, match="min_step=5 lies above max_step=4"):
        await buffer.report(min_step=5, max_step=4)
    with pytest.raises(ValueError, match="points=0"):
        await buffer.report(points=0)
    with pytest.raises(ValueError, match="names no task"):
        await buffer.report([""])
    assert (await buffer.report(["none"])).steps == []


async def test_it_is_read_beside_the_process_that_writes(buffer: ReplayBuffer, tmp_path: Path) -> None:
    await trained(buffer, 2)
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as reader:
        assert (await reader.report()).steps == (await buffer.report()).steps
