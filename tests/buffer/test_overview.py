"""Shows that an overview says how the run stands, as the rows say it, and counts rates over the newest changes only."""

import time
from collections import Counter
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status
from buffer import overview as module
from buffer.errors import CorruptPayloadError
from buffer.overview import Staleness
from tests.buffer.groups import a_group, draw, edit, finished, put_all, url

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def test_an_empty_buffer_has_one(buffer: ReplayBuffer) -> None:
    found = await buffer.overview()
    assert (found.tasks, found.rewinds, found.version, found.last_change, found.committed_step) == ({}, [], None, None, None)
    assert (found.last_step, found.timeline, found.abandoned, found.rate_seconds) == (0, 0, 0, 300.0)
    assert (found.payload_groups, found.payload_bytes, found.prefix_groups, found.prefix_bytes) == (0, 0, 0, 0)
    assert found.database_bytes > 0


async def test_counts_and_steps_are_those_of_the_other_questions(buffer: ReplayBuffer) -> None:
    await draw(buffer, 0, 1)
    await put_all(buffer, [a_group(10 + n) for n in range(6)])
    await put_all(buffer, [a_group(20 + n, task_name="code") for n in range(3)])
    for step in (1, 2):
        await buffer.take("math", 2, step=step)
    await buffer.commit(1)
    found = await buffer.overview()
    for name, task in found.tasks.items():
        assert (task.counts, task.last_step) == (await buffer.counts(name), await buffer.last_step(name))
        assert (sum(task.counts.values()) + task.pruned, task.pruned) == (task.drawn, 0)
    assert (list(found.tasks), found.last_step, found.committed_step) == (["code", "math"], 2, 1)
    archived = (await buffer.query(status=S.ARCHIVED))[0]
    assert (found.payload_groups, found.payload_bytes > 2 * archived.rollouts[0].response_ids.nbytes) == (2, True)


async def test_pruned_groups_are_told_apart(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n) for n in range(1, 5)])
    for step in (1, 2):
        await buffer.take("math", 2, step=step)
    await buffer.commit(2)
    await buffer.prune(keep_steps=1, rows=True)
    found = await buffer.overview()
    assert (found.tasks["math"].drawn, found.tasks["math"].pruned, found.payload_groups) == (4, 2, 2)
    audit = await buffer.audit()
    assert (audit.ok, audit.pruned) == (True, {"math": 2})


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ([3], Staleness(1, 2, 2, 2)),
        ([5, 5, 4, 1], Staleness(4, 0, 0, 4)),
        ([5, 4, 4, 1, 0], Staleness(5, 0, 1, 5)),
        ([0, 1, 2, 3], Staleness(4, 2, 3, 5)),
    ],
    ids=str,
)
async def test_staleness_is_that_of_what_waits(buffer: ReplayBuffer, versions: list[int], expected: Staleness) -> None:
    await put_all(buffer, [a_group(1, version=0), a_group(2, S.FILTERED, version=0), a_group(3, S.INTERRUPTED, tokens=0)])
    await buffer.take("math", 1, step=1, version=5)
    waiting = [a_group(10 + n, (S.COMPLETED, S.INTERRUPTED)[n % 2], version=version) for n, version in enumerate(versions)]
    await put_all(buffer, waiting)
    found = await buffer.overview()
    assert (found.version, found.tasks["math"].staleness) == (5, expected)
    assert list(found.tasks["math"].by_staleness.items()) == sorted(Counter(5 - version for version in versions).items())
    assert found.tasks["math"].account == await buffer.account("math")
    assert sorted(group.staleness(5) for group in waiting)[-1] == expected.most  # type: ignore[type-var]  # none is None


async def test_the_version_is_the_newest_that_is_known(buffer: ReplayBuffer) -> None:
    await buffer.put(a_group(1, version=2))
    assert (await buffer.overview()).version == 2, "what was sampled tells"
    await buffer.take("math", 1, step=1, version=3)
    assert (await buffer.overview()).version == 3, "the batch tells"
    await buffer.commit(1, version=4)
    assert (await buffer.overview()).version == 4, "the checkpoint tells"
    await put_all(buffer, [a_group(2, version=4), a_group(3, version=6)])
    for step, version in ((2, 4), (3, 6)):
        await buffer.take("math", 1, step=step, version=version)
    assert (await buffer.overview()).version == 6
    await buffer.resume(step=1)
    found = await buffer.overview()
    assert (found.version, found.timeline) == (4, 1), "those that a rewind undid do not exist"
    assert [(rewind.step, rewind.version) for rewind in found.rewinds] == [(1, 4)]
    assert found.tasks["math"].staleness == Staleness(2, 0, 0, 2)


