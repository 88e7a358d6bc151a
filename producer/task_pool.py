"""`TaskPool`: the one place where tasks are born; it owns them until its block ends."""

import asyncio
from collections.abc import Coroutine, Hashable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class TaskPool(Generic[T]):
    """Runs coroutines under keys and gives their results as they come.

    No task outlives the `async with` block. A task that raises cancels the others and its error leaves the block;
    results are values, failures that are expected included.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._running: dict[Hashable, asyncio.Task[None]] = {}
        self._results: asyncio.Queue[T] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._group.__aexit__(kind, error, trace)

    @property
    def running(self) -> list[Any]:
        """The keys of what runs."""
        return list(self._running)

    def __len__(self) -> int:
        """Tasks whose results were not given out yet."""
        return len(self._running) + self._results.qsize()

    def start(self, key: Hashable, coroutine: Coroutine[Any, Any, T]) -> None:
        """Run the coroutine; its result comes out of `next`."""
        if key in self._running:
            coroutine.close()
            raise ValueError(f"{key!r} is running already")
        task = self._running[key] = self._group.create_task(self._run(key, coroutine))

        def ended(_: asyncio.Task[None]) -> None:
            # By callback, since a task that is cancelled before its first step never runs a line of its own.
            coroutine.close()
            if self._running.get(key) is task:  # by now the key may belong to another
                del self._running[key]

        task.add_done_callback(ended)

    async def _run(self, key: Hashable, coroutine: Coroutine[Any, Any, T]) -> None:
        result = await coroutine
        # Together, before anyone else runs: a task that is counted as running beside its own result is waited for in vain.
        self._running.pop(key)
        self._results.put_nowait(result)

    async def next(self) -> T:
        """The next result; something must run or have a result waiting."""
        return await self._results.get()

    async def drained(self, within: float) -> bool:
        """Wait until nothing runs; False if that takes longer than `within` seconds. Results stay to be taken."""
        if self._running:
            await asyncio.wait(self._running.values(), timeout=within)
        return not self._running

    def cancel(self) -> None:
        """Cancel what runs."""
        for task in list(self._running.values()):
            task.cancel()

    def taken(self) -> list[T]:
        """The results that wait, without waiting for more."""
        return [self._results.get_nowait() for _ in range(self._results.qsize())]
