"""A buffer without threads does what every buffer does, in the event loop: one transaction a turn, and the same in every run."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from buffer import ReplayBuffer, Status
from buffer.errors import BufferClosedError, BufferLockedError, DatabaseError, IllegalTransitionError
from buffer.inline import InlineReplayBuffer
from buffer.queries import Transaction
from buffer.transactor import Transactor
from producer.simulate.virtual_time import run
from tests.buffer.groups import a_group


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each transaction that any writer does."""
    seen: list[None] = []
    perform = Transactor.perform

    def counted(self: Transactor, work: Callable[[Transaction], Any]) -> Any:
        seen.append(None)
        return perform(self, work)

    monkeypatch.setattr(Transactor, "perform", counted)
    return seen


def test_what_is_asked_for_in_one_turn_is_one_transaction_and_no_thread_works(tmp_path: Path, transactions: list[None]) -> None:
    async def main() -> None:
        before = set(threading.enumerate())
        async with InlineReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer:
            opening = len(transactions)
            async with asyncio.TaskGroup() as tasks:
                for n in range(100):
                    tasks.create_task(buffer.put(a_group(n)))
            assert len(transactions) == opening + 1
            await buffer.put(a_group(100))
            assert len(transactions) == opening + 2
            assert await buffer.count("math", Status.COMPLETED) == 101
            assert [group.group_id for group in await buffer.take("math", 3, step=1)] == [0, 1, 2]
            assert (await buffer.audit(payloads=True)).ok
            assert set(threading.enumerate()) <= before
        assert asyncio.get_running_loop().time() == 0.0

    run(main())


def test_a_bad_request_fails_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with InlineReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer:
            await buffer.put(a_group(1))
            results: list[BaseException | None] = []

            async def put(n: int) -> None:
                try:
                    await buffer.put(a_group(n))
                    results.append(None)
                except IllegalTransitionError as error:
                    results.append(error)

            async with asyncio.TaskGroup() as tasks:
                for n in (2, 1, 3):
                    tasks.create_task(put(n))
            assert [type(result) for result in results] == [type(None), IllegalTransitionError, type(None)]
            assert await buffer.count("math", Status.COMPLETED) == 3

    run(main())


def test_what_was_asked_for_before_closing_is_stored(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/run.db"

    async def main() -> None:
        async with InlineReplayBuffer.open(url) as buffer, asyncio.TaskGroup() as tasks:
            putting = tasks.create_task(buffer.put(a_group(1)))
            await asyncio.sleep(0)
            putting.cancel()
        with pytest.raises(BufferClosedError):
            await buffer.put(a_group(2))

    run(main())

    async def look() -> int:
        async with ReplayBuffer.open(url, read_only=True) as buffer:
            return await buffer.count("math", Status.COMPLETED)

    assert asyncio.run(look()) == 1


def test_it_is_a_sqlite_buffer_with_one_writer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/run.db"
    with pytest.raises(ValueError, match="needs SQLite"):
        InlineReplayBuffer.open("postgresql://somewhere/run")

    async def main() -> None:
        async with InlineReplayBuffer.open(url):
            with pytest.raises(BufferLockedError):
                async with InlineReplayBuffer.open(url):
                    pass
        (tmp_path / "other.db").write_bytes(b"no database at all" * 100)
        with pytest.raises(DatabaseError, match="is not a database"):
            async with InlineReplayBuffer.open(f"sqlite:///{tmp_path}/other.db"):
                pass

    run(main())


def test_a_database_that_breaks_ends_the_writer_and_all_who_wait_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tx: Transaction, arguments: Sequence[Any]) -> Sequence[Any]:
        tx.conn.close()
        raise RuntimeError("the connection is gone")

    async def main() -> None:
        async with InlineReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer:
            monkeypatch.setattr("buffer.operations.put", broken)
            with pytest.raises(BufferClosedError, match="writer has ended"):
                await buffer.put(a_group(1))
            with pytest.raises(BufferClosedError):
                await buffer.put(a_group(1))

    run(main())


def test_a_cancelled_claim_gives_back_what_it_was_given(tmp_path: Path) -> None:
    async def main() -> None:
        async with InlineReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer:
            await buffer.put(a_group(1, status=Status.INTERRUPTED))
            async with asyncio.TaskGroup() as tasks:
                claiming = tasks.create_task(buffer.claim("math", 1, statuses=[Status.INTERRUPTED]))
                await asyncio.sleep(0)
                claiming.cancel()
            assert await buffer.count("math", Status.RUNNING) == 0
            assert await buffer.count("math", Status.INTERRUPTED) == 1

    run(main())


def test_two_runs_leave_the_same_database(tmp_path: Path) -> None:
    """In processes of their own, whose sets have other orders."""
    said = [
        subprocess.run(
            [sys.executable, "-m", "tests.simulate.one_run", f"{tmp_path}/{seed}.db"],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": "."},
            capture_output=True,
            check=True,
            text=True,
            timeout=120,
        ).stdout
        for seed in (1, 2)
    ]
    assert float(said[0].splitlines()[0]) > 3600
    assert said[0] == said[1]
