"""`make_experience`: from finished groups to arrays that a training step takes as they are."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from buffer.rollout import RolloutGroup, RolloutState
from producer.experience.advantages import AdvantageFn, estimator, zero_variance
from producer.experience.losses import Reduction, token_weights
from producer.experience.packing import IGNORED_LABEL, Layout

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
        rewards: (S,) float64.
        group_ids: (S,) int64.
        rollout_ids: S names.
        metrics: flat, finite numbers for a tracker.
        layout: rows, lengths, cu_seqlens, seq_idx; `layout.unplace(array)` gives any (N, T) array back by sequence.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64] | None
    position_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    versions: NDArray[np.int32]
    rewards: NDArray[np.float64]
    group_ids: NDArray[np.int64]
    rollout_ids: tuple[str, ...]
    metrics: dict[str, float]
    layout: Layout

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

    def shift_weights(self, reduction: Reduction = "token-mean", *, max_length: int | None = None) -> NDArray[np.float64]:
        """(N, T) weights for which `(loss * weights).sum()` over all rows is the reduction; see `losses.token_weights`."""
        return token_weights(self.shift_mask, self.layout.sequence, reduction, max_length=max_length)

    def to_torch(self, device: "torch.device | str | None" = None) -> "dict[str, torch.Tensor]":
        """The (N, T) arrays and their shifted forms by name, as tensors on `device`; a micro-batch is the same rows of each."""
        from producer.experience.tensors import to_torch

        return to_torch(self, device)


def make_experience(
    groups: Sequence[RolloutGroup], *, advantage: str | AdvantageFn = "grpo", token_budget: int | None = None, pad_id: int = 0
) -> Experience:
    """Arrays to train on from finished groups.

    Args:
        groups: as `ReplayBuffer.take` and `produce_batch` give them; of any sizes.
        advantage: "grpo", "drgrpo", "rloo", or a function of (rewards with NaN where there is none, group numbers) giving one
            finite number a rollout.
        token_budget: the most tokens of a row, prompts included: sequences are packed. None: one sequence a row, padded on the right.
        pad_id: fills `input_ids` where there is no token.

    A rollout that cannot be trained on is left out, and counted in `metrics` as "left_out/<reason>": "failed" (see
    `RolloutState.left_out`), "no_reward", "no_prompt_ids", "no_response", "no_trained_token". Its reward, if it has one, still
    counts in its group's baseline: it was sampled all the same.

    Raises:
        ValueError: nothing is left to train on, or a sequence is longer than the budget.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = np.array([_reward(rollout) for rollout in rollouts], np.float64)
    numbers = np.repeat(np.arange(len(groups)), [len(group.rollouts) for group in groups])
    advantages = _finite(estimator(advantage)(rewards, numbers), len(rollouts))
    reasons = [_why_left_out(rollout) for rollout in rollouts]
    kept = [at for at, reason in enumerate(reasons) if reason is None]
    left_out = Counter(reason for reason in reasons if reason is not None)
    if not kept:
        raise ValueError(f"none of {len(rollouts)} rollouts in {len(groups)} groups can be trained on: {dict(left_out)}")
    chosen = [rollouts[at] for at in kept]
    lengths = [_prompt(rollout).size + rollout.response_ids.size for rollout in chosen]
    if token_budget is not None and max(lengths) > token_budget:
        longest = int(np.argmax(lengths))
        raise ValueError(
            f"rollout {chosen[longest].rollout_id} has {lengths[longest]} tokens, over token_budget={token_budget}; "
            "raise the budget or allow shorter responses"
        )
    layout = Layout.padded(lengths) if token_budget is None else Layout.packed(lengths, token_budget)
    metrics = _metrics(rollouts, rewards, numbers, left_out) | _size_metrics(chosen, layout)
    return _assemble(chosen, rewards[kept], advantages[kept], layout, metrics, pad_id=pad_id, packed=token_budget is not None)


