"""The best of k: how likely k tries are to hold a right one, and what each member adds to that.

Both are exact expectations over all subsets of k members, from the order of rewards and binomial coefficients; nothing is sampled.
"""

from functools import lru_cache
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from producer.experience.groups import Groups, Rewards


def pass_rate_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k tries is right, when `correct` of n were (Chen et al. 2021, Codex, eq. 1)."""
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, correct={correct}, k={k}: correct must be 0 to n, and k 1 to n")
    return 1 - comb(n - correct, k) / comb(n, k)


def pass_at_k(rewards: Rewards, group_ids: ArrayLike, k: int = 4) -> NDArray[np.float64]:
    """(E[best | member is among the k] - E[best]) / std[best], over all subsets of k members.

    For rewards of 0 and 1 this is the closed form of pass@k training (Chen et al. 2025, arXiv 2508.10751); for others
    it is the same expectation, and for k = 1 it is GRPO with the population's deviation. A group of k scored members
    or fewer has but one subset, or none, and gets 0.
    """
    if k < 1:
        raise ValueError(f"k={k}; the best is taken of 1 or more")
    groups = Groups.of(rewards, group_ids)
    advantages = np.zeros(groups.values.size)
    for members in groups.places.members(groups.values.size):
        if members.size > k:
            advantages[members] = _of_group(groups.differences[members], k)
    return groups.placed(advantages)


def _of_group(values: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    order = np.argsort(values, kind="stable")
    # No subset's best is below the kth from the least. What is equal from there on is 0 exactly, and so is its deviation.
    ranked = np.maximum(values[order] - values[order][k - 1], 0.0)
    best, own, beaten = _weights(values.size, k)
    mean = ranked @ best
    std = np.sqrt(((ranked - mean) ** 2) @ best)
    # A member's own chance of being the best, and that of each better one in a subset that holds the member.
    better = np.append(np.cumsum((ranked * beaten)[::-1])[::-1][1:], 0.0)
    advantages = np.empty(values.size)
    advantages[order] = (ranked * own + better - mean) / std if ranked[-1] > 0 else 0.0
    return advantages


@lru_cache(maxsize=64)
def _weights(n: int, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """By rank, from the least: the chance of being the best of a subset; of one it is in; and of one that a given lesser one is in."""
    subsets, with_one = comb(n, k), comb(n - 1, k - 1)
    best = np.array([comb(rank, k - 1) / subsets for rank in range(n)])
    own = np.array([comb(rank, k - 1) / with_one for rank in range(n)])
    beaten = np.array([comb(rank - 1, k - 2) / with_one if k > 1 and rank > 0 else 0.0 for rank in range(n)])
    return best, own, beaten
