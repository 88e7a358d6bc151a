"""How far the policy is from a reference, estimated from the log-probabilities of sampled tokens; and a coefficient that follows it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from agent_loop.arguments import at_least, one_of, positive
from agent_loop.sampling import number

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Any, reference: Any, estimator: KLEstimator = "k1") -> Any:
    """The divergence at each token, of tokens that the policy sampled (Schulman 2020, "Approximating KL divergence").

    With d = logprobs - reference: k1 is d, unbiased, of either sign; k2 is d^2 / 2, biased, of small variance; k3 is
    exp(-d) - 1 + d, unbiased and never negative. Numpy arrays and torch tensors, whose gradients pass through, both do. Nothing is
    clamped; where d is below some -80, k3 is so large that float32 has no room for it.

    As a loss term, k1 has a gradient that is 0 on average, and k2 has that of the divergence (Tang and Munos 2025, arXiv 2506.09477).
    """
    check_kl_estimator(estimator)
    d = logprobs - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    # exp(-d) - 1 by itself loses all digits near 0, which is where most tokens are.
    return (np.expm1(-d) if isinstance(d, np.ndarray | np.floating | float) else (-d).expm1()) + d


def check_kl_estimator(estimator: str) -> None:
    """Raises ValueError for a name that is none."""
    one_of("estimator", estimator, get_args(KLEstimator))


@dataclass(frozen=True)
class AdaptiveKL:
    """A coefficient that holds the divergence near a target (Ziegler et al. 2019). A value: `updated` gives the next.

    Attributes:
        coef: of the divergence in the reward, now.
        target: the divergence of a sequence to be held.
        horizon: over how many sequences the coefficient may change by a fifth.
    """

    coef: float
    target: float
    horizon: float = 10_000

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon"):
            positive(name, getattr(self, name))

    def updated(self, kl: float, sequences: int) -> "AdaptiveKL":
        """The coefficient after a batch of so many sequences, whose divergence was `kl` on average."""
        error = min(max(number("kl", kl) / self.target - 1, -0.2), 0.2)
        return AdaptiveKL(self.coef * (1 + error * at_least("sequences", sequences, 0) / self.horizon), self.target, self.horizon)