def _assemble(
    rollouts: Sequence[RolloutState],
    rewards: NDArray[np.float64],
    advantages: NDArray[np.float64],
    layout: Layout,
    metrics: dict[str, float],
    *,
    pad_id: int,
    packed: bool,
) -> Experience:
    masks = [np.concatenate([np.zeros(_prompt(rollout).size, np.bool_), rollout.loss_mask == 1]) for rollout in rollouts]

    def response(values: Sequence[NDArray[Any]], outside: float, dtype: type[np.generic]) -> NDArray[Any]:
        """Values of the response's tokens at their places; `outside` the mask whatever they were: an unmasked logprob may be NaN."""
        whole = []
        for value, mask in zip(values, masks, strict=True):
            whole.append(np.full(mask.size, outside, dtype))
            whole[-1][mask] = value[mask[mask.size - value.size :]]
        return layout.place(whole, fill=outside, dtype=dtype)

    spread = [np.full(rollout.response_ids.size, value) for rollout, value in zip(rollouts, advantages, strict=True)]
    return Experience(
        input_ids=layout.place([np.concatenate([_prompt(one), one.response_ids]) for one in rollouts], fill=pad_id, dtype=np.int64),
        attention_mask=None if packed else (layout.seq_idx >= 0).astype(np.int64),
        position_ids=layout.position_ids,
        loss_mask=layout.place(masks, fill=False, dtype=np.bool_),
        logprobs=response([one.logprobs for one in rollouts], 0.0, np.float32),
        advantages=response(spread, 0.0, np.float32),
        versions=response([one.versions for one in rollouts], NO_VERSION, np.int32),
        rewards=rewards,
        group_ids=np.array([rollout.group_id for rollout in rollouts], np.int64),
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        metrics=metrics,
        layout=layout,
    )


def _reward(rollout: RolloutState) -> float:
    return float("nan") if rollout.reward is None or not np.isfinite(rollout.reward) else float(rollout.reward)


def _prompt(rollout: RolloutState) -> NDArray[np.int32]:
    return np.empty(0, np.int32) if rollout.prompt_ids is None else rollout.prompt_ids


def _why_left_out(rollout: RolloutState) -> str | None:
    if rollout.left_out:
        return "failed"
    if np.isnan(_reward(rollout)):
        return "no_reward"
    if _prompt(rollout).size == 0:
        return "no_prompt_ids"
    if rollout.response_ids.size == 0:
        return "no_response"
    return None if (rollout.loss_mask == 1).any() else "no_trained_token"


def _finite(advantages: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    values = np.asarray(advantages, np.float64)
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ValueError(f"the advantage function gave {values!r:.200}; it must give {count} finite numbers, 0 where there is no reward")
    return values


def _metrics(
    rollouts: Sequence[RolloutState], rewards: NDArray[np.float64], numbers: NDArray[np.intp], left_out: Counter[str]
) -> dict[str, float]:
    known = rewards[~np.isnan(rewards)]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None and np.isfinite(rollout.score)]
    metrics = {"reward/mean": float(known.mean()), "reward/std": float(known.std())}
    if scores:
        metrics["score/mean"] = float(np.mean(scores))
    metrics["groups/zero_variance"] = zero_variance(rewards, numbers)
    metrics["left_out/total"] = float(left_out.total())
    return metrics | {f"left_out/{reason}": float(count) for reason, count in sorted(left_out.items())}


def _size_metrics(chosen: Sequence[RolloutState], layout: Layout) -> dict[str, float]:
    """Of the rollouts that are trained on; response lengths count tokens of the environment too."""
    return {
        "rollouts": float(len(chosen)),
        "length/mean": float(np.mean([rollout.response_ids.size for rollout in chosen])),
        "length/max": float(max(rollout.response_ids.size for rollout in chosen)),
        "tokens/trained": float(sum(int((rollout.loss_mask == 1).sum()) for rollout in chosen)),
        "tokens/fill": sum(layout.lengths) / (len(layout.rows) * layout.width),
    }
