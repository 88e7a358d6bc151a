"""Rewards: plain functions of a finished rollout or of its whole group, sync or async, with a deadline and finite answers."""

import asyncio
import contextvars
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any

from agent_loop.errors import RewardError
from buffer.rollout import RolloutGroup, RolloutState

Reward = Callable[[RolloutState], float | Awaitable[float]]
"""Gives the raw score of a finished rollout, from its `text`, `response_ids`, `row` and the rest."""


GroupReward = Callable[[RolloutGroup], Sequence[float] | Awaitable[Sequence[float]]]
"""Gives the raw scores of the finished rollouts of a group, one for each, in the order of `rollouts`."""

REWARD_THREADS = 32
"""Rewards of one agent loop that run on threads at once; more wait, and their time does not run meanwhile."""


async def judge(reward: Reward, state: RolloutState, *, timeout: float, threads: asyncio.Semaphore) -> float:
    """The score that `reward` gives `state`.

    A function that is not async runs on a thread of its own, so that a slow one does not stop the event loop. At the
    deadline the thread cannot be killed: its answer is dropped, and it holds up neither others nor the end of the program.

    Raises:
        RewardError: it raised (see `__cause__`), took longer than `timeout` seconds, or gave no finite number.
    """
    return _finite(await _answer(reward, state, timeout, threads), _name(reward))


async def judge_group(reward: GroupReward, group: RolloutGroup, *, timeout: float, threads: asyncio.Semaphore) -> list[float]:
    """The scores that `reward` gives the rollouts of `group`, in order; run as by `judge`.

    Raises:
        RewardError: as of `judge`, or it did not give one number for each rollout.
    """
    return _scores(await _answer(reward, group, timeout, threads), len(group.rollouts), _name(reward))


def _name(reward: object) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


async def _answer(reward: Callable[[Any], Any], subject: Any, timeout: float, threads: asyncio.Semaphore) -> Any:
    try:
        if _is_async(reward):
            return await _in_time(_awaited(reward, subject), timeout)
        async with threads:
            return await _in_time(_on_thread(reward, subject), timeout)
    except _TooSlow as error:
        raise RewardError(f"reward {_name(reward)} took longer than {timeout:g} s; make it faster or raise reward_timeout") from error
    except Exception as error:
        raise RewardError(f"reward {_name(reward)} raised {type(error).__name__}: {error}") from error


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


def _is_async(reward: Callable[[Any], Any]) -> bool:
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


async def _awaited(reward: Callable[[Any], Any], subject: Any) -> Any:
    return await reward(subject)


async def _on_thread(reward: Callable[[Any], Any], subject: Any) -> Any:
    """What `reward` returns on a daemon thread. A pool would do less well: a few rewards that hang would fill it."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    if not getattr(loop, "waits_for_threads", True):  # virtual time stands still while it works here, and would overtake a thread
        value = reward(subject)
        return await value if inspect.isawaitable(value) else value
    done = asyncio.Event()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((context.run(reward, subject), None))
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


def _scores(value: Any, n: int, name: str) -> list[float]:
    wanted = f"it must give {n} finite numbers, one for each finished rollout of the group, in order"
    if isinstance(value, str | bytes | Mapping | Set):  # these are iterated over too, and say nothing of an order
        raise RewardError(f"reward {name} gave {value!r:.100}; {wanted}")
    try:
        given = list(value)
    except Exception as error:
        raise RewardError(f"reward {name} gave {value!r:.100}; {wanted}") from error
    if len(given) != n:
        raise RewardError(f"reward {name} gave {len(given)} scores; {wanted}")
    return [_finite(score, name) for score in given]
