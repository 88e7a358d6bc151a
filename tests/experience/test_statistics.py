"""Statistics of a batch are those that numpy gives over the rollouts by themselves, packed or padded; parts add up to the whole, and what
is not there has no name."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer import RolloutGroup, RolloutState, Status
from producer.experience import Attached, Experience, OffPolicy, batch_statistics, make_experience
from producer.experience.statistics import advantage_statistics, entropy_statistics, kl_statistics, ratio_statistics, spread


def group_of(group_id: int, task: str, rng: np.random.Generator, version: int) -> RolloutGroup:
    states = []
    for index in range(int(rng.integers(2, 5))):
        state = RolloutState(group_id, index, task, prompt_ids=[1, 2])
        state.append([3, 4], logprobs=rng.normal(-1, 0.3, 2), version=version)
        state.append([9], trainable=False, version=version)
        n = int(rng.integers(1, 6))
        state.append([5] * n, logprobs=rng.normal(-1, 0.3, n), version=version + int(rng.integers(0, 2)))
        state.status, state.finish_reason, state.reward = Status.COMPLETED, "stop", float(rng.integers(0, 3))
        states.append(state)
    return RolloutGroup(group_id, states, task)


def batch(seed: int, token_budget: int | None = None) -> tuple[list[RolloutState], Experience, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    groups = [group_of(n, task, rng, version) for n, (task, version) in enumerate([("a", 1), ("b-2", 3), ("a", 3), ("", 4)][:3], 1)]
    states = [state for group in groups for state in group.rollouts]
    reference = {state.rollout_id: state.logprobs + rng.normal(0, 0.1, state.logprobs.size) for state in states}
    experience = make_experience(groups, advantage="rloo", attached=Attached(reference=reference), token_budget=token_budget)
    return states, experience, reference


@pytest.mark.parametrize("token_budget", [None, 40])
@pytest.mark.parametrize("seed", range(4))
def test_each_part_is_what_its_rollouts_are(seed: int, token_budget: int | None) -> None:
    states, experience, reference = batch(seed, token_budget)
    found = batch_statistics(experience)
    parts = {"all": (found.all, states)}
    parts |= {f"task {name}": (own, [state for state in states if state.task_name == name]) for name, own in found.by_task.items()}
    parts |= {f"version {n}": (own, [state for state in states if state.min_version == n]) for n, own in found.by_version.items()}
    assert (list(found.by_task), sorted(found.by_version)) == (["a", "b-2"], [1, 3])
    for name, (own, members) in parts.items():
        trained = [state.loss_mask == 1 for state in members]
        logprobs = np.concatenate([state.logprobs[mask] for state, mask in zip(members, trained, strict=True)]).astype(np.float64)
        theirs = np.concatenate([reference[state.rollout_id][mask] for state, mask in zip(members, trained, strict=True)])
        rewards, lengths = np.array([state.reward for state in members]), np.array([mask.sum() for mask in trained])
        expected = {
            "rollouts": len(members),
            "tokens/trained": logprobs.size,
            **{f"reward/{what}": getattr(rewards, what)() for what in ("mean", "std", "min", "max")},
            **{f"trained_length/{what}": getattr(lengths, what)() for what in ("mean", "std", "min", "max")},
            "entropy/sampled": -logprobs.mean(),
            "kl/k1": (logprobs - theirs).mean(),
            "kl/k3": (np.exp(theirs - logprobs) - 1 - (theirs - logprobs)).mean(),
        }
        assert {key: own[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    for key in ("rollouts", "tokens/trained"):
        for split in (found.by_task, found.by_version):
            assert sum(own[key] for own in split.values()) == found.all[key]
    assert all(math.isfinite(value) for value in found.flat().values())
    assert found.flat()["task/b-2/rollouts"] == found.by_task["b-2"]["rollouts"]
    assert json.loads(json.dumps(found.to_json()))["by_version"]["3"] == found.by_version[3]
    for name in ("advantage/mean", "advantage/zero", "entropy/sampled"):
        assert experience.metrics[name] == pytest.approx(found.all[name], abs=1e-6)


def test_ratios_of_the_policy_that_sampled_are_one() -> None:
    _, experience, _ = batch(1)
    own = batch_statistics(experience, current=experience.logprobs).all
    assert [own[f"ratio/{what}"] for what in ("mean", "std", "min", "max", "effective", "far")] == [1, 0, 1, 1, 1, 0]
    moved = batch_statistics(experience, current=np.where(experience.loss_mask, experience.logprobs + math.log(1.5), np.nan)).all
    assert (moved["ratio/mean"], moved["ratio/far"], moved["ratio/effective"]) == pytest.approx((1.5, 1.0, 1.0), rel=1e-6)


def test_a_correction_that_takes_tokens_out_and_parts_of_a_batch_have_statistics_too() -> None:
    states, _, _ = batch(1)
    groups = [RolloutGroup(n, [state for state in states if state.group_id == n], states_of) for n, states_of in ((1, "a"), (2, "b-2"))]
    trainer = {state.rollout_id: state.logprobs + 0.1 for state in states}
    experience = make_experience(
        groups, advantage="rloo", attached=Attached(trainer=trainer, version=3), off_policy=OffPolicy(max_staleness=0, drop=True)
    )
    found = batch_statistics(experience)
    assert list(found.by_version) == [3], "what was sampled before is dropped"
    assert found.by_task["a"]["tokens/trained"] == 0
    assert "advantage/mean" not in found.by_task["a"]
    assert found.all["tokens/trained"] == experience.metrics["tokens/trained"]
    assert found.all["ratio/mean"] == pytest.approx(math.exp(0.1), rel=1e-5)
    parts = [batch_statistics(part).all for of_rank in experience.split(ranks=2) for part in of_rank]
    assert sum(part["tokens/trained"] for part in parts) == found.all["tokens/trained"]
    filler = batch_statistics(experience.part([]))
    assert (filler.all, filler.by_task, filler.by_version) == ({"rollouts": 0.0, "tokens/trained": 0.0}, {}, {})


def test_current_log_probabilities_that_cannot_be_are_refused() -> None:
    _, experience, _ = batch(1)
    with pytest.raises(ValueError, match="give one log-probability a token"):
        batch_statistics(experience, current=[0.0])
    with pytest.raises(ValueError, match="is not finite"):
        batch_statistics(experience, current=np.full(experience.input_ids.shape, np.nan))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1), st.lists(st.floats(-1e3, 1e3), min_size=1))
def test_any_numbers_give_finite_statistics(one: list[float], other: list[float]) -> None:
    n = min(len(one), len(other))
    found = ratio_statistics(one[:n], other[:n]) | kl_statistics(one[:n], other[:n]) | advantage_statistics(one) | entropy_statistics(one)
    assert all(math.isfinite(value) for value in found.values())
    assert 0 < found["ratio/effective"] <= 1 + 1e-9
    assert found["advantage/positive"] + found["advantage/negative"] + found["advantage/zero"] == pytest.approx(1)


def test_of_nothing_nothing_is_said() -> None:
    assert spread("reward", [float("nan"), float("inf")]) == {}
    assert advantage_statistics([]) == entropy_statistics([]) == kl_statistics([], []) == ratio_statistics([], []) == {}
