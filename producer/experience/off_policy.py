"""Weights for tokens that another policy sampled than the one that is trained: an older one, or the same on another engine.

The importance ratio of a token is the trainer's probability of it over that with which it was sampled. Arrays are flat over tokens, in
float64; what comes out is finite whatever goes in. Formulas and their sources are in docs/explanation/off-policy.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import at_least, flag, instance, one_of, positive
from agent_loop.sampling import SamplingParams

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Level = Literal["token", "sequence", "geometric"]
Bounds = tuple[float, float]

LARGEST_LOG = 80.0
"""A ratio is at most e^80: float32, in which the loss is taken, has no room for e^89."""
NONSENSE = 1e6
"""A log-ratio this far from 0 is not finite in all but name, as masked logits are."""


@dataclass(frozen=True)
class OffPolicy:
    """What becomes of importance ratios. By itself it measures only: every weight is 1.

    A ratio is of one of three levels: of the "token"; of the "sequence", the product of its tokens' ratios; or "geometric", their
    geometric mean, which does not grow with length. All tokens of a sequence have the latter two in common.

    Attributes:
        weight: the level of the ratio that weighs a token's loss; None: 1.
        truncate: bounds of that weight; what is outside is brought to the bound (TIS).
        mask: the level of the ratio that decides whether a token is trained on at all; None: all are.
        keep: bounds of that ratio; what is outside gets weight 0 (IcePop, MIS).
        negative_kl: tokens of negative advantage get weight 0 where the mean of log q - log p over their sequence, q the sampler and p the
            trainer, is above this (DeepSeek-V3.2, eq. 9).
        max_staleness: tokens sampled more than so many versions before `Attached.version` get weight 0.
        drop: whether tokens of weight 0 are taken out of `loss_mask` too, so that no reduction divides by them (verl); else they
            count as tokens without a loss (TRL, IcePop).
        sampling: what the agent loop sampled with. Prompts' own overrides are stored with their rollouts, the loop's parameters are
            not; with them, a ratio that they bias is warned of.

    Raises:
        ValueError: parts that make no sense together, with the reason.
    """

    weight: Level | None = None
    truncate: Bounds | None = None
    mask: Level | None = None
    keep: Bounds | None = None
    negative_kl: float | None = None
    max_staleness: int | None = None
    drop: bool = False
    sampling: SamplingParams | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "mask"):
            one_of(name, getattr(self, name), (*get_args(Level), None))
        for name in ("truncate", "keep"):
            if (bounds := getattr(self, name)) is not None and not _around_one(bounds):
                raise ValueError(f"{name}={bounds} must be two numbers, one of 0 to 1 and one of 1 or more: equal policies have ratio 1")
        self._check_pairs()
        if self.negative_kl is not None:
            positive("negative_kl", self.negative_kl)
        if self.max_staleness is not None:
            at_least("max_staleness", self.max_staleness, 0)
        flag("drop", self.drop)
        instance("sampling", self.sampling, SamplingParams | None, "the SamplingParams of the agent loop")

    def _check_pairs(self) -> None:
        if self.truncate is not None and self.weight is None:
            raise ValueError(f"truncate={self.truncate} without a weight: say whose ratio is meant, weight='token' or 'sequence'")
        if (self.mask is None) != (self.keep is None):
            raise ValueError(f"mask={self.mask!r} with keep={self.keep}: a mask needs bounds, and bounds need the level of their ratio")
        if self.weight is not None and self.truncate is None and self.mask is None:
            raise ValueError(
                f"weight={self.weight!r} without bounds has no end to its variance; give truncate=(0, 2), or a mask, "
                "or truncate=(0, float('inf')) if you mean it"
            )

    @property
    def needs_trainer(self) -> bool:
        """Whether it looks at ratios, and so needs the trainer's log-probabilities; one that only masks what is stale does not."""
        return any((self.weight, self.mask, self.negative_kl is not None, self.max_staleness is None))

    @property
    def level(self) -> Level:
        """The level whose ratios the metrics are of."""
        return self.weight or self.mask or "token"


