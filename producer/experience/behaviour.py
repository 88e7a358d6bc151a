"""How rollouts were sampled, against how they are trained on: their tokens' weights, and a warning where a ratio cannot be trusted."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.sampling import SamplingParams
from buffer.rollout import RolloutState
from buffer.staleness import fresh_mask
from producer.experience.attached import Attached, trained
from producer.experience.off_policy import Correction, OffPolicy, correct

_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The values at which what a parameter does is off, and a token is sampled from the whole vocabulary."""


def corrected(off_policy: OffPolicy, rollouts: Sequence[RolloutState], attached: Attached, advantages: NDArray[np.float64]) -> Correction:
    """The weights of the trained tokens of rollouts that have what the correction needs; `advantages` are flat over these tokens."""
    lengths = [int((one.loss_mask == 1).sum()) for one in rollouts]
    if not off_policy.needs_trainer:
        return correct(off_policy, lengths, fresh=_fresh(off_policy, rollouts, attached))
    made = correct(
        off_policy,
        lengths,
        trainer=np.concatenate([trained(attached.trainer, one, "trainer") for one in rollouts]),
        sampler=np.concatenate([one.logprobs[one.loss_mask == 1] for one in rollouts]),
        advantages=advantages,
        fresh=_fresh(off_policy, rollouts, attached),
    )
    made.metrics["off_policy/biased"] = _warned(off_policy, rollouts, attached.temperature)
    return made


def bias_of(sampling: SamplingParams | Mapping[str, Any], temperature: float | None = None) -> str | None:
    """Why ratios to what was sampled so are biased; None if they are not.

    The log-probability of a token that was sampled from a part of the vocabulary is of that part, while the trainer's is of all of it: each
    ratio is too small by the probability of the part, 0.8 or so with top_p=0.8, for every token alike.

    Args:
        sampling: the parameters that are known; others are taken to be off.
        temperature: at which the trainer's log-probabilities were taken; None where it is not known.
    """
    given = asdict(sampling) if isinstance(sampling, SamplingParams) else sampling
    if cut := [f"{name}={given[name]}" for name, off in _OFF.items() if given.get(name, off) != off]:
        return ", ".join(cut)
    sampled_at = given.get("temperature")
    if sampled_at == 0:
        return "temperature=0, which samples nothing"
    if sampled_at is not None and temperature is not None and sampled_at != temperature:
        return f"temperature={sampled_at}, while the trainer's log-probabilities are of temperature {temperature}"
    return None


def _warned(off_policy: OffPolicy, rollouts: Sequence[RolloutState], temperature: float | None) -> float:
    """The share of rollouts whose ratios are biased; a warning says by what, if any are."""
    known = {} if off_policy.sampling is None else asdict(off_policy.sampling)
    of_all = bias_of(known, temperature)
    reasons = [bias_of(known | dict(one.sampling), temperature) if one.sampling else of_all for one in rollouts]
    biased = [reason for reason in reasons if reason is not None]
    if biased:
        warnings.warn(
            f"{len(biased)} of {len(rollouts)} rollouts were sampled with {biased[0]}: their importance ratios are biased, those of "
            "sequences as a power of their length; sample from the whole vocabulary at the trainer's temperature, or correct nothing",
            stacklevel=4,
        )
    return len(biased) / len(rollouts)


def _fresh(off_policy: OffPolicy, rollouts: Sequence[RolloutState], attached: Attached) -> NDArray[np.bool_] | None:
    """Whether each trained token is within the bound of staleness, versions of undone timelines counted as far as they are."""
    if off_policy.max_staleness is None or attached.version is None:
        return None
    version, bound = attached.version, off_policy.max_staleness
    masks = [fresh_mask(one.effective_versions, one.loss_mask, version, bound)[one.loss_mask == 1] for one in rollouts]
    fresh: NDArray[np.bool_] = np.concatenate(masks) == 1
    return fresh
