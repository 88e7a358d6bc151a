"""Shows that what a batch is made into depends on the batch alone: not on the order of groups and members, nor on the layout."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.rollout import RolloutGroup
from producer.experience import AdvantageConfig, Experience, RunningMoments, make_experience
from tests.experience.test_parts import a_batch

CONFIGS = [
    AdvantageConfig("grpo"),
    AdvantageConfig("rloo", normalise=True, clip=(-1.5, 1.5)),
    AdvantageConfig("reinforce++", gamma=0.9),
    AdvantageConfig("reinforce++_baseline"),
    AdvantageConfig("opo"),
]
NAMES = ("input_ids", "loss_mask", "logprobs", "advantages", "versions", "returns", "position_ids")


def by_prompt(made: Experience) -> dict[Any, Any]:
    """Every value of every token, by the tokens and the reward of its sequence: whatever numbers its group and row have."""
    values = {name: made.layout.unplace(getattr(made, name)) for name in NAMES if getattr(made, name) is not None}
    found: dict[Any, Any] = {}
    for number, ids in enumerate(values["input_ids"]):
        own = {name: [round(float(value), 6) for value in rows[number]] for name, rows in values.items()}
        found.setdefault((tuple(ids.tolist()), float(made.rewards[number]), int(made.group_ids[number])), []).append(own)
    return {key: sorted(rows, key=str) for key, rows in found.items()}


def reordered(groups: list[RolloutGroup], rng: np.random.Generator) -> list[RolloutGroup]:
    """The groups in another order, and their members too."""
    shuffled = [groups[at] for at in rng.permutation(len(groups))]
    for group in shuffled:
        group.rollouts = [group.rollouts[at] for at in rng.permutation(len(group.rollouts))]
        for index, member in enumerate(group.rollouts):
            member.index = index
    return shuffled


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.estimator)
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), budget=st.none() | st.integers(40, 200), ranks=st.integers(1, 4))
def test_neither_order_nor_layout_nor_shards_change_a_token(config: AdvantageConfig, seed: int, budget: int | None, ranks: int) -> None:
    running = RunningMoments(3, 0.5, 2.0) if config.normalise else None
    made = make_experience(a_batch(seed), advantage=config, running=running)
    expected = by_prompt(made)
    again = make_experience(reordered(a_batch(seed), np.random.default_rng(seed)), advantage=config, running=running, token_budget=budget)
    assert by_prompt(again) == expected
    shards: dict[Any, Any] = {}
    for part in (part for of_rank in again.split(ranks, token_budget=budget) for part in of_rank if part.rollout_ids):
        for key, rows in by_prompt(part).items():
            shards[key] = sorted(shards.get(key, []) + rows, key=str)
    assert shards == expected
    if running is not None:
        assert again.running is not None
        assert made.running is not None
        assert (again.running.mean, again.running.squares) == pytest.approx((made.running.mean, made.running.squares))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.estimator)
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), shift=st.integers(-5, 5), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_rewards_of_another_scale_or_origin_teach_the_same(config: AdvantageConfig, seed: int, shift: int, factor: float) -> None:
    """Of what is divided by a deviation; the others are shown to be free of the origin in test_advantages.py."""
    if config.estimator in ("opo", "rloo"):
        return
    # Without an epsilon beside the deviation, which a small one would feel.
    exact = AdvantageConfig("grpo", eps=0.0) if config.estimator == "grpo" else AdvantageConfig(config.estimator, whiten_eps=0.0)
    groups = a_batch(seed)
    expected = make_experience(a_batch(seed), advantage=exact)
    for member in (one for group in groups for one in group.rollouts):
        member.reward = None if member.reward is None else factor * member.reward + shift
    np.testing.assert_allclose(make_experience(groups, advantage=exact).advantages, expected.advantages, atol=1e-5)
