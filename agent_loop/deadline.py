"""Functions of users, sync or async, called from the event loop: a slow one does not stop it, and one that hangs is not waited for."""

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class TooSlow(Exception):
    """The deadline passed; a function's own TimeoutError is another matter."""


def is_async(function: object) -> bool:
    """Whether calling it gives a coroutine, as far as can be known beforehand."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def in_time(awaited: Awaitable[T], timeout: float) -> T:
    """The result of `awaited`.

    Raises:
        TooSlow: it took longer than `timeout` seconds, and was cancelled.
    """
    try:
        async with asyncio.timeout(timeout) as deadline:
            return await awaited
    except TimeoutError as error:
        if deadline.expired():
            raise TooSlow from error
        raise


async def called(function: Callable[..., Any], *arguments: Any, thread: str) -> Any:
    """What `function` returns; one that is not async runs on a daemon thread of that name.

    A pool would do less well: a few functions that hang would fill it.
    """
    if is_async(function):
        return await function(*arguments)
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    if not getattr(loop, "waits_for_threads", True):  # virtual time stands still while it works here, and would overtake a thread
        value = function(*arguments)
        return await value if inspect.isawaitable(value) else value
    done = asyncio.Event()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((context.run(function, *arguments), None))
        except BaseException as error:  # noqa: BLE001 - raised again below, for the one who waits
            outcome.append((None, error))
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name=thread, daemon=True).start()
    await done.wait()
    ((value, error),) = outcome
    if isinstance(error, StopIteration) or not isinstance(error, Exception | None):
        # A coroutine cannot raise the one; the others (SystemExit) would end the program instead of this call.
        raise RuntimeError(repr(error)) from error
    if error is not None:
        raise error
    return await value if inspect.isawaitable(value) else value
