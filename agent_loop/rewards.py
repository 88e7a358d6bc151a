"""Rewards: plain functions of a finished rollout, sync or async, each with a deadline and a finite answer."""

import asyncio
import contextvars
import inspect
import math
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from agent_loop.errors import RewardError
from buffer.rollout import RolloutState

Reward = Callable[[RolloutState], float | Awaitable[float]]
"""Gives the raw score of a finished rollout, from its `text`, `response_ids`, `row` and the rest."""


REWARD_THREADS = 32
"""Rewards of one agent loop that run on threads at once; more wait, and their time does not run meanwhile."""


async def judge(reward: Reward, state: RolloutState, *, timeout: float, threads: asyncio.Semaphore) -> float:
    """The score that `reward` gives `state`.

    A function that is not async runs on a thread of its own, so that a slow one does not stop the event loop. At the
    deadline the thread cannot be killed: its answer is dropped, and it holds up neither others nor the end of the program.

    Raises:
        RewardError: it raised (see `__cause__`), took longer than `timeout` seconds, or gave no finite number.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        if _is_async(reward):
            value = await _in_time(_awaited(reward, state), timeout)
        else:
            async with threads:
                value = await _in_time(_on_thread(reward, state), timeout)
    except _TooSlow as error:
        raise RewardError(f"reward {name} took longer than {timeout:g} s; make it faster or raise reward_timeout") from error
    except Exception as error:
        raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
    return _finite(value, name)


class _TooSlow(Exception):
    """The deadline passed; the reward's own TimeoutError is another matter."""


async def _in_time(judgement: Awaitable[Any], timeout: float) -> Any:
    try:
        async with asyncio.timeout(timeout) as deadline:
            return await judgement
    except TimeoutError as error:
        if deadline.expired():
            raise _TooSlow from error
        raise


def _is_async(reward: Reward) -> bool:
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


async def _awaited(reward: Reward, state: RolloutState) -> Any:
    return await reward(state)  # type: ignore[misc]


async def _on_thread(reward: Reward, state: RolloutState) -> Any:
    """What `reward` returns on a daemon thread. A pool would do less well: a few rewards that hang would fill it."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    if not getattr(loop, "waits_for_threads", True):  # virtual time stands still while it works here, and would overtake a thread
        value = reward(state)
        return await value if inspect.isawaitable(value) else value
    done = asyncio.Event()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((context.run(reward, state), None))
        except BaseException as error:  # noqa: BLE001 - raised again below, for the one who waits
            outcome.append((None, error))
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="millrace-reward", daemon=True).start()
    await done.wait()
    ((value, error),) = outcome
    if isinstance(error, StopIteration) or not isinstance(error, Exception | None):
        # A coroutine cannot raise the one; the others (SystemExit) would end the program instead of the judgement.
        raise RuntimeError(repr(error)) from error
    if error is not None:
        raise error
    return await value if inspect.isawaitable(value) else value


def _finite(value: Any, name: str) -> float:
    try:
        score = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is a tensor's, of more than one element
        score = math.nan
    if not math.isfinite(score):
        raise RewardError(f"reward {name} gave {value!r:.100}; it must give a finite number")
    return score
