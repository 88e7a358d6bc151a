"""`Experience`: the arrays of one batch, as a training step takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from producer.experience.balancing import Cost
from producer.experience.losses import Reduction, Totals, token_weights
from producer.experience.packing import IGNORED_LABEL, Layout
from producer.experience.parts import part, split
from producer.experience.running import RunningMoments

if TYPE_CHECKING:
    import torch


NO_VERSION = -1
"""The version of tokens that are not trained on: of the prompt, of the environment, and padding."""


@dataclass(frozen=True, eq=False)
class Experience:
    """One batch to train on. S sequences (prompt + response) lie in N rows of T tokens; `layout` knows where.

    Padded, each row is a sequence. Packed, a row holds several, and is one micro-batch: give the model `position_ids`
    (and `layout.cu_seqlens(row)` where it takes that) and *no* attention mask, with which it would let sequences see each other;
    hence `attention_mask` is None then.

    Values a token stand where the token stands in `input_ids`. A model's logits at position t predict token t + 1, so a loss
    on logits takes the `shift_...` forms: `shift_mask[n, t]` is `loss_mask[n, t + 1]` within a sequence, and 0 at its last token.

    Attributes:
        input_ids: (N, T) int64.
        attention_mask: (N, T) int64, 0 where padded; None when packed.
        position_ids: (N, T) int64, from 0 in each sequence.
        loss_mask: (N, T) bool, true for trained tokens: those of the response whose own mask is 1.
        logprobs: (N, T) float32, of the policy that sampled the token; 0 outside the mask.
        advantages: (N, T) float32, the rollout's advantage on each trained token; 0 outside the mask.
        versions: (N, T) int32, of the policy that sampled the token; -1 outside the mask.
        reference_logprobs: (N, T) float32, of the reference policy; 0 outside the mask; None where none were attached.
        values: (N, T) float32, likewise, of the critic at the time of sampling.
        returns: (N, T) float32, what a critic learns: with estimators of the kind "tokens", else None.
        trainer_logprobs: (N, T) float32, of the policy that is trained, before the step; 0 outside the mask; None where none were attached.
        importance: (N, T) float32, the weight of each token's loss by its importance ratio, without a gradient; 0 outside the mask and
            where the token is masked; None without `off_policy`.
        rewards: (S,) float64, as shaped and clipped.
        group_ids: (S,) int64.
        rollout_ids: S names.
        metrics: flat, finite numbers for a tracker.
        running: the moments of the run's rewards with this batch, for the next one and for the checkpoint; None without `normalise`.
        layout: rows, lengths, cu_seqlens, seq_idx; `layout.unplace(array)` gives any (N, T) array back by sequence.
        media: S tuples, what a rollout's prompt shows beside its tokens, in their order; see `row_media`.
        pad_id: what fills `input_ids`.
        whole: the totals of the batch that this is a part of; None where it is all of it.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64] | None
    position_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    versions: NDArray[np.int32]
    reference_logprobs: NDArray[np.float32] | None
    values: NDArray[np.float32] | None
    returns: NDArray[np.float32] | None
    trainer_logprobs: NDArray[np.float32] | None
    importance: NDArray[np.float32] | None
    rewards: NDArray[np.float64]
    group_ids: NDArray[np.int64]
    rollout_ids: tuple[str, ...]
    metrics: dict[str, float]
    layout: Layout
    running: RunningMoments | None
    media: tuple[tuple[Any, ...], ...] = ()
    pad_id: int = 0
    whole: Totals | None = None

    @property
    def shift_labels(self) -> NDArray[np.int64]:
        """(N, T) the next token of the same sequence, -100 at its end and where padded; prompt tokens are not left out."""
        return self.layout.shift(self.input_ids, IGNORED_LABEL)

    @property
    def shift_mask(self) -> NDArray[np.bool_]:
        """(N, T) whether the logits here predict a trained token."""
        return self.layout.shift(self.loss_mask, False)

    @property
    def shift_logprobs(self) -> NDArray[np.float32]:
        """(N, T) `logprobs` of the token that the logits here predict."""
        return self.layout.shift(self.logprobs, 0.0)

    @property
    def shift_advantages(self) -> NDArray[np.float32]:
        """(N, T) `advantages` of the token that the logits here predict."""
        return self.layout.shift(self.advantages, 0.0)

    @property
    def shift_reference_logprobs(self) -> NDArray[np.float32] | None:
        """(N, T) `reference_logprobs` of the token that the logits here predict; None where there are none."""
        return None if self.reference_logprobs is None else self.layout.shift(self.reference_logprobs, 0.0)

    @property
    def shift_values(self) -> NDArray[np.float32] | None:
        """(N, T) `values` of the token that the logits here predict; None where there are none."""
        return None if self.values is None else self.layout.shift(self.values, 0.0)

    @property
    def shift_returns(self) -> NDArray[np.float32] | None:
        """(N, T) `returns` of the token that the logits here predict; None where there are none."""
        return None if self.returns is None else self.layout.shift(self.returns, 0.0)

    @property
    def shift_trainer_logprobs(self) -> NDArray[np.float32] | None:
        """(N, T) `trainer_logprobs` of the token that the logits here predict; None where there are none."""
        return None if self.trainer_logprobs is None else self.layout.shift(self.trainer_logprobs, 0.0)

    @property
    def shift_importance(self) -> NDArray[np.float32] | None:
        """(N, T) `importance` of the token that the logits here predict; None where there is none."""
        return None if self.importance is None else self.layout.shift(self.importance, 0.0)

    @property
    def totals(self) -> Totals:
        """Trained tokens and sequences that have any, to be added up over ranks that each have their own experience."""
        return Totals(int(self.loss_mask.sum()), sum(bool(mask.any()) for mask in self.layout.unplace(self.loss_mask)))

    def shift_weights(
        self, reduction: Reduction = "token-mean", *, max_length: int | None = None, totals: Totals | None = None
    ) -> NDArray[np.float64]:
        """(N, T) weights for which `(loss * weights).sum()` over all rows is the reduction; see `losses.token_weights`.

        Those of a part are of the whole batch: over all micro-batches and ranks the losses add up to the reduction, and the gradients
        to its gradient.
        """
        return token_weights(self.shift_mask, self.layout.sequence, reduction, max_length=max_length, totals=totals or self.whole)

    def row_media(self, row: int) -> tuple[Any, ...]:
        """What the prompts of a row show beside their tokens, in the order of its sequences."""
        return tuple(shown for number in self.layout.rows[row] if self.media for shown in self.media[number])

    def part(self, numbers: Sequence[int]) -> "Experience":
        """Some sequences as an experience of their own, which knows the totals of the whole; see `parts.part`."""
        return part(self, numbers)

    def split(
        self, ranks: int = 1, *, token_budget: int | None = None, micro_batches: int | None = None, cost: Cost | None = None
    ) -> "list[list[Experience]]":
        """`split[rank][micro_batch]`: all sequences over ranks and micro-batches of like cost, none split; see `balancing.balance`.

        A packed experience gives micro-batches of one row each, a padded one gives padded ones, each as wide as its longest sequence.
        """
        return split(self, ranks, token_budget, micro_batches, cost or Cost())

    def to_torch(
        self, device: "torch.device | str | None" = None, *, reduction: Reduction | None = None, max_length: int | None = None
    ) -> "dict[str, torch.Tensor]":
        """The (N, T) arrays and their shifted forms by name, as tensors on `device`; a micro-batch is the same rows of each.

        With a `reduction` also `shift_weights`, in float32.
        """
        from producer.experience.tensors import to_torch

        return to_torch(self, device, reduction, max_length)

    def varlen(self, row: int = 0, device: "torch.device | str | None" = None) -> dict[str, Any]:
        """Where a packed row's sequences lie, by the names under which models of transformers take it for flash-attention's kernels."""
        from producer.experience.tensors import varlen

        return varlen(self, row, device)
