"""Whether a trainer and its rollouts fit each other: what TRL would not notice, and would train on all the same."""

import warnings
from typing import Any, Literal

from agent_loop import SamplingParams
from producer.experience.behaviour import bias_of
from producer.integrations.trl.corrected import CorrectedGRPOTrainer

Correction = Literal["required", "off"]


def check_trainer(trainer: Any, sampling: SamplingParams, correction: Correction) -> None:
    """Raise where `trainer` would train on something else than it believes.

    Raises:
        ValueError: with what to change.
    """
    if (processes := trainer.accelerator.num_processes) > 1:
        raise ValueError(
            f"{processes} processes would share one database and one engine; a rollout_func here is for one, use AsyncRollouts"
        )
    if getattr(trainer, "tools", None):
        raise ValueError(
            "TRL would run its tools on completions that the agent loop made; leave tools out, and let the agent loop use them"
        )
    _check_sampling(trainer, sampling)
    _check_checkpoints(trainer.args)
    if correction == "required":
        _check_correction(trainer)


def _check_sampling(trainer: Any, sampling: SamplingParams) -> None:
    if sampling.temperature != trainer.temperature:
        raise ValueError(
            f"the agent loop samples at temperature={sampling.temperature} and the trainer divides its logits by {trainer.temperature}; "
            "give both the same"
        )
    if sampling.max_tokens > trainer.max_completion_length:
        raise ValueError(
            f"max_tokens={sampling.max_tokens} of the agent loop is over max_completion_length={trainer.max_completion_length}, which "
            "TRL does not enforce and some losses divide by; lower the one or raise the other"
        )
    if reason := bias_of(sampling, trainer.temperature):
        warnings.warn(
            f"the agent loop samples with {reason}: log-probabilities are of what that leaves, the trainer's of the whole vocabulary, "
            "so that importance ratios are biased",
            stacklevel=2,
        )


def _check_checkpoints(args: Any) -> None:
    """A checkpoint amid the steps that share one generation would have its completions made, and trained on, a second time."""
    every = args.steps_per_generation * args.num_iterations
    save_steps = args.save_steps if str(args.save_strategy) in ("steps", "SaveStrategy.STEPS") else None
    if save_steps is not None and save_steps >= 1 and (save_steps * args.gradient_accumulation_steps) % every:
        raise ValueError(
            f"save_steps={save_steps} of {args.gradient_accumulation_steps} micro-batches does not fall on the end of a generation, which "
            f"is trained on for {every} (steps_per_generation * num_iterations); make it a multiple"
        )


def _check_correction(trainer: Any) -> None:
    corrects = trainer.use_vllm or isinstance(trainer, CorrectedGRPOTrainer)
    if not (corrects and trainer.args.vllm_importance_sampling_correction):
        raise ValueError(
            "this trainer ignores the log-probabilities with which the completions were sampled, and takes them for its own; use "
            "CorrectedGRPOTrainer with vllm_importance_sampling_correction=True, or say correction='off'"
        )
