"""What a batch looks like before it is trained on, in flat numbers: by itself, by task, and by the version that sampled it.

Tokens are the trained ones, flat: those of the first rollout, then those of the second, and so on. Everything is in float64 and
finite; what there is nothing of has no name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from producer.experience.arrays import NO_VERSION, Experience
from producer.experience.kl import kl_estimate
from producer.experience.off_policy import LARGEST_LOG, effective_share

Array = NDArray[np.float64]
Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """What `batch_statistics` found.

    Attributes:
        all: of the whole batch.
        by_task: of the rollouts of each task.
        by_version: of the rollouts whose oldest trained token is of this version: that from which their staleness is counted.
    """

    all: Numbers
    by_task: dict[str, Numbers]
    by_version: dict[int, Numbers]

    def flat(self) -> Numbers:
        """One mapping for a logger: `reward/mean`, `task/<name>/reward/mean`, `version/<n>/reward/mean`.

        Versions are ever new names, which makes some loggers slow: they have `all` and `by_task` by themselves.
        """
        parts = [(f"task/{name}/", own) for name, own in self.by_task.items()] + [
            (f"version/{n}/", own) for n, own in self.by_version.items()
        ]
        return self.all | {f"{prefix}{name}": value for prefix, own in parts for name, value in own.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain mappings with keys of text, for `json.dumps`."""
        return {"all": self.all, "by_task": self.by_task, "by_version": {str(n): own for n, own in self.by_version.items()}}


def batch_statistics(experience: Experience, *, current: ArrayLike | None = None) -> BatchStatistics:
    """Statistics of a batch by itself, by task and by version; docs/reference/metrics.md says what each name means.

    Args:
        experience: from `make_experience`.
        current: (N, T) log-probabilities of its tokens under the policy as it is now, where the tokens stand, for the ratios; what lies
            outside the mask may be anything. If not given, `experience.trainer_logprobs`.

    Raises:
        ValueError: `current` has another shape, or is not finite on a trained token.
    """
    tokens = _Tokens.of(experience, experience.trainer_logprobs if current is None else current)
    found = _of(experience, tokens, np.ones(len(experience.rollout_ids), np.bool_))
    names, versions = _task_names(experience), tokens.oldest_versions()
    by_task = {name: _of(experience, tokens, np.array([own == name for own in names])) for name in sorted(set(names))}
    by_version = {int(version): _of(experience, tokens, versions == version) for version in np.unique(versions[versions != NO_VERSION])}
    return BatchStatistics(found, by_task, by_version)


def spread(name: str, values: ArrayLike) -> Numbers:
    """`<name>/mean`, `/std` (of the population), `/min` and `/max` of the finite values; nothing where there is none."""
    every = np.asarray(values, np.float64)
    known = every[np.isfinite(every)]
    if known.size == 0:
        return {}
    return {f"{name}/{what}": float(getattr(known, what)()) for what in ("mean", "std", "min", "max")}


def advantage_statistics(advantages: ArrayLike) -> Numbers:
    """The spread of advantages a token, and the fractions that are above 0, below it, and 0 exactly, which teach nothing."""
    values = np.asarray(advantages, np.float64)
    if values.size == 0:
        return {}
    shares = {"positive": values > 0, "negative": values < 0, "zero": values == 0}
    return spread("advantage", values) | {f"advantage/{name}": float(share.mean()) for name, share in shares.items()}


def entropy_statistics(logprobs: ArrayLike) -> Numbers:
    """`entropy/sampled`: minus the mean log-probability of sampled tokens; on average, the entropy of what they were sampled from."""
    values = np.asarray(logprobs, np.float64)
    return {"entropy/sampled": float(-values.mean())} if values.size else {}


