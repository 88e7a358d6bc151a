"""From rewards to the advantage of each trained token, in one order: normalise, KL in the reward, baseline, whiten, clip.

What comes before, filtering and shaping, is done on rollouts; what comes after, packing, on tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from producer.experience.advantages import dr_grpo, gdpo, grpo, opo, rloo
from producer.experience.config import AdvantageConfig
from producer.experience.kl import kl_estimate
from producer.experience.pass_at_k import pass_at_k
from producer.experience.returns import discounted_returns, gae, token_rewards
from producer.experience.running import RunningMoments
from producer.experience.usable import LARGEST, usable
from producer.experience.whitening import clip, whiten

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """N rollouts and their trained tokens, flat: those of the first, then those of the second, and so on.

    Attributes:
        rewards: (N,) shaped; NaN for a rollout that takes no part.
        group_ids: (N,) any integers.
        lengths: (N,) trained tokens; 0 for a rollout that only counts in its group's baseline.
        logprobs, reference, values: flat, each None where not needed.
        baselines: (N,) what "remax" compares with: the reward of the greedy response to the same prompt.
        parts: (N, K) of "gdpo".
        part_weights: (K,).
    """

    rewards: Array
    group_ids: NDArray[np.integer]
    lengths: NDArray[np.int64]
    logprobs: Array | None = None
    reference: Array | None = None
    values: Array | None = None
    baselines: Array | None = None
    parts: Array | None = None
    part_weights: Array | None = None


@dataclass(frozen=True)
class Estimate:
    """What training takes. `advantages` and `returns` are flat over trained tokens; `returns` is None for kinds that have one a rollout."""

    advantages: Array
    returns: Array | None
    running: RunningMoments | None
    metrics: dict[str, float]


def estimate(config: AdvantageConfig, batch: Scored, running: RunningMoments | None = None) -> Estimate:
    """Advantages of a whole batch; a part of it would be normalised and whitened by itself.

    Args:
        running: the moments of the run so far, with `config.normalise`; a new run has none.

    Raises:
        ValueError: the estimator lacks what it needs, or a function of the user's own gave something else than it must.
    """
    metrics: dict[str, float] = {}
    rewards = batch.rewards
    if config.normalise:
        running = (running or RunningMoments()).updated(rewards)
        rewards = running.normalised(rewards)
    kl = _kl(config, batch, metrics)
    if config.spec.kind == "group":
        per_rollout = _by_group(config, batch, rewards - _sums(kl, batch.lengths))
        tokens, returns = np.repeat(per_rollout, batch.lengths), None
    else:
        tokens, returns = _by_token(config, batch, rewards, kl)
    trained = np.repeat(~np.isnan(batch.rewards), batch.lengths)
    if config.whitening != "none":
        tokens = whiten(tokens, trained, centre=config.whitening == "full", ddof=config.whiten_ddof, eps=config.whiten_eps)
    else:
        tokens[~trained] = 0.0
    if config.clip is not None:
        tokens[trained], metrics["advantage/clipped"] = clip(tokens[trained], config.clip)
    return Estimate(tokens, returns, running, metrics)


def _kl(config: AdvantageConfig, batch: Scored, metrics: dict[str, float]) -> Array | None:
    """The divergence of each token times its coefficient, where it is taken off the reward."""
    if config.kl is None or (batch.reference is None and config.kl.where == "loss"):
        return None
    kl: Array = kl_estimate(_given(batch.logprobs, "logprobs"), _given(batch.reference, "reference"), config.kl.estimator)
    if not usable(kl).all():
        raise ValueError(
            f"the divergence {config.kl.estimator} of a token is {np.abs(kl).max():.3g}, above {LARGEST:g}: the reference is not one of "
            "this policy, or take 'k1'"
        )
    if kl.size:
        metrics["kl/token"] = float(kl.mean())
        metrics["kl/sequence"] = float(_sums(kl, batch.lengths)[batch.lengths > 0].mean())
    return config.kl.coef * kl if config.kl_in_reward else None


def _by_group(config: AdvantageConfig, batch: Scored, rewards: Array) -> Array:
    ids = batch.group_ids
    ddof, eps = int(config.option("ddof")), config.option("eps")
    of_names: dict[str, Callable[[], Array]] = {
        "grpo": lambda: grpo(rewards, ids, scale=config.scaling, ddof=ddof, eps=eps),
        "dr_grpo": lambda: dr_grpo(rewards, ids),
        "reinforce++_baseline": lambda: dr_grpo(rewards, ids),
        "rloo": lambda: rloo(rewards, ids),
        "opo": lambda: opo(rewards, ids, batch.lengths),
        "pass_at_k": lambda: pass_at_k(rewards, ids, _k(config, ids)),
        "gdpo": lambda: gdpo(_given(batch.parts, "parts"), ids, batch.part_weights, ddof=ddof, eps=eps),
    }
    if isinstance(config.estimator, str):
        return of_names[config.estimator]()
    own = np.asarray(config.estimator(rewards, ids), np.float64)
    if own.shape != rewards.shape or not np.isfinite(own).all():
        raise ValueError(
            f"the advantage function gave {own!r:.200}; it must give {rewards.size} finite numbers, 0 where there is no reward"
        )
    return own


def _k(config: AdvantageConfig, group_ids: NDArray[np.integer]) -> int:
    k, largest = int(config.option("k")), int(np.unique(group_ids, return_counts=True)[1].max(initial=0))
    if 1 < largest <= k:
        raise ValueError(
            f"k={k} with groups of at most {largest} members: each is one subset, and all advantages would be 0; take a smaller k"
        )
    return k


def _by_token(config: AdvantageConfig, batch: Scored, rewards: Array, kl: Array | None) -> tuple[Array, Array]:
    tokens = token_rewards(np.nan_to_num(rewards), batch.lengths, kl, 1.0)
    if config.estimator == "gae":
        return gae(tokens, _given(batch.values, "values"), batch.lengths, gamma=config.option("gamma"), lam=config.option("lam"))
    returns = discounted_returns(tokens, batch.lengths, config.option("gamma"))
    if config.estimator == "remax":
        return returns - np.repeat(np.nan_to_num(_given(batch.baselines, "baselines")), batch.lengths), returns
    return returns.copy(), returns


def _sums(tokens: Array | None, lengths: NDArray[np.int64]) -> Array:
    """(N,) sums by rollout; 0 for one without tokens."""
    if tokens is None:
        return np.zeros(lengths.size)
    return np.bincount(np.repeat(np.arange(lengths.size), lengths), weights=tokens, minlength=lengths.size).astype(np.float64)


def _given(values: Array | None, name: str) -> Array:
    if values is None:
        raise ValueError(f"the configuration needs {name}, and none were given")
    return values