def _around_one(bounds: object) -> bool:
    match bounds:
        case (int() | float() as low, int() | float() as high):
            return 0 <= low <= 1 <= high
    return False


CORRECTIONS: Mapping[str, OffPolicy] = MappingProxyType(
    {
        "measure": OffPolicy(),
        "tis": OffPolicy("token", truncate=(0.0, 2.0)),
        "sequence_tis": OffPolicy("sequence", truncate=(0.0, 2.0)),
        "icepop": OffPolicy("token", mask="token", keep=(0.5, 5.0)),
        "mis": OffPolicy("sequence", mask="sequence", keep=(0.0, 3.0)),
        "geometric_mask": OffPolicy(mask="geometric", keep=(0.999, 1.001)),
    }
)
"""Corrections by the name they are known under, with the bounds of their authors or of the libraries that have them."""


def off_policy_named(name: "str | OffPolicy") -> OffPolicy:
    """The correction of that name; one that is a value already as it is."""
    if isinstance(name, OffPolicy):
        return name
    if not isinstance(name, str) or name not in CORRECTIONS:
        raise ValueError(f"unknown correction off_policy={name!r:.80}; known are {sorted(CORRECTIONS)}, or pass an OffPolicy")
    return CORRECTIONS[name]


@dataclass(frozen=True)
class Correction:
    """What a loss takes. Flat over tokens.

    Attributes:
        weights: of each token's loss; finite, 0 for those that are not kept. No gradient belongs to them.
        kept: whether the token is trained on.
        metrics: finite numbers, counted before anything was truncated.
    """

    weights: Array
    kept: Bools
    metrics: dict[str, float]


def correct(
    config: OffPolicy,
    lengths: ArrayLike,
    *,
    trainer: ArrayLike | None = None,
    sampler: ArrayLike | None = None,
    advantages: ArrayLike | None = None,
    fresh: ArrayLike | None = None,
) -> Correction:
    """Weights of the trained tokens of N sequences; lengths may be 0.

    A token whose log-probabilities are not both finite, or differ by more than a million, has no ratio: it gets weight 0, and so does its
    sequence where the sequence's ratio is asked for.

    Args:
        lengths: (N,) trained tokens of each sequence; the arrays below are flat over these.
        trainer: log-probabilities by the policy that is trained, before the step.
        sampler: those with which the tokens were sampled.
        advantages: needed for `negative_kl`.
        fresh: whether a token is not too stale; needed for `max_staleness`.

    Raises:
        ValueError: an array of another length than there are tokens, or what the configuration needs was not given.
    """
    sizes = np.asarray(lengths, np.int64).reshape(-1)
    total = int(sizes.sum())
    kept, weights, metrics = np.ones(total, np.bool_), np.ones(total), dict[str, float]()
    if config.needs_trainer:
        ratios = _Ratios.of(_flat("trainer", trainer, total), _flat("sampler", sampler, total), sizes)
        metrics |= _measured(ratios, config.level)
        kept &= _known(ratios, config)
        if config.weight is not None:
            weights = _weights(ratios, config, metrics)
        if config.mask is not None and config.keep is not None:
            held = np.exp(np.minimum(ratios.logs_of(config.mask), LARGEST_LOG))
            kept &= ratios.by_token(config.mask, (held >= config.keep[0]) & (held <= config.keep[1]))
        if config.negative_kl is not None:
            far = ratios.by_token("geometric", -ratios.logs_of("geometric") > config.negative_kl)
            kept &= ~(far & (_flat("advantages", advantages, total) < 0))
        metrics["off_policy/masked"] = _share(~kept)
    if config.max_staleness is not None:
        not_stale = _flat("fresh", fresh, total) != 0
        metrics["off_policy/stale"] = _share(~not_stale)
        kept &= not_stale
    weights[~kept] = 0.0
    owner = np.repeat(np.arange(sizes.size), sizes)
    metrics["off_policy/masked_sequences"] = _share((np.bincount(owner, weights=kept, minlength=sizes.size) == 0)[sizes > 0])
    metrics["off_policy/weight_mean"] = float(weights.mean()) if total else 0.0
    return Correction(weights, kept, metrics)


