"""Rewards for what a response looks like, before anything is compared: too long, cut off, or by a rule of the user's own.

A step is a function of (rewards, lengths, truncated), arrays of N rollouts, that gives N rewards; NaN stands for none. Lengths count
all tokens of the response; `truncated` is whether it was cut off at a limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import at_least, flag, positive
from agent_loop.sampling import number
from producer.experience.usable import usable

Rewards = NDArray[np.float64]
ShapeFn = Callable[[Rewards, NDArray[np.int64], NDArray[np.bool_]], ArrayLike]


@dataclass(frozen=True)
class Overlong:
    """Takes off up to `factor` as a response fills the last `buffer` tokens below `limit` (Yu et al. 2025, DAPO, eq. 13).

    Attributes:
        limit: the most tokens of a response.
        buffer: how many of these are paid for, linearly.
        factor: what the last of them costs.
        capped: whether responses above the limit pay no more; OpenRLHF caps, verl does not.
    """

    limit: int
    buffer: int
    factor: float = 1.0
    capped: bool = True

    def __post_init__(self) -> None:
        if at_least("buffer", self.buffer, 1) > at_least("limit", self.limit, 1):
            raise ValueError(f"limit={self.limit}, buffer={self.buffer}: the buffer must be 1 to limit")
        positive("factor", self.factor)
        flag("capped", self.capped)

    def __call__(self, rewards: Rewards, lengths: NDArray[np.int64], truncated: NDArray[np.bool_]) -> Rewards:
        over = np.clip(lengths - (self.limit - self.buffer), 0, self.buffer if self.capped else None)
        penalised: Rewards = rewards - self.factor * over / self.buffer
        return penalised


@dataclass(frozen=True)
class StopProperly:
    """Changes the reward of truncated responses: times `coef` where that is 0 to 1, replaced by it where it is negative (ProRL; OpenRLHF).

    A factor makes a punishment milder: -1 times 0.5 is -0.5. Take a negative `coef` where wrong answers have negative rewards.
    """

    coef: float

    def __post_init__(self) -> None:
        if number("coef", self.coef) > 1:
            raise ValueError(f"coef={self.coef} must be 0 to 1 to multiply, or negative to replace")

    def __call__(self, rewards: Rewards, lengths: NDArray[np.int64], truncated: NDArray[np.bool_]) -> Rewards:
        changed = rewards * self.coef if self.coef >= 0 else np.where(np.isnan(rewards), np.nan, self.coef)
        return np.where(truncated, changed, rewards)


def shape_rewards(rewards: ArrayLike, lengths: ArrayLike, truncated: ArrayLike, steps: Sequence[ShapeFn]) -> Rewards:
    """The rewards after all steps, one after the other; NaN where there was none, or where a step gave none that is
    finite and within 1e15 of 0.

    Raises:
        ValueError: a step gave another number of rewards.
    """
    given = np.asarray(rewards, np.float64)
    shaped, sizes, cut = given.copy(), np.asarray(lengths, np.int64), np.asarray(truncated, np.bool_)
    for step in steps:
        shaped = np.array(step(shaped, sizes, cut), np.float64)
        if shaped.shape != given.shape:
            raise ValueError(f"{step!r:.100} gave rewards of shape {shaped.shape}; it must give {given.size}, one a rollout")
    return np.where(usable(shaped) & ~np.isnan(given), shaped, np.nan)
