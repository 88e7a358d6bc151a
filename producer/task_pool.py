"""`TaskPool`: the one place where tasks are born; it owns them until its block ends."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class TaskPool(Generic[T]):
    """Runs coroutines under keys and gives their results as they come.

    No task outlives the `async with` block. A task that raises cancels the others and its error leaves the block;
    results are values, failures that are expected included.

    Args:
        on_change: called when there is a result more, or a task that was cancelled has ended.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._group, self._on_change = asyncio.TaskGroup(), on_change
        self._running: dict[Hashable, asyncio.Task[None]] = {}
        self._results: list[T] = []
        self.failed = False
        """Whether a task raised: the others are being cancelled."""

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
        return len(self._running) + len(self._results)

    def start(self, key: Hashable, coroutine: Coroutine[Any, Any, T]) -> None:
        """Run the coroutine; its result comes out of `taken`."""
        if key in self._running:
            coroutine.close()
            raise ValueError(f"{key!r} is running already")
        task = self._running[key] = self._group.create_task(self._run(key, coroutine))

        def ended(_: asyncio.Task[None]) -> None:
            # By callback, since a task that is cancelled before its first step never runs a line of its own.
            coroutine.close()
            if self._running.get(key) is task:  # by now the key may belong to another
                del self._running[key]
                self._on_change()

        task.add_done_callback(ended)

    async def _run(self, key: Hashable, coroutine: Coroutine[Any, Any, T]) -> None:
        try:
            result = await coroutine
        except (KeyboardInterrupt, SystemExit) as error:
            # The task that it came to has ended the loop's run with it already. Raised by this one too, it would end the run
            # in which everything else is being stored.
            raise asyncio.CancelledError from error
        except Exception:
            self.failed = True
            raise
        # Together, before anyone else runs: a task that is counted as running beside its own result is waited for in vain.
        self._running.pop(key)
        self._results.append(result)
        self._on_change()

    async def drained(self, within: float | None) -> bool:
        """Wait until nothing runs; False if that takes longer than `within` seconds. Results stay to be taken."""
        if self._running:
            await asyncio.wait(self._running.values(), timeout=within)
        return not self._running

    def cancel(self) -> None:
        """Cancel what runs."""
        for task in list(self._running.values()):
            task.cancel()

    def taken(self) -> list[T]:
        """The results that came since the last call, in the order in which they came."""
        results, self._results = self._results, []
        return results
