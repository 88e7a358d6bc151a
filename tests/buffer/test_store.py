"""Shows that whatever happens on the writer's thread, everyone who waits for an answer gets one."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, operations
from buffer.backends import backend_of
from buffer.codec import snapshot
from buffer.errors import BufferClosedError, DatabaseError, ReplayBufferError
from buffer.queries import Transaction
from buffer.requests import Request
from buffer.store import Writer
from buffer.transactor import Producer, Transactor, new_owner
from tests.buffer.groups import a_group, url

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Writer]:
    """A writer on a file of its own."""
    opened = _writer(url(tmp_path))
    await opened.start()
    yield opened
    await opened.close()


def _writer(address: str) -> Writer:
    transactor = Transactor(backend_of(address), Producer(new_owner(), lease=60.0), patience=10.0)
    return Writer(transactor, asyncio.get_running_loop())


def echo(tx: Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
    return arguments


def raising(error: BaseException) -> Callable[..., Sequence[Any]]:
    def operation(tx: Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
        raise error

    return operation


async def outcome(request: Request) -> Any:
    try:
        return await request.answer
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopIteration(), GeneratorExit(), asyncio.CancelledError()])
async def test_an_error_that_is_no_exception_reaches_its_caller_alone(writer: Writer, error: BaseException) -> None:
    requests = [writer.submit(echo, 1), writer.submit(raising(error), None), writer.submit(echo, 2)]
    first, failed, last = [await outcome(request) for request in requests]
    assert (first, last) == (1, 2)
    assert isinstance(failed, ReplayBufferError)
    assert failed.__cause__ is error


async def test_an_operation_that_answers_too_little_fails_and_the_others_do_not(writer: Writer) -> None:
    requests = [writer.submit(echo, 1), writer.submit(lambda tx, arguments: [], None), writer.submit(echo, 2)]
    first, failed, last = [await outcome(request) for request in requests]
    assert (first, last) == (1, 2)
    assert isinstance(failed, ValueError)


async def test_what_failed_has_no_outcome_to_undo(writer: Writer, tmp_path: Path) -> None:
    def half(tx: Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
        if len(arguments) > 1 or arguments[0] == "bad":
            raise ValueError(arguments)
        return arguments

    requests = [writer.submit(half, "good"), writer.submit(half, "bad")]
    assert [type(await outcome(request)) for request in requests] == [str, ValueError]
    assert [request.outcome for request in requests] == ["good", None]


async def test_what_was_rolled_back_and_then_failed_has_no_outcome_either(writer: Writer) -> None:
    calls, under_way, go_on = [], threading.Event(), threading.Event()

    def works_once(tx: Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
        calls.append(arguments)
        if len(calls) > 1:
            raise ValueError("no room any more")
        return arguments

    def wait(tx: Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
        under_way.set()
        assert go_on.wait(60)
        return arguments

    first = writer.submit(wait, 0)
    await asyncio.to_thread(under_way.wait, 60)  # so that the next two come into one transaction
    requests = [writer.submit(works_once, 1), writer.submit(raising(ValueError("bad")), 2)]
    go_on.set()
    assert [type(await outcome(request)) for request in (first, *requests)] == [int, ValueError, ValueError]
    assert len(calls) == 2, "once beside the bad one, once alone"
    assert requests[0].outcome is None


@pytest.mark.sqlite
async def test_a_lost_connection_ends_the_writer_and_all_who_wait_are_told(writer: Writer) -> None:
    def lose(tx: Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
        tx.conn.close()
        return arguments

    requests = [writer.submit(echo, 0), writer.submit(lose, 1), *(writer.submit(echo, n) for n in range(200))]
    outcomes = [await outcome(request) for request in requests]
    assert isinstance(outcomes[-1], BufferClosedError)
    assert "the buffer's writer has ended" in str(outcomes[-1])
    with pytest.raises(BufferClosedError, match="the buffer is closed"):
        writer.submit(echo, 1)


@pytest.mark.sqlite
async def test_a_connection_that_cannot_be_made_is_the_openers_error(tmp_path: Path) -> None:
    writer = _writer(url(tmp_path / "missing"))
    with pytest.raises(DatabaseError, match="unable to open database file"):
        await writer.start()
    await writer.close()


async def test_an_answer_nobody_waits_for_any_more_does_not_disturb_the_others(writer: Writer) -> None:
    requests = [writer.submit(echo, n) for n in range(5)]
    requests[2].answer.cancel()
    assert [await requests[n].answer for n in (0, 1, 3, 4)] == [0, 1, 3, 4]
    assert requests[2].outcome == 2


def test_a_loop_that_is_gone_does_not_keep_what_was_asked_for_from_being_stored(tmp_path: Path) -> None:
    async def leave() -> Writer:
        writer = _writer(url(tmp_path))
        await writer.start()
        for n in range(1, 10):
            writer.submit(operations.put, operations.Put(snapshot(a_group(n))))
        return writer

    async def look(writer: Writer) -> int:
        await writer.close()  # on another loop
        async with ReplayBuffer.open(url(tmp_path)) as buffer:
            return await buffer.count("math", "completed")

    assert asyncio.run(look(asyncio.run(leave()))) == 9
