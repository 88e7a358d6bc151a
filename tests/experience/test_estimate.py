"""Shows that a batch's advantages are made in one order, that what is left out touches nothing, and that order is of no account."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.experience import KL, AdvantageConfig, RunningMoments, preset
from producer.experience.advantages import dr_grpo, grpo, rloo
from producer.experience.config import ESTIMATORS
from producer.experience.estimate import Scored, estimate
from producer.experience.presets import PRESETS, Preset
from producer.experience.returns import discounted_returns, gae
from producer.experience.whitening import whiten

CENTRED = ["grpo", "dr_grpo", "rloo", "opo", "pass_at_k", "gdpo", "reinforce++_baseline"]
TOKENS = ["reinforce", "reinforce++", "remax", "gae"]


def scored(rewards: list[float], ids: list[int], lengths: list[int], seed: int = 0) -> Scored:
    """A batch with all that any estimator needs."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    values = np.array(rewards, np.float64)
    return Scored(
        values,
        np.array(ids),
        np.array(lengths, np.int64),
        logprobs=rng.normal(size=n) - 2,
        reference=rng.normal(size=n) - 2,
        values=rng.normal(size=n),
        baselines=np.array(ids) / 4,
        parts=np.stack([values, np.where(np.isnan(values), np.nan, np.array(lengths))], axis=1),
    )


def configured(name: str, **options: Any) -> AdvantageConfig:
    """The estimator, best of one where it is of k: the groups here are small."""
    return AdvantageConfig(name, k=1 if name == "pass_at_k" else None, **options)


def rows(flat: np.ndarray, lengths: list[int]) -> list[list[float]]:
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


@st.composite
def batches(draw: st.DrawFn) -> Scored:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    ids = [number for number, size in enumerate(sizes) for _ in range(size)]
    rewards = draw(st.lists(st.sampled_from([-1.0, 0, 0.25, 1, 7, math.nan]), min_size=len(ids), max_size=len(ids)))
    lengths = [0 if math.isnan(reward) else draw(st.integers(0, 4)) for reward in rewards]
    return scored(rewards, ids, lengths, draw(st.integers(0, 99)))


def test_o40_the_divergence_comes_off_the_reward_before_the_baseline() -> None:
    batch = Scored(
        np.array([1.0, 0]), np.array([0, 0]), np.array([2, 1]), logprobs=np.array([-1.0, -1, -2]), reference=np.array([-2.0, -2, -1])
    )
    made = estimate(AdvantageConfig("rloo", kl=KL(0.1)), batch)
    np.testing.assert_allclose(made.advantages, [0.7, 0.7, -0.7])
    assert made.metrics == pytest.approx({"kl/token": 1 / 3, "kl/sequence": 0.5})


def test_o18_remax() -> None:
    lengths = [3, 2]
    batch = Scored(np.array([1.0, 0.5]), np.array([0, 1]), np.array(lengths), baselines=np.array([0.4, 0.3]))
    made = estimate(AdvantageConfig("remax"), batch)
    np.testing.assert_allclose(made.advantages, [0.6, 0.6, 0.6, 0.2, 0.2])


def test_gae_and_reinforce_see_the_divergence_token_by_token() -> None:
    batch = scored([1.0, 0.0], [0, 1], [2, 3])
    assert batch.logprobs is not None
    assert batch.reference is not None
    assert batch.values is not None
    tokens = -0.1 * (batch.logprobs - batch.reference)
    tokens[1] += 1.0
    returns = discounted_returns(tokens, [2, 3], 0.9)
    made = estimate(AdvantageConfig("reinforce", gamma=0.9, kl=KL(0.1)), batch)
    np.testing.assert_allclose(made.advantages, returns)
    np.testing.assert_allclose(estimate(AdvantageConfig("reinforce++", gamma=0.9, kl=KL(0.1)), batch).advantages, whiten(returns, ddof=1))
    expected = gae(tokens, batch.values, [2, 3], gamma=0.9, lam=0.8)
    made = estimate(AdvantageConfig("gae", gamma=0.9, lam=0.8, kl=KL(0.1), whiten="none"), batch)
    np.testing.assert_allclose((made.advantages, made.returns), expected)


def test_rewards_are_normalised_before_the_baseline_with_the_batch_itself() -> None:
    batch, before = scored([1.0, 3, math.nan, 4], [0, 0, 0, 1], [1, 1, 0, 1]), RunningMoments().updated([0.0, 10.0])
    made = estimate(AdvantageConfig("rloo", normalise=True), batch, before)
    running = before.updated([1.0, 3, 4])
    np.testing.assert_allclose(made.advantages, rloo(running.normalised(batch.rewards), batch.group_ids)[[0, 1, 3]])
    assert made.running == running


def test_advantages_are_clipped_last_and_counted_before() -> None:
    batch = scored([0.0, 0, 0, 8], [0] * 4, [1, 1, 1, 3])
    made = estimate(AdvantageConfig("dr_grpo", clip=(-1, 5)), batch)
    assert made.advantages.tolist() == [-1, -1, -1, 5, 5, 5]
    assert made.metrics == {"advantage/clipped": 1.0}
    assert estimate(AdvantageConfig("dr_grpo", clip=(-3, 5)), batch).metrics == {"advantage/clipped": 0.5}


