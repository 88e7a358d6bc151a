"""Shows that after a rewind rollouts of undone weights are told apart: kept with their distance, or expired."""

from pathlib import Path

import pytest

from buffer import ReplayBuffer, RolloutGroup, Status
from tests.buffer.groups import a_group, draw, fill, finished, ids, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def trained(buffer: ReplayBuffer, steps: int = 4) -> None:
    """Groups 1 to 8, two a step; those of step n were sampled by version n - 1, and its batch saw that version."""
    for step in range(1, steps + 1):
        await put_all(buffer, [a_group(2 * step - 1, version=step - 1), a_group(2 * step, version=step - 1)])
        await buffer.take("math", 2, step=step, version=step - 1)
    await buffer.commit(1, version=1)


def staleness(groups: list[RolloutGroup], version: int) -> list[int | None]:
    return [group.staleness(version) for group in groups]


async def test_a_rewind_begins_a_timeline_and_distance_is_counted_over_the_fork(buffer: ReplayBuffer) -> None:
    await trained(buffer)
    report = await buffer.resume(step=1)
    assert (report.version, report.timeline, report.rewound, report.expired) == (1, 1, 6, 0)
    again = await buffer.take("math", 6, step=2)
    assert ids(again) == [3, 4, 5, 6, 7, 8]
    assert staleness(again, 1) == [0, 0, 1, 1, 2, 2], "two updates on the timeline that ended, none on this one"
    assert staleness(again, 2) == [1, 1, 2, 2, 3, 3]


async def test_two_weights_of_one_version_are_told_apart(buffer: ReplayBuffer) -> None:
    await trained(buffer)
    await buffer.resume(step=1)
    (drawn,) = await buffer.start(await draw(buffer, 0))
    await buffer.put(finished(drawn, version=3))
    old, new = await buffer.get(7), await buffer.get(drawn.group_id)
    assert [r.versions.tolist() for g in (old, new) for r in g.rollouts] == [[3, 3, 3]] * 4
    assert [r.timelines.tolist() for g in (old, new) for r in g.rollouts] == [[0] * 3] * 2 + [[1] * 3] * 2
    assert staleness([old, new], 3) == [4, 0]


async def test_undone_rollouts_stay_under_the_bound_on_staleness(buffer: ReplayBuffer) -> None:
    await trained(buffer)
    await buffer.resume(step=1)
    assert await buffer.expire("math", version=1, max_staleness=1) == 2
    assert ids(await buffer.query(status=S.EXPIRED)) == [7, 8]
    assert await buffer.expire("math", version=2, max_staleness=1) == 2
    assert ids(await buffer.query(status=S.EXPIRED)) == [5, 6, 7, 8]


async def test_the_future_is_expired_when_asked(buffer: ReplayBuffer) -> None:
    await trained(buffer)
    report = await buffer.resume(step=1, future="expire")
    assert (report.rewound, report.expired) == (6, 4)
    assert ids(await buffer.query(status=S.EXPIRED)) == [5, 6, 7, 8]
    assert (await buffer.history(5))[-1].reason == "sampled by weights that the rewind to step 1 undid"
    assert ids(await buffer.take("math", 9, step=2)) == [3, 4]


async def test_only_the_members_with_undone_tokens_expire(buffer: ReplayBuffer) -> None:
    group = a_group(1, version=1)
    group.rollouts[1].append([5], logprobs=[-1.0], version=2)
    await buffer.put(group)
    await buffer.take("math", 1, step=1, version=1)
    await buffer.resume(step=0, future="expire")
    stored = await buffer.get(1)
    assert [r.response_ids.size for r in stored.rollouts] == [3, 0], "the batch of step 1 saw version 1"


async def test_a_run_that_never_sampled_has_one_timeline(buffer: ReplayBuffer) -> None:
    assert (await buffer.resume(step=0)).timeline == 0
    await draw(buffer, 0, 1)
    assert (await buffer.resume(step=0)).timeline == 0
    await buffer.put(a_group(50, version=0))
    assert (await buffer.resume(step=0)).timeline == 1


