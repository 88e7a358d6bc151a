"""Shows that returns and generalised advantage estimation meet the published numbers, for sequences of any lengths at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.experience.returns import discounted_returns, gae, token_rewards

VALUES, REWARDS = [0.5, 0.6, 0.7], [0.0, 0, 1]
ragged = st.lists(st.integers(0, 7), min_size=1, max_size=8)


def test_o4_reward_on_the_last_trained_token_and_kl_on_each() -> None:
    tokens = token_rewards([1, 2], [2, 3], kl=[0.1, 0.2, 0.2, 0.1, 0.4], kl_coef=0.1)
    np.testing.assert_allclose(tokens, [-0.01, 0.98, -0.02, -0.01, 1.96])


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages", "returns"),
    [
        (1.0, 0.95, [0.46575, 0.385, 0.3], [0.96575, 0.985, 1]),
        (0.9, 0.8, [0.21712, 0.246, 0.3], [0.71712, 0.846, 1]),
        (1.0, 1.0, [0.5, 0.4, 0.3], [1, 1, 1]),
        (1.0, 0.0, [0.1, 0.1, 0.3], [0.6, 0.7, 1]),
    ],
    ids=["o5", "o6", "return minus value", "error of one step"],
)
def test_o5_and_o6_gae(gamma: float, lam: float, advantages: list[float], returns: list[float]) -> None:
    made = gae(REWARDS, VALUES, [3], gamma=gamma, lam=lam)
    np.testing.assert_allclose(made, [advantages, returns], atol=1e-12)


def test_o8_discounted_returns() -> None:
    np.testing.assert_allclose(discounted_returns([0, 0.5, 1], [3], 0.9), [1.26, 1.4, 1])


def _one_by_one(tokens: np.ndarray, gamma: float) -> list[float]:
    returns: list[float] = []
    for token in reversed(tokens):
        returns.insert(0, token + gamma * (returns[0] if returns else 0.0))
    return returns


@given(lengths=ragged, seed=st.integers(0, 99), gamma=st.sampled_from([0.0, 0.3, 0.99, 1.0]))
def test_sequences_of_any_lengths_do_not_touch_each_other(lengths: list[int], seed: int, gamma: float) -> None:
    tokens = np.random.default_rng(seed).normal(size=sum(lengths))
    before = tokens.copy()
    expected = [value for part in np.split(tokens, np.cumsum(lengths)[:-1]) for value in _one_by_one(part, gamma)]
    np.testing.assert_allclose(discounted_returns(tokens, lengths, gamma), expected, atol=1e-12)
    np.testing.assert_array_equal(tokens, before)


@given(lengths=ragged, seed=st.integers(0, 99))
def test_gae_without_discount_or_decay_is_return_minus_value(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, values = rng.normal(size=(2, sum(lengths)))
    advantages, returns = gae(tokens, values, lengths, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, discounted_returns(tokens, lengths), atol=1e-12)
    np.testing.assert_allclose(advantages, returns - values, atol=1e-12)


@given(lengths=ragged, seed=st.integers(0, 99))
def test_a_batch_in_parts_is_the_whole(lengths: list[int], seed: int) -> None:
    tokens, values = np.random.default_rng(seed).normal(size=(2, sum(lengths)))
    bounds = np.cumsum(lengths)[:-1]
    parts = [
        gae(token, value, [length], gamma=0.9)
        for token, value, length in zip(np.split(tokens, bounds), np.split(values, bounds), lengths, strict=True)
    ]
    np.testing.assert_allclose(gae(tokens, values, lengths, gamma=0.9), np.concatenate(parts, axis=1))


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="2 rewards came with 1 lengths"):
        token_rewards([1, 2], [3])
    with pytest.raises(ValueError, match=r"kl of shape \(2,\) for lengths that add up to 3"):
        token_rewards([1], [3], kl=[0.1, 0.2], kl_coef=0.1)
    with pytest.raises(ValueError, match=r"values of shape \(2,\)"):
        gae([0, 1, 2], [0, 1], [3])
    with pytest.raises(ValueError, match=r"gamma=1.1 must be 0 to 1"):
        discounted_returns([0.0], [1], 1.1)
    with pytest.raises(ValueError, match=r"lam=-1 must be"):
        gae([0.0], [0.0], [1], lam=-1)
    with pytest.raises(ValueError, match="a length of -1"):
        discounted_returns([], [-1])
