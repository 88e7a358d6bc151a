"""What a rollout needs to be trained on: of itself, and of what the caller brings; and the reason where it lacks something."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import mapping, within
from agent_loop.sampling import whole
from buffer.rollout import RolloutState
from producer.experience.config import AdvantageConfig
from producer.experience.off_policy import OffPolicy
from producer.experience.usable import usable
from producer.members import is_surplus

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Attached:
    """What the caller knows of rollouts beside what is stored.

    Attributes:
        reference: by rollout_id, the reference policy's log-probability of each token of the response.
        values: by rollout_id, the critic's value of each token of the response.
        baselines: by group_id, the reward of the greedy response to the group's prompt, for "remax".
        trainer: by rollout_id, the log-probability of each token of the response by the policy that is trained, before the step.
        version: of the weights that gave `trainer`.
        temperature: at which these were taken; None where it is not known.
    """

    reference: Mapping[str, ArrayLike] = field(default_factory=dict)
    values: Mapping[str, ArrayLike] = field(default_factory=dict)
    baselines: Mapping[int, float] = field(default_factory=dict)
    trainer: Mapping[str, ArrayLike] = field(default_factory=dict)
    version: int | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name, key in (("reference", "rollout_id"), ("values", "rollout_id"), ("trainer", "rollout_id"), ("baselines", "group_id")):
            mapping(name, getattr(self, name), f"each {key} to what is attached")
        if self.version is not None:
            whole("version", self.version)
        if self.temperature is not None:
            within("temperature", self.temperature, 0, float("inf"))

    def check(self, config: AdvantageConfig, off_policy: OffPolicy | None = None) -> None:
        """Raises ValueError where the configuration or the correction needs what is not there at all."""
        for name in ("values", "baselines"):
            if config.spec.needs == name and not getattr(self, name):
                raise ValueError(f"estimator={config.estimator!r} needs {name}; attach them: Attached({name}=...)")
        if config.kl is not None and not self.reference:
            raise ValueError(f"{config.kl} needs log-probabilities of a reference; attach them: Attached(reference=...)")
        if off_policy is None:
            return
        if off_policy.needs_trainer and not self.trainer:
            raise ValueError(
                f"{off_policy} needs log-probabilities by the policy that is trained; attach them: Attached(trainer=...), "
                "or let a Scorer do it"
            )
        if off_policy.max_staleness is not None and self.version is None:
            raise ValueError(f"max_staleness={off_policy.max_staleness} needs the trainer's version; attach it: Attached(version=...)")


def prompt_of(rollout: RolloutState) -> NDArray[np.int32]:
    """The prompt's tokens; none where there are none."""
    return np.empty(0, np.int32) if rollout.prompt_ids is None else rollout.prompt_ids


def reward_of(rollout: RolloutState) -> float:
    """The reward, NaN where there is none that can be computed with."""
    return float("nan") if rollout.reward is None or not usable(rollout.reward) else float(rollout.reward)


def why_left_out(rollout: RolloutState) -> str | None:
    """Why a rollout by itself cannot be trained on; None if it can."""
    if rollout.left_out:
        return "surplus" if is_surplus(rollout) else "failed"
    if rollout.reward is None:
        return "no_reward"
    if not usable(rollout.reward):
        return "reward_not_finite"
    if prompt_of(rollout).size == 0:
        return "no_prompt_ids"
    if rollout.response_ids.size == 0:
        return "no_response"
    return None if (rollout.loss_mask == 1).any() else "no_trained_token"


def what_it_lacks(rollout: RolloutState, attached: Attached, config: AdvantageConfig, off_policy: OffPolicy | None = None) -> str | None:
    """Why a rollout cannot be trained on for want of something attached, or stored, that is needed; None if it can."""
    needs = config.spec.needs
    if needs == "parts" and not any(usable(part) for part in rollout.reward_parts.values()):
        return "no_reward_parts"
    if needs == "baselines" and not usable(attached.baselines.get(rollout.group_id, np.nan)):
        return "no_baseline"
    for name, by_id, wanted in (
        ("reference", attached.reference, config.kl is not None),
        ("values", attached.values, needs == "values"),
        ("trainer", attached.trainer, off_policy is not None and off_policy.needs_trainer),
    ):
        if wanted and rollout.rollout_id not in by_id:
            return f"no_{name}"
        if rollout.rollout_id in by_id and not usable(trained(by_id, rollout, name)).all():
            return f"{name}_not_finite"
    return None


def trained(by_id: Mapping[str, ArrayLike], rollout: RolloutState, name: str) -> Array:
    """What is attached to a rollout, of its trained tokens only.

    Raises:
        ValueError: it is not one number a token of the response.
    """
    try:
        values = np.asarray(by_id[rollout.rollout_id], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of rollout {rollout.rollout_id} is {by_id[rollout.rollout_id]!r:.80}, no numbers: {error}") from error
    if values.shape != rollout.response_ids.shape:
        raise ValueError(
            f"{name} of rollout {rollout.rollout_id} has shape {values.shape} for {rollout.response_ids.size} tokens; "
            "give one number a token of the response, those of the environment too"
        )
    of_trained: Array = values[rollout.loss_mask == 1]
    return of_trained


def reward_parts(rollouts: Sequence[RolloutState], weights: Mapping[str, float] | None) -> tuple[Array, Array]:
    """(N, K) parts of rewards, NaN where one is missing, and (K,) their weights; in order of name, or those of `weights`.

    Raises:
        ValueError: a weight is for a part that no rollout has.
    """
    known = sorted({name for rollout in rollouts for name in rollout.reward_parts})
    names = known if weights is None else list(weights)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"part_weights name {unknown}, which no rollout has; the parts are {known}")
    table = np.array([[rollout.reward_parts.get(name, np.nan) for name in names] for rollout in rollouts], np.float64)
    table = table.reshape(len(rollouts), len(names))
    return np.where(usable(table), table, np.nan), np.array([1.0 if weights is None else weights[name] for name in names])
