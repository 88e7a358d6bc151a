"""Calling a wait off ends that wait only, and never swallows a cancellation by the task's owner."""

import asyncio
from typing import Any

import pytest

from agent_loop.calling_off import CalledOffError, CallOffs


async def waits(call_offs: CallOffs, group_id: int, said: list[str]) -> None:
    try:
        await call_offs.unless_called_off(group_id, asyncio.Event().wait())
    except CalledOffError:
        said.append(f"{group_id} called off")
    await asyncio.sleep(0)  # a cancellation that was left behind would be met here
    said.append(f"{group_id} goes on")


async def test_only_the_waits_of_the_groups_named_end_and_their_tasks_go_on() -> None:
    call_offs, said = CallOffs(), list[str]()
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(waits(call_offs, group_id, said)) for group_id in (1, 1, 2)]
        await asyncio.sleep(0)
        call_offs.call_off([1, 5])
        call_offs.call_off([1])  # again is nothing
        await asyncio.wait(started[:2])
        assert said == ["1 called off", "1 called off", "1 goes on", "1 goes on"]
        assert [task.cancelling() for task in started] == [0, 0, 0]
        started[2].cancel()
    assert started[2].cancelled()
    assert not call_offs._waiting
    assert not call_offs._called_off


@pytest.mark.parametrize("first", ["owner", "call off"])
async def test_a_cancellation_by_the_owner_passes_whichever_comes_first(first: str) -> None:
    call_offs, said = CallOffs(), list[str]()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(waits(call_offs, 1, said))
        await asyncio.sleep(0)
        acts: list[Any] = [task.cancel, lambda: call_offs.call_off([1])]
        for act in acts if first == "owner" else reversed(acts):
            act()
    assert task.cancelled()
    assert said == []


async def test_what_is_ready_as_it_is_called_off_is_called_off() -> None:
    call_offs, done = CallOffs(), asyncio.get_running_loop().create_future()

    async def wait() -> str:
        try:
            return str(await call_offs.unless_called_off(1, done))
        except CalledOffError:
            return "called off"

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(wait())
        await asyncio.sleep(0)
        done.set_result("done")
        call_offs.call_off([1])
    assert task.result() == "called off"
    assert await call_offs.unless_called_off(1, asyncio.sleep(0, "later")) == "later"
