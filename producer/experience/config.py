"""What is made of rewards: an estimator with its options, as one value whose parts fit each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from agent_loop.arguments import flag, instance, mapping, one_of, positive, within
from agent_loop.sampling import number, whole
from producer.experience.advantages import AdvantageFn, Scale
from producer.experience.kl import KLEstimator, check_kl_estimator
from producer.experience.shaping import ShapeFn
from producer.experience.usable import LARGEST
from producer.experience.whitening import Whiten, check_bounds

_MOST_TRIES = 1e6
"""Of "pass_at_k": no group has more members."""


@dataclass(frozen=True)
class Estimator:
    """What one estimator is. `kind`: one advantage a rollout, of its "group", or of its own "tokens". `options`: which it takes."""

    kind: Literal["group", "tokens"]
    options: frozenset[str]
    needs: str | None = None
    whiten: Whiten = "none"
    scaled: str | None = None
    """Why whitening would scale it a second time; None where it may be whitened."""


def _estimator(
    kind: Literal["group", "tokens"], *options: str, needs: str | None = None, whiten: Whiten = "none", scaled: str | None = None
) -> Estimator:
    return Estimator(kind, frozenset(options), needs, whiten, scaled)


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {
        "grpo": _estimator("group", "scale", "ddof", "eps"),
        "dr_grpo": _estimator(
            "group", scaled="it leaves out the deviation on purpose; take 'reinforce++_baseline' for a scale of the batch"
        ),
        "rloo": _estimator("group"),
        "opo": _estimator("group"),
        "pass_at_k": _estimator("group", "k", scaled="it is divided by the deviation of the best of k already"),
        "gdpo": _estimator("group", "ddof", "eps", "part_weights", needs="parts", scaled="it is scaled over the batch already"),
        "reinforce++_baseline": _estimator("group", whiten="scale"),
        "reinforce": _estimator("tokens", "gamma"),
        "reinforce++": _estimator("tokens", "gamma", whiten="full"),
        "remax": _estimator("tokens", "gamma", needs="baselines"),
        "gae": _estimator("tokens", "gamma", "lam", needs="values", whiten="full"),
    }
)
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "drgrpo": "dr_grpo",
        "pass@k": "pass_at_k",
        "reinforce_plus_plus": "reinforce++",
        "reinforce_plus_plus_baseline": "reinforce++_baseline",
    }
)
DEFAULTS: Mapping[str, float | str] = MappingProxyType({"scale": "group", "ddof": 1, "eps": 1e-4, "k": 4, "gamma": 1.0, "lam": 0.95})
_WHY_NOT = {
    ("scale", "rloo"): "the deviation of the others is 0 where they agree, and one that differs would get 1e6; take 'grpo'",
    ("scale", "dr_grpo"): "it is GRPO without the deviation; take 'grpo'",
    ("gamma", "group"): "a rollout has one advantage, from its whole reward; take 'reinforce', 'reinforce++', 'remax' or 'gae'",
    ("lam", "tokens"): "only 'gae' has values to weigh",
}


@dataclass(frozen=True)
class KL:
    """A divergence from a reference policy: taken off the reward, or a term that the trainer adds to its loss.

    Attributes:
        coef: of the divergence.
        estimator: "k1", "k2" or "k3"; see `kl_estimate`.
        where: "reward" or "loss". For the loss, an `Experience` brings `reference_logprobs`, and the trainer adds
            `coef * kl_estimate(logprobs, reference, estimator)` a token.
    """

    coef: float
    estimator: KLEstimator = "k1"
    where: Literal["reward", "loss"] = "reward"

    def __post_init__(self) -> None:
        check_kl_estimator(self.estimator)
        one_of("where", self.where, ("reward", "loss"))
        positive("coef", self.coef)
        if self.where == "loss" and self.estimator == "k1":
            raise ValueError("k1 as a loss term has a gradient of 0 on average, and holds nothing; take 'k2' or 'k3', or where='reward'")


@dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages. What is None is the estimator's own; what an estimator has no use for is refused.

    The order is fixed: shape, clip rewards, normalise, KL in the reward, baseline, whiten once over the batch, clip.

    Attributes:
        estimator: a name of `ESTIMATORS` or `ALIASES`, or a function of (rewards with NaN where there is none, group
            numbers) giving one finite number a rollout.
        scale: of "grpo": the deviation of the "group" (the default), of the "batch", or "none".
        ddof: of "grpo" and "gdpo": 1 for the sample's deviation (the default), 0 for the population's.
        eps: of these: added to the deviation; 1e-4 by default.
        k: of "pass_at_k": 4 by default.
        gamma: of "reinforce", "reinforce++", "remax" and "gae": the discount of a token; 1 by default.
        lam: of "gae": 0.95 by default.
        part_weights: of "gdpo": which parts of the reward, and how much of each; all by 1 by default.
        shape: steps such as `Overlong` and `StopProperly`, or functions of (rewards, lengths, truncated).
        reward_clip: bounds of the shaped reward.
        normalise: whether rewards are brought to mean 0 and deviation 1 of the run so far.
        kl: a divergence from a reference.
        whiten: "full", "scale" (not centred: what is 0 stays so) or "none".
        whiten_ddof: 1 for the sample's variance, 0 for the population's.
        whiten_eps: added to the variance.
        clip: bounds of advantages.

    Raises:
        ValueError: parts that make no sense together, with the reason.
    """

    estimator: str | AdvantageFn = "grpo"
    scale: Scale | None = None
    ddof: int | None = None
    eps: float | None = None
    k: int | None = None
    gamma: float | None = None
    lam: float | None = None
    part_weights: Mapping[str, float] | None = None
    shape: tuple[ShapeFn, ...] = ()
    reward_clip: tuple[float, float] | None = None
    normalise: bool = False
    kl: KL | None = None
    whiten: Whiten | None = None
    whiten_ddof: int = 1
    whiten_eps: float = 1e-8
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.estimator, str):
            object.__setattr__(self, "estimator", ALIASES.get(self.estimator, self.estimator))
            if self.estimator not in ESTIMATORS:
                known = sorted([*ESTIMATORS, *ALIASES])
                raise ValueError(f"unknown advantage {self.estimator!r}; known are {known}, or pass a function of (rewards, group_ids)")
        elif not callable(self.estimator):
            raise ValueError(f"estimator={self.estimator!r} is neither the name of one nor a function of (rewards, group_ids)")
        if not isinstance(self.shape, tuple | list) or not all(callable(step) for step in self.shape):
            raise ValueError(f"shape={self.shape!r:.100} must be a tuple of steps, even where it is one: shape=(step,)")
        self._check_options()
        self._check_bounds()
        self._check_whitening()
        self._check_rewards()

    @property
    def spec(self) -> Estimator:
        """What the estimator is and needs; a function of the user's own is of kind "group"."""
        return ESTIMATORS[self.estimator] if isinstance(self.estimator, str) else Estimator("group", frozenset())

    @property
    def whitening(self) -> Whiten:
        """What is done over the batch: as asked, or the estimator's own."""
        return self.spec.whiten if self.whiten is None else self.whiten

    @property
    def kl_in_reward(self) -> KL | None:
        """The divergence, where it is taken off the reward."""
        return self.kl if self.kl is not None and self.kl.where == "reward" else None

    def option(self, name: str) -> float:
        """The number given, or its default."""
        value = getattr(self, name)
        return float(DEFAULTS[name] if value is None else value)

    @property
    def scaling(self) -> Scale:
        """The scale given, or its default."""
        return "group" if self.scale is None else self.scale

    def _check_options(self) -> None:
        for name in (*DEFAULTS, "part_weights"):
            if getattr(self, name) is not None and name not in self.spec.options:
                why = _WHY_NOT.get((name, str(self.estimator))) or _WHY_NOT.get((name, self.spec.kind)) or "it has no such option"
                raise ValueError(f"{name}={getattr(self, name)!r} with estimator={self.estimator!r}: {why}")

    def _check_bounds(self) -> None:
        one_of("scale", self.scale, (*get_args(Scale), None))
        for name in ("k", "ddof"):
            if (value := getattr(self, name)) is not None:
                whole(name, value)
        for name, low, high in (("k", 1, _MOST_TRIES), ("gamma", 0, 1), ("lam", 0, 1), ("ddof", 0, 1), ("eps", 0, LARGEST)):
            if (value := getattr(self, name)) is not None:
                within(name, value, low, high)
        for name in ("reward_clip", "clip"):
            if (bounds := getattr(self, name)) is not None:
                check_bounds(name, bounds)
        if self.clip is not None and not self.clip[0] <= 0 <= self.clip[1]:
            raise ValueError(f"clip={self.clip} would give what teaches nothing an advantage; give bounds around 0")
        self._check_parts()

    def _check_parts(self) -> None:
        if self.part_weights is None:
            return
        mapping("part_weights", self.part_weights, "names of parts to their weights")
        if not any(number(f"the weight of {name!r}", weight) for name, weight in self.part_weights.items()):
            raise ValueError(f"part_weights={dict(self.part_weights)} leaves no part; name those to be trained on")

    def _check_whitening(self) -> None:
        one_of("whiten", self.whiten, (*get_args(Whiten), None))
        within("whiten_ddof", whole("whiten_ddof", self.whiten_ddof), 0, 1)
        within("whiten_eps", self.whiten_eps, 0, LARGEST)
        why = self.spec.scaled
        if self.estimator == "grpo" and self.scaling != "none":
            why = "it is divided by a deviation already; take scale='none', or 'reinforce++_baseline'"
        if why is not None and self.whitening != "none":
            raise ValueError(f"whiten={self.whiten!r} with estimator={self.estimator!r}: {why}")

    def _check_rewards(self) -> None:
        flag("normalise", self.normalise)
        instance("kl", self.kl, KL | None, "a KL, such as KL(0.1), or None")
        if self.estimator == "gdpo" and (self.shape or self.reward_clip or self.normalise or self.kl_in_reward):
            raise ValueError(
                "'gdpo' looks at the parts of a reward, not at their sum: make what shapes it a part of its own, the KL a loss term"
            )
        if self.normalise and (self.estimator == "pass_at_k" or (self.estimator == "grpo" and self.scaling == "group")):
            raise ValueError(f"normalise=True with estimator={self.estimator!r} changes nothing: the group's own deviation divides it out")
