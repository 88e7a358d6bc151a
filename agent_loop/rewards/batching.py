"""`MicroBatcher`: what many coroutines ask at about the same time is worked on together."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

from agent_loop.arguments import at_least, within
from agent_loop.errors import RewardClosedError

Item = TypeVar("Item")
Result = TypeVar("Result")

_Waiting = tuple[Item, asyncio.Future[Result]]


class MicroBatcher(Generic[Item, Result]):
    """Calls `work` with lists of items; an async context manager that owns the tasks of its batches.

    A batch begins when it is full or its first item has waited for `window`, as soon as a slot is free; what comes while all
    slots are taken goes into the next ones. One whose askers are all gone is cancelled.

    Args:
        work: gives a result for each item, in order; an exception as the result is raised for that item alone.
        most: items of one batch.
        window: seconds that the first item waits for others.
        at_once: batches that are worked on at once.
    """

    def __init__(
        self, work: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]], *, most: int, window: float, at_once: int
    ) -> None:
        at_least("batch", most, 1)
        within("window", window, 0, float("inf"))
        self._work, self._most, self._window, self._at_once = work, most, window, at_once
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._to_come = 0  # batches whose task waits for a slot
        self._timer: asyncio.TimerHandle | None = None
        self._open = False

    async def __aenter__(self) -> Self:
        self.check_closed()
        self._tasks, self._slots = await asyncio.TaskGroup().__aenter__(), asyncio.Semaphore(self._at_once)
        self._open = True
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in self._running:
            task.cancel()
        _refuse([future for _, future in self._waiting])
        self._waiting.clear()
        # Without the error of the block, which is not of these tasks and would come out wrapped.
        await self._tasks.__aexit__(None, None, None)

    def check_closed(self) -> None:
        """Raises RuntimeError where it is open."""
        if self._open:
            raise RuntimeError("it is open already; open either the reward or the RewardSet that holds it, and one set only")

    async def __call__(self, item: Item) -> Result:
        """The result for `item`.

        Raises:
            RewardClosedError: the batcher is not open, or was closed meanwhile.
        """
        if not self._open:
            raise RewardClosedError("it is not open; use it, or the RewardSet that holds it, with `async with`")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= (self._to_come + 1) * self._most:
            self._begin()
        elif self._to_come == 0 and self._timer is None:
            self._timer = loop.call_later(self._window, self._begin)
        return await future

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._to_come += 1
        task = self._tasks.create_task(self._batch())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _batch(self) -> None:
        try:
            await self._slots.acquire()
        finally:
            self._to_come -= 1
        try:
            batch = self._taken()
            if self._waiting and not self._to_come:
                self._begin()  # they have waited while all slots were taken
            if batch:
                await self._answer(batch)
        finally:
            self._slots.release()

    def _taken(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        while self._waiting and len(batch) < self._most:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _answer(self, batch: list[_Waiting[Item, Result]]) -> None:
        futures = [future for _, future in batch]
        _cancel_without(futures)
        try:
            results: Sequence[Result | Exception] = await self._work([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001 - raised for each who asked
            results = [error] * len(batch)
        finally:
            if not self._open:
                _refuse(futures)  # cancelled by closing; a cancelled future would look as if its asker had been
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)


def _cancel_without(futures: Sequence["asyncio.Future[Result]"]) -> None:
    """Cancel the current task when nobody waits for any of them any more."""
    task = asyncio.current_task()
    assert task is not None

    def gone(_: object) -> None:
        if all(future.cancelled() for future in futures):
            task.cancel()

    for future in futures:
        future.add_done_callback(gone)


def _refuse(futures: Sequence["asyncio.Future[Result]"]) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(RewardClosedError("it was closed before it had an answer"))
