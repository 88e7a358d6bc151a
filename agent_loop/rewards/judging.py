"""One reward asked once: sync or async, of a rollout or of its whole group, with a deadline and finite answers."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from agent_loop.deadline import TooSlow, called, in_time, is_async
from agent_loop.errors import RewardError, RewardTimeoutError
from agent_loop.rewards.judgement import Judgement, answers_of, judgement_of
from buffer.rollout import RolloutGroup, RolloutState

Reward = Callable[[RolloutState], float | Judgement | Awaitable[float | Judgement]]
"""Gives the raw score of a finished rollout, from its `text`, `response_ids`, `row` and the rest."""


GroupReward = Callable[[RolloutGroup], Sequence[float | Judgement] | Awaitable[Sequence[float | Judgement]]]
"""Gives the raw scores of the finished rollouts of a group, one for each, in the order of `rollouts`."""

REWARD_THREADS = 32
"""Rewards of one agent loop that run on threads at once; more wait, and their time does not run meanwhile."""


async def judge(reward: Reward, state: RolloutState, *, timeout: float, threads: asyncio.Semaphore) -> Judgement:
    """What `reward` says of `state`.

    A function that is not async runs on a thread of its own, so that a slow one does not stop the event loop. At the
    deadline the thread cannot be killed: its answer is dropped, and it holds up neither others nor the end of the program.
    `timeout` is not for what keeps deadlines of its own: a `RewardSet`, `HTTPReward`, `ProcessReward`.

    Raises:
        RewardError: it raised (see `__cause__`), took longer than `timeout` seconds, or gave no finite number.
    """
    return judgement_of(await _asked(reward, state, timeout, threads), name_of(reward))


async def judge_group(reward: GroupReward, group: RolloutGroup, *, timeout: float, threads: asyncio.Semaphore) -> list[Judgement]:
    """What `reward` says of the rollouts of `group`, in order; run as by `judge`.

    Raises:
        RewardError: as of `judge`, or it did not give one number for each rollout.
    """
    name = name_of(reward)
    answers = answers_of(await _asked(reward, group, timeout, threads), len(group.rollouts), name)
    return [judgement_of(answer, name) for answer in answers]


def by_kind(reward: Reward | None, group_reward: GroupReward | None) -> tuple[Reward | None, GroupReward | None]:
    """Both as they are, but for a reward that needs whole groups (a `RewardSet` may): that is a group reward."""
    if group_reward is None and reward is not None and getattr(reward, "of_group", False):
        return None, reward  # type: ignore[return-value]  # it takes either
    return reward, group_reward


def name_of(reward: object) -> str:
    """What messages call a reward."""
    return getattr(reward, "__name__", type(reward).__name__)


async def _asked(reward: Callable[[Any], Any], subject: Any, timeout: float, threads: asyncio.Semaphore) -> Any:
    if getattr(reward, "own_deadlines", False):
        try:
            return await reward(subject)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"reward {name_of(reward)} raised {type(error).__name__}: {error}") from error
    slot: AbstractAsyncContextManager[Any] = nullcontext() if is_async(reward) else threads
    async with slot:
        return await answer(reward, subject, timeout, name_of(reward), "reward_timeout")


async def answer(reward: Callable[[Any], Any], subject: Any, timeout: float, name: str, bound: str) -> Any:
    """What `reward` returns of `subject`, whatever that is; `bound` is what the caller's users call the timeout.

    Raises:
        RewardTimeoutError: it took longer than `timeout` seconds.
        RewardError: it raised.
    """
    try:
        return await in_time(called(reward, subject, thread="millrace-reward"), timeout)
    except TooSlow as error:
        raise RewardTimeoutError(f"reward {name} took longer than {timeout:g} s; make it faster or raise {bound}") from error
    except RewardError as error:
        kind = RewardTimeoutError if isinstance(error, RewardTimeoutError) else RewardError
        raise kind(f"reward {name}: {error}") from error
    except Exception as error:
        raise RewardError(f"reward {name} raised {type(error).__name__}: {error}") from error
