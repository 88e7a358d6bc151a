"""From a loss a token to one loss: the reductions in use, for padded arrays and for packed ones.

`reduce_loss` needs only operators, `sum` and `clip`, so torch tensors (with their gradients) and numpy arrays both do.
"""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "dr_grpo"]


def reduce_loss(loss: Any, mask: Any, reduction: Reduction = "token-mean", *, max_length: int | None = None) -> Any:
    """One number from `loss` (B, T) where `mask` (B, T) is 1; rows are sequences. A row without a masked token does not count.

    Args:
        reduction: "token-mean", the sum over all tokens by their number (Yu et al. 2025, DAPO);
            "seq-mean-token-mean", the mean over sequences of each one's mean (Shao et al. 2024, GRPO: long responses weigh less a token);
            "seq-mean-token-sum", the mean over sequences of each one's sum;
            "dr_grpo", that divided by the constant `max_length` (Liu et al. 2025), so that length has no part in a token's weight.
    """
    _check(reduction, max_length)
    sums, counts = (loss * mask).sum(-1), mask.sum(-1)
    sequences = (counts > 0).sum().clip(1)
    if reduction == "token-mean":
        return sums.sum() / counts.sum().clip(1)
    if reduction == "seq-mean-token-mean":
        return (sums / counts.clip(1)).sum() / sequences
    return sums.sum() / (sequences * (max_length if reduction == "dr_grpo" else 1))


def token_weights(
    mask: ArrayLike, sequence: ArrayLike, reduction: Reduction = "token-mean", *, max_length: int | None = None
) -> NDArray[np.float64]:
    """Weights for which `(loss * weights).sum()` is the reduction over the whole batch.

    Made once for a batch, they hold for any split of it: packed rows, micro-batches, ranks that add their gradients. A
    reduction of each part by itself, averaged, is another loss where the parts have unequal numbers of tokens.

    Args:
        mask: any shape, 1 where a token is trained on.
        sequence: same shape, the number of the sequence that each token belongs to; any value where the mask is 0.
    """
    _check(reduction, max_length)
    trained, owner = np.asarray(mask, dtype=np.float64), np.asarray(sequence)
    if trained.shape != owner.shape:
        raise ValueError(f"mask {trained.shape} and sequence {owner.shape} differ in shape; give each token the number of its sequence")
    _, index, counts = np.unique(owner[trained > 0], return_inverse=True, return_counts=True)
    weights = np.zeros(trained.shape)
    if reduction == "token-mean":
        weights[trained > 0] = 1 / max(counts.sum(), 1)
    elif reduction == "seq-mean-token-mean":
        weights[trained > 0] = 1 / (counts[index] * counts.size)
    else:
        weights[trained > 0] = 1 / (max(counts.size, 1) * ((max_length or 1) if reduction == "dr_grpo" else 1))
    return weights


def _check(reduction: str, max_length: int | None) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}; known are {get_args(Reduction)}")
    if (reduction == "dr_grpo") != (max_length is not None) or (max_length is not None and max_length < 1):
        raise ValueError(f"max_length={max_length} with {reduction!r}: 'dr_grpo' needs the longest response allowed, the others take none")
