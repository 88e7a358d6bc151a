"""Shows that a fork is the run as a trainer at the checkpoint finds it, and that one which is broken off is refused."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, RolloutGroup, Status, forking
from buffer.errors import BufferClosedError, DatabaseError, StepError
from tests.buffer.groups import a_group, draw, finished, ids, plain, turns, url

pytestmark = pytest.mark.usefixtures("backend")

ROOT = Path(__file__).parents[2]
STEPS = 5
COMMITTED = 3


@pytest.fixture
async def run(backend: str, tmp_path: Path) -> AsyncIterator[ReplayBuffer]:
    """Five steps of three groups, the first three committed; groups that wait, that run, and one that was filtered."""
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await draw(buffer, *range(30))
        for step in range(1, STEPS + 1):
            for group in await buffer.claim("math", 4, statuses=[Status.PENDING]):
                await buffer.put(finished(group, version=step - 1))
            await buffer.take("math", 3, step=step, version=step - 1)
            if step <= COMMITTED:
                await buffer.commit(step, version=step)
        (filtered, _running, held) = await buffer.claim("math", 3, statuses=[Status.PENDING])
        filtered.mark(Status.FILTERED, reason="too easy")
        await buffer.put(filtered)
        held.rollouts[0].append([1, 2], logprobs=[-1.0, -2.0], version=4)
        await buffer.checkpoint(held)
        await buffer.put(a_group(1000, task_name="code"))
        yield buffer


def without_time(group: RolloutGroup) -> dict[str, Any]:
    """All but what the rewind changes: whether it is consumed, and the timeline on which it was read."""
    fields = plain(group) | {"consumed_step": None}
    return fields | {"rollouts": [member | {"status": None, "timeline": None} for member in fields["rollouts"]]}


async def everything(buffer: ReplayBuffer) -> list[RolloutGroup]:
    return await buffer.query(limit=10**6)


async def batches(buffer: ReplayBuffer, first: int, last: int) -> list[list[int]]:
    return [ids(await buffer.take("math", 3, step=step)) for step in range(first, last + 1)]


async def consumed(buffer: ReplayBuffer) -> dict[int, list[int]]:
    return {step: ids(await buffer.query(task_name="math", step=step)) for step in range(1, STEPS + 1)}


async def test_the_history_of_a_fork_has_no_gap(run: ReplayBuffer, tmp_path: Path) -> None:
    await run.fork(url(tmp_path, "fork.db"), step=0)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        for group in await fork.query(limit=100):
            told = await fork.history(group.group_id)
            assert [t.source for t in told] == [None, *(t.target for t in told[:-1])]
            assert told[-1].target is group.status
        reopened = await fork.history((await consumed(run))[1][0])
        assert [t.reason for t in reopened[-2:]] == ["the run was forked at step 0", "rewound to step 0"]


@pytest.mark.parametrize("step", range(STEPS + 1))
async def test_a_trainer_of_the_fork_is_handed_the_same_batches_again(step: int, run: ReplayBuffer, tmp_path: Path) -> None:
    before = await consumed(run)
    report = await run.fork(url(tmp_path, "fork.db"), step=step)
    assert (report.step, report.version, report.groups, report.released) == (step, step, 31, 2)
    assert report.rewound == 3 * (STEPS - step)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        resumed = await fork.resume(step)
        assert (resumed.version, resumed.rewound, resumed.released) == (step, 0, 0)
        again = await batches(fork, step + 1, STEPS)
        assert again == [before[later] for later in range(step + 1, STEPS + 1)]
        audited = await fork.audit()
        assert audited.ok, audited.problems
        assert await fork.last_step() == STEPS
        # What was committed at the checkpoint is final there too, and no more than that.
        committed = min(step, COMMITTED)
        assert await fork.count("math", Status.ARCHIVED) == 3 * committed
        if committed:
            with pytest.raises(StepError):
                await fork.take("math", 1, step=committed)
    assert await consumed(run) == before


async def test_every_group_is_copied_in_every_field(run: ReplayBuffer, tmp_path: Path) -> None:
    original = [without_time(group) for group in await everything(run)]
    await run.fork(url(tmp_path, "fork.db"), step=2)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        copied = await everything(fork)
        # Interrupted when it was copied: counted as an interruption, as of any producer that is gone.
        for group in copied:
            if group.status is Status.INTERRUPTED:
                for rollout in group.rollouts:
                    rollout.interruptions -= 1
        assert [without_time(group) for group in copied] == original
        assert await fork.counts("math") == await run.counts("math") | {
            Status.ARCHIVED: 6,
            Status.CONSUMED: 0,
            Status.COMPLETED: 14,
            Status.RUNNING: 0,
            Status.INTERRUPTED: 2,
        }
        changes = [(change.source, change.target) for change in await fork.history(7)]
        assert changes[:3] == [(one.source, one.target) for one in await run.history(7)][:3]
        assert changes[-1][1] is Status.COMPLETED


async def test_both_go_on_and_nothing_is_drawn_twice(run: ReplayBuffer, tmp_path: Path) -> None:
    await run.fork(url(tmp_path, "fork.db"), step=1)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        assert await fork.cursor("math") == await run.cursor("math")
        assert await draw(fork, 30, 31) == await draw(run, 30, 31) == [1001, 1002]
        await run.resume(4)
        await fork.resume(1)
        await fork.put(a_group(2000, version=1))
        await fork.take("math", 3, step=2, version=1)
        await fork.commit(2)
        assert await run.count("math", Status.ARCHIVED) == 9
        for buffer in (run, fork):
            report = await buffer.audit()
            assert report.ok, report.problems


async def test_a_fork_begins_a_timeline_of_its_own(run: ReplayBuffer, tmp_path: Path) -> None:
    await run.resume(4)
    await run.put(a_group(2000, version=5, timeline=(await run.get(1)).rollouts[0].timeline))
    report = await run.fork(url(tmp_path, "fork.db"), step=2)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        for group in await everything(run):
            (ours,) = {rollout.timeline for rollout in group.rollouts}
            copied = await fork.get(group.group_id)
            assert {rollout.timeline for rollout in copied.rollouts} == {ours.rewound(report.version)}
        # Three updates of the weights lead from the fork's to those of step 5, which do not exist there.
        assert (await fork.get(2000)).staleness(report.version) == 3
        audited = await fork.audit(payloads=True)
        assert audited.ok, audited.problems


async def test_a_fork_can_be_forked_and_read_only_runs_too(run: ReplayBuffer, tmp_path: Path) -> None:
    before = await consumed(run)
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as reader:
        await reader.fork(url(tmp_path, "one.db"), step=4)
    async with ReplayBuffer.open(url(tmp_path, "one.db"), read_only=True) as one:
        await one.fork(url(tmp_path, "two.db"), step=1)
    async with ReplayBuffer.open(url(tmp_path, "two.db")) as two:
        await two.resume(1)
        assert await batches(two, 2, STEPS) == [before[step] for step in range(2, STEPS + 1)]


async def test_a_fork_may_lie_in_another_kind_of_database(run: ReplayBuffer, tmp_path: Path) -> None:
    before, file = await consumed(run), f"sqlite:///{tmp_path / 'file.db'}"
    original = [without_time(group) for group in await everything(run) if group.status is Status.COMPLETED]
    await run.fork(file, step=4)
    async with ReplayBuffer.open(file) as fork:
        await fork.fork(url(tmp_path, "back.db"), step=2)
    async with ReplayBuffer.open(url(tmp_path, "back.db")) as back:
        waiting = {group.group_id: without_time(group) for group in await everything(back)}
        assert all(waiting[group["group_id"]] == group for group in original)
        await back.resume(2)
        assert await batches(back, 3, STEPS) == [before[step] for step in range(3, STEPS + 1)]
        report = await back.audit(payloads=True)
        assert report.ok, report.problems


async def test_a_fork_is_of_one_moment_while_the_run_goes_on(run: ReplayBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_SLICE", 1)
    monkeypatch.setattr(forking, "_SLICES", {})
    await run.resume(STEPS)
    forking_now = asyncio.create_task(run.fork(url(tmp_path, "fork.db"), step=STEPS))
    number = 5000
    while not forking_now.done():
        number += 1
        await run.put(a_group(number, version=STEPS))
        await run.take("math", 1, step=number)
        await run.commit(number)
    report = await forking_now
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        audited = await fork.audit()
        assert audited.ok, audited.problems
        assert len(await everything(fork)) == report.groups


async def test_a_step_whose_tokens_were_pruned_is_refused_with_the_oldest_possible(run: ReplayBuffer, tmp_path: Path) -> None:
    before = await consumed(run)
    await run.prune(keep_last=5)  # of 9: step 1, and a group of step 2
    for rows in (False, True):
        await run.prune(keep_last=5, rows=rows)
        with pytest.raises(StepError, match=r"step=1: .*the oldest possible step is 2"):
            await run.fork(url(tmp_path, "fork.db"), step=1)
    assert not (tmp_path / "fork.db").exists()
    await run.fork(url(tmp_path, "fork.db"), step=2)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        await fork.resume(2)
        assert await batches(fork, 3, STEPS) == [before[step] for step in range(3, STEPS + 1)]
        with pytest.raises(StepError, match="the oldest possible step is 2"):
            await fork.fork(url(tmp_path, "again.db"), step=1)
        report = await fork.audit()
        assert report.ok, report.problems


async def test_a_database_that_is_not_empty_is_left_alone(run: ReplayBuffer, tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path, "other.db")) as other:
        await other.put(a_group(1))
        with pytest.raises(DatabaseError):  # on SQLite it is locked, before it is found not to be empty
            await run.fork(url(tmp_path, "other.db"), step=1)
    with pytest.raises(DatabaseError, match="is not empty"):
        await run.fork(url(tmp_path, "other.db"), step=1)
    with pytest.raises(DatabaseError):
        await run.fork(url(tmp_path), step=1)
    with pytest.raises(ValueError, match="step=-1"):
        await run.fork(url(tmp_path, "new.db"), step=-1)
    async with ReplayBuffer.open(url(tmp_path, "other.db")) as other:
        assert ids(await everything(other)) == [1]


KILLED = """
import asyncio, os, signal, sys
from buffer import ReplayBuffer, forking, schema