async def test_what_runs_across_a_rewind_keeps_both_timelines(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(40, version=0)])
        (group,) = await buffer.start(await draw(buffer, 0))
        group.rollouts[0].append([1, 2], logprobs=[-1, -1], version=3)
        group.rollouts[0].status = group.rollouts[1].status = S.INTERRUPTED
        await buffer.put(group)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        report = await buffer.resume(step=0)
        assert (report.version, report.timeline) == (0, 1)
        (group,) = await buffer.claim("math", 1, statuses=[S.INTERRUPTED])
        group.rollouts[0].append([3], logprobs=[-1], version=1)
        assert group.rollouts[0].timelines.tolist() == [0, 0, 1]
        assert group.staleness(1) == 4
        await buffer.put(finished(group, version=1))
        assert (await buffer.get(group.group_id)).staleness(1) == 4
        assert (await buffer.audit(payloads=True)).problems == []


async def test_a_group_stored_after_a_rewind_that_it_does_not_know_is_counted_as_of_then(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(40, version=0)])
    (group,) = await buffer.start(await draw(buffer, 0))
    await buffer.resume(step=0)
    await buffer.put(finished(group, version=2))  # sampled by weights that the rewind undid meanwhile
    assert (await buffer.get(group.group_id)).staleness(0) == 2
    assert await buffer.expire("math", version=0, max_staleness=1) == 1


async def test_a_group_released_after_a_rewind_is_counted_as_of_then(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, S.INTERRUPTED, version=6))
    await buffer.claim("math", 1, statuses=[S.INTERRUPTED])
    await buffer.put(a_group(2, version=0))
    await buffer.take("math", 1, step=1, version=0)
    await buffer.resume(step=0)
    await buffer.release([1])
    assert (await buffer.get(1)).staleness(0) == 6
    assert await buffer.expire("math", version=0, max_staleness=3) == 1


@pytest.mark.parametrize("future", ["drop", None, True])
async def test_an_unknown_future_is_refused(buffer: ReplayBuffer, future: object) -> None:
    with pytest.raises(ValueError, match="choose 'keep' or 'expire'"):
        await buffer.resume(step=0, future=future)  # type: ignore[arg-type]


async def test_a_group_that_is_final_keeps_its_staleness_over_a_rewind_and_the_audit_knows(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, S.FILTERED, version=3))
    await buffer.resume(step=0)
    assert (await buffer.audit(payloads=True)).problems == []


async def test_a_group_that_was_consumed_when_a_rewind_undid_its_weights_is_counted_as_of_then(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, version=5))
    await buffer.take("math", 1, step=1, version=1)
    assert (await buffer.resume(step=1)).version == 2
    await buffer.commit(0, version=9)
    assert (await buffer.resume(step=0)).version == 9
    assert (await buffer.get(1)).staleness(2) == 3
    assert await buffer.expire("math", version=2, max_staleness=2) == 1


async def test_what_an_earlier_rewind_undid_is_no_future_of_a_later_one(buffer: ReplayBuffer) -> None:
    group = a_group(1, version=2)
    group.rollouts[1].append([5], logprobs=[-1.0], version=7)
    await buffer.put(group)
    await buffer.commit(0, version=1)
    await buffer.resume(step=0)
    await buffer.commit(0, version=5)
    assert (await buffer.resume(step=0, future="expire")).expired == 1
    assert [r.response_ids.size for r in (await buffer.get(1)).rollouts] == [3, 0]


async def test_the_future_of_fresh_members_of_an_expired_group_is_expired_too(buffer: ReplayBuffer) -> None:
    group = a_group(1, version=5)
    group.rollouts[0].reset()
    fill(group.rollouts[0], version=1)
    await put_all(buffer, [group, a_group(2, version=2)])
    assert await buffer.expire("math", version=4, max_staleness=2) == 1
    assert [r.response_ids.size for r in (await buffer.get(1)).rollouts] == [0, 3]
    await put_all(buffer, [a_group(3, version=2)])
    await buffer.take("math", 1, step=1, version=2)
    report = await buffer.resume(step=0, future="expire")
    assert (report.version, report.expired) == (2, 0), "it was expired before"
    assert [r.response_ids.size for r in (await buffer.get(1)).rollouts] == [0, 0]
    assert [t.target for t in await buffer.history(1)] == [S.COMPLETED, S.EXPIRED]
    assert (await buffer.audit(payloads=True)).problems == []
