"""Shows that a batch of several tasks is taken whole or not at all, and that a rewind forgets how what it undoes was shared out."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from buffer import FreshestFirst, ReplayBuffer, Share, Status
from buffer.errors import ResumeRequiredError, StepError
from tests.buffer.groups import a_group, ids, put_all, url

S = Status


@pytest.fixture
async def buffer(tmp_path: Path, backend: str) -> AsyncIterator[ReplayBuffer]:
    async with ReplayBuffer.open(url(tmp_path)) as opened:
        await put_all(opened, [a_group(n, task_name="a", version=n) for n in (1, 2, 3)] + [a_group(n, task_name="b") for n in (11, 12)])
        yield opened
        report = await opened.audit()
        assert report.ok, report.problems


def shares(a: int, b: int, c: int = 0) -> list[Share]:
    return [Share("a", 1.0, a, 0.25), Share("b", 2.0, b, -0.25), Share("c", 0.0, c, 0.0)]


async def completed(buffer: ReplayBuffer) -> tuple[int, int]:
    return await buffer.count("a", S.COMPLETED), await buffer.count("b", S.COMPLETED)


async def test_each_task_gives_its_part_in_its_order_at_one_step(buffer: ReplayBuffer) -> None:
    taken = await buffer.take_together(shares(2, 1), step=4, version=7, policies={"a": FreshestFirst()})
    assert {name: ids(groups) for name, groups in taken.items()} == {"a": [3, 2], "b": [11], "c": []}
    assert [(group.status, group.consumed_step) for groups in taken.values() for group in groups] == [(S.CONSUMED, 4)] * 3
    assert [(step.step, step.version, step.groups) for step in await buffer.recorded_steps("a")] == [(4, 7, 2)]
    assert await buffer.shares(before=5) == shares(2, 1)
    assert await buffer.shares(before=4) == []
    assert await buffer.shared_tasks() == ["a", "b", "c"]


async def test_where_one_task_has_too_few_nothing_is_taken_of_any(buffer: ReplayBuffer) -> None:
    assert await buffer.take_together(shares(2, 3), step=1) == {}
    assert await completed(buffer) == (3, 2)
    assert await buffer.shares(before=9) == []


async def test_a_rewind_forgets_the_shares_that_it_undoes_and_hands_out_the_same_groups(buffer: ReplayBuffer) -> None:
    first = await buffer.take_together(shares(1, 1), step=1)
    second = await buffer.take_together(shares(2, 1), step=2)
    await buffer.resume(step=1)
    assert await buffer.shares(before=9) == shares(1, 1)
    again = await buffer.take_together(shares(2, 1), step=2)
    assert {name: ids(groups) for name, groups in again.items()} == {name: ids(groups) for name, groups in second.items()}
    assert ids(first["a"]) == [1]


async def test_taking_a_step_again_writes_its_shares_anew(buffer: ReplayBuffer) -> None:
    await buffer.take_together(shares(1, 1), step=1)
    await buffer.take_together([Share("b", 1.0, 1, 0.0)], step=1)
    assert await buffer.shares(before=2) == [Share("b", 1.0, 1, 0.0)]


async def test_a_taker_that_is_cancelled_gives_all_of_it_back(buffer: ReplayBuffer) -> None:
    taking = asyncio.create_task(buffer.take_together(shares(2, 1), step=1))
    await asyncio.sleep(0)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    await buffer.cursor("a")  # the writer answers in order
    assert await completed(buffer) == (3, 2)
    assert {group.task_name for group in await buffer.query(status=S.COMPLETED)} == {"a", "b"}


async def test_steps_that_are_final_and_shares_that_are_none_are_refused(buffer: ReplayBuffer) -> None:
    await buffer.commit(step=3)
    with pytest.raises(StepError, match="step=3"):
        await buffer.take_together(shares(1, 1), step=3)
    for wrong in ([], shares(0, 0), [Share("a", 1.0, 1, 0.0)] * 2):
        with pytest.raises(ValueError, match="make no batch"):
            await buffer.take_together(wrong, step=4)
    with pytest.raises(ValueError, match="groups"):
        await buffer.take_together(shares(-1, 3), step=4)
    assert await completed(buffer) == (3, 2)


async def test_after_a_restart_resume_comes_first_and_a_fork_has_the_shares_of_its_steps(tmp_path: Path, backend: str) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(n, task_name="a") for n in (1, 2, 3)])
        for step in (1, 2):
            await buffer.take_together([Share("a", 1.0, 1, float(step))], step=step)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        with pytest.raises(ResumeRequiredError):
            await buffer.take_together([Share("a", 1.0, 1, 0.0)], step=3)
        await buffer.fork(url(tmp_path, "fork.db"), step=1)
        assert [share.carried for share in await buffer.shares(before=9)] == [2.0]
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        assert [share.carried for share in await fork.shares(before=9)] == [1.0]
