"""`Gate`: may groups start now? Held while weights are updated or an evaluation runs; blocks may overlap, and be nested."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from agent_loop.engines.base import Engine, PauseMode
from producer.errors import ProducerError


class Gate:
    """What a production asks before it starts groups; whoever holds it has that for as long as any of its blocks lasts.

    Attributes:
        on_change: called when it opens or closes.
        thawed_at: when what was frozen went on the last time, on the loop's clock.
    """

    def __init__(self) -> None:
        self._holds = self._freezes = 0
        self._starting = asyncio.Lock()
        self.on_change: Callable[[], None] = _nobody
        self.thawed_at: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether groups may start."""
        return not self._holds

    @property
    def is_frozen(self) -> bool:
        """Whether nothing can end, so that a silence means nothing."""
        return self._freezes > 0

    @asynccontextmanager
    async def starting(self) -> AsyncGenerator[None]:
        """Groups start in this block; enter it where the gate is open."""
        async with self._starting:
            yield

    @asynccontextmanager
    async def held(self) -> AsyncGenerator[None]:
        """No group starts in this block; starts under way are waited for before it."""
        self._holds += 1
        try:
            async with self._starting:
                pass
            yield
        finally:
            self._holds -= 1
            self.on_change()

    @contextmanager
    def frozen(self) -> Generator[None]:
        """What runs stands still in this block, weights being updated, say."""
        self._freezes += 1
        self.on_change()
        try:
            yield
        finally:
            self._freezes -= 1
            self.thawed_at = asyncio.get_running_loop().time()
            self.on_change()


class Updater:
    """Which task updates the weights now: in its block it would wait for ever for what waits for the end of the block."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None

    @property
    def is_here(self) -> bool:
        """Whether it is the task that asks."""
        return self._task is not None and self._task is asyncio.current_task()

    @contextmanager
    def here(self) -> Generator[None]:
        """The weights are updated in this block."""
        self._task = asyncio.current_task()
        try:
            yield
        finally:
            self._task = None

    def check_elsewhere(self, what: str) -> None:
        """`ProducerError` in such a block."""
        if self.is_here:
            raise ProducerError(f"{what} waits for the end of `update_weights`, and is awaited in its block; await it after the block")


@asynccontextmanager
async def paused(engine: Engine, mode: PauseMode) -> AsyncGenerator[None]:
    """The engine stands still in this block; where pausing it fails or is cancelled midway, it goes on."""
    try:
        await engine.pause(mode)
    except BaseException:
        with suppress(Exception):  # it may stand by now; what went wrong with the pause is the error to raise
            await engine.resume()
        raise
    try:
        yield
    finally:
        await engine.resume()


def _nobody() -> None:
    """Nobody waits."""
