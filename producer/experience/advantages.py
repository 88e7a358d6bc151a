"""Advantages of a group's members over each other: one number a rollout, from flat rewards and group ids.

Every estimator takes `rewards` (one a rollout; None or NaN where there is none) and `group_ids` (same length, any integers, in any
order), and gives float64 of that length. Rollouts without a reward get 0 and take no part in any baseline. A group whose
rewards are all equal gets exactly 0, and so does the single scored member of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rewards = Sequence[float | None] | NDArray[np.floating]
Scale = Literal["group", "batch", "none"]
AdvantageFn = Callable[[Rewards, ArrayLike], NDArray[np.float64]]


def grpo(rewards: Rewards, group_ids: ArrayLike, *, scale: Scale = "group", ddof: int = 1, eps: float = 1e-4) -> NDArray[np.float64]:
    """(r - mean of the group) / (std + eps): group relative policy optimisation (Shao et al. 2024, DeepSeekMath, section 4.1).

    Args:
        scale: the standard deviation of the "group", of the whole "batch", or "none".
        ddof: 1 for the sample standard deviation, 0 for that of the population.
        eps: added to the standard deviation.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"unknown scale {scale!r}; known are {get_args(Scale)}")
    if ddof not in (0, 1) or eps < 0:
        raise ValueError(f"ddof={ddof} must be 0 or 1, and eps={eps} 0 or more")
    groups = _Groups.of(rewards, group_ids)
    centred = groups.centred()
    if scale == "none":
        return centred
    std = groups.std(centred, ddof) if scale == "group" else groups.batch_std(ddof)
    # Where nothing varies the numerator is exactly 0, and with eps = 0 the denominator too.
    return np.divide(centred, std + eps, out=np.zeros(centred.shape, np.float64), where=centred != 0)


def dr_grpo(rewards: Rewards, group_ids: ArrayLike) -> NDArray[np.float64]:
    """r - mean of the group, unscaled (Liu et al. 2025, "Understanding R1-Zero-Like Training"); its loss reduction is "dr_grpo"."""
    return grpo(rewards, group_ids, scale="none")


def rloo(rewards: Rewards, group_ids: ArrayLike) -> NDArray[np.float64]:
    """r - mean of the others: REINFORCE leave-one-out (Ahmadian et al. 2024), which is n / (n - 1) times (r - mean)."""
    groups = _Groups.of(rewards, group_ids)
    counts = groups.counts[groups.index].astype(np.float64)
    factor: NDArray[np.float64] = counts / np.maximum(counts - 1, 1)
    return groups.centred() * factor


ESTIMATORS: Mapping[str, AdvantageFn] = MappingProxyType({"grpo": grpo, "drgrpo": dr_grpo, "dr_grpo": dr_grpo, "rloo": rloo})


def estimator(advantage: str | AdvantageFn) -> AdvantageFn:
    """The estimator of that name, or the given function itself."""
    if callable(advantage):
        return advantage
    if advantage not in ESTIMATORS:
        raise ValueError(f"unknown advantage {advantage!r}; known are {sorted(ESTIMATORS)}, or pass a function of (rewards, group_ids)")
    return ESTIMATORS[advantage]


def zero_variance(rewards: Rewards, group_ids: ArrayLike) -> float:
    """The fraction of groups whose rewards are all equal, and which thus teach nothing; of those that have a reward. 0 if none has."""
    groups = _Groups.of(rewards, group_ids)
    largest = np.zeros(groups.counts.size)
    np.maximum.at(largest, groups.index, groups.above_least)
    known = groups.counts > 0
    return float(np.mean(largest[known] == 0)) if known.any() else 0.0


@dataclass(frozen=True)
class _Groups:
    """Rewards by group. `above_least` (N,) is each reward minus the least of its group, 0 where there is no reward.

    Means are taken of these differences: they are exactly 0 where all are equal, in any precision, while the mean of
    equal numbers need not be that number. And a constant added to all rewards is gone before anything is summed.
    """

    values: NDArray[np.float64]  # (N,) NaN without a reward
    index: NDArray[np.intp]  # (N,) 0 .. number of groups - 1
    scored: NDArray[np.bool_]  # (N,)
    counts: NDArray[np.intp]  # (groups,) members with a reward
    above_least: NDArray[np.float64]

    @classmethod
    def of(cls, rewards: Rewards, group_ids: ArrayLike) -> "_Groups":
        values = np.array(rewards, dtype=np.float64).reshape(-1)
        ids = np.asarray(group_ids).reshape(-1)
        if values.shape != ids.shape:
            raise ValueError(f"{values.size} rewards came with {ids.size} group ids; give one a rollout")
        if np.isinf(values).any():
            at = int(np.argmax(np.isinf(values)))
            raise ValueError(f"reward {at} is {values[at]}; rewards are finite, or None where there is none")
        unique, index = np.unique(ids, return_inverse=True)
        scored = ~np.isnan(values)
        least = np.full(unique.size, np.inf)
        np.minimum.at(least, index[scored], values[scored])
        above = np.zeros_like(values)
        above[scored] = values[scored] - least[index[scored]]
        return cls(values, index, scored, np.bincount(index[scored], minlength=unique.size), above)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(groups,) sums over the members with a reward."""
        return np.bincount(self.index[self.scored], weights=values[self.scored], minlength=self.counts.size).astype(np.float64)

    def centred(self) -> NDArray[np.float64]:
        """(N,) r - mean of the group; 0 without a reward."""
        means = self.sums(self.above_least) / np.maximum(self.counts, 1)
        return np.where(self.scored, self.above_least - means[self.index], 0.0)

    def std(self, centred: NDArray[np.float64], ddof: int) -> NDArray[np.float64]:
        """(N,) standard deviation of each member's group; 0 for a group of one."""
        stds: NDArray[np.float64] = np.sqrt(self.sums(centred**2) / np.maximum(self.counts - ddof, 1))
        return stds[self.index]

    def batch_std(self, ddof: int) -> NDArray[np.float64]:
        """(N,) standard deviation of all rewards, the same everywhere; 0 for a batch of one."""
        known = self.values[self.scored]
        return np.full(self.values.shape, np.std(known, ddof=ddof) if known.size > ddof else 0.0)
