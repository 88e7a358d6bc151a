"""`Pins`: evaluations hold the weights where they are, and an update waits for them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Pins:
    """Any number of evaluations at once, or one update of the weights; who comes first goes first."""

    def __init__(self) -> None:
        self._line = asyncio.Lock()
        self._held = 0
        self._none_held, self._no_update = asyncio.Event(), asyncio.Event()
        self._none_held.set()
        self._no_update.set()

    @asynccontextmanager
    async def held(self) -> AsyncGenerator[None]:
        """The weights are not updated in this block; updates that wait already come before it."""
        async with self._line:
            self._held += 1
            self._none_held.clear()
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._none_held.set()

    @asynccontextmanager
    async def updating(self) -> AsyncGenerator[None]:
        """Nobody holds the weights in this block."""
        async with self._line:
            await self._none_held.wait()
            self._no_update.clear()
            try:
                yield
            finally:
                self._no_update.set()

    async def settled(self) -> None:
        """Wait until no update is under way."""
        await self._no_update.wait()