async def test_producers_are_told_with_what_they_run(buffer: ReplayBuffer) -> None:
    await draw(buffer, 0, 1, 2)
    await buffer.claim("math", 2, statuses=[S.PENDING])
    found = await buffer.overview()
    (one,) = found.producers
    assert (one.running, found.abandoned) == (2, 0)
    assert 0 < one.expires_in <= 60


async def test_what_failed_lately_is_told_with_its_reason(buffer: ReplayBuffer) -> None:
    await put_all(buffer, [a_group(n) for n in range(1, 4)])
    failed, filtered = a_group(10, S.FAILED), a_group(11, S.COMPLETED, task_name="code")
    failed.rollouts[1].error = "TimeoutError: 30 s"
    filtered.mark(S.FILTERED, reason="all equal")
    await put_all(buffer, [failed, filtered])
    found = [(f.task_name, f.group_id, f.status, f.reason) for f in (await buffer.overview()).failures]
    assert found == [("code", 11, S.FILTERED, "all equal"), ("math", 10, S.FAILED, "TimeoutError: 30 s")]
    await put_all(buffer, [a_group(20 + n, S.FAILED) for n in range(20)])
    assert [f.group_id for f in (await buffer.overview()).failures] == list(range(39, 31, -1))


async def test_running_groups_of_nobody_are_counted(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await draw(buffer, 0, 1)
        await buffer.claim("math", 2, statuses=[S.PENDING])
        edit(tmp_path, "delete from producers")
        found = await buffer.overview()
    assert (found.abandoned, found.producers) == (2, [])


def set_times(folder: Path, change: str) -> None:
    edit(folder, f"update transitions set at = {change}")


async def test_rates_are_of_the_window(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        (first, second, *_) = await draw(buffer, *range(6))
        for group in await buffer.start([first, second]):
            await buffer.put(finished(group))
        await put_all(buffer, [a_group(100 + n) for n in range(4)])
        await buffer.take("math", 3, step=1)
        await buffer.resume(step=0)
        await buffer.take("math", 3, step=1)
    # Of 22 changes the first 6, the draws, lie 20 minutes back, the others a minute.
    set_times(tmp_path, f"{time.time()} - case when transition_id <= 6 then 1200 else 60 end")
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        found = await buffer.overview(window=600)
        assert found.rate_seconds == 600
        # 6 were completed, what the rewind gave back not counted, and 3 consumed twice.
        assert (found.tasks["math"].completed_per_minute, found.tasks["math"].consumed_per_minute) == (0.6, 0.6)
        assert (await buffer.overview(window=30)).tasks["math"].consumed_per_minute == 0
        assert found.last_change is not None
        assert found.at - found.last_change == pytest.approx(60, abs=5)


async def test_rates_of_a_young_or_busy_run_are_over_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(1 + n) for n in range(40)])
    set_times(tmp_path, f"{time.time()} - 2 * (40 - transition_id)")
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        young = await buffer.overview()
        assert young.rate_seconds == pytest.approx(78, abs=5)
        assert young.tasks["math"].completed_per_minute == pytest.approx(40 * 60 / young.rate_seconds)
        monkeypatch.setattr(module, "_MOST_TRANSITIONS", 10)
        busy = await buffer.overview()
        assert busy.rate_seconds == pytest.approx(18, abs=5)
        assert busy.tasks["math"].completed_per_minute == pytest.approx(10 * 60 / busy.rate_seconds)


@pytest.mark.parametrize("window", [0, -1, float("nan"), float("inf")])
async def test_a_window_that_is_none_is_refused(buffer: ReplayBuffer, window: float) -> None:
    with pytest.raises(ValueError, match="window="):
        await buffer.overview(window=window)


@pytest.mark.sqlite  # a server keeps words out of columns of numbers
async def test_a_number_that_was_edited_away_is_named(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.put(a_group(1))
    edit(tmp_path, "update tasks set drawn = 'many'")
    async with ReplayBuffer.open(url(tmp_path), read_only=True) as buffer:
        with pytest.raises(CorruptPayloadError, match="stands 'many'"):
            await buffer.overview()
