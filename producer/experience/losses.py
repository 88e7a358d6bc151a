"""From a loss a token to one loss: the reductions in use, for padded arrays and for packed ones.

`reduce_loss` takes torch tensors, with their gradients, and numpy arrays.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import at_least, one_of
from agent_loop.sampling import whole

Reduction = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "dr_grpo", "seq-sum-norm"]
_BY_LENGTH = ("dr_grpo", "seq-sum-norm")


@dataclass(frozen=True)
class Totals:
    """What a batch is divided by: trained tokens, and sequences that have any. Those of all ranks add up to the global batch's."""

    tokens: int
    sequences: int

    def __post_init__(self) -> None:
        if at_least("sequences", self.sequences, 0) > at_least("tokens", self.tokens, 0):
            raise ValueError(f"tokens={self.tokens} and sequences={self.sequences}: each sequence that counts has one token or more")

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(self.tokens + other.tokens, self.sequences + other.sequences)

    @classmethod
    def of(cls, mask: ArrayLike, sequence: ArrayLike) -> "Totals":
        """Those of a batch; see `token_weights`."""
        trained, owner = _tokens(mask, sequence)
        return cls(int(trained.sum()), int(np.unique(owner[trained]).size))


def reduce_loss(loss: Any, mask: Any, reduction: Reduction = "token-mean", *, max_length: int | None = None) -> Any:
    """One number from `loss` (B, T) where `mask` (B, T) is 1; rows are sequences. A row without a masked token does not count.

    What lies outside the mask may be anything, NaN too.

    Args:
        reduction: "token-mean", the sum over all tokens by their number (Yu et al. 2025, DAPO);
            "seq-mean-token-mean", the mean over sequences of each one's mean (Shao et al. 2024, GRPO: long responses weigh less a token);
            "seq-mean-token-sum", the mean over sequences of each one's sum;
            "dr_grpo", that divided by the constant `max_length` (Liu et al. 2025), so that length has no part in a token's weight;
            "seq-sum-norm", the sum of all by `max_length`, whatever the number of sequences (verl's `seq-mean-token-sum-norm`).
    """
    check_reduction(reduction, max_length)
    inside = mask != 0
    known = np.where(inside, loss, 0.0) if isinstance(loss, np.ndarray) else loss.masked_fill(~inside, 0.0)
    sums, counts = (known * mask).sum(-1), mask.sum(-1)
    sequences = (counts > 0).sum().clip(1)
    if reduction == "token-mean":
        return sums.sum() / counts.sum().clip(1)
    if reduction == "seq-mean-token-mean":
        return (sums / counts.clip(1)).sum() / sequences
    return sums.sum() / ((1 if reduction == "seq-sum-norm" else sequences) * (max_length or 1))


def token_weights(
    mask: ArrayLike,
    sequence: ArrayLike,
    reduction: Reduction = "token-mean",
    *,
    max_length: int | None = None,
    totals: Totals | None = None,
) -> NDArray[np.float64]:
    """Weights for which `(loss * weights).sum()` is the reduction over the whole batch.

    Made once for a batch, they hold for any split of it: packed rows, micro-batches, ranks that add their gradients. A
    reduction of each part by itself, averaged, is another loss where the parts have unequal numbers of tokens.

    Args:
        mask: any shape, 1 where a token is trained on.
        sequence: same shape, the number of the sequence that each token belongs to; any value where the mask is 0.
        totals: of the global batch, where this is a rank's part of it; a sequence lies within one part. Gradients of ranks are
            then to be *added*: where they are averaged, as DDP does, multiply the loss by the number of ranks.

    Raises:
        ValueError: the totals are below those of this part.
    """
    check_reduction(reduction, max_length)
    trained, owner = _tokens(mask, sequence)
    _, index, counts = np.unique(owner[trained], return_inverse=True, return_counts=True)
    own = Totals(int(counts.sum()), counts.size)
    whole = own if totals is None else totals
    if whole.tokens < own.tokens or whole.sequences < own.sequences:
        raise ValueError(f"{whole} is less than this part alone, {own}; add up the totals of all ranks")
    weights = np.zeros(trained.shape)
    if reduction == "token-mean":
        weights[trained] = 1 / max(whole.tokens, 1)
    elif reduction == "seq-mean-token-mean":
        weights[trained] = 1 / (counts[index] * whole.sequences)
    else:
        weights[trained] = 1 / ((1 if reduction == "seq-sum-norm" else max(whole.sequences, 1)) * (max_length or 1))
    return weights


def _tokens(mask: ArrayLike, sequence: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    trained, owner = np.asarray(mask) != 0, np.asarray(sequence)
    if trained.shape != owner.shape:
        raise ValueError(f"mask {trained.shape} and sequence {owner.shape} differ in shape; give each token the number of its sequence")
    return trained, owner


def check_reduction(reduction: str, max_length: int | None) -> None:
    """Raises ValueError for a reduction that is none, or whose `max_length` is missing or too much."""
    one_of("reduction", reduction, get_args(Reduction))
    if (reduction in _BY_LENGTH) != (max_length is not None) or (max_length is not None and whole("max_length", max_length) < 1):
        raise ValueError(
            f"max_length={max_length} with {reduction!r}: 'dr_grpo' and 'seq-sum-norm' need the longest response, the others take none"
        )
