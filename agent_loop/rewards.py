"""Rewards: plain functions of a finished rollout, sync or async, each with a deadline and a finite answer."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable
from typing import Any

from agent_loop.errors import RewardError
from buffer.rollout import RolloutState

Reward = Callable[[RolloutState], float | Awaitable[float]]
"""Gives the raw score of a finished rollout, from its `text`, `response_ids`, `row` and the rest."""


async def judge(reward: Reward, state: RolloutState, *, timeout: float) -> float:
    """The score that `reward` gives `state`.

    A function that is not async runs on a thread, so that a slow one does not stop the event loop. At the deadline
    the thread cannot be killed: its answer is dropped.

    Raises:
        RewardError: it raised (see `__cause__`), took longer than `timeout` seconds, or gave no finite number.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        async with asyncio.timeout(timeout) as deadline:
            value = await _call(reward, state)
    except TimeoutError as error:
        if not deadline.expired():
            raise RewardError(f"reward {name} raised TimeoutError: {error}") from error
        raise RewardError(f"reward {name} took longer than {timeout:g} s; make it faster or raise reward_timeout") from error
    except Exception as error:
        raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
    return _finite(value, name)


async def _call(reward: Reward, state: RolloutState) -> Any:
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004
        return await reward(state)  # type: ignore[misc]
    value = await asyncio.to_thread(reward, state)
    return await value if inspect.isawaitable(value) else value


def _finite(value: Any, name: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise RewardError(f"reward {name} gave {value!r:.100}; it must give a number") from None
    if not math.isfinite(score):
        raise RewardError(f"reward {name} gave {score}; it must give a finite number")
    return score
