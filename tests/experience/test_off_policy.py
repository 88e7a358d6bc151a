"""Shows that importance ratios become the published weights, by oracle and by brute force, that nothing makes them or their metrics
anything but finite, and that `make_experience` puts them beside the right tokens."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agent_loop.sampling import SamplingParams
from buffer.rollout import RolloutGroup, RolloutState
from buffer.staleness import Timeline
from buffer.status import Status
from producer.experience import AdvantageConfig, Attached, OffPolicy, make_experience
from producer.experience.behaviour import bias_of
from producer.experience.off_policy import CORRECTIONS, correct, effective_share, off_policy_named

TRAINER = [-1.0, -2.0, -0.5]
SAMPLER = [-1.1, -1.8, -2.0]
RATIOS = [1.1051709, 0.8187308, 4.4816891]


def weights_of(config: OffPolicy, trainer: list[float] = TRAINER, sampler: list[float] = SAMPLER) -> list[float]:
    return correct(config, [len(trainer)], trainer=trainer, sampler=sampler).weights.tolist()


def test_o26_tokens_truncated_and_masked() -> None:
    assert weights_of(OffPolicy("token", truncate=(0, 3))) == pytest.approx([*RATIOS[:2], 3], rel=1e-6)
    assert weights_of(OffPolicy("token", mask="token", keep=(0, 3))) == pytest.approx([*RATIOS[:2], 0], rel=1e-6)


def test_o27_the_product_and_the_geometric_mean_of_a_sequence() -> None:
    assert weights_of(OffPolicy("sequence", truncate=(0, math.inf))) == pytest.approx([4.0552000] * 3, rel=1e-6)
    assert weights_of(OffPolicy("sequence", truncate=(0, 3))) == [3.0] * 3
    assert weights_of(OffPolicy("sequence", mask="sequence", keep=(0, 3))) == [0.0] * 3
    assert weights_of(OffPolicy("geometric", truncate=(0, 3))) == pytest.approx([1.5946698] * 3, rel=1e-6)
    assert weights_of(CORRECTIONS["mis"]) == [0.0] * 3


def test_o38_with_bounds_on_both_sides() -> None:
    sampler = [-1.1, -1.8, -2.5]
    assert weights_of(OffPolicy("token", truncate=(0.5, 5)), sampler=sampler) == pytest.approx([*RATIOS[:2], 5], rel=1e-6)
    assert weights_of(CORRECTIONS["icepop"], sampler=sampler) == pytest.approx([*RATIOS[:2], 0], rel=1e-6)
    assert weights_of(OffPolicy("geometric", truncate=(0.5, 5)), sampler=sampler) == pytest.approx([1.8838797] * 3, rel=1e-6)


def test_o39_negative_tokens_of_sequences_that_are_far_off() -> None:
    trainer = np.zeros(6)
    sampler, advantages = np.repeat([2.0, 0.5, 2.0], 2), np.repeat([1.0, -1.0, -1.0], 2)
    made = correct(OffPolicy(negative_kl=1.0), [2, 2, 2], trainer=trainer, sampler=sampler, advantages=advantages)
    assert made.kept.tolist() == [True] * 4 + [False] * 2
    assert made.weights.tolist() == [1.0] * 4 + [0.0] * 2
    assert made.metrics["off_policy/masked_sequences"] == pytest.approx(1 / 3)


def by_hand(config: OffPolicy, lengths: list[int], trainer: np.ndarray, sampler: np.ndarray) -> list[float]:
    """One token after the other, as the definitions read."""
    weights, start = [], 0
    for length in lengths:
        ratios = [math.exp(a - b) for a, b in zip(trainer[start:][:length], sampler[start:][:length], strict=True)]
        product = math.prod(ratios)
        for ratio in ratios:
            of_level = {"token": ratio, "sequence": product, "geometric": product ** (1 / length), None: 1.0}
            weight = of_level[config.weight]
            if config.truncate is not None:
                weight = min(max(weight, config.truncate[0]), config.truncate[1])
            if config.keep is not None and not config.keep[0] <= of_level[config.mask] <= config.keep[1]:
                weight = 0.0
            weights.append(weight)
        start += length
    return weights


LEVELS = st.sampled_from(["token", "sequence", "geometric"])
BOUNDS = st.tuples(st.floats(0, 1), st.floats(1, 10))
CONFIGS = st.one_of(
    st.builds(lambda weight, truncate: OffPolicy(weight, truncate=truncate), LEVELS, BOUNDS),
    st.builds(lambda mask, keep: OffPolicy(mask=mask, keep=keep), LEVELS, BOUNDS),
    st.builds(lambda weight, truncate, mask, keep: OffPolicy(weight, truncate, mask, keep), LEVELS, BOUNDS, LEVELS, BOUNDS),
)


@given(config=CONFIGS, lengths=st.lists(st.integers(0, 5), max_size=6), data=st.data())
def test_weights_are_those_of_the_definitions(config: OffPolicy, lengths: list[int], data: st.DataObject) -> None:
    logs = arrays.arrays(np.float64, sum(lengths), elements=st.floats(-3, 0, width=16))
    trainer, sampler = data.draw(logs), data.draw(logs)
    made = correct(config, lengths, trainer=trainer, sampler=sampler)
    expected = np.array(by_hand(config, lengths, trainer, sampler))
    # A ratio that equals a bound to the last digit may fall on either side of it.
    near = np.zeros(len(expected), np.bool_)
    if config.keep is not None and config.mask is not None:
        held = np.array(by_hand(OffPolicy(config.mask, truncate=(0, math.inf)), lengths, trainer, sampler))
        near = np.isclose(held, config.keep[0], rtol=1e-9) | np.isclose(held, config.keep[1], rtol=1e-9)
    np.testing.assert_allclose(made.weights[~near], expected[~near], rtol=1e-9)


@given(config=CONFIGS, lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6), data=st.data())
def test_neither_order_nor_shards_change_a_weight(config: OffPolicy, lengths: list[int], data: st.DataObject) -> None:
    logs = arrays.arrays(np.float64, sum(lengths), elements=st.floats(-3, 0, width=16))
    bounds = np.cumsum(lengths)[:-1]
    pairs = list(zip(np.split(data.draw(logs), bounds), np.split(data.draw(logs), bounds), strict=True))

    def weights(chosen: list[int]) -> list[float]:
        trainer, sampler = (np.concatenate([np.zeros(0), *(pairs[number][side] for number in chosen)]) for side in (0, 1))
        return correct(config, [lengths[number] for number in chosen], trainer=trainer, sampler=sampler).weights.tolist()

    order = data.draw(st.permutations(range(len(lengths))))
    assert weights(order) == pytest.approx([weight for number in order for weight in weights([number])], rel=1e-9)


def test_weighed_samples_of_one_policy_have_the_expectation_of_the_other() -> None:
    """Over all sequences of two tokens out of three: products of ratios are exact, single ratios are for the first token."""
    draw = np.random.default_rng(0)
    p, q = (draw.dirichlet(np.ones(3), 4) for _ in range(2))  # the first token's distribution, then one after each first token
    pairs = [(first, second) for first in range(3) for second in range(3)]

    def logs(policy: np.ndarray) -> np.ndarray:
        return np.log([[policy[0, first], policy[1 + first, second]] for first, second in pairs])

    def weights(config: OffPolicy) -> np.ndarray:
        return correct(config, [2] * 9, trainer=logs(p), sampler=logs(q)).weights.reshape(9, 2)

    values = draw.normal(size=9)
    expected = np.exp(logs(p).sum(1)) @ values
    sampled = np.exp(logs(q).sum(1))
    exact = weights(OffPolicy("sequence", truncate=(0, math.inf)))[:, 0]
    assert sampled @ (exact * values) == pytest.approx(expected)
    assert sampled @ exact == pytest.approx(1.0)
    # Token by token the first is exact, and the second is still of what q made the first.
    by_token = weights(OffPolicy("token", truncate=(0, math.inf)))
    first = np.array([value for value in draw.normal(size=3) for _ in range(3)])
    assert sampled @ (by_token[:, 0] * first) == pytest.approx(np.exp(logs(p).sum(1)) @ first)
    assert sampled @ (by_token[:, 1] * values) != pytest.approx(expected)


BAD = st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0, -1.0, 700.0, -700.0, -3.4e38])


@given(
    config=CONFIGS | st.just(OffPolicy(negative_kl=0.5, max_staleness=1)), lengths=st.lists(st.integers(0, 4), max_size=5), data=st.data()
)
def test_whatever_goes_in_what_comes_out_is_finite(config: OffPolicy, lengths: list[int], data: st.DataObject) -> None:
    logs = arrays.arrays(np.float64, sum(lengths), elements=BAD)
    trainer, sampler = data.draw(logs), data.draw(logs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = correct(config, lengths, trainer=trainer, sampler=sampler, advantages=-np.ones(sum(lengths)), fresh=np.ones(sum(lengths)))
    assert np.isfinite(made.weights.astype(np.float32)).all()
    assert all(isinstance(value, float) and math.isfinite(value) for value in made.metrics.values())
    assert not made.weights[~made.kept].any()
    unknown = ~(np.isfinite(trainer) & np.isfinite(sampler))
    assert not made.weights[unknown].any()


def test_a_ratio_that_is_not_known_costs_its_token_or_its_sequence() -> None:
    trainer, sampler = [math.nan, -1.0, -1.0], [-1.0, -1.0, -1.0]
    token = correct(CORRECTIONS["tis"], [2, 1], trainer=trainer, sampler=sampler)
    assert token.weights.tolist() == [0.0, 1.0, 1.0]
    assert token.metrics["off_policy/masked"] == pytest.approx(1 / 3)
    assert correct(CORRECTIONS["sequence_tis"], [2, 1], trainer=trainer, sampler=sampler).weights.tolist() == [0.0, 0.0, 1.0]
    assert correct(CORRECTIONS["measure"], [2, 1], trainer=[math.nan] * 3, sampler=sampler).weights.tolist() == [0.0] * 3


def test_metrics_are_of_the_ratios_before_anything_is_cut() -> None:
    made = correct(OffPolicy("token", truncate=(0.9, 3)), [3], trainer=TRAINER, sampler=SAMPLER)
    logs = np.subtract(TRAINER, SAMPLER)
    assert made.metrics == pytest.approx(
        {
            "off_policy/ratio_mean": np.mean(RATIOS),
            "off_policy/ratio_min": RATIOS[1],
            "off_policy/ratio_max": RATIOS[2],
            "off_policy/ess": sum(RATIOS) ** 2 / sum(ratio**2 for ratio in RATIOS) / 3,
            "off_policy/kl_k1": -logs.mean(),
            "off_policy/kl_k3": np.mean(np.exp(logs) - 1 - logs),
            "off_policy/truncated": 2 / 3,
            "off_policy/masked": 0.0,
            "off_policy/masked_sequences": 0.0,
            "off_policy/weight_mean": (RATIOS[0] + 0.9 + 3) / 3,
        },
        rel=1e-6,
    )
    sequences = correct(CORRECTIONS["sequence_tis"], [2, 1], trainer=TRAINER, sampler=SAMPLER).metrics
    assert sequences["off_policy/ratio_mean"] == pytest.approx((RATIOS[0] * RATIOS[1] + RATIOS[2]) / 2)
    assert sequences["off_policy/truncated"] == pytest.approx(1 / 3)


def test_the_effective_share_is_that_of_equal_weights() -> None:
    assert effective_share(np.full(7, 1000.0)) == pytest.approx(1.0)
    assert effective_share([0.0, -2000.0, -2000.0, -2000.0]) == pytest.approx(0.25)


def test_kl_estimates_are_those_of_the_sampler_to_the_trainer() -> None:
    # Exact sums over three tokens in place of samples: O3 has the same distributions.
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    drawn = np.repeat([0, 1, 2], [50, 30, 20])
    metrics = correct(OffPolicy(), [100], trainer=np.log(q[drawn]), sampler=np.log(p[drawn])).metrics
    assert metrics["off_policy/kl_k1"] == pytest.approx(0.2748872)
    assert metrics["off_policy/kl_k3"] == pytest.approx(0.2748872)
    assert metrics["off_policy/ratio_mean"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weight": "row"}, "weight='row' must be one of"),
        ({"weight": "token"}, "no end to its variance"),
        ({"truncate": (0, 2)}, "without a weight"),
        ({"mask": "token"}, "a mask needs bounds"),
        ({"keep": (0.5, 5)}, "a mask needs bounds"),
        ({"weight": "token", "truncate": (2, 3)}, "equal policies have ratio 1"),
        ({"weight": "token", "truncate": (0, math.nan)}, "equal policies have ratio 1"),
        ({"weight": "token", "truncate": 2}, "equal policies have ratio 1"),
        ({"sampling": {"top_p": 0.8}}, "must be the SamplingParams"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        OffPolicy(**options)  # type: ignore[arg-type]


def test_arrays_that_do_not_fit_and_names_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values of trainer for 3 trained tokens"):
        correct(OffPolicy(), [3], trainer=[0, 0], sampler=[0, 0, 0])
    with pytest.raises(ValueError, match="needs advantages"):
        correct(OffPolicy(negative_kl=1.0), [1], trainer=[0], sampler=[0])
    with pytest.raises(ValueError, match="unknown correction off_policy='ppo'"):
        off_policy_named("ppo")


# In make_experience


def state(index: int, *, reward: float = 0.0, sampling: dict[str, object] | None = None) -> RolloutState:
    """Two prompt tokens, two of the policy at versions 3 and 5, one of the environment, one more of the policy at version 6."""
    made = RolloutState(1, index, status=Status.COMPLETED, prompt_ids=np.array([1, 2]), sampling=sampling or {})
    made.append([10, 11], logprobs=[-1.0, -1.0], version=[3, 5])
    made.append([20], trainable=False)
    made.append([12], logprobs=[-1.0], version=6)
    made.score = made.reward = reward
    return made


def groups(**fields: object) -> list[RolloutGroup]:
    return [RolloutGroup(1, [state(index, reward=float(index), **fields) for index in range(2)])]  # type: ignore[arg-type]


def attached(*differences: list[float], **fields: object) -> Attached:
    """A trainer whose log-probabilities of the four response tokens differ so from the stored ones."""
    trainer = {f"default-1-{index}": np.array([-1.0, -1.0, 0.0, -1.0]) + each for index, each in enumerate(differences)}
    return Attached(trainer=trainer, **fields)  # type: ignore[arg-type]


LOG2 = math.log(2)


@pytest.mark.parametrize("budget", [None, 12])
def test_weights_stand_at_their_tokens_and_are_shifted_with_them(budget: int | None) -> None:
    beside = attached([LOG2, -LOG2, 99.0, 2 * LOG2], [0.0] * 4)
    made = make_experience(groups(), advantage="rloo", attached=beside, off_policy=OffPolicy("token", truncate=(0, 3)), token_budget=budget)
    assert made.importance is not None
    assert made.shift_importance is not None
    assert made.trainer_logprobs is not None
    found = made.layout.unplace(made.importance)
    np.testing.assert_allclose(found[0], [0, 0, 2, 0.5, 0, 3], rtol=1e-6)
    assert found[1].tolist() == [0, 0, 1, 1, 0, 1]
    np.testing.assert_allclose(made.layout.unplace(made.shift_importance)[0], [0, 2, 0.5, 0, 3, 0], rtol=1e-6)
    np.testing.assert_allclose(made.layout.unplace(made.trainer_logprobs)[0], [0, 0, LOG2 - 1, -LOG2 - 1, 0, 2 * LOG2 - 1], rtol=1e-6)
    assert made.metrics["off_policy/truncated"] == pytest.approx(1 / 6)
    assert made.metrics["off_policy/biased"] == 0.0
    assert made.metrics["off_policy/ratio_max"] == pytest.approx(4.0)


def test_without_a_correction_there_is_no_weight() -> None:
    made = make_experience(groups(), attached=attached([0.0] * 4, [0.0] * 4))
    assert made.importance is made.shift_importance is None
    assert made.shift_trainer_logprobs is not None
    assert not [name for name in made.metrics if name.startswith("off_policy/")]


def test_what_is_not_attached_is_refused_or_left_out_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"needs log-probabilities by the policy that is trained; attach them"):
        make_experience(groups(), off_policy="tis")
    with pytest.raises(ValueError, match=r"max_staleness=1 needs the trainer's version"):
        make_experience(groups(), off_policy=OffPolicy(max_staleness=1))
    made = make_experience(groups(), advantage="rloo", attached=attached([0.0] * 4), off_policy="tis")
    assert (made.rollout_ids, made.metrics["left_out/no_trainer"]) == (("default-1-0",), 1)
    made = make_experience(groups(), attached=attached([math.nan] * 4, [0.0] * 4), off_policy="tis")
    assert (made.rollout_ids, made.metrics["left_out/trainer_not_finite"]) == (("default-1-1",), 1)


def test_stale_tokens_are_masked_one_by_one() -> None:
    policy = OffPolicy(max_staleness=1)
    made = make_experience(groups(), advantage="rloo", attached=Attached(version=6), off_policy=policy)
    assert made.importance is not None
    assert made.importance[0].tolist() == [0, 0, 0, 1, 0, 1]
    assert made.metrics["off_policy/stale"] == pytest.approx(1 / 3)
    assert "off_policy/ratio_mean" not in made.metrics
    assert made.loss_mask.sum() == 6
    both = OffPolicy("token", truncate=(0, 2), max_staleness=0)
    made = make_experience(groups(), attached=attached([1.0] * 4, [0.0] * 4, version=6), off_policy=both)
    assert made.importance is not None
    assert made.importance.tolist() == [[0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 1]]


def test_versions_that_a_rewind_undid_count_as_old_as_they_are() -> None:
    undone = groups()
    for one in undone[0].rollouts:
        one.timeline = Timeline((4,))  # of versions 3, 5 and 6 the latter two are undone, and count as 3 and 2
    made = make_experience(undone, attached=Attached(version=5), off_policy=OffPolicy(max_staleness=2))
    assert made.importance is not None
    assert made.importance[0].tolist() == [0, 0, 1, 1, 0, 0]


def test_dropped_tokens_are_in_no_mask_and_no_reduction_divides_by_them() -> None:
    beside = attached([0.0, 2.0, 0.0, 0.0], [2.0] * 4)
    policy = OffPolicy("token", mask="token", keep=(0.5, 5.0), drop=True)
    kept = make_experience(groups(), advantage="rloo", attached=beside, off_policy="icepop")
    made = make_experience(groups(), advantage="rloo", attached=beside, off_policy=policy)
    assert made.loss_mask.astype(int).tolist() == [[0, 0, 1, 0, 0, 1], [0] * 6]
    assert kept.loss_mask.sum() == 6
    for name in ("advantages", "importance", "logprobs", "trainer_logprobs"):
        assert not getattr(made, name)[~made.loss_mask].any()
        np.testing.assert_array_equal(getattr(made, name)[made.loss_mask], getattr(kept, name)[made.loss_mask])
    assert (made.versions[~made.loss_mask] == -1).all()
    assert (made.totals.tokens, made.totals.sequences) == (2, 1)
    assert made.metrics["tokens/trained"] == 2
    assert made.shift_weights("token-mean").sum() == pytest.approx(1.0)


def test_a_batch_of_which_nothing_is_kept_makes_no_nan() -> None:
    beside = attached([50.0] * 4, [-50.0] * 4)
    for policy in (OffPolicy(mask="geometric", keep=(0.5, 2), drop=True), CORRECTIONS["icepop"], CORRECTIONS["mis"]):
        made = make_experience(groups(), advantage=AdvantageConfig("rloo"), attached=beside, off_policy=policy)
        assert made.importance is not None
        assert made.shift_importance is not None
        for reduction in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
            weights = made.shift_weights(reduction) * made.shift_importance * made.shift_advantages
            assert np.isfinite(weights).all()
        assert all(math.isfinite(value) for value in made.metrics.values())


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        (SamplingParams(top_p=0.8), "top_p=0.8"),
        (SamplingParams(top_k=20), "top_k=20"),
        (SamplingParams(min_p=0.05), "min_p=0.05"),
        (SamplingParams(repetition_penalty=1.1), "repetition_penalty=1.1"),
        (SamplingParams(temperature=0.0), "temperature=0, which samples nothing"),
        (SamplingParams(temperature=0.7), "temperature=0.7, while the trainer's log-probabilities are of temperature 1.0"),
    ],
)
def test_a_ratio_that_sampling_biases_is_warned_of(sampling: SamplingParams, why: str) -> None:
    beside = attached([0.0] * 4, [0.0] * 4, temperature=1.0)
    with pytest.warns(UserWarning, match=f"2 of 2 rollouts were sampled with {why}") as warned:
        made = make_experience(groups(), attached=beside, off_policy=OffPolicy(sampling=sampling))
    assert warned[0].filename == __file__
    assert made.metrics["off_policy/biased"] == 1.0


def test_a_prompts_own_parameters_are_known_without_being_told() -> None:
    beside = attached([0.0] * 4, [0.0] * 4)
    with pytest.warns(UserWarning, match="sampled with top_k=5"):
        make_experience(groups(sampling={"top_k": 5}), attached=beside, off_policy="tis")
    of_all = OffPolicy("token", truncate=(0, 2), sampling=SamplingParams(top_p=0.8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make_experience(groups(sampling={"top_p": 1.0, "max_tokens": 9}), attached=beside, off_policy=of_all)
    assert made.metrics["off_policy/biased"] == 0.0
    assert bias_of({"temperature": 0.7}) is None  # nobody knows the trainer's


def test_o27_truncated_sampling_scales_every_ratio_by_the_kept_mass() -> None:
    """A distribution of which top-p keeps 0.8: the same weights on both sides, and yet each ratio is 0.8."""
    whole = np.array([0.5, 0.3, 0.15, 0.05])
    sampled_from = np.where(np.arange(4) < 2, whole, 0) / 0.8
    drawn = [0, 1, 0, 0, 1]
    made = correct(CORRECTIONS["tis"], [5], trainer=np.log(whole[drawn]), sampler=np.log(sampled_from[drawn]))
    np.testing.assert_allclose(made.weights, 0.8)
    assert made.metrics["off_policy/ess"] == pytest.approx(1.0)  # which is why no statistic of the ratios shows it