def test_a_loss_term_changes_no_advantage() -> None:
    batch = scored([0.0, 1], [0, 0], [2, 2])
    with_term = estimate(AdvantageConfig("grpo", kl=KL(0.5, "k3", "loss")), batch)
    np.testing.assert_array_equal(with_term.advantages, estimate(AdvantageConfig("grpo"), batch).advantages)
    assert set(with_term.metrics) == {"kl/token", "kl/sequence"}


@pytest.mark.parametrize("name", ESTIMATORS)
@given(batch=batches(), seed=st.integers(0, 99))
def test_the_order_of_rollouts_changes_nothing(name: str, batch: Scored, seed: int) -> None:
    config = configured(name, clip=(-2, 2))
    order = np.random.default_rng(seed).permutation(batch.rewards.size)
    lengths = batch.lengths.tolist()

    def tokens(flat: np.ndarray | None) -> np.ndarray:
        assert flat is not None
        return np.concatenate([np.array(rows(flat, lengths)[at], np.float64) for at in order])

    assert batch.baselines is not None
    assert batch.parts is not None
    shuffled = Scored(
        batch.rewards[order],
        10 - batch.group_ids[order],
        batch.lengths[order],
        logprobs=tokens(batch.logprobs),
        reference=tokens(batch.reference),
        values=tokens(batch.values),
        baselines=batch.baselines[order],
        parts=batch.parts[order],
    )
    made = estimate(config, batch)
    np.testing.assert_allclose(estimate(config, shuffled).advantages, tokens(made.advantages), atol=1e-9)
    assert np.isfinite(made.advantages).all()


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_o32_equal_rewards_are_zero_to_the_end(name: str, dtype: type[np.floating]) -> None:
    equal = np.full(7, 0.99, dtype).astype(np.float64)
    lengths, other = np.array([1, 2, 3, 4, 5, 0, 2, 2, 3]), np.array([0.0, 1.0])
    rewards = np.concatenate([equal, other])
    batch = Scored(rewards, np.array([0] * 7 + [1, 1]), lengths, parts=rewards[:, None])
    config = configured(name)
    made = estimate(config, batch).advantages
    assert made[:17].tolist() == [0.0] * 17
    assert (made[17:] != 0).all()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "opo", "pass_at_k", "reinforce++_baseline"])
@given(batch=batches(), shift=st.integers(-100, 100))
def test_a_constant_added_to_all_rewards_changes_nothing(name: str, batch: Scored, shift: int) -> None:
    config = configured(name)
    moved = replace(batch, rewards=batch.rewards + shift)
    np.testing.assert_allclose(estimate(config, moved).advantages, estimate(config, batch).advantages, atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "opo", "pass_at_k", "reinforce", "remax"])
@given(batch=batches())
def test_shards_of_whole_groups_are_the_batch(name: str, batch: Scored) -> None:
    config, lengths = configured(name), batch.lengths.tolist()
    whole = rows(estimate(config, batch).advantages, lengths)
    assert batch.baselines is not None
    for number in set(batch.group_ids.tolist()):
        at = np.flatnonzero(batch.group_ids == number)
        shard = Scored(batch.rewards[at], batch.group_ids[at], batch.lengths[at], baselines=batch.baselines[at])
        found = estimate(config, shard).advantages
        np.testing.assert_allclose(found, np.concatenate([np.array(whole[i]) for i in at]), atol=1e-9)


