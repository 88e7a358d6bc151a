"""From groups to the `RolloutSample`s that TRL's asynchronous trainer takes: one a rollout, each with its advantage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from buffer import RolloutGroup, RolloutState
from buffer.rows import drawn_messages
from producer.errors import ProducerError
from producer.experience import AdvantageConfig, Experience, make_experience


def check_config(config: AdvantageConfig) -> AdvantageConfig:
    """`config`, if a sample can carry what it gives.

    Raises:
        ValueError: an advantage of each token, or something attached.
    """
    if config.spec.kind != "group" or config.kl is not None:
        raise ValueError(
            f"estimator={config.estimator!r}, kl={config.kl}: a RolloutSample has one advantage and no reference; "
            "take an estimator of groups without a divergence, such as preset('trl_async', 'grpo')"
        )
    return config


def samples(groups: Sequence[RolloutGroup], config: AdvantageConfig, engine_version: int, model_version: int) -> list[RolloutSample]:
    """One sample for each rollout, in order; one that cannot be trained on has mask 0 throughout, so that counts stay what they are.

    Args:
        groups: of one batch.
        config: how advantages are made.
        engine_version: of the weights now.
        model_version: TRL's name for the same weights.

    Raises:
        ValueError: none of them can be trained on.
    """
    experience = make_experience(groups, advantage=config)
    advantages = _advantages(experience)
    return [
        _sample(group, rollout, advantages.get(rollout.rollout_id), model_version - (group.staleness(engine_version) or 0))
        for group in groups
        for rollout in group.rollouts
    ]


def _advantages(experience: Experience) -> dict[str, float]:
    """By rollout, of those that are trained on."""
    values, masks = experience.layout.unplace(experience.advantages), experience.layout.unplace(experience.loss_mask)
    return {name: float(value[mask][0]) for name, value, mask in zip(experience.rollout_ids, values, masks, strict=True)}


def _sample(group: RolloutGroup, rollout: RolloutState, advantage: float | None, model_version: int) -> RolloutSample:
    prompt = np.empty(0, np.int32) if rollout.prompt_ids is None else rollout.prompt_ids
    if prompt.size == 0:
        raise ProducerError(f"rollout {rollout.rollout_id} has no prompt_ids; the agent loop must set them")
    mask = rollout.loss_mask if advantage is not None else np.zeros_like(rollout.loss_mask)
    return RolloutSample(
        prompt=drawn_messages(rollout.row, rollout.messages) or [{"role": "user", "content": rollout.prompt or ""}],
        completion=[{"role": "assistant", "content": rollout.text or ""}],
        input_ids=np.concatenate([prompt, rollout.response_ids]).astype(np.int64),
        completion_mask=np.concatenate([np.zeros(prompt.size, np.int64), mask]),
        old_log_probs=np.concatenate([np.zeros(prompt.size, np.float32), np.where(mask == 1, rollout.logprobs, np.float32(0))]),
        advantage=0.0 if advantage is None else advantage,
        model_version=model_version,
        group_id=group.group_id,
        metrics=_metrics(group, rollout),
    )


def _metrics(group: RolloutGroup, rollout: RolloutState) -> dict[str, float]:
    """Of one name for all: the collator takes the names from the first sample."""
    known = [one.reward for one in group.rollouts if one.reward is not None and np.isfinite(one.reward)]
    return {
        "reward": _number(rollout.reward),
        "reward_std": float(np.std(known)) if known else float("nan"),
        **{f"rewards/{name}": _number(part) for name, part in sorted(rollout.reward_parts.items())},
    }


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
