"""Shows that an experience holds exactly the tokens, masks and values of its rollouts, that what cannot be trained on is counted, and that
a real model sees the same sequences packed and padded."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.rollout import RolloutGroup, RolloutState
from buffer.status import Status
from producer.experience import KL, AdvantageConfig, Attached, Experience, Overlong, RunningMoments, StopProperly, make_experience
from producer.experience.config import ESTIMATORS


def rollout(group_id: int, index: int, prompt: Sequence[int] | None, *parts: Sequence[int], reward: float | None = 0.0) -> RolloutState:
    """Parts alternate between the policy's tokens (log-probability -token / 100, version token) and the environment's."""
    state = RolloutState(group_id=group_id, index=index, status=Status.COMPLETED, prompt_ids=None if prompt is None else np.array(prompt))
    for number, part in enumerate(parts):
        if number % 2 == 0:
            state.append(part, logprobs=[-token / 100 for token in part], version=list(part))
        else:
            state.append(part, trainable=False)
    state.reward = state.score = reward
    return state


def group(group_id: int, *rollouts: RolloutState) -> RolloutGroup:
    return RolloutGroup(group_id=group_id, rollouts=list(rollouts))


def two_groups() -> list[RolloutGroup]:
    return [
        group(7, rollout(7, 0, [1, 2, 3], [10, 11], [20, 21], [30], reward=1.0), rollout(7, 1, [1, 2, 3], [12], reward=0.0)),
        group(9, rollout(9, 0, [4], [13, 14], reward=0.5), rollout(9, 1, [4], [15], reward=0.5)),
    ]


def test_o35_prompt_response_and_masks() -> None:
    made = make_experience(two_groups()[:1], advantage="drgrpo")
    assert made.input_ids[0].tolist() == [1, 2, 3, 10, 11, 20, 21, 30]
    assert made.loss_mask[0].astype(int).tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert made.shift_mask[0].astype(int).tolist() == [0, 0, 1, 1, 0, 0, 1, 0]
    np.testing.assert_allclose(made.logprobs[0], [0, 0, 0, -0.10, -0.11, 0, 0, -0.30])
    np.testing.assert_allclose(made.shift_logprobs[0], [0, 0, -0.10, -0.11, 0, 0, -0.30, 0])
    assert made.versions[0].tolist() == [-1, -1, -1, 10, 11, -1, -1, 30]
    assert made.advantages[0].tolist() == [0, 0, 0, 0.5, 0.5, 0, 0, 0.5]
    assert made.shift_advantages[0].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0.5, 0]
    assert made.shift_labels[0].tolist() == [2, 3, 10, 11, 20, 21, 30, -100]


def test_padding_is_on_the_right_and_outside_every_mask() -> None:
    made = make_experience(two_groups(), advantage="rloo", pad_id=99)
    assert made.input_ids[3].tolist() == [4, 15, *[99] * 6]
    assert made.attention_mask is not None
    assert made.attention_mask.sum(-1).tolist() == [8, 4, 3, 2]
    assert made.position_ids[3].tolist() == [0, 1, *[0] * 6]
    assert made.shift_labels[3].tolist() == [15, *[-100] * 7]
    assert made.loss_mask.sum(-1).tolist() == [3, 1, 2, 1]
    assert (made.rewards.tolist(), made.group_ids.tolist()) == ([1.0, 0.0, 0.5, 0.5], [7, 7, 9, 9])
    assert made.rollout_ids == ("default-7-0", "default-7-1", "default-9-0", "default-9-1")
    assert not made.advantages[2:].any()


@given(budget=st.integers(8, 40))
def test_packed_and_padded_hold_the_same(budget: int) -> None:
    padded, packed = make_experience(two_groups()), make_experience(two_groups(), token_budget=budget)
    assert packed.attention_mask is None
    assert packed.input_ids.shape[1] <= budget
    for name in ("input_ids", "position_ids", "loss_mask", "logprobs", "advantages", "versions", "shift_labels", "shift_mask"):
        both = zip(padded.layout.unplace(getattr(padded, name)), packed.layout.unplace(getattr(packed, name)), strict=True)
        for one, other in both:
            np.testing.assert_array_equal(one, other)
    for reduction in ("token-mean", "seq-mean-token-mean"):
        weights = [(made.shift_advantages * made.shift_weights(reduction)).sum() for made in (padded, packed)]
        assert weights[0] == pytest.approx(weights[1])


def test_what_cannot_be_trained_on_is_left_out_and_counted() -> None:
    groups = [
        group(
            1,
            rollout(1, 0, [1], [10], reward=1.0),
            rollout(1, 1, [1], [11], reward=None),
            rollout(1, 2, [1], reward=0.0),
            rollout(1, 3, [1], [], [20, 21], reward=0.0),
            rollout(1, 4, None, [12], reward=0.0),
            rollout(1, 5, [1], [13], reward=float("nan")),
        )
    ]
    made = make_experience(groups, advantage="drgrpo")
    assert made.rollout_ids == ("default-1-0",)
    left_out = {name: value for name, value in made.metrics.items() if name.startswith("left_out/")}
    assert left_out == {
        "left_out/total": 5,
        "left_out/no_reward": 1,
        "left_out/reward_not_finite": 1,
        "left_out/no_response": 1,
        "left_out/no_trained_token": 1,
        "left_out/no_prompt_ids": 1,
    }
    # The baseline is of the four that have a reward, whatever became of their tokens.
    assert made.advantages.tolist() == [[0.0, 0.75]]


def test_a_batch_without_anything_to_train_on_is_an_error_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"none of 1 rollouts in 1 groups .*'no_reward': 1"):
        make_experience([group(1, rollout(1, 0, [1], [10], reward=None))])
    with pytest.raises(ValueError, match="none of 0 rollouts"):
        make_experience([])
    with pytest.raises(ValueError, match="rollout default-7-0 has 8 tokens, over token_budget=7"):
        make_experience(two_groups(), token_budget=7)
    with pytest.raises(ValueError, match="token_budget='100' must be a whole number"):
        make_experience(two_groups(), token_budget="100")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pad_id=None must be a whole number"):
        make_experience(two_groups(), pad_id=None)  # type: ignore[arg-type]


def test_a_log_probability_outside_the_mask_never_reaches_the_arrays() -> None:
    state = rollout(1, 0, [1], [10], reward=1.0)
    state.append([20], logprobs=[float("nan")], trainable=False)
    made = make_experience([group(1, state)])
    np.testing.assert_allclose(made.logprobs, [[0, -0.10, 0]])


def test_weights_of_shards_add_up_to_the_whole() -> None:
    groups = two_groups()
    whole, shards = make_experience(groups), [make_experience([one], token_budget=9) for one in groups]
    totals = shards[0].totals + shards[1].totals
    assert totals == whole.totals
    for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        found = sum((shard.shift_weights(reduction, totals=totals) * shard.shift_logprobs).sum() for shard in shards)
        assert found == pytest.approx((whole.shift_weights(reduction) * whole.shift_logprobs).sum())


def test_metrics_are_flat_and_finite() -> None:
    metrics = make_experience(two_groups(), token_budget=9).metrics
    own = {name: value for name, value in metrics.items() if not name.startswith(("advantage/", "entropy/"))}  # see test_statistics
    assert own == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/std": 0.125**0.5,
            "score/mean": 0.5,
            "groups/zero_variance": 0.5,
            "left_out/total": 0,
            "rollouts": 4,
            "length/mean": 9 / 4,
            "length/max": 5,
            "tokens/trained": 7,
            "tokens/fill": 17 / 18,
        }
    )
    assert all(isinstance(value, float) for value in metrics.values())


def test_an_advantage_may_be_any_function() -> None:
    made = make_experience(two_groups(), advantage=lambda rewards, ids: np.asarray(ids) + 1.0)
    assert [row.max() for row in made.advantages] == [1.0, 1.0, 2.0, 2.0]
    for wrong in (lambda rewards, ids: np.zeros(3), lambda rewards, ids: np.full(4, np.nan)):
        with pytest.raises(ValueError, match="must give 4 finite numbers"):
            make_experience(two_groups(), advantage=wrong)


def attached_to(groups: Sequence[RolloutGroup]) -> Attached:
    """A reference that gives each token 0.5 less than the policy, and a critic that expects a quarter of each token's number."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return Attached(
        reference={one.rollout_id: np.where(one.loss_mask == 1, one.logprobs - 0.5, np.nan) for one in rollouts},
        values={one.rollout_id: one.response_ids / 4 for one in rollouts},
        baselines={group.group_id: 0.25 for group in groups},
    )


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("budget", [None, 11])
def test_every_estimator_makes_an_experience(name: str, budget: int | None) -> None:
    groups = two_groups()
    for rollout in [rollout for group in groups for rollout in group.rollouts]:
        rollout.reward_parts = {"right": rollout.reward or 0.0, "short": float(rollout.response_ids.size)}
    config = AdvantageConfig(name, k=1 if name == "pass_at_k" else None)
    made = make_experience(groups, advantage=config, attached=attached_to(groups), token_budget=budget)
    assert np.isfinite(made.advantages).all()
    assert made.advantages.any()
    assert not made.advantages[~made.loss_mask].any()
    assert (made.returns is not None) == (ESTIMATORS[name].kind == "tokens")


