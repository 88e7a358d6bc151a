"""Shows which groups each filter of `ReplayBuffer.query` finds, together and alone, and what is refused."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from buffer import ReplayBuffer, RolloutGroup, Status
from tests.buffer.groups import a_group, ids, put_all, url

pytestmark = pytest.mark.usefixtures("backend")


def judged(group_id: int, *rewards: float | None, status: Status = Status.COMPLETED) -> RolloutGroup:
    group = a_group(group_id, status, size=len(rewards), version=group_id)
    for rollout, reward in zip(group.rollouts, rewards, strict=True):
        rollout.reward = reward
    return group


def failed(group_id: int, error: str, attempts: int) -> RolloutGroup:
    group = a_group(group_id, Status.FAILED, tokens=0)
    group.rollouts[1].error, group.rollouts[1].attempts, group.rollouts[1].reward = error, attempts, None
    group.rollouts[0].reward = None
    return group


@pytest.fixture
async def buffer(tmp_path: Path) -> AsyncIterator[ReplayBuffer]:
    """Groups 1 to 4 judged with means 0, 0.5, 1 (of those that have a reward) and none; 5 to 7 failed; 2 and 3 consumed at 1 and 2."""
    async with ReplayBuffer.open(url(tmp_path)) as opened:
        await put_all(opened, [judged(2, 0.0, 1.0), judged(3, 1.0, None)])
        for step in (1, 2):
            await opened.take("math", 1, step=step)
        await put_all(opened, [judged(1, 0.0, 0.0), judged(4, None, None)])
        await put_all(
            opened, [failed(5, "ValueError: 100% wrong", 1), failed(6, "TimeoutError: 100 s", 3), failed(7, "a_b\\c 'x' --\0\ud800", 2)]
        )
        mixed = a_group(8, task_name="code", size=1, version=2)
        mixed.rollouts[0].append([9], logprobs=[-1.0], version=6)
        mixed.rollouts[0].append([9], trainable=False, version=9)
        await opened.put(mixed)
        yield opened


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"min_version": 3}, [3, 4]),
        ({"max_version": 2}, [1, 2]),
        ({"min_version": 2, "max_version": 6}, [2, 3, 4, 8]),
        ({"min_version": 2, "max_version": 5}, [2, 3, 4]),
        ({"min_version": 3, "max_version": 3}, [3]),
        ({"min_reward": 0.5}, [2, 3, 8]),
        ({"max_reward": 0.5}, [1, 2]),
        ({"min_reward": 0.25, "max_reward": 0.75}, [2]),
        ({"min_reward": -np.inf}, [1, 2, 3, 8]),
        ({"max_reward": np.float32(0.0)}, [1]),
        ({"step": 1}, [2]),
        ({"step": 2}, [3]),
        ({"step": 3}, []),
        ({"error": "100"}, [5, 6]),
        ({"error": "100%"}, [5]),
        ({"error": "valueERROR"}, [5]),
        ({"error": "a_b"}, [7]),
        ({"error": "_"}, [7]),
        ({"error": "b\\c"}, [7]),
        ({"error": "/"}, []),
        ({"error": "' OR 1=1 --"}, []),
        ({"error": "'x' --"}, [7]),
        ({"error": ""}, [5, 6, 7]),
        ({"error": "\0"}, [7]),
        ({"error": "\ud800"}, [7]),
        ({"min_attempts": 2}, [6, 7]),
        ({"min_attempts": 0}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"min_attempts": np.int64(4)}, []),
        ({"error": "100", "min_attempts": 2}, [6]),
        ({"min_version": 2, "task_name": "code"}, [8]),
        ({"min_reward": 0.0, "status": "completed"}, [1, 8]),
        ({"step": 1, "status": "completed"}, []),
        ({"min_attempts": 0, "limit": 2, "offset": 3}, [4, 5]),
    ],
)
async def test_filters_find(buffer: ReplayBuffer, filters: dict[str, Any], expected: list[int]) -> None:
    assert ids(await buffer.query(**filters)) == expected


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("oldest", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("newest", [8, 7, 6, 5, 4, 3, 2, 1]),
        ("stalest", [1, 2, 8, 3, 4, 5, 6, 7]),
        ("best", [3, 8, 2, 1, 4, 5, 6, 7]),
        ("worst", [1, 2, 3, 8, 4, 5, 6, 7]),
    ],
)
async def test_they_come_in_the_order_asked_for_and_page_by_page(buffer: ReplayBuffer, order: Any, expected: list[int]) -> None:
    assert ids(await buffer.query(order=order)) == expected
    pages = [ids(await buffer.query(order=order, limit=3, offset=offset)) for offset in (0, 3, 6)]
    assert [group_id for page in pages for group_id in page] == expected


async def test_what_changed_last_comes_first(buffer: ReplayBuffer) -> None:
    await buffer.start([6])
    assert ids(await buffer.query(order="changed", limit=1)) == [6]


async def test_by_age(buffer: ReplayBuffer) -> None:
    assert len(await buffer.query(max_age=3600)) == 8
    assert await buffer.query(min_age=3600) == []
    assert len(await buffer.query(min_age=-3600, max_age=3600)) == 8


async def test_the_step_is_that_of_what_is_not_given_back(buffer: ReplayBuffer) -> None:
    await buffer.commit(1)
    await buffer.resume(1)
    assert ids(await buffer.query(step=1)) == [2]
    assert ids(await buffer.query(step=2)) == []


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_version": 3, "max_version": 2}, "min_version=3 lies above max_version=2, so nothing can be found"),
        ({"min_reward": 1.0, "max_reward": 0.5}, r"min_reward=1\.0 lies above max_reward=0\.5"),
        ({"min_reward": float("nan")}, "min_reward=nan is no number to compare with"),
        ({"max_reward": "high"}, "max_reward='high' is no number"),
        ({"min_version": -1}, "min_version=-1 must be a whole number, 0 or more"),
        ({"max_version": 1.5}, r"max_version=1\.5 must be a whole number"),
        ({"step": 0}, "step=0 must be a whole number, 1 or more"),
        ({"min_attempts": -1}, "min_attempts=-1 must be a whole number, 0 or more"),
        ({"error": 100}, "error=100 must be text"),
        ({"task_name": 5}, "task_name=5 names no task"),
        ({"task_name": "a\0"}, r"task_name='a\\x00' holds a null character"),
        ({"task_name": "\ud800"}, r"task_name='\\ud800' is no text that a database holds"),
        ({"max_reward": 10**400}, "max_reward=1000+ is no number to compare with"),
        ({"min_age": 2, "max_age": 1}, r"min_age=2\.0 lies above max_age=1\.0"),
        ({"order": "id; DROP TABLE groups"}, "order='id; DROP TABLE groups' is unknown; choose among .*'oldest', 'newest'"),
    ],
)
async def test_what_can_find_nothing_is_refused(buffer: ReplayBuffer, filters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        await buffer.query(**filters)
