"""Shows that what a running group decoded is durable from its checkpoint on, and only what is new is written."""

import asyncio
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from buffer import ReplayBuffer, RolloutGroup, Status
from buffer.errors import IllegalTransitionError, LeaseLostError, UnknownGroupError
from tests.buffer.groups import a_group, draw, fill, finished, plain, url

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def running(buffer: ReplayBuffer, n: int = 1) -> list[RolloutGroup]:
    return await buffer.start(await draw(buffer, *range(n)))


def sample(group: RolloutGroup, n: int, *, version: int = 0, member: int | None = None) -> None:
    for rollout in group.rollouts if member is None else [group.rollouts[member]]:
        rollout.append(range(n), logprobs=[-0.25] * n, version=version)


async def test_after_a_crash_a_group_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        (group,) = await running(buffer)
        sample(group, 5, version=1)
        await buffer.checkpoint(group)
        sample(group, 3, version=2)
        fill(group.rollouts[0], 1, version=2)
        group.rollouts[0].status = S.COMPLETED
        await buffer.checkpoint(group)
        sample(group, 7, version=2, member=1)  # lost
        stored = await buffer.get(group.group_id)
        assert (stored.status, [r.response_ids.size for r in stored.rollouts]) == (S.RUNNING, [9, 8])
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        (again,) = await buffer.claim("math", 1, statuses=[S.INTERRUPTED])
        first, second = again.rollouts
        assert (first.status, first.score, first.text) == (S.COMPLETED, 1.0, "three"), "it is neither sampled nor scored again"
        assert (second.status, second.interruptions) == (S.RUNNING, 1)
        assert second.versions.tolist() == [1] * 5 + [2] * 3
        await buffer.put(finished(again, version=3))
        whole = await buffer.get(again.group_id)
        assert whole.rollouts[1].versions.tolist() == [1] * 5 + [2] * 3 + [3] * 3
        assert (await buffer.audit(payloads=True)).ok


async def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    async with ReplayBuffer.open(f"sqlite:///{path}") as buffer:
        (group,) = await running(buffer)
        for _ in range(4):
            sample(group, 100)
            await buffer.checkpoint(group)
        await buffer.checkpoint(group)  # nothing is new
        sample(group, 10, member=1)
        await buffer.checkpoint(group)
        assert _sizes(path) == [2 * 908] * 4 + [98], "9 bytes a token, and 8 a run of one version"
        await buffer.put(finished(group))
        assert _sizes(path) == [], "the payload replaces them"


def _sizes(path: Path) -> list[int]:
    with sqlite3.connect(path) as connection:
        sizes = [size for (size,) in connection.execute("SELECT length(arrays) FROM prefixes ORDER BY number")]
    connection.close()
    return sizes


async def test_a_member_that_was_begun_anew_replaces_what_was_stored(buffer: ReplayBuffer) -> None:
    (group,) = await running(buffer)
    sample(group, 6)
    await buffer.checkpoint(group)
    group.rollouts[0].reset()
    group.rollouts[0].append([9, 9, 9, 9, 9, 9, 9], logprobs=[-1.0] * 7, version=4)
    group.rollouts[1].reset()
    await buffer.checkpoint(group)
    stored = await buffer.get(group.group_id)
    assert stored.rollouts[0].response_ids.tolist() == [9] * 7
    assert stored.rollouts[1].response_ids.tolist() == []
    await buffer.put(finished(group))


async def test_versions_that_were_provisional_are_put_right(buffer: ReplayBuffer) -> None:
    (group,) = await running(buffer)
    sample(group, 6, version=2)
    await buffer.checkpoint(group)
    group.rollouts[0].versions = np.array([1, 1, 1, 2, 2, 2], np.int32)
    await buffer.checkpoint(group)
    stored = await buffer.get(group.group_id)
    assert [r.versions.tolist() for r in stored.rollouts] == [[1, 1, 1, 2, 2, 2], [2] * 6]
    await buffer.put(finished(group))