@dataclass(frozen=True)
class _Ratios:
    """Log-ratios of tokens, 0 where there is none, and what they make of their sequences."""

    logs: Array
    known: Bools
    owner: NDArray[np.intp]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, trainer: Array, sampler: Array, lengths: NDArray[np.int64]) -> "_Ratios":
        with np.errstate(invalid="ignore", over="ignore"):
            logs = trainer - sampler
            known = np.abs(logs) < NONSENSE
        return cls(np.where(known, logs, 0.0), known, np.repeat(np.arange(lengths.size), lengths), lengths)

    def logs_of(self, level: Level) -> Array:
        """(tokens,) or (N,) log-ratios of that level; 0 for an empty sequence."""
        if level == "token":
            return self.logs
        sums: Array = np.bincount(self.owner, weights=self.logs, minlength=self.lengths.size).astype(np.float64)
        return sums if level == "sequence" else sums / np.maximum(self.lengths, 1)

    def known_of(self, level: Level) -> Bools:
        """(tokens,) or (N,) whether there is such a ratio."""
        if level == "token":
            return self.known
        unknown: Bools = np.bincount(self.owner, weights=~self.known, minlength=self.lengths.size) > 0
        return ~unknown & (self.lengths > 0)

    def by_token(self, level: Level, values: NDArray[Any]) -> NDArray[Any]:
        """What is of a level, at each token."""
        return values if level == "token" else values[self.owner]


def _known(ratios: _Ratios, config: OffPolicy) -> Bools:
    """Tokens that have every ratio that is asked for."""
    levels: set[Level] = {level for level in (config.weight, config.mask, "token") if level is not None}
    levels |= {"geometric"} if config.negative_kl is not None else set()
    known: Bools = np.logical_and.reduce([ratios.by_token(level, ratios.known_of(level)) for level in levels])
    return known


def _weights(ratios: _Ratios, config: OffPolicy, metrics: dict[str, float]) -> Array:
    level = config.level
    weights: Array = np.exp(np.minimum(ratios.logs_of(level), LARGEST_LOG))
    if config.truncate is not None:
        outside = (weights < config.truncate[0]) | (weights > config.truncate[1])
        metrics["off_policy/truncated"] = _share(ratios.by_token(level, outside))
        weights = np.clip(weights, *config.truncate)
    return ratios.by_token(level, weights).copy()


def _measured(ratios: _Ratios, level: Level) -> dict[str, float]:
    """Of the ratios as they are; nothing where there is none."""
    tokens, logs = ratios.logs[ratios.known], ratios.logs_of(level)[ratios.known_of(level)]
    if not tokens.size or not logs.size:
        return {}
    held = np.exp(np.minimum(logs, LARGEST_LOG))
    return {
        "off_policy/ratio_mean": float(held.mean()),
        "off_policy/ratio_min": float(held.min()),
        "off_policy/ratio_max": float(held.max()),
        "off_policy/ess": effective_share(logs),
        "off_policy/kl_k1": float(-tokens.mean()),
        "off_policy/kl_k3": float((np.expm1(np.minimum(tokens, LARGEST_LOG)) - tokens).mean()),
    }


def effective_share(log_weights: ArrayLike) -> float:
    """The effective sample size (Kish 1965) of weights exp(log_weights), as a share of their number N: 1 / N if one outweighs all."""
    logs = np.asarray(log_weights, np.float64)
    held = np.exp(logs - logs.max())  # a common factor changes nothing
    return float(held.sum() ** 2 / (held @ held) / logs.size)


def _share(these: Bools) -> float:
    return float(these.mean()) if these.size else 0.0


def _flat(name: str, values: ArrayLike | None, total: int) -> Array:
    if values is None:
        raise ValueError(f"the correction needs {name}, and none were given")
    array = np.asarray(values, np.float64).reshape(-1)
    if array.size != total:
        raise ValueError(f"{array.size} values of {name} for {total} trained tokens; give one a token")
    return array