def kl_statistics(logprobs: ArrayLike, reference: ArrayLike) -> Numbers:
    """How far the policy that sampled is from the reference, a token: k1 and k3 in the mean, k1's extremes."""
    d = np.asarray(kl_estimate(np.asarray(logprobs, np.float64), np.asarray(reference, np.float64)), np.float64)
    if d.size == 0:
        return {}
    with np.errstate(over="ignore"):
        k3 = float(np.mean(kl_estimate(d, np.zeros_like(d), "k3")))
    found = {"kl/k1": float(d.mean()), "kl/k3": k3, "kl/min": float(d.min()), "kl/max": float(d.max())}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def ratio_statistics(logprobs: ArrayLike, current: ArrayLike) -> Numbers:
    """The importance ratios of the policy now over the one that sampled, a token.

    `ratio/effective` is the effective sample size as a fraction of the tokens, (sum of ratios)^2 / (n * sum of their squares): 1 where
    all are equal. `ratio/far` is the fraction outside 0.8 to 1.2, PPO's usual bounds.
    """
    logs = np.asarray(current, np.float64) - np.asarray(logprobs, np.float64)
    if logs.size == 0:
        return {}
    bounded = np.clip(logs, -LARGEST_LOG, LARGEST_LOG)
    ratios = np.exp(bounded)
    far = (ratios < 0.8) | (ratios > 1.2)
    return spread("ratio", ratios) | {"ratio/effective": effective_share(bounded), "ratio/far": float(far.mean())}


_NEWEST = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The trained tokens of an experience; `rollout` says whose each is."""

    rollouts: int
    rollout: NDArray[np.intp]
    logprobs: Array
    advantages: Array
    versions: NDArray[np.int32]
    reference: Array | None
    current: Array | None

    @classmethod
    def of(cls, experience: Experience, current: ArrayLike | None) -> "_Tokens":
        def flat(array: NDArray[Any] | None) -> Any:
            return None if array is None else np.concatenate([row[mask] for row, mask in zip(unplace(array), masks, strict=True)])

        unplace = experience.layout.unplace
        masks = unplace(experience.loss_mask)
        given = None if current is None else np.asarray(current, np.float64)
        if given is not None and given.shape != experience.input_ids.shape:
            raise ValueError(f"current has shape {given.shape}, the batch {experience.input_ids.shape}; give one log-probability a token")
        now = flat(given)
        if now is not None and not np.isfinite(now).all():
            raise ValueError(
                f"{int((~np.isfinite(now)).sum())} of {now.size} trained tokens have a current log-probability that is not finite"
            )
        numbers = np.repeat(np.arange(len(masks)), [int(mask.sum()) for mask in masks])
        return cls(
            len(masks),
            numbers,
            flat(experience.logprobs).astype(np.float64),
            flat(experience.advantages).astype(np.float64),
            flat(experience.versions),
            flat(experience.reference_logprobs),
            now,
        )

    def oldest_versions(self) -> NDArray[np.int32]:
        """Of each rollout; NO_VERSION where a correction left it without a trained token."""
        oldest = np.full(self.rollouts, _NEWEST, np.int32)
        np.minimum.at(oldest, self.rollout, self.versions)
        return np.where(oldest == _NEWEST, NO_VERSION, oldest)


def _of(experience: Experience, tokens: _Tokens, chosen: NDArray[np.bool_]) -> Numbers:
    """Statistics of the chosen rollouts."""
    inside = chosen[tokens.rollout]
    logprobs = tokens.logprobs[inside]
    trained = np.bincount(tokens.rollout[inside], minlength=chosen.size)[chosen]
    found: Numbers = {"rollouts": float(chosen.sum()), "tokens/trained": float(inside.sum())}
    found |= spread("reward", experience.rewards[chosen]) | spread("trained_length", trained)
    found |= advantage_statistics(tokens.advantages[inside]) | entropy_statistics(logprobs)
    if tokens.reference is not None:
        found |= kl_statistics(logprobs, tokens.reference[inside])
    if tokens.current is not None:
        found |= ratio_statistics(logprobs, tokens.current[inside])
    return found


def _task_names(experience: Experience) -> Sequence[str]:
    """Of each rollout: its id without the numbers of its group and of itself."""
    pairs = zip(experience.rollout_ids, experience.group_ids, strict=True)
    return [rollout_id.rpartition("-")[0].removesuffix(f"-{group_id}") for rollout_id, group_id in pairs]
