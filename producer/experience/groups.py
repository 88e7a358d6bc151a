"""Rewards by group: the sums, means and deviations that every estimator with a baseline is made of, for ragged groups.

Means are taken of the differences to the least reward of each group. These are exactly 0 where all rewards are equal, in any
precision, while the mean of equal numbers need not be that number; and a constant added to all rewards is gone before anything is summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rewards = Sequence[float | None] | NDArray[np.floating]


@dataclass(frozen=True)
class Groups:
    """Rewards of N rollouts in G groups. Rollouts without a reward take no part in anything."""

    values: NDArray[np.float64]  # (N,) NaN without a reward
    index: NDArray[np.intp]  # (N,) 0 .. G - 1
    scored: NDArray[np.bool_]  # (N,)
    counts: NDArray[np.intp]  # (G,) members with a reward
    above_least: NDArray[np.float64]  # (N,) reward minus the least of its group; 0 without a reward
    whole: bool  # whether all have a reward: then nothing is picked out

    @classmethod
    def of(cls, rewards: Rewards, group_ids: ArrayLike) -> "Groups":
        """Groups of `rewards` (None or NaN where there is none) by `group_ids` (any integers, in any order).

        Raises:
            ValueError: unequal numbers of both, or a reward that is infinite.
        """
        values = np.array(rewards, dtype=np.float64).reshape(-1)
        ids = np.asarray(group_ids).reshape(-1)
        if values.shape != ids.shape:
            raise ValueError(f"{values.size} rewards came with {ids.size} group ids; give one a rollout")
        scored = np.isfinite(values)
        whole = bool(scored.all())
        if not whole and np.isinf(values).any():
            at = int(np.argmax(np.isinf(values)))
            raise ValueError(f"reward {at} is {values[at]}; rewards are finite, or None where there is none")
        index, number = _index_of(ids)
        counts = np.bincount(index if whole else index[scored], minlength=number)
        least = np.full(counts.size, np.inf)
        if whole:
            np.minimum.at(least, index, values)
            return cls(values, index, scored, counts, values - least[index], whole)
        np.minimum.at(least, index[scored], values[scored])
        above = np.zeros_like(values)
        above[scored] = values[scored] - least[index[scored]]
        return cls(values, index, scored, counts, above, whole)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G,) sums of `values` (N,) over the members with a reward."""
        if self.whole:
            return np.bincount(self.index, weights=values, minlength=self.counts.size).astype(np.float64, copy=False)
        return np.bincount(self.index[self.scored], weights=values[self.scored], minlength=self.counts.size).astype(np.float64)

    def centred(self, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """(N,) reward minus the group's mean, by `weights` (N,) where given; 0 without a reward."""
        if weights is None:
            means = self.sums(self.above_least) / np.maximum(self.counts, 1)
        else:
            total = self.sums(weights)
            means = np.divide(self.sums(weights * self.above_least), total, out=np.zeros_like(total), where=total > 0)
        centred: NDArray[np.float64] = self.above_least - means[self.index]
        return centred if self.whole else np.where(self.scored, centred, 0.0)

    def std(self, centred: NDArray[np.float64], ddof: int) -> NDArray[np.float64]:
        """(N,) standard deviation of each member's group, from what `centred()` gave; 0 for a group of one."""
        stds: NDArray[np.float64] = np.sqrt(self.sums(centred**2) / np.maximum(self.counts - ddof, 1))
        return stds[self.index]

    def batch_std(self, ddof: int) -> NDArray[np.float64]:
        """(N,) standard deviation of all rewards, the same everywhere; 0 for a batch of one."""
        known = self.values[self.scored]
        return np.full(self.values.shape, np.std(known, ddof=ddof) if known.size > ddof else 0.0)

    @cached_property
    def zero_variance(self) -> float:
        """The fraction of groups whose rewards are all equal, of those that have a reward. 0 if none has."""
        largest = np.zeros(self.counts.size)
        np.maximum.at(largest, self.index, self.above_least)
        known = self.counts > 0
        return float(np.mean(largest[known] == 0)) if known.any() else 0.0


def _index_of(ids: NDArray[Any]) -> tuple[NDArray[np.intp], int]:
    """(N,) 0 .. G - 1 in the order of the ids, and G. A batch mostly comes group after group; then nothing is sorted."""
    if ids.size and ids.dtype.kind in "iu" and bool((ids[1:] >= ids[:-1]).all()):
        index = np.zeros(ids.size, np.intp)
        np.cumsum(ids[1:] != ids[:-1], out=index[1:])
        return index, int(index[-1]) + 1
    unique, index = np.unique(ids, return_inverse=True)
    return index, unique.size


def divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, 0 where the numerator is 0: where nothing varies it is exactly that, and the denominator may be 0 too."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape, np.float64), where=numerator != 0)
