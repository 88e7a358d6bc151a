"""The clipped loss of a policy's tokens, what clipping takes off, and which tokens are uncertain enough to learn from.

Written with operators and methods that numpy arrays and torch tensors share, so both do, and torch's gradients pass through.
"""

from typing import Any

import numpy as np

from producer.experience.off_policy import LARGEST_LOG


def policy_loss(logprobs: Any, old_logprobs: Any, advantages: Any, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Any:
    """The loss of each token: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logprobs - old_logprobs).

    A ratio is at most e^80, beyond which float32 soon has no room.

    Schulman et al. 2017 (PPO, eq. 7), with the two bounds of Yu et al. 2025 (DAPO); the same bound twice is PPO's. Reduce it with
    `Experience.shift_weights` or `reduce_loss`.
    """
    _check(clip_low, clip_high)
    ratio = _ratio(logprobs, old_logprobs)
    loss, bounded = -(ratio * advantages), -(ratio.clip(1 - clip_low, 1 + clip_high) * advantages)
    return loss.clip(bounded, None)


def clipped(logprobs: Any, old_logprobs: Any, advantages: Any, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Any:
    """Of each token whether its bound holds, so that it has no gradient: counted on the ratio before it is clipped."""
    _check(clip_low, clip_high)
    ratio = _ratio(logprobs, old_logprobs)
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def high_entropy(entropies: Any, mask: Any, top: float = 0.2) -> Any:
    """Which of the masked tokens are among the `top` share with the highest entropies (Wang et al. 2025, arXiv 2506.01939).

    The bound is the quantile over the masked tokens of what is given: give the whole batch, or its ranks differ.

    Raises:
        ValueError: `top` is not above 0 and at most 1, or no token is masked.
    """
    if not 0 < top <= 1:
        raise ValueError(f"top={top} is the share of tokens to keep; it must be above 0 and at most 1")
    chosen = mask != 0
    known = entropies[chosen]
    if hasattr(known, "detach"):
        known = known.detach().float().cpu().numpy()
    if known.size == 0:
        raise ValueError("no token is masked, so none has the highest entropy; leave such a batch out")
    return chosen & (entropies >= float(np.quantile(known, 1 - top)))


def _ratio(logprobs: Any, old_logprobs: Any) -> Any:
    difference = (logprobs - old_logprobs).clip(None, LARGEST_LOG)  # infinity times an advantage of 0 is NaN
    return np.exp(difference) if isinstance(difference, np.ndarray | np.floating) else difference.exp()


def _check(clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and 0 <= clip_high < float("inf")):
        raise ValueError(f"clip_low={clip_low} must be 0 to 1, and clip_high={clip_high} 0 or more and finite")
