"""Shows that what is prepared ahead of a write is what the write would have made, and that nothing depends on its being prepared."""

import asyncio
import gc
import threading
import weakref
from pathlib import Path

import pytest

from buffer import Position, ReplayBuffer
from buffer.ahead import Ahead, Preparable
from buffer.codec import encode, snapshot
from buffer.errors import DuplicateGroupError
from buffer.operations import Put
from buffer.staleness import FIRST_TIMELINE
from tests.buffer.groups import a_group, plain, put_all, url


class Noted(Preparable):
    """Notes that it was prepared, or refuses."""

    __slots__ = ("done",)

    def __init__(self, size: int = 1) -> None:
        self.size, self.taken, self.done = size, False, threading.Event()

    def prepare(self) -> bool:
        self.done.set()
        return True


@pytest.fixture
def ahead() -> Ahead:
    return Ahead()


def test_it_prepares_in_order_while_a_commit_is_under_way(ahead: Ahead) -> None:
    first, second = Noted(), Noted()
    ahead.start()
    ahead.add(first)
    ahead.add(second)
    with ahead.working():
        assert second.done.wait(30)
        assert first.done.is_set()
    ahead.close()


def test_beyond_a_bound_nothing_is_prepared_until_what_is_ahead_was_taken(ahead: Ahead) -> None:
    large, beyond, after = Noted(size=2**40), Noted(), Noted()
    ahead.start()
    with ahead.working():
        ahead.add(large)
        ahead.add(beyond)
        assert large.done.wait(30)
        ahead.close()
    assert not beyond.done.is_set()
    again = Ahead()
    again.start()
    with again.working():
        again.add(large)
        large.taken = True
        again.add(after)
        assert after.done.wait(30)
    again.close()


def test_what_was_taken_is_not_kept(ahead: Ahead) -> None:
    argument, barrier = Noted(), Noted()
    ahead.start()
    with ahead.working():
        ahead.add(argument)
        ahead.add(barrier)
        assert barrier.done.wait(30)
    gone = weakref.ref(argument)
    del argument
    gc.collect()
    assert gone() is None
    ahead.close()


def test_a_prepared_put_has_the_rows_that_it_would_have_had() -> None:
    group = a_group(1, tokens=20)
    put, other = Put(snapshot(group)), Put(snapshot(group))
    assert put.prepare()
    prepared, made = put.encoded_new(FIRST_TIMELINE), other.encoded_new(FIRST_TIMELINE)
    assert prepared._replace(snapshot=made.snapshot) == made
    assert not put.prepare()


def test_what_was_prepared_before_a_rewind_is_made_anew_also_when_it_is_done_again() -> None:
    now = FIRST_TIMELINE.rewound(0)
    put = Put(snapshot(a_group(1, tokens=20)))
    assert put.prepare()
    expected = encode(snapshot(a_group(1, tokens=20)), now).timeline
    for _ in range(2):  # the second after a rollback
        e = put.encoded_new(now)
        assert e.timeline == expected == 1
        assert all((rollout.timelines == 1).all() for rollout in e.snapshot.rollouts)
        assert '"timelines"' in e.extras


def test_what_cannot_be_stored_is_left_to_the_operation() -> None:
    group = a_group(1)
    group.rollouts[0].metrics["seconds"] = float("nan")
    put = Put(snapshot(group))
    assert not put.prepare()
    with pytest.raises(ValueError, match="cannot be stored"):
        put.encoded_new(FIRST_TIMELINE)


@pytest.mark.usefixtures("backend")
async def test_a_bad_group_among_many_fails_alone_and_the_others_are_stored_as_they_were(tmp_path: Path) -> None:
    groups = [a_group(n, tokens=20_000) for n in range(1, 41)]
    groups[20].rollouts[0].metrics["seconds"] = float("inf")
    groups[0].position = groups[30].position = Position(0, 0)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        outcomes = await asyncio.gather(*(buffer.put(group) for group in groups), return_exceptions=True)
        failed = {n: error for n, error in enumerate(outcomes) if error is not None}
        assert {n: type(error) for n, error in failed.items()} == {20: ValueError, 30: DuplicateGroupError}
        await put_all(buffer, [a_group(100)])
        stored = [n for n in range(40) if n not in failed]
        assert [plain(await buffer.get(n + 1)) for n in stored] == [plain(groups[n]) for n in stored]
        assert (await buffer.audit(payloads=True)).ok


async def test_the_thread_ends_with_the_buffer(tmp_path: Path) -> None:
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, [a_group(1)])
        assert _threads() == 1
    assert _threads() == 0


def _threads() -> int:
    return sum(thread.name == "millrace-ahead" for thread in threading.enumerate())
