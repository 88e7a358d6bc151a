"""`CorrectedGRPOTrainer`: TRL's importance sampling correction for completions of a `rollout_func`."""

import inspect
import math
from typing import Any

import torch
from trl import GRPOTrainer
from trl.trainer.utils import selective_log_softmax

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class CorrectedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` that weighs each token by how much likelier the trainer makes it than the policy that sampled it did.

    TRL does so for completions of its own vLLM only, and ignores the `logprobs` of a `rollout_func`. Here they are used the same
    way, and as the same arguments say: `vllm_importance_sampling_correction`, `..._mode`, `..._clip_min` and `..._clip_max`. The weight
    multiplies the advantage of each token, which gives TRL's own loss. It costs one forward pass without gradients a micro-batch.

    Raises:
        ValueError: a loss that the weight cannot reach this way ("vespo", and Liger's).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.loss_type == "vespo" or getattr(self, "use_liger_kernel", False):
            raise ValueError(
                f"loss_type={self.loss_type!r} or Liger's loss: these have one weight a sequence inside; take "
                "another loss_type without Liger"
            )

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of the weighted advantages."""
        if not self.use_vllm and self.args.vllm_importance_sampling_correction and inputs.get("sampling_per_token_logps") is not None:
            inputs = {**inputs, "advantages": self.weighted_advantages(model, inputs)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def weighted_advantages(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, T) the advantage of each completion times the weight of each of its tokens."""
        mask = inputs["completion_mask"] if "tool_mask" not in inputs else inputs["completion_mask"] * inputs["tool_mask"]
        before = inputs.get("old_per_token_logps")
        if before is None:  # of weights that have not changed since the generation: the present ones
            before = logprobs_of(model, inputs, self.temperature)
        args = self.args
        weights = importance_weights(
            before,
            inputs["sampling_per_token_logps"],
            mask,
            mode=args.vllm_importance_sampling_mode,
            clip_min=getattr(args, "vllm_importance_sampling_clip_min", None),
            clip_max=args.vllm_importance_sampling_clip_max,
        )
        advantages: torch.Tensor = inputs["advantages"]
        return (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages) * weights


def importance_weights(
    logprobs: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor, *, mode: str, clip_min: float | None, clip_max: float | None
) -> torch.Tensor:
    """(B, T), or (B, 1) for a whole sequence: exp(logprobs - sampled), brought to the bounds (truncate) or 0 beyond them (mask).

    Args:
        logprobs: (B, T) the trainer's, when the completions were made.
        sampled: (B, T) those they were sampled with.
        mask: (B, T) 1 where trained.
        mode: one of `MODES`.
        clip_min: the lower bound; None is none.
        clip_max: the upper one.
    """
    if mode not in MODES:
        raise ValueError(f"unknown vllm_importance_sampling_mode={mode!r}; known are {MODES}")
    level, beyond = mode.split("_")
    difference = (logprobs - sampled) * mask
    ratio = (difference.sum(-1, keepdim=True) if level == "sequence" else difference).exp()
    if beyond == "truncate":
        return ratio if clip_min is None and clip_max is None else ratio.clamp(min=clip_min, max=clip_max)
    low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def logprobs_of(model: Any, inputs: dict[str, Any], temperature: float) -> torch.Tensor:
    """(B, T) log-probabilities of the completions' tokens under `model`."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    n = inputs["completion_ids"].size(1)
    known = inspect.signature(getattr(model, "module", model).forward).parameters
    few = {"logits_to_keep": n + 1} if "logits_to_keep" in known else {}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **few).logits
    picked: torch.Tensor = selective_log_softmax(logits[:, -n - 1 : -1] / temperature, inputs["completion_ids"])
    return picked
