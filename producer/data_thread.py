"""`in_background`: what is async, on an event loop and a thread of its own, for programs that are not."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

from agent_loop.arguments import function
from agent_loop.loop_thread import LoopThread

Result = TypeVar("Result")


@contextmanager
def in_background(source: Callable[[], AbstractAsyncContextManager[Result]]) -> Iterator[Result]:
    """What an async context manager gives, entered on an event loop that runs on a thread of its own: for programs that are not async.

    ```python
    with in_background(production) as producer:  # an @asynccontextmanager that opens buffer, engine and producer
        trainer.fit(model, DataLoader(BufferDataset(producer, batch_size=64), batch_size=None))
    ```

    An error of entering or leaving is raised here. It is left when the block ends, whichever way.
    """
    function("source", source, "an async context manager, such as an @asynccontextmanager")
    thread, opened, left = LoopThread(), Future[Result](), asyncio.Event()

    async def live() -> None:
        async with source() as value:
            opened.set_result(value)
            await left.wait()

    try:
        living = asyncio.run_coroutine_threadsafe(live(), thread.loop)
        either: list[Future[Any]] = [opened, living]
        wait(either, return_when=FIRST_COMPLETED)
        if not opened.done():
            living.result()
        try:
            yield opened.result()
        finally:
            thread.loop.call_soon_threadsafe(left.set)
            living.result()
    finally:
        thread.stop()
