"""Shows that pruning gives up the payloads of committed groups beyond the bounds, in slices, and loses nothing else."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from buffer import PruneReport, ReplayBuffer, Status
from buffer.operations import pruning
from buffer.queries import Bounds
from tests.buffer.groups import a_group, ids, plain, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def trained(buffer: ReplayBuffer, steps: int = 5, batch: int = 2, *, commit: int | None = None) -> None:
    """Steps 1 to `steps` of `batch` groups each (step n: groups 2n - 1 and 2n), committed up to `commit`."""
    await put_all(buffer, [a_group(n, tokens=4) for n in range(1, steps * batch + 1)])
    for step in range(1, steps + 1):
        await buffer.take("math", batch, step=step)
    await buffer.commit(steps if commit is None else commit)


async def with_payload(buffer: ReplayBuffer) -> list[int]:
    return [group.group_id for group in await buffer.query(limit=1000) if group.rollouts[0].response_ids.size]


@pytest.mark.parametrize(
    ("bounds", "left"),
    [
        ({"keep_steps": 2}, [7, 8, 9, 10]),
        ({"keep_steps": 0}, []),
        ({"keep_last": 3}, [8, 9, 10]),
        ({"keep_last": 100}, list(range(1, 11))),
        ({"keep_steps": 4, "keep_last": 3}, [8, 9, 10]),
        ({"keep_steps": 1, "keep_last": 9}, [9, 10]),
    ],
    ids=str,
)
async def test_what_lies_beyond_any_bound_goes(buffer: ReplayBuffer, bounds: dict[str, int], left: list[int]) -> None:
    await trained(buffer)
    report = await buffer.prune(**bounds)
    assert await with_payload(buffer) == left
    assert (report.payloads, report.rows) == (10 - len(left), 0)
    assert (report.payload_bytes > 0) == (len(left) < 10)
    assert await buffer.counts("math") == dict.fromkeys(S, 0) | {S.ARCHIVED: 10}
    assert (await buffer.audit(payloads=True)).ok
    assert await buffer.prune(**bounds) == PruneReport(0, 0, 0), "again it does nothing"


async def test_the_oldest_go_until_the_rest_fits(buffer: ReplayBuffer) -> None:
    await trained(buffer)
    (one,) = {report.payload_bytes for report in [await buffer.prune(keep_last=9)]}
    await buffer.prune(max_bytes=4 * one)
    assert await with_payload(buffer) == [7, 8, 9, 10]
    await buffer.prune(max_bytes=0)
    assert await with_payload(buffer) == []


async def test_what_is_not_committed_stays(buffer: ReplayBuffer) -> None:
    await trained(buffer, commit=2)
    await put_all(buffer, [a_group(50), a_group(51, S.INTERRUPTED), a_group(52, S.FILTERED)])
    await buffer.prune(keep_steps=0, keep_last=0, max_bytes=0, rows=True)
    assert await with_payload(buffer) == [*range(5, 11), 50, 51, 52]
    await buffer.resume(step=2)
    assert ids(await buffer.take("math", 2, step=3)) == [5, 6]


async def test_rows_go_when_asked_and_are_accounted_for(buffer: ReplayBuffer) -> None:
    await trained(buffer)
    await buffer.prune(keep_last=2)
    assert await buffer.prune(rows=True) == PruneReport(0, 0, 8)
    assert ids(await buffer.query()) == [9, 10]
    audit = await buffer.audit(payloads=True)
    assert (audit.ok, audit.drawn) == (True, {"math": 10})
    assert (await buffer.last_step(), await buffer.next_step("math")) == (5, 6)
    await buffer.prune(keep_last=0, rows=True)
    assert await buffer.next_step("math") == 6
    assert ids(await buffer.query()) == [9, 10], "the last step's rows tell which it was"


async def test_each_task_keeps_its_last_step(buffer: ReplayBuffer) -> None:
    for step, task_name in ((8, "code"), (9, "code"), (10, "math")):
        await buffer.put(a_group(step, task_name=task_name))
        await buffer.take(task_name, 1, step=step)
    await buffer.commit(10)
    assert (await buffer.prune(keep_steps=0, rows=True)).rows == 1
    assert [await buffer.last_step(task_name) for task_name in ("code", "math")] == [9, 10]


async def test_a_pruned_group_is_still_found_with_its_rewards_and_its_history(buffer: ReplayBuffer) -> None:
    await trained(buffer)
    before = plain(await buffer.get(1))
    await buffer.prune(keep_steps=0)
    after = plain(await buffer.get(1))
    kept = ("group_id", "index", "task_name", "status", "row", "prompt", "score", "reward", "finish_reason", "attempts")
    assert [{k: r[k] for k in kept} for r in after["rollouts"]] == [{k: r[k] for k in kept} for r in before["rollouts"]]
    assert [t.target for t in await buffer.history(1)] == [S.COMPLETED, S.CONSUMED, S.ARCHIVED]
    assert 1 in ids(await buffer.query(step=1, min_reward=1.0))


async def test_others_write_between_slices(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_SLICE_GROUPS", 1)
    await trained(buffer, steps=20)
    order: list[str] = []
    begun, loop, prune_slice = asyncio.Event(), asyncio.get_running_loop(), pruning._prune_payloads

    def noting(*arguments: Any) -> Any:
        order.append("slice")
        loop.call_soon_threadsafe(begun.set)
        return prune_slice(*arguments)

    monkeypatch.setattr(pruning, "_prune_payloads", noting)

    async def write() -> None:
        await begun.wait()
        await buffer.put(a_group(99))
        order.append("put")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        tasks.create_task(buffer.prune(keep_steps=0))
    assert order.index("put") < len(order) - 10


async def test_a_slice_is_bounded_in_bytes(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    await trained(buffer)
    one = (await buffer.prune(keep_last=9)).payload_bytes
    monkeypatch.setattr(pruning, "_SLICE_BYTES", 3 * one)
    first = await buffer._write(pruning.prune, pruning.Prune(Bounds(5, None)))
    assert first.payloads == 3


async def test_free_pages_are_used_again(tmp_path: Path) -> None:
    async with ReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}", synchronous="NORMAL") as buffer:
        for round_ in range(6):
            await put_all(buffer, [a_group(1 + n + 20 * round_, tokens=20_000) for n in range(20)])
            await buffer.take("math", 20, step=round_ + 1)
            await buffer.commit(round_ + 1)
            await buffer.prune(keep_steps=0)
            if round_ == 1:
                after_two = (tmp_path / "run.db").stat().st_size
    assert (tmp_path / "run.db").stat().st_size <= 1.25 * max(after_two, 8_000_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "told nothing to give up; give one of keep_steps, keep_last, max_bytes, or rows=True"),
        ({"keep_steps": -1}, "keep_steps=-1 must be a whole number, 0 or more"),
        ({"max_bytes": 1.5}, r"max_bytes=1\.5 must be a whole number"),
    ],
)
async def test_bounds_that_are_none_are_refused(buffer: ReplayBuffer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        await buffer.prune(**arguments)


async def test_nothing_to_prune_is_fine(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert await buffer.prune(keep_steps=0, rows=True) == PruneReport(0, 0, 0)
