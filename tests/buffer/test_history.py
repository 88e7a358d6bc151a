"""Shows that every change of a group's status is kept with its time, its writer, its step and its reason."""

import pytest

from buffer import ReplayBuffer, Status
from buffer.errors import UnknownGroupError
from tests.buffer.groups import a_group, draw, finished

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def test_a_groups_life_is_told_in_order(buffer: ReplayBuffer) -> None:
    (group_id,) = await draw(buffer, 0)
    (group,) = await buffer.start([group_id])
    await buffer.put(finished(group, version=4))
    await buffer.take("math", 1, step=7)
    await buffer.resume(step=6)
    await buffer.take("math", 1, step=7)
    await buffer.commit(7)
    told = await buffer.history(group_id)
    assert [(t.source, t.target, t.step, t.reason) for t in told] == [
        (None, S.PENDING, None, None),
        (S.PENDING, S.RUNNING, None, None),
        (S.RUNNING, S.COMPLETED, None, None),
        (S.COMPLETED, S.CONSUMED, 7, None),
        (S.CONSUMED, S.COMPLETED, None, "rewound to step 6"),
        (S.COMPLETED, S.CONSUMED, 7, None),
        (S.CONSUMED, S.ARCHIVED, None, None),
    ]
    assert [t.at for t in told] == sorted(t.at for t in told)
    assert [t.version for t in told] == [None, None, 4, 4, 4, 4, 4]
    assert len({t.owner for t in told}) == 1


@pytest.mark.parametrize(("status", "reason"), [(S.FILTERED, "all equal"), (S.FAILED, "reward raised"), (S.INTERRUPTED, None)])
async def test_reasons_are_those_of_the_filter_and_of_the_errors(buffer: ReplayBuffer, status: Status, reason: str | None) -> None:
    group = a_group(1, status)
    if status is S.FILTERED:
        group.filter_reason = reason
    if status is S.FAILED:
        group.rollouts[1].error = reason
    await buffer.put(a_group(1, S.PENDING))
    await buffer.start([1])
    await buffer.put(group)
    last = (await buffer.history(1))[-1]
    assert (last.source, last.target, last.reason) == (S.RUNNING, status, reason)


async def test_an_expired_group_says_by_which_bound(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, version=1))
    await buffer.expire("math", version=5, max_staleness=2)
    assert (await buffer.history(1))[-1].reason == "too stale at version 5 with max_staleness=2, by sequence"


async def test_a_change_that_is_refused_leaves_no_trace(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1))
    with pytest.raises(ValueError, match="cannot become"):
        await buffer.start([1])
    assert len(await buffer.history(1)) == 1


async def test_an_unknown_group_has_none(buffer: ReplayBuffer) -> None:
    with pytest.raises(UnknownGroupError, match="no group 5"):
        await buffer.history(5)