def test_what_is_attached_lies_at_the_trained_tokens() -> None:
    groups = two_groups()
    config = AdvantageConfig("gae", kl=KL(0.1), lam=1.0, whiten="none")
    made = make_experience(groups, advantage=config, attached=attached_to(groups))
    assert made.reference_logprobs is not None
    assert made.values is not None
    assert made.returns is not None
    np.testing.assert_allclose(made.reference_logprobs[0], [0, 0, 0, -0.6, -0.61, 0, 0, -0.8], rtol=1e-6)
    np.testing.assert_allclose(made.values[0], [0, 0, 0, 2.5, 2.75, 0, 0, 7.5])
    # The divergence of 0.5 costs 0.05 a token; the environment's two tokens are skipped.
    np.testing.assert_allclose(made.returns[0], [0, 0, 0, 0.85, 0.9, 0, 0, 0.95], rtol=1e-6)
    np.testing.assert_allclose(made.advantages, made.returns - made.values, rtol=1e-6)
    assert made.shift_values is not None
    assert made.shift_returns is not None
    assert made.shift_reference_logprobs is not None
    assert made.shift_values[0].tolist() == [0, 0, 2.5, 2.75, 0, 0, 7.5, 0]
    assert made.metrics["kl/token"] == pytest.approx(0.5)
    assert made.metrics["kl/sequence"] == pytest.approx(3.5 / 4)
    without = make_experience(groups)
    assert (without.reference_logprobs, without.values, without.returns, without.shift_values) == (None,) * 4