@pytest.mark.parametrize("name", [*CENTRED, *TOKENS])
def test_a_rollout_without_a_reward_has_zeros_and_touches_no_other(name: str) -> None:
    with_hole = scored([0.0, math.nan, 1.0, 2.0], [0, 0, 0, 1], [2, 3, 1, 1])
    kept = np.array([True] * 2 + [False] * 3 + [True] * 2)
    assert with_hole.logprobs is not None
    assert with_hole.values is not None
    assert with_hole.baselines is not None
    assert with_hole.parts is not None
    at = [0, 2, 3]
    without = Scored(
        with_hole.rewards[at],
        with_hole.group_ids[at],
        with_hole.lengths[at],
        values=with_hole.values[kept],
        baselines=with_hole.baselines[at],
        parts=with_hole.parts[at],
    )
    config = configured(name)
    made = estimate(config, with_hole).advantages
    assert made[~kept].tolist() == [0.0] * 3
    np.testing.assert_allclose(made[kept], estimate(config, without).advantages, atol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_without_a_trained_token_are_fine(name: str) -> None:
    made = estimate(configured(name), scored([1.0, 0.0], [0, 0], [0, 0]))
    assert made.advantages.size == 0


@pytest.mark.parametrize(("name", "lacks"), [("gae", "values"), ("remax", "baselines"), ("gdpo", "parts")])
def test_what_an_estimator_needs_is_asked_for(name: str, lacks: str) -> None:
    with pytest.raises(ValueError, match=f"needs {lacks}"):
        estimate(AdvantageConfig(name), replace(scored([1.0, 0], [0, 0], [1, 1]), **{lacks: None}))


def test_a_k_that_makes_every_advantage_zero_is_refused() -> None:
    batch = scored([0.0, 1, 0, 1], [0, 0, 1, 1], [1] * 4)
    with pytest.raises(ValueError, match="k=2 with groups of at most 2 members"):
        estimate(AdvantageConfig("pass_at_k", k=2), batch)


def _torch_whiten(values: Any, unbiased: bool) -> Any:
    return (values - values.mean()) / (values.var(unbiased=unbiased) + 1e-8) ** 0.5


def test_presets_give_the_numbers_of_their_libraries() -> None:
    """Beside the expressions of those libraries in torch, whole groups of one size, float64."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    grouped = torch.tensor(rng.normal(size=(5, 4)))
    lengths = rng.integers(1, 6, 20)
    batch = scored(grouped.flatten().tolist(), np.repeat(np.arange(5), 4).tolist(), lengths.tolist())
    repeats = torch.tensor(lengths)
    centred, std = grouped - grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True)
    loo = grouped - (grouped.sum(1, keepdim=True) - grouped) / 3
    assert batch.parts is not None
    assert batch.values is not None
    parts = torch.tensor(batch.parts).view(5, 4, 2)
    summed = ((parts - parts.mean(1, keepdim=True)) / (parts.std(1, keepdim=True) + 1e-4)).sum(-1).flatten()
    by_token = {name: values.flatten().repeat_interleave(repeats) for name, values in {"r": grouped, "centred": centred}.items()}
    critic = by_token["r"] - torch.tensor(batch.values)
    sizes = repeats.view(5, 4).double()
    shares = sizes / sizes.sum(1, keepdim=True)
    assert batch.baselines is not None
    greedy = grouped.flatten() - torch.tensor(batch.baselines)
    expected: list[tuple[Preset, str, dict[str, Any], Any, bool]] = [
        ("trl", "grpo", {}, centred / (std + 1e-4), True),
        ("trl", "grpo", {"scale": "batch"}, centred / (grouped.std() + 1e-4), True),
        ("trl", "grpo", {"scale": "none"}, centred, True),
        ("trl", "dr_grpo", {}, centred, True),
        ("trl", "rloo", {}, loo, True),
        ("trl", "gdpo", {}, (summed - summed.mean()) / (summed.std() + 1e-4), True),
        ("trl_async", "grpo", {}, centred / (grouped.std(1, keepdim=True, unbiased=False) + 1e-8), True),
        ("verl", "grpo", {}, centred / (std + 1e-6), True),
        ("verl", "dr_grpo", {}, centred, True),
        ("verl", "rloo", {}, grouped * 4 / 3 - grouped.mean(1, keepdim=True) * 4 / 3, True),
        ("verl", "opo", {}, grouped - (shares * grouped).sum(1, keepdim=True), True),
        ("verl", "remax", {}, greedy, True),
        ("verl", "reinforce++", {}, _torch_whiten(by_token["r"], unbiased=True), False),
        ("verl", "reinforce++_baseline", {}, _torch_whiten(by_token["centred"], unbiased=True), False),
        ("verl", "gae", {}, _torch_whiten(critic, unbiased=True), False),
        ("openrlhf", "grpo", {}, centred / (std + 1e-9), True),
        ("openrlhf", "dr_grpo", {}, centred, True),
        ("openrlhf", "rloo", {}, loo, True),
        ("openrlhf", "reinforce++", {}, _torch_whiten(by_token["r"], unbiased=False), False),
        ("openrlhf", "reinforce++_baseline", {}, _torch_whiten(by_token["centred"], unbiased=False), False),
        ("openrlhf", "gae", {}, _torch_whiten(critic, unbiased=False), False),
    ]
    assert {(library, name) for library, name, *_ in expected} == {(library, name) for library, names in PRESETS.items() for name in names}
    for library, name, changes, values, one_a_rollout in expected:
        flat = values.flatten().repeat_interleave(repeats) if one_a_rollout else values
        made = estimate(preset(library, name, **changes), batch).advantages
        np.testing.assert_allclose(made, flat.numpy(), atol=1e-9, err_msg=f"{library} {name} {changes}")


def test_a_preset_is_a_configuration_that_may_be_changed() -> None:
    assert preset("trl_async").eps == 1e-8
    assert preset("openrlhf", "reinforce_plus_plus").reward_clip == (-10, 10)
    assert preset("verl", "gae", lam=0.95).lam == 0.95
    with pytest.raises(ValueError, match="name='slime' must be one of"):
        preset("slime")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verl has no estimator='pass_at_k' of these numbers"):
        preset("verl", "pass_at_k")


def test_the_default_is_grpo_itself() -> None:
    batch = scored([0.0, 1, 0.5], [0, 0, 0], [1, 1, 1])
    np.testing.assert_array_equal(estimate(AdvantageConfig(), batch).advantages, grpo(batch.rewards, batch.group_ids))
    np.testing.assert_array_equal(estimate(AdvantageConfig("drgrpo"), batch).advantages, dr_grpo(batch.rewards, batch.group_ids))
