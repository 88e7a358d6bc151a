"""Rewards by group: the sums, means and deviations that every estimator with a baseline is made of, for ragged groups.

Means are taken of the differences to one reward of each group. These are exactly 0 where all rewards are equal, in any
precision, while the mean of equal numbers need not be that number; and a constant added to all rewards is gone before anything is summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Rewards = Sequence[float | None] | NDArray[np.floating]


@dataclass(slots=True)
class Groups:
    """The n rollouts that have a reward, of N, in their G groups. The others take no part in anything; `placed` gives them 0."""

    values: Array  # (n,)
    places: "_Even | _Anywhere"
    differences: Array  # (n,) to one reward of the group
    scored: NDArray[np.bool_] | None  # (N,) which they are; None where they are all

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
        if scored.all():
            places = _places(ids)
            return cls(values, places, places.differences(values), None)
        if np.isinf(values).any():
            at = int(np.argmax(np.isinf(values)))
            raise ValueError(f"reward {at} is {values[at]}; rewards are finite, or None where there is none")
        known, places = values[scored], _places(ids[scored])
        return cls(known, places, places.differences(known), scored)

    def chosen(self, of_rollouts: NDArray[Any]) -> NDArray[Any]:
        """(n,) what is of the rollouts that have a reward."""
        return of_rollouts if self.scored is None else of_rollouts[self.scored]

    def placed(self, values: Array) -> Array:
        """(N,) what was computed, 0 for a rollout without a reward."""
        if self.scored is None:
            return values
        every = np.zeros(self.scored.size)
        every[self.scored] = values
        return every

    def centred(self) -> Array:
        """(n,) reward minus the group's mean."""
        places = self.places
        return self.differences - places.spread(places.sums(self.differences) / places.sizes)

    def centred_by(self, weights: Array) -> Array:
        """(n,) reward minus the group's mean by `weights` (n,), or its plain mean where all of them are 0."""
        places = self.places
        given = np.where(places.spread(places.sums(weights)) > 0, weights, 1.0)
        return self.differences - places.spread(places.sums(given * self.differences) / places.sums(given))

    def std(self, centred: Array, ddof: int) -> Array:
        """(n,) standard deviation of each member's group, from what `centred()` gave; 0 for a group of one."""
        places = self.places
        return places.spread(np.sqrt(places.sums(centred * centred) / np.maximum(places.sizes - ddof, 1)))

    def batch_std(self, ddof: int) -> float:
        """Standard deviation of all rewards; 0 for a batch of one."""
        return float(np.std(self.values, ddof=ddof)) if self.values.size > ddof else 0.0

    def unbiased(self, centred: Array) -> Array:
        """(n,) what `centred()` gave times size / (size - 1), which is reward minus the mean of the others; 0 for a group of one."""
        return self.places.scaled(centred, self.places.sizes / np.maximum(self.places.sizes - 1, 1))

    @property
    def zero_variance(self) -> float:
        """The fraction of groups whose rewards are all equal, of those that have a reward. 0 if none has."""
        return float(np.mean(self.places.sums(np.abs(self.differences)) == 0)) if self.values.size else 0.0


@dataclass(slots=True)
class _Even:
    """Groups of one size, one behind the other, as a batch mostly has them: rows of a table."""

    sizes: int

    def differences(self, values: Array) -> Array:
        """(n,) to the first of the group."""
        table = values.reshape(-1, self.sizes)
        return (table - table[:, :1]).reshape(-1)

    def sums(self, values: Array) -> Array:
        """(G,) over the members of each group."""
        return np.add.reduceat(values, np.arange(0, values.size, self.sizes))

    def spread(self, of_groups: Array) -> Array:
        """(n,) what is of its group, at each member."""
        return np.repeat(of_groups, self.sizes)

    def scaled(self, values: Array, factor: Any) -> Array:
        """(n,) times the factor of the group, the same for all."""
        scaled: Array = values * factor
        return scaled

    def members(self, n: int) -> list[NDArray[np.intp]]:
        """Of each group the places of its members, of n."""
        return list(np.arange(n).reshape(-1, self.sizes))


@dataclass(slots=True)
class _Anywhere:
    """Groups of any sizes, whose members lie in any order."""

    index: NDArray[np.intp]  # (n,) 0 .. G - 1
    sizes: NDArray[np.intp]  # (G,)

    def differences(self, values: Array) -> Array:
        """(n,) to one reward of the group."""
        reference = np.empty(self.sizes.size)
        reference[self.index] = values
        return values - reference[self.index]

    def sums(self, values: Array) -> Array:
        """(G,) over the members of each group."""
        return np.bincount(self.index, weights=values, minlength=self.sizes.size).astype(np.float64, copy=False)

    def spread(self, of_groups: Array) -> Array:
        """(n,) what is of its group, at each member."""
        return of_groups[self.index]

    def scaled(self, values: Array, factor: Any) -> Array:
        """(n,) times the factor of each one's group."""
        scaled: Array = values * factor[self.index]
        return scaled

    def members(self, n: int) -> list[NDArray[np.intp]]:
        """Of each group the places of its members, of n."""
        return np.split(np.argsort(self.index, kind="stable"), np.cumsum(self.sizes)[:-1]) if n else []


def _places(ids: NDArray[Any]) -> _Even | _Anywhere:
    """Where the members of each group lie."""
    size = _even_size(ids)
    if size:
        return _Even(size)
    if ids.dtype.kind in "iu" and (ids[1:] >= ids[:-1]).all():  # in order, so that nothing need be sorted
        index = np.zeros(ids.size, np.intp)
        np.cumsum(ids[1:] != ids[:-1], out=index[1:])
        return _Anywhere(index, np.bincount(index))
    _, index, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    return _Anywhere(index, sizes)


def _even_size(ids: NDArray[Any]) -> int:
    """The size of all groups, where it is one and they lie one behind the other in the order of their ids; else 0."""
    if ids.size == 0 or ids.dtype.kind not in "iu":
        return 0
    size = int(ids.searchsorted(ids[0], "right"))  # of the first, if they are in order
    if size == 0 or ids.size % size:
        return 0
    table = ids.reshape(-1, size)
    return size if (table == table[:, :1]).all() and (table[1:, 0] > table[:-1, 0]).all() else 0


def divide(numerator: Array, denominator: "Array | float") -> Array:
    """The quotient, 0 where the numerator is 0: where nothing varies it is exactly that, and the denominator may be 0 too."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape, np.float64), where=numerator != 0)
