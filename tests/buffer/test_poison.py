"""Shows that a prompt whose runs kill their process again and again is failed with its reason, and others are not."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status
from tests.buffer.groups import draw, finished, ids, url
from tests.zygote import Moment, Say, Zygote

pytestmark = pytest.mark.usefixtures("backend")

S = Status


async def claim_until_killed(say: Say, url: str, max_crashes: int | None, sample: bool) -> None:
    """The child: claims what waits and, with `sample`, checkpoints it."""
    async with ReplayBuffer.open(url, max_crashes=max_crashes) as buffer:
        groups = await buffer.claim("math", 9, statuses=[S.INTERRUPTED, S.PENDING])
        for group in groups if sample else []:
            group.rollouts[0].append([1], logprobs=[-1.0])
            await buffer.checkpoint(group)
        say("claimed", groups=ids(groups))
        await asyncio.Event().wait()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote("tests.buffer.test_poison:claim_until_killed", "buffer.backends.postgres") as started:
        yield started


def crash(zygote: Zygote, folder: Path, *, max_crashes: int | None, sample: bool = False) -> list[int]:
    """A process that claims what waits and is killed; what it had claimed."""
    child = zygote.start(url=url(folder), max_crashes=max_crashes, sample=sample)
    assert child.killed(Moment(1, 0.0))
    claimed: list[int] = child.lines[0]["groups"]
    return claimed


async def drawn(folder: Path) -> None:
    async with ReplayBuffer.open(url(folder)) as buffer:
        await draw(buffer, 0, 1)


async def test_a_group_that_takes_its_producers_with_it_is_failed(tmp_path: Path, zygote: Zygote) -> None:
    await drawn(tmp_path)
    for _ in range(3):
        assert crash(zygote, tmp_path, max_crashes=3) == [1, 2]
    async with ReplayBuffer.open(url(tmp_path), max_crashes=3) as buffer:
        assert await buffer.counts("math") == dict.fromkeys(S, 0) | {S.FAILED: 2}
        assert await buffer.claim("math", 9, statuses=[S.INTERRUPTED, S.PENDING]) == []
        group = await buffer.get(1)
        reason = "3 producers in a row died while they ran it (max_crashes=3)"
        assert [r.error for r in group.rollouts] == [reason, reason]
        assert (await buffer.history(1))[-1].reason == reason
        assert (await buffer.audit(payloads=True)).ok
        (again,) = await buffer.start([1])  # on request
        await buffer.put(finished(again))
        assert await buffer.count("math", S.COMPLETED) == 1


async def test_progress_between_crashes_makes_it_innocent(tmp_path: Path, zygote: Zygote) -> None:
    await drawn(tmp_path)
    for _ in range(4):
        assert crash(zygote, tmp_path, max_crashes=2, sample=True) == [1, 2]
    async with ReplayBuffer.open(url(tmp_path), max_crashes=2) as buffer:
        assert await buffer.count("math", S.INTERRUPTED) == 2
        assert [r.interruptions for r in (await buffer.get(1)).rollouts] == [4, 4]


async def test_members_that_finished_are_kept_as_they_are(tmp_path: Path, zygote: Zygote) -> None:
    await drawn(tmp_path)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        group, _ = await buffer.claim("math", 2, statuses=[S.PENDING])
        finished(group).rollouts[1].status = S.INTERRUPTED
        await buffer.put(group)
    assert crash(zygote, tmp_path, max_crashes=None) == [2, 1]
    async with ReplayBuffer.open(url(tmp_path), max_crashes=1) as buffer:
        stored = await buffer.get(1)
        assert stored.statuses == [S.COMPLETED, S.FAILED]
        assert stored.rollouts[0].score == 1.0


async def test_without_a_bound_none_is_failed(tmp_path: Path, zygote: Zygote) -> None:
    await drawn(tmp_path)
    for _ in range(22):
        assert crash(zygote, tmp_path, max_crashes=None) == [1, 2]


@pytest.mark.parametrize("bound", [0, -1, 1.5])
def test_a_bound_that_is_none_is_refused(tmp_path: Path, bound: float) -> None:
    with pytest.raises(ValueError, match=r"max_crashes=.* must be a whole number, 1 or more"):
        ReplayBuffer.open(url(tmp_path), max_crashes=bound)  # type: ignore[arg-type]


@pytest.mark.parametrize("lease", [0, -1.0, float("nan"), float("inf"), "long"])
def test_a_lease_that_is_none_is_refused(tmp_path: Path, lease: float) -> None:
    with pytest.raises(ValueError, match="lease="):
        ReplayBuffer.open(url(tmp_path), lease=lease)


async def test_one_with_a_checkpoint_keeps_it_and_may_go_on_from_it_on_request(tmp_path: Path, zygote: Zygote) -> None:
    await drawn(tmp_path)
    crash(zygote, tmp_path, max_crashes=1, sample=True)
    async with ReplayBuffer.open(url(tmp_path), max_crashes=1) as buffer:
        assert await buffer.count("math", S.FAILED) == 2
        assert (await buffer.audit(payloads=True)).problems == []
        (again,) = await buffer.start([1])
        assert again.rollouts[0].response_ids.tolist() == [1]
