"""An event loop on a thread of its own, for callers that are not async."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def call(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` on `loop`, which runs on another thread, and wait for it. Ctrl-C cancels it and waits for its end."""
    ended = threading.Event()
    future = asyncio.run_coroutine_threadsafe(_told(work, ended), loop)
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise
    except BaseException:
        if not future.done():
            future.cancel()
            ended.wait()  # what it holds in the engine is free when this returns
        raise


async def _told(work: Coroutine[Any, Any, Result], ended: threading.Event) -> Result:
    try:
        return await work
    finally:
        ended.set()


class LoopThread:
    """A running event loop; `stop` ends it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        # A daemon: a program that forgets to close ends all the same.
        self._thread = threading.Thread(target=self.loop.run_forever, name="millrace-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop and its thread."""
        call(self.loop, self._quiet())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _quiet(self) -> None:
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()
