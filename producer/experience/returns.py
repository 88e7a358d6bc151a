"""Rewards of single tokens, and what is to come after each: discounted returns and generalised advantage estimation.

Tokens are flat: those of the first sequence, then those of the second, and so on; `lengths` says how many each has. Only trained
tokens are given. Tokens of tools and environments between them are thereby skipped: value and advantage are carried over them.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Tokens = NDArray[np.float64]


def token_rewards(rewards: ArrayLike, lengths: ArrayLike, kl: ArrayLike | None = None, kl_coef: float = 0.0) -> Tokens:
    """Each sequence's reward on its last token, and -kl_coef times `kl` on every token (Ouyang et al. 2022, InstructGPT, eq. 2).

    A sequence without a token gives none: its reward is nowhere.
    """
    sizes, known = _sizes(lengths), np.asarray(rewards, np.float64).reshape(-1)
    if known.shape != sizes.shape:
        raise ValueError(f"{known.size} rewards came with {sizes.size} lengths; give one a sequence")
    tokens = np.zeros(int(sizes.sum())) if kl is None else -kl_coef * _flat(kl, sizes, "kl")
    full = sizes > 0
    tokens[np.cumsum(sizes)[full] - 1] += known[full]
    return tokens


def discounted_returns(tokens: ArrayLike, lengths: ArrayLike, gamma: float = 1.0) -> Tokens:
    """At each token its reward plus gamma times the return of the next of the same sequence (Williams 1992, REINFORCE)."""
    sizes = _sizes(lengths)
    returns = _flat(tokens, sizes, "tokens").copy()
    if _share("gamma", gamma) == 0:
        return returns
    # Longest first, so that the sequences that reach a step are a slice; each step adds all of them at once.
    order = np.argsort(-sizes, kind="stable")
    starts, steps = (np.cumsum(sizes) - sizes)[order], sizes[order]
    reaching = np.searchsorted(-steps, -np.arange(1, int(sizes.max(initial=0))), side="left")
    for step in range(reaching.size - 1, -1, -1):
        at = starts[: reaching[step]] + step
        returns[at] += gamma * returns[at + 1]
    return returns


def gae(tokens: ArrayLike, values: ArrayLike, lengths: ArrayLike, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tokens, Tokens]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, eqs. 11 to 16); returns are advantages + values.

    Args:
        tokens: rewards of tokens, as `token_rewards` gives them.
        values: what a critic expects from each token on. After the last token of a sequence it expects 0.
        lam: 1 gives return minus value, 0 the error of one step.
    """
    sizes = _sizes(lengths)
    rewards, expected = _flat(tokens, sizes, "tokens"), _flat(values, sizes, "values")
    following = np.append(expected[1:], 0.0)[: expected.size]
    following[np.cumsum(sizes)[sizes > 0] - 1] = 0.0
    errors = rewards + _share("gamma", gamma) * following - expected
    advantages = discounted_returns(errors, sizes, gamma * _share("lam", lam))
    return advantages, advantages + expected


def _sizes(lengths: ArrayLike) -> NDArray[np.int64]:
    sizes = np.asarray(lengths, np.int64).reshape(-1)
    if (sizes < 0).any():
        raise ValueError(f"a length of {sizes.min()}; lengths are 0 or more")
    return sizes


def _flat(values: ArrayLike, sizes: NDArray[np.int64], name: str) -> Tokens:
    flat = np.asarray(values, np.float64)
    if flat.shape != (sizes.sum(),):
        raise ValueError(f"{name} of shape {flat.shape} for lengths that add up to {sizes.sum()}; give one number a trained token, flat")
    return flat


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be 0 to 1")
    return value
