"""Shows that a buffer's groups go to a file and into another buffer without loss, while it runs, and over kills and cancellations."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from buffer import Position, ReplayBuffer, RolloutGroup, Status, transfer
from buffer.errors import DuplicateGroupError, FileFormatError, IllegalTransitionError, ReplayBufferError, StepError
from buffer.export import read_groups, write_groups
from tests.buffer.groups import a_group, draw, finished, ids, plain, put_all, rows, turns, url

pytestmark = pytest.mark.usefixtures("backend")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def slices_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_SLICE_GROUPS", 2)


async def a_run(buffer: ReplayBuffer) -> None:
    """Groups in every status, of two tasks; steps 1 to 3, the first committed."""
    await draw(buffer, *range(12))
    for group in await buffer.claim("math", 9, statuses=[Status.PENDING]):
        if group.group_id == 8:
            group.mark(Status.FILTERED, reason="too easy")
        elif group.group_id == 9:
            group.rollouts[0].status, group.rollouts[0].error = Status.FAILED, "it broke"
            group.rollouts[1].status, group.rollouts[1].metrics = Status.COMPLETED, {"seconds": 2.5}
        else:
            finished(group, version=group.group_id % 3)
        await buffer.put(group)
    for step in (1, 2, 3):
        await buffer.take("math", 2, step=step, version=step)
    await buffer.commit(1)
    await buffer.start([10])
    await put_all(buffer, [a_group(100, task_name="code"), a_group(101, Status.INTERRUPTED, task_name="code", version=1)])


async def all_of(buffer: ReplayBuffer) -> list[dict[str, Any]]:
    return [plain(group) for group in await buffer.query(limit=10**6)]


def interrupted(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As an import has them: what ran is interrupted."""
    for group in groups:
        for member in group["rollouts"]:
            member["status"] = Status.INTERRUPTED if member["status"] is Status.RUNNING else member["status"]
    return groups


async def assert_sound(buffer: ReplayBuffer) -> None:
    report = await buffer.audit()
    assert report.ok, report.problems


