"""Advantages of a group's members over each other: one number a rollout, from flat rewards and group ids.

Every estimator takes `rewards` (one a rollout; None or NaN where there is none) and `group_ids` (same length, any integers, in any
order), and gives float64 of that length. Rollouts without a reward get 0 and take no part in any baseline. A group whose
rewards are all equal gets exactly 0, and so does the single scored member of a group.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from producer.experience.groups import Groups, Rewards, divide

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
    _check(ddof, eps)
    groups = Groups.of(rewards, group_ids)
    centred = groups.centred()
    if scale == "none":
        return groups.placed(centred)
    return groups.placed(divide(centred, (groups.std(centred, ddof) if scale == "group" else groups.batch_std(ddof)) + eps))


def dr_grpo(rewards: Rewards, group_ids: ArrayLike) -> NDArray[np.float64]:
    """r - mean of the group, unscaled (Liu et al. 2025, "Understanding R1-Zero-Like Training"); its loss reduction is "dr_grpo"."""
    return grpo(rewards, group_ids, scale="none")


def rloo(rewards: Rewards, group_ids: ArrayLike) -> NDArray[np.float64]:
    """r - mean of the others: REINFORCE leave-one-out (Ahmadian et al. 2024), which is n / (n - 1) times (r - mean)."""
    groups = Groups.of(rewards, group_ids)
    return groups.placed(groups.unbiased(groups.centred()))


def opo(rewards: Rewards, group_ids: ArrayLike, lengths: ArrayLike) -> NDArray[np.float64]:
    """r - the group's mean weighted by length: on-policy optimal baseline (Hao et al. 2025, arXiv 2505.23585).

    Args:
        lengths: trained tokens of each rollout. A group without any is compared with its plain mean.
    """
    weights = np.asarray(lengths, dtype=np.float64).reshape(-1)
    groups, n = Groups.of(rewards, group_ids), np.size(group_ids)
    if weights.shape != (n,) or not ((weights >= 0) & (weights < np.inf)).all():
        raise ValueError(f"lengths {weights!r:.100} for {n} rewards; give each rollout its length, finite and 0 or more")
    return groups.placed(groups.centred_by(groups.chosen(weights)))


def gdpo(
    parts: ArrayLike, group_ids: ArrayLike, weights: ArrayLike | None = None, *, ddof: int = 1, eps: float = 1e-4
) -> NDArray[np.float64]:
    """Each part of the reward is normalised within its group, they are added up, and the sum is scaled by its deviation over the batch.

    Group reward-decoupled normalisation (Liu et al. 2026, arXiv 2601.05242); TRL's `normalize_then_sum`. The sum's mean
    over the batch is 0 already, and is not taken off again: its rounding would move groups whose parts are all equal.

    Args:
        parts: (N, K), NaN where a rollout lacks a part, which then adds nothing. A rollout without any part gets 0.
        weights: (K,), of the normalised parts; 1 each if not given.
    """
    _check(ddof, eps)
    table = np.asarray(parts, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0:
        raise ValueError(f"parts of shape {table.shape}; give one column a part, at least one")
    by_part = np.ones(table.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    if by_part.shape != table.shape[1:] or not np.isfinite(by_part).all():
        raise ValueError(f"weights {by_part!r:.100} for {table.shape[1]} parts; give each a finite weight")
    columns = [grpo(column, group_ids, ddof=ddof, eps=eps) for column in table.T]
    total = np.stack(columns, axis=1) @ by_part
    scored = ~np.isnan(table).all(axis=1)
    n = int(scored.sum())
    std = float(np.std(total[scored], ddof=ddof)) if n > ddof else 0.0
    return divide(total, std + eps)


def zero_variance(rewards: Rewards, group_ids: ArrayLike) -> float:
    """The fraction of groups whose rewards are all equal, and which thus teach nothing; of those that have a reward. 0 if none has."""
    return Groups.of(rewards, group_ids).zero_variance


def _check(ddof: int, eps: float) -> None:
    if ddof not in (0, 1) or not eps >= 0:
        raise ValueError(f"ddof={ddof} must be 0 or 1, and eps={eps} 0 or more")