def test_rewards_are_shaped_clipped_and_normalised_in_this_order() -> None:
    groups = two_groups()
    groups[0].rollouts[0].finish_reason = "length"
    config = AdvantageConfig("rloo", shape=(Overlong(limit=5, buffer=2), StopProperly(-3.0)), reward_clip=(-2.0, 0.25), normalise=True)
    made = make_experience(groups, advantage=config, running=RunningMoments().updated([0.0]))
    assert made.rewards.tolist() == [-2.0, 0.0, 0.25, 0.25]
    assert made.metrics["reward/clipped"] == 0.75
    assert made.running == RunningMoments().updated([0.0]).updated(made.rewards)
    spread = 2.0 / made.running.std
    assert made.advantages.max(axis=1).tolist() == pytest.approx([0, spread, 0, 0])
    assert made.advantages[0, 3] == pytest.approx(-spread)
    assert make_experience(two_groups()).running is None


def test_lacking_what_the_configuration_needs_is_a_reason_or_an_error() -> None:
    groups = two_groups()
    with pytest.raises(ValueError, match=r"'gae' needs values; attach them"):
        make_experience(groups, advantage="gae")
    with pytest.raises(ValueError, match=r"needs log-probabilities of a reference"):
        make_experience(groups, advantage=AdvantageConfig(kl=KL(0.1, "k2", "loss")))
    with pytest.raises(ValueError, match=r"'no_reward_parts': 4"):
        make_experience(groups, advantage="gdpo")
    whole = attached_to(groups)
    values = {"default-7-0": whole.values["default-7-0"], "default-7-1": [np.nan]}
    made = make_experience(groups, advantage="gae", attached=Attached(values=values))
    assert made.rollout_ids == ("default-7-0",)
    assert (made.metrics["left_out/no_values"], made.metrics["left_out/values_not_finite"]) == (2, 1)
    made = make_experience(groups, advantage="remax", attached=Attached(baselines={9: 0.0, 7: float("nan")}))
    assert (made.rollout_ids, made.metrics["left_out/no_baseline"]) == (("default-9-0", "default-9-1"), 2)
    with pytest.raises(ValueError, match=r"values of rollout default-7-0 has shape \(2,\) for 5 tokens"):
        make_experience(groups, advantage="gae", attached=Attached(values={"default-7-0": [0, 0]}))


def test_a_member_whose_divergence_is_not_known_has_no_part_in_the_baseline() -> None:
    groups = [group(1, *(rollout(1, index, [1], [10], reward=float(index)) for index in range(3)))]
    reference = {f"default-1-{index}": [-0.1] for index in (0, 2)}
    made = make_experience(groups, advantage=AdvantageConfig("dr_grpo", kl=KL(0.1)), attached=Attached(reference=reference))
    assert made.advantages[:, 1].tolist() == [-1.0, 1.0]
    assert made.metrics["left_out/no_reference"] == 1