@pytest.mark.parametrize("name", ["run.parquet", "run.jsonl", "run.jsonl.gz"])
@pytest.mark.usefixtures("slices_of_two")
async def test_an_empty_buffer_has_after_an_import_what_the_other_had(name: str, tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer, ReplayBuffer.open(url(tmp_path, "other.db")) as other:
        await a_run(buffer)
        assert await buffer.export(tmp_path / name) == 14
        assert await other.import_file(tmp_path / name) == 14
        assert await all_of(other) == interrupted(await all_of(buffer))
        await assert_sound(other)
        report, other_report = await buffer.resume(1), await other.resume(1)
        assert report.rewound == other_report.rewound == 4
        order = [ids(await one.take("math", 9, step=2)) for one in (buffer, other)]
        assert order[0] == order[1] == [3, 4, 5, 6, 7]
        # A file has no dataset's position: the first prompt is there already.
        with pytest.raises(DuplicateGroupError, match=r"at \(epoch 0, 0\)"):
            await draw(other, 0)
        # Ids go on behind those that came in.
        (drawn,) = await other.draw("new", rows(0), group_size=1, moves=0, cursor={})
        assert drawn > 101


async def test_what_is_not_committed_is_not_taken_without_a_resume(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer, ReplayBuffer.open(url(tmp_path, "other.db")) as other:
        await a_run(buffer)
        await buffer.export(tmp_path / "run.jsonl")
        await other.import_file(tmp_path / "run.jsonl")
        with pytest.raises(ReplayBufferError, match="never committed"):
            await other.take("math", 1, step=4)
        with pytest.raises(StepError, match="committed step 1"):
            await other.resume(0)
        await other.resume(3)
        with pytest.raises(StepError, match="committed step 1"):
            await other.take("math", 1, step=1)
        assert ids(await other.take("math", 1, step=4)) == [7]


async def test_an_export_has_what_was_asked_for(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await a_run(buffer)
        async with ReplayBuffer.open(url(tmp_path), read_only=True) as reader:
            assert await reader.export(tmp_path / "code.jsonl", task_name="code") == 2
            assert await reader.export(tmp_path / "some.jsonl", status=[Status.FILTERED, "failed"]) == 2
            assert await reader.export(tmp_path / "none.jsonl", status="discarded") == 0
            assert sorted(ids(list(read_groups(tmp_path / "some.jsonl")))) == [8, 9]
            with pytest.raises(ReplayBufferError, match="read_only=True"):
                await reader.import_file(tmp_path / "code.jsonl")
            with pytest.raises(FileExistsError, match="overwrite=True"):
                await reader.export(tmp_path / "code.jsonl")
            assert await reader.export(tmp_path / "code.jsonl", task_name="math", overwrite=True) == 12
            for bad in ({"status": "eaten"}, {"task_name": ""}):
                with pytest.raises(ValueError, match=r"eaten|names no task"):
                    await reader.export(tmp_path / "bad.jsonl", **bad)  # type: ignore[arg-type]


async def test_groups_whose_tokens_were_pruned_are_left_out(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await a_run(buffer)
        await buffer.prune(keep_last=1)  # of the two that are committed
        assert await buffer.export(tmp_path / "run.jsonl") == 13


@pytest.mark.usefixtures("slices_of_two")
async def test_an_export_goes_on_beside_the_run(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(number) for number in range(1, 61)])
        async with asyncio.TaskGroup() as group:
            exporting = group.create_task(buffer.export(tmp_path / "run.parquet"))
            step = 0
            while not exporting.done():
                step += 1
                await buffer.put(a_group(1000 + step))
                await buffer.take("math", 1, step=step)
                await buffer.commit(step)
        written = list(read_groups(tmp_path / "run.parquet"))
        assert sorted(ids(written))[:60] == list(range(1, 61))
        assert exporting.result() == len(written)
        await assert_sound(buffer)


@pytest.mark.usefixtures("slices_of_two")
async def test_a_cancelled_export_leaves_no_file(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(number) for number in range(1, 20)])
        for wait in range(1, 200, 9):
            before = set(os.listdir(tmp_path))
            exporting = asyncio.create_task(buffer.export(tmp_path / f"run{wait}.parquet"))
            await turns(wait)
            exporting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await exporting
            left = set(os.listdir(tmp_path)) - before
            assert not left or len(list(read_groups(tmp_path / left.pop()))) == 19  # it was whole when the cancellation came


@pytest.mark.usefixtures("slices_of_two")
async def test_importing_again_passes_over_what_is_there(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer, ReplayBuffer.open(url(tmp_path, "other.db")) as other:
        await a_run(buffer)
        await buffer.export(tmp_path / "some.jsonl", status=["completed", "archived", "running"])
        await buffer.export(tmp_path / "all.jsonl")
        assert await other.import_file(tmp_path / "some.jsonl") == 5
        assert await other.import_file(tmp_path / "all.jsonl") == 9
        assert await other.import_file(tmp_path / "all.jsonl") == 0
        assert await all_of(other) == interrupted(await all_of(buffer))
        await assert_sound(other)


@pytest.mark.usefixtures("slices_of_two")
async def test_a_cancelled_import_is_begun_again(tmp_path: Path) -> None:
    groups = [a_group(number, position=Position(0, number)) for number in range(1, 20)]
    write_groups(tmp_path / "run.jsonl", groups)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        added = 0
        for wait in range(1, 120, 7):
            importing = asyncio.create_task(buffer.import_file(tmp_path / "run.jsonl"))
            await turns(wait)
            importing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await importing
            await assert_sound(buffer)
        added = await buffer.count("math", Status.COMPLETED)
        assert await buffer.import_file(tmp_path / "run.jsonl") == len(groups) - added
        assert await all_of(buffer) == [plain(group) for group in groups]
        await assert_sound(buffer)


KILLED = """
import asyncio, os, signal, sys
from buffer import ReplayBuffer, transfer

transfer._SLICE_GROUPS, encoded, left = 2, transfer._encoded, [4]

def killed(conn, file):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return encoded(conn, file)

transfer._encoded = killed

async def main():
    async with ReplayBuffer.open(sys.argv[1]) as buffer:
        await buffer.import_file(sys.argv[2])

asyncio.run(main())
"""


def import_until_killed(folder: Path) -> int:
    command = [sys.executable, "-c", KILLED, url(folder), str(folder / "run.jsonl")]
    return subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode


async def test_a_killed_import_is_begun_again(tmp_path: Path) -> None:
    groups = [a_group(number) for number in range(1, 20)]
    write_groups(tmp_path / "run.jsonl", groups)
    assert import_until_killed(tmp_path) == -signal.SIGKILL
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert await buffer.count("math", Status.COMPLETED) == 6
        assert await buffer.import_file(tmp_path / "run.jsonl") == 13
        assert await all_of(buffer) == [plain(group) for group in groups]
        await assert_sound(buffer)


def cut_off(groups: list[RolloutGroup], path: Path) -> None:
    write_groups(path, groups)
    path.write_bytes(path.read_bytes()[:-9])


def with_another_group(groups: list[RolloutGroup], path: Path) -> None:
    groups[-2] = a_group(1, tokens=5)
    write_groups(path, groups)


def with_another_place(groups: list[RolloutGroup], path: Path) -> None:
    groups[-1] = a_group(50, position=Position(0, 1))
    write_groups(path, groups)


def with_a_group_twice(groups: list[RolloutGroup], path: Path) -> None:
    write_groups(path, [*groups, groups[0]])


def consumed_at_no_step(groups: list[RolloutGroup], path: Path) -> None:
    groups[-1].mark(Status.CONSUMED)
    write_groups(path, groups)


def consumed_at_a_final_step(groups: list[RolloutGroup], path: Path) -> None:
    groups[-1].mark(Status.CONSUMED)
    groups[-1].consumed_step = 2
    write_groups(path, groups)


def final_behind_ours(groups: list[RolloutGroup], path: Path) -> None:
    groups[-1].mark(Status.ARCHIVED)
    groups[-1].consumed_step = 7
    write_groups(path, groups)


def with_what_no_database_holds(groups: list[RolloutGroup], path: Path) -> None:
    write_groups(path, groups)
    lines = path.read_text().splitlines(keepends=True)
    lines[-1] = lines[-1].replace('"metrics":"{}"', '"metrics":"{\\"a\\":NaN}"')
    path.write_text("".join(lines))


BAD: list[tuple[Callable[[list[RolloutGroup], Path], None], type[Exception], str]] = [
    (cut_off, FileFormatError, "row 18: .*cut off"),
    (with_another_group, DuplicateGroupError, "group 1 is in the database already, and is another"),
    (with_another_place, DuplicateGroupError, r"at \(epoch 0, 1\) is group 1 of the database"),
    (with_a_group_twice, DuplicateGroupError, "group 11 stands in the file twice"),
    (with_what_no_database_holds, ValueError, "group 19 cannot be stored"),
    (consumed_at_no_step, ValueError, "group 19 of the file is consumed and consumed_step=None"),
    (consumed_at_a_final_step, StepError, "consumed at step 2 and not committed, and here everything up to step 2 is final"),
    (final_behind_ours, StepError, "committed up to step 7, and here step 3 is consumed"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), BAD, ids=[spoil.__name__ for spoil, _, _ in BAD])
@pytest.mark.usefixtures("slices_of_two")
async def test_of_a_file_that_cannot_be_imported_nothing_is(
    spoil: Callable[[list[RolloutGroup], Path], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    spoil([a_group(number) for number in range(11, 20)], tmp_path / "run.jsonl")
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(number, position=Position(0, number)) for number in range(1, 5)])
        await buffer.take("math", 1, step=2)
        await buffer.commit(2)
        await buffer.take("math", 1, step=3)
        before = await all_of(buffer)
        with pytest.raises(error, match=message):
            await buffer.import_file(tmp_path / "run.jsonl")
        assert await all_of(buffer) == before
        await assert_sound(buffer)


async def test_restored_groups_stand_as_they_stood(tmp_path: Path) -> None:
    groups = [a_group(number, version=number) for number in range(1, 4)]
    for step, group in enumerate(groups, 1):
        group.mark(Status.ARCHIVED if step < 3 else Status.CONSUMED)
        group.consumed_step = step
    tokenless = a_group(4, Status.FAILED, tokens=0)
    tokenless.rollouts[0].metrics, tokenless.rollouts[0].messages = {"a": 1.0}, [{"role": "user", "content": "hi"}]
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.put_restored([])
        await buffer.put_restored([*groups, tokenless])
        assert await all_of(buffer) == [plain(group) for group in [*groups, tokenless]]
        await assert_sound(buffer)
        assert (await buffer.resume(2)).rewound == 1
        assert ids(await buffer.take("math", 9, step=3)) == [3]


async def test_groups_that_cannot_be_restored_are_refused_together(tmp_path: Path) -> None:
    running, consumed, with_step = a_group(2, Status.RUNNING), a_group(3, Status.CONSUMED), a_group(4)
    with_step.consumed_step = 1
    refused = [
        (a_group(1), DuplicateGroupError, "group 1 is in the database already"),
        (running, IllegalTransitionError, "group 2 is running elsewhere"),
        (consumed, IllegalTransitionError, "group 3 is consumed and consumed_step=None"),
        (with_step, IllegalTransitionError, "group 4 is completed and consumed_step=1"),
    ]
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.put(a_group(1))
        for group, error, message in refused:
            with pytest.raises(error, match=message):
                await buffer.put_restored([a_group(9), group])
        assert len(await all_of(buffer)) == 1
        await assert_sound(buffer)


async def test_steps_that_are_recorded_are_listed(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await a_run(buffer)
        found = [(one.step, one.version, one.groups, one.pruned) for one in await buffer.recorded_steps("math")]
        assert found == [(1, 1, 2, 0), (2, 2, 2, 0), (3, 3, 2, 0)]
        assert await buffer.recorded_steps("code") == []