forking._SLICE, forking._SLICES, slices = 2, {}, forking._slices

def killed(source, table):
    for number, rows in enumerate(slices(source, table)):
        if table.name == sys.argv[3] and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield rows

forking._slices = killed

async def main():
    async with ReplayBuffer.open(sys.argv[1], read_only=True) as buffer:
        await buffer.fork(sys.argv[2], step=1)

asyncio.run(main())
"""


def fork_until_killed(folder: Path, table: str) -> int:
    command = [sys.executable, "-c", KILLED, url(folder), url(folder, "fork.db"), table]
    return subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode


@pytest.mark.parametrize("table", ["steps", "groups", "payloads", "counts"])
async def test_a_killed_fork_is_refused(table: str, run: ReplayBuffer, tmp_path: Path) -> None:
    assert fork_until_killed(tmp_path, table) == -signal.SIGKILL
    for read_only in (False, True):
        with pytest.raises(DatabaseError, match="a fork that was broken off; delete it, and fork again"):
            async with ReplayBuffer.open(url(tmp_path, "fork.db"), read_only=read_only):
                pass
    with pytest.raises(DatabaseError, match="is not empty"):
        await run.fork(url(tmp_path, "fork.db"), step=1)


async def test_a_cancelled_fork_ends_soon_and_is_refused(run: ReplayBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_SLICE", 1)
    monkeypatch.setattr(forking, "_SLICES", {})
    slices, began = forking._slices, threading.Event()

    def noted(*arguments: Any) -> Any:
        began.set()
        return slices(*arguments)

    monkeypatch.setattr(forking, "_slices", noted)
    fork = asyncio.create_task(run.fork(url(tmp_path, "fork.db"), step=1))
    while not began.is_set():
        await turns(1)
    fork.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fork
    with pytest.raises(DatabaseError):
        async with ReplayBuffer.open(url(tmp_path, "fork.db"), read_only=True):
            pass


async def test_a_closed_buffer_is_not_forked(tmp_path: Path) -> None:
    buffer = ReplayBuffer.open(url(tmp_path))
    with pytest.raises(BufferClosedError):
        await buffer.fork(url(tmp_path, "fork.db"), step=0)


async def test_an_empty_run_is_forked_too(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        report = await buffer.fork(url(tmp_path, "fork.db"), step=0)
        assert (report.groups, report.version, report.rewound) == (0, 0, 0)
    async with ReplayBuffer.open(url(tmp_path, "fork.db")) as fork:
        assert await draw(fork, 0) == [1]