def test_a_shape_that_gives_no_number_leaves_its_rollout_out() -> None:
    config = AdvantageConfig("dr_grpo", shape=(lambda rewards, lengths, truncated: np.where(lengths == 5, np.nan, rewards),))
    made = make_experience(two_groups(), advantage=config)
    assert made.metrics["left_out/shaped_not_finite"] == 1
    assert not made.advantages.any()  # the sibling that is left has nothing to be compared with


FINITE_AND_NO_USE = [1e39, 1e200, 1e308, -1e308, -3.4028234663852886e38]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("huge", FINITE_AND_NO_USE)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_finite_number_without_room_for_its_square_costs_its_row_only(name: str, huge: float) -> None:
    """Else it is an advantage of infinity in float32, NaN in the loss, or a deviation by which all its siblings become 0."""
    rows = [rollout(1, index, [1, 2], [10 + index, 11], reward=reward) for index, reward in enumerate([1.0, 0.0, huge, 0.5])]
    for one in rows:
        one.reward_parts = {"a": one.reward or 0.0}
    ids = [one.rollout_id for one in rows]
    beside = Attached(values={each: [huge if each == ids[3] and name == "gae" else 0.1] * 2 for each in ids}, baselines={1: 0.25})
    config = AdvantageConfig(name, k=2 if name == "pass_at_k" else None)
    made = make_experience([group(1, *rows)], advantage=config, attached=beside)
    assert made.rollout_ids == tuple(ids[:2] if name == "gae" else [*ids[:2], ids[3]])
    assert made.metrics["left_out/reward_not_finite"] == 1
    assert all(np.isfinite(value) for value in made.metrics.values())
    for array in (made.advantages, made.returns, made.values):
        assert array is None or np.isfinite(array).all()
    assert made.advantages.any()  # the others are told apart as if it were not there


def test_an_advantage_that_float32_cannot_hold_is_an_error_and_no_loss() -> None:
    for values in ([1e300, 0, 0, 0], [0, 0, -1e39, 0]):
        with pytest.raises(ValueError, match=r"the advantage of rollout default-[79]-0 is .*1e.*, which float32 cannot hold"):
            make_experience(two_groups(), advantage=lambda rewards, ids, values=values: np.array(values))
    least = [group(1, rollout(1, 0, [1], [10], reward=1e-200), rollout(1, 1, [1], [10], reward=0.0))]
    with pytest.raises(ValueError, match=r"default-1-0 is inf.* an eps above 0"), np.errstate(divide="ignore"):
        make_experience(least, advantage=AdvantageConfig(eps=0.0))
    far = Attached(reference={one.rollout_id: [90.0] * one.response_ids.size for each in two_groups() for one in each.rollouts})
    for kl in (KL(0.1, "k3"), KL(0.1, "k3", "loss")):
        with pytest.raises(ValueError, match=r"the divergence k3 of a token is 1.*e\+39, above 1e\+15"):
            make_experience(two_groups(), advantage=AdvantageConfig("rloo", kl=kl), attached=far)


def test_tensors_are_the_same_by_name() -> None:
    torch = pytest.importorskip("torch")
    made = make_experience(two_groups())
    tensors = made.to_torch("cpu")
    assert {tensor.shape for tensor in tensors.values()} == {made.input_ids.shape}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), getattr(made, name))
    assert (tensors["input_ids"].dtype, tensors["advantages"].dtype, tensors["loss_mask"].dtype) == (torch.int64, torch.float32, torch.bool)
    assert "attention_mask" not in make_experience(two_groups(), token_budget=20).to_torch()


def _model_logprobs(made: Experience, folder: Path) -> list[np.ndarray]:
    """What a model gives each next token, by sequence; row by row, as training does."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tensors = made.to_torch()
    rows = []
    for row in range(len(made.input_ids)):
        inputs = {name: tensors[name][row : row + 1] for name in ("input_ids", "attention_mask", "position_ids") if name in tensors}
        labels = tensors["shift_labels"][row : row + 1].clamp(min=0)
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        rows.append(torch.log_softmax(logits, -1).gather(-1, labels[..., None])[0, :, 0].numpy())
    return made.layout.unplace(np.where(made.shift_labels >= 0, np.stack(rows), 0.0))


def test_a_model_gives_packed_sequences_the_logprobs_of_padded_ones(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.tiny_model import make_tiny_model

    folder = make_tiny_model(tmp_path)
    padded, packed = make_experience(two_groups()), make_experience(two_groups(), token_budget=11)
    assert len(packed.layout.rows) == 2
    for one, other in zip(_model_logprobs(padded, folder), _model_logprobs(packed, folder), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, producer.experience; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
