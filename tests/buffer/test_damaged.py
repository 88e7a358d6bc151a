"""Shows that a group which does not decode is failed with the reason when it is claimed, and stops a take without a loss."""

from pathlib import Path

import pytest

from buffer import ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.errors import CorruptPayloadError
from tests.buffer.groups import a_group, draw, edit, ids, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def interrupted(folder: Path, *group_ids: int) -> None:
    """Groups with a payload that wait to be run again."""
    async with ReplayBuffer.open(url(folder)) as buffer:
        await put_all(buffer, [a_group(group_id, S.INTERRUPTED) for group_id in group_ids])


async def test_a_damaged_group_that_is_claimed_is_failed_and_the_others_are_handed_out(tmp_path: Path) -> None:
    await interrupted(tmp_path, 1, 2, 3)
    edit(tmp_path, "UPDATE payloads SET extras = 'nonsense' WHERE group_id = 1")
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert ids(await buffer.claim("math", 2, statuses=[S.INTERRUPTED])) == [2]
        assert ids(await buffer.claim("math", 2, statuses=[S.INTERRUPTED])) == [3]
        assert await buffer.counts("math") == dict.fromkeys(S, 0) | {S.FAILED: 1, S.RUNNING: 2}
        last = (await buffer.history(1))[-1]
        assert (last.source, last.target) == (S.RUNNING, S.FAILED)
        assert last.reason is not None
        assert last.reason.startswith("group 1 does not decode (Expecting value")
        assert "restore it from a copy" in last.reason
        assert (await buffer.audit()).ok


async def test_one_whose_prompt_is_damaged_is_failed_too(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await draw(buffer, 0, 1)
    edit(tmp_path, """UPDATE prompts SET data = '[{"evil": 1}]' WHERE group_id = 1""")
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert ids(await buffer.claim("math", 9, statuses=[S.PENDING])) == [2]
        assert await buffer.count("math", S.FAILED) == 1


async def test_one_that_is_started_by_its_id_is_an_error_and_waits_as_before(tmp_path: Path) -> None:
    await interrupted(tmp_path, 1, 2)
    edit(tmp_path, "UPDATE payloads SET extras = 'nonsense' WHERE group_id = 1")
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        with pytest.raises(CorruptPayloadError, match="group 1 does not decode"):
            await buffer.start([1, 2])
        assert await buffer.count("math", S.FAILED) == 0
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert await buffer.count("math", S.INTERRUPTED) == 2


async def test_a_take_that_meets_one_takes_nothing_until_it_is_stored_anew(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(1), a_group(2)])
    edit(tmp_path, "UPDATE payloads SET extras = 'nonsense' WHERE group_id = 1")
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        with pytest.raises(CorruptPayloadError, match=r"group 1 does not decode.*restore it from a copy"):
            await buffer.take("math", 2, step=1)
        await buffer.put(emptied(1))
        assert [(told.target, told.reason) for told in await buffer.history(2)][1:] == [
            (S.CONSUMED, None),
            (S.COMPLETED, "its taker was cancelled, or could not have it"),
        ]
        assert ids(await buffer.take("math", 2, step=1)) == [2]
        (again,) = await buffer.claim("math", 1, statuses=[S.EXPIRED])
        assert (again.group_id, again.rollouts[0].prompt, again.rollouts[0].response_ids.size) == (1, "p1", 0)
        assert (await buffer.audit(payloads=True)).ok


def emptied(group_id: int) -> RolloutGroup:
    """What stands in for a damaged group of two members, so that its prompt is run again."""
    return RolloutGroup(group_id, [RolloutState(group_id, index, "math", S.EXPIRED) for index in range(2)], "math")