async def test_prefixes_count_for_staleness(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        (group,) = await running(buffer)
        sample(group, 2, version=1)
        await buffer.checkpoint(group)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert await buffer.expire("math", version=9, max_staleness=3) == 1
        assert [r.response_ids.size for r in (await buffer.get(group.group_id)).rollouts] == [0, 0]
        (again,) = await buffer.claim("math", 1, statuses=[S.EXPIRED])
        await buffer.put(finished(again))


async def test_many_groups_at_once(buffer: ReplayBuffer) -> None:
    groups = await running(buffer, 20)
    for n, group in enumerate(groups):
        sample(group, n + 1)
    async with asyncio.TaskGroup() as tasks:
        for group in groups:
            tasks.create_task(buffer.checkpoint(group))
            tasks.create_task(buffer.checkpoint(group))
    for group in groups:
        stored = await buffer.get(group.group_id)
        assert all(np.array_equal(a.response_ids, b.response_ids) for a, b in zip(stored.rollouts, group.rollouts, strict=True))
        await buffer.put(finished(group))


async def test_what_does_not_run_has_no_checkpoint(buffer: ReplayBuffer) -> None:
    (group,) = await running(buffer)
    sample(group, 2)
    await buffer.release([group.group_id])
    with pytest.raises(LeaseLostError, match="group 1 of task 'math' ran out, and now it is interrupted"):
        await buffer.checkpoint(group)
    with pytest.raises(UnknownGroupError, match=r"group 77 .* only groups that were handed out"):
        await buffer.checkpoint(a_group(77, S.RUNNING))
    with pytest.raises(TypeError, match=r"checkpoint\(\) stores a RolloutGroup, not str"):
        await buffer.checkpoint("group")  # type: ignore[arg-type]


async def test_a_checkpoint_that_failed_is_made_good_by_the_next(buffer: ReplayBuffer) -> None:
    (group,) = await running(buffer)
    sample(group, 4)
    group.rollouts[0].metrics = {"bad": float("nan")}
    with pytest.raises(ValueError, match="cannot be stored"):
        await buffer.checkpoint(group)
    group.rollouts[0].metrics = {}
    sample(group, 4)
    await buffer.checkpoint(group)
    stored = await buffer.get(group.group_id)
    assert [plain(stored)["rollouts"][n]["response_ids"] for n in (0, 1)] == [plain(group)["rollouts"][n]["response_ids"] for n in (0, 1)]
    await buffer.put(finished(group))


async def test_what_is_judged_or_measured_after_the_last_token_is_checkpointed_too(buffer: ReplayBuffer) -> None:
    (group,) = await buffer.start(await draw(buffer, 0))
    group.rollouts[0].append([1, 2], logprobs=[-1, -1])
    await buffer.checkpoint(group)
    group.rollouts[0].metrics["turns"] = 2.0
    group.rollouts[0].reward_parts["format"] = 0.5
    await buffer.checkpoint(group)
    stored = (await buffer.get(group.group_id)).rollouts[0]
    assert (stored.metrics, stored.reward_parts) == ({"turns": 2.0}, {"format": 0.5})


async def test_a_token_without_a_log_probability_is_written_once(buffer: ReplayBuffer) -> None:
    (group,) = await buffer.start(await draw(buffer, 0))
    group.rollouts[0].append([1], logprobs=[float("nan")], trainable=False)
    await buffer.checkpoint(group)
    before = (await buffer.overview()).prefix_bytes
    await buffer.checkpoint(group)
    assert (await buffer.overview()).prefix_bytes == before


async def test_one_asked_for_before_the_last_one_failed_holds_what_that_was_to_store(buffer: ReplayBuffer) -> None:
    (group,) = await running(buffer)
    sample(group, 3)
    group.rollouts[0].metrics["seconds"] = object()  # type: ignore[assignment]
    async with asyncio.TaskGroup() as tasks:
        bad = tasks.create_task(refused(buffer, group))
        await asyncio.sleep(0)
        group.rollouts[0].metrics.clear()
        sample(group, 1)
        tasks.create_task(buffer.checkpoint(group))
    assert bad.result()
    assert plain(await buffer.get(group.group_id)) == plain(group)


async def refused(buffer: ReplayBuffer, group: RolloutGroup) -> bool:
    with pytest.raises(ValueError, match="cannot be stored"):
        await buffer.checkpoint(group)
    return True


async def test_one_that_was_cancelled_is_not_counted_on(buffer: ReplayBuffer) -> None:
    (group,) = await running(buffer)
    sample(group, 3)
    group.rollouts[0].metrics["seconds"] = object()  # type: ignore[assignment]
    task = asyncio.create_task(buffer.checkpoint(group))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    group.rollouts[0].metrics.clear()
    sample(group, 1)
    await buffer.checkpoint(group)
    assert plain(await buffer.get(group.group_id)) == plain(group)


async def test_a_group_of_which_nothing_runs_is_not_checkpointed(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        (group,) = await running(buffer)
        with pytest.raises(IllegalTransitionError, match=r"group 1 is completed and cannot be checkpointed; put\(\) stores"):
            await buffer.checkpoint(finished(group))
    async with ReplayBuffer.open(url(tmp_path)) as buffer:  # else its row would say interrupted, its members completed
        assert (await buffer.get(1)).status is S.INTERRUPTED
