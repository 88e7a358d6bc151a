"""Shows that what a batch leaves for the next goes on exactly, also over a rewind, and that samples stay with what belongs to a prompt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import EngineClosedError
from agent_loop.sampler import Sampler
from buffer import ReplayBuffer, RolloutGroup, RolloutState
from producer.errors import ProducerError
from producer.experience import KL, AdaptiveKL, AdvantageConfig, Attached, EngineScorer, ExperienceMaker, make_experience
from tests.buffer.groups import put_all
from tests.experience.test_maker import group, rollout
from tests.experience.test_parts import a_batch

NORMALISED = AdvantageConfig("rloo", normalise=True)


def a_divergence(groups: Any) -> Attached:
    """A reference whose log-probabilities lie 0.25 below those of the policy."""
    return Attached(reference={one.rollout_id: one.logprobs - 0.25 for group in groups for one in group.rollouts})


def test_moments_and_coefficient_go_on_from_batch_to_batch() -> None:
    config = AdvantageConfig("rloo", normalise=True, kl=KL(0.5))
    kl = AdaptiveKL(0.1, target=1.0)
    maker = ExperienceMaker(config, adaptive_kl=kl, attach=a_divergence)
    running = None
    for seed in range(3):
        groups = a_batch(seed)
        own = AdvantageConfig("rloo", normalise=True, kl=KL(kl.coef))
        expected = make_experience(groups, advantage=own, attached=a_divergence(groups), running=running)
        made = maker.make_experience(groups)
        np.testing.assert_array_equal(made.advantages, expected.advantages)
        assert made.metrics["kl/coef"] == kl.coef
        running, kl = expected.running, kl.updated(expected.metrics["kl/sequence"], len(expected.rollout_ids))
        assert (maker.state.running, maker.state.kl, maker.state.batches) == (running, kl, seed + 1)


def test_a_batch_that_cannot_be_made_leaves_the_state_as_it_was() -> None:
    maker = ExperienceMaker(NORMALISED)
    maker.make_experience(a_batch(0))
    before = maker.state
    with pytest.raises(ValueError, match="can be trained on"):
        maker.make_experience([group(1, rollout(1, 0, [1], [2], reward=None))])
    assert maker.state is before


def test_a_loaded_state_goes_on_to_the_last_digit() -> None:
    first, second = (ExperienceMaker(NORMALISED) for _ in range(2))
    for seed in range(2):
        first.make_experience(a_batch(seed))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state == first.state
    np.testing.assert_array_equal(first.make_experience(a_batch(2)).advantages, second.make_experience(a_batch(2)).advantages)
    for state, message in (
        ({}, "is not the state of an ExperienceMaker"),
        (first.state_dict() | {"kl_coef": 0.1}, "do not go together"),
        (first.state_dict() | {"running": {"count": 1}}, "running moments"),
        (first.state_dict() | {"batches": -1}, "batches=-1"),
    ):
        before = second.state
        with pytest.raises(ValueError, match=message):
            second.load_state_dict(state)
        assert second.state is before


@pytest.mark.usefixtures("backend")
async def test_after_a_rewind_the_moments_are_those_of_its_step(tmp_path: Path) -> None:
    from tests.buffer.groups import url

    batches = {step: made_anew(a_batch(step, groups=2), 10 * step) for step in (1, 2, 3)}
    states = []
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        maker = ExperienceMaker(NORMALISED)
        for step, groups in batches.items():
            await put_all(buffer, groups)
            maker.make_experience(await buffer.take("default", 2, step=step))
            await maker.save(buffer, step=step)
            states.append(maker.state)
        await buffer.commit(1)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await buffer.resume(step=2)
        again = ExperienceMaker(NORMALISED)
        await again.resume(buffer, step=2)
        assert again.state == states[1]
        again.make_experience(await buffer.take("default", 2, step=3))
        assert again.state == states[2]
        await again.resume(buffer, step=0)
        assert again.state.batches == 0


async def test_makers_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    from tests.buffer.groups import url

    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        first, second, named = ExperienceMaker(NORMALISED), ExperienceMaker(NORMALISED), ExperienceMaker(NORMALISED, name="experience/code")
        for maker, reward in ((first, 1), (second, 5), (named, 9)):
            maker.make_experience(made_anew(a_batch(reward, groups=1), reward))
        await first.save(buffer, step=1)
        await named.save(buffer, step=1)
        for step in (1, 2):  # also where it has none of its own yet: whoever resumes would go on from the other's
            with pytest.raises(ProducerError, match="a state of another ExperienceMaker by the name 'experience': give each its own name="):
                await second.save(buffer, step=step)
        await first.save(buffer, step=1)  # the same again, as after a call that was broken off
        await second.resume(buffer, step=1)
        assert second.state == first.state
        second.make_experience(a_batch(5, groups=1))
        await second.save(buffer, step=2)
        with pytest.raises(ProducerError, match="give each its own name="):
            await first.save(buffer, step=3)
        assert (await buffer.load_state("experience", step=9) or {})["batches"] == 2


def made_anew(groups: list[RolloutGroup], first: int) -> list[RolloutGroup]:
    """The same groups under other numbers."""
    for number, one in enumerate(groups):
        one.group_id = first + number
        for member in one.rollouts:
            member.group_id = first + number
    return groups


# From prompts

ANSWERS = ["one", "two", "three"]


def seen(state: RolloutState) -> float:
    """A reward that tells which reference and label it was given."""
    assert state.row["label"] == ANSWERS.index(state.row["reference"])
    return float(10 * state.row["label"] + state.index)


async def test_several_samples_of_a_prompt_stay_with_its_reference() -> None:
    prompts = [[1, 2], {"prompt_ids": [3, 4]}, [5]]
    async with SimulatedEngine(seed=1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=seen, sampling=SamplingParams(max_tokens=4))
        of_sampler = ExperienceMaker("rloo", source=Sampler(engine), reward=seen)
        for maker in (ExperienceMaker("rloo", source=loop), of_sampler):
            options = {} if maker is not of_sampler else {"sampling_params": {"max_tokens": 4}}
            groups = await maker.generate_samples(prompts, references=ANSWERS, labels=range(3), num_samples=4, **options)
            assert [one.rollouts[0].prompt_ids.tolist() for one in groups] == [[1, 2], [3, 4], [5]]
            assert [[member.reward for member in one.rollouts] for one in groups] == [[10.0 * n + k for k in range(4)] for n in range(3)]
            again = await maker.generate_samples([[1]], references=["one"], labels=[0], num_samples=1, **options)
            assert again[0].group_id not in {one.group_id for one in groups}


async def test_micro_batches_of_one_call_are_those_of_the_whole_batch() -> None:
    async with SimulatedEngine(seed=1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=lambda state: float(state.index), sampling=SamplingParams(max_tokens=8))
        maker = ExperienceMaker(AdvantageConfig("reinforce++", normalise=True), source=loop, token_budget=32)
        parts = await maker.make_experience_list([[1, 2, 3], [4]], num_samples=4)
    assert len(parts) > 1
    assert sorted(name for part in parts for name in part.rollout_ids) == sorted(
        f"samples-{g}-{n}" for g in ids_of(parts) for n in range(4)
    )
    assert sum(part.shift_weights().sum() for part in parts) == pytest.approx(1.0)
    assert all(part.input_ids.shape[0] == 1 and part.input_ids.size <= 32 for part in parts)
    trained = np.concatenate([part.advantages[part.loss_mask] for part in parts])
    assert (trained.mean(), trained.std(ddof=1)) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-3))  # whitened once, as a whole
    assert maker.state.batches == 1


def ids_of(parts: Any) -> set[int]:
    return {int(number) for part in parts for number in part.group_ids}


async def test_what_a_reward_cannot_judge_is_left_out_with_the_reason() -> None:
    def fails_on_the_first(state: RolloutState) -> float:
        if state.index == 0:
            raise RuntimeError("no judge")
        return float(state.index)

    async with SimulatedEngine(seed=1) as engine:
        maker = ExperienceMaker("rloo", source=Sampler(engine), reward=fails_on_the_first)
        groups = await maker.generate_samples([[1]], num_samples=3, sampling_params={"max_tokens": 4})
        assert [member.left_out for member in groups[0].rollouts] == [True, False, False]
        assert maker.make_experience(groups).metrics["left_out/failed"] == 1


async def test_an_engine_that_is_closed_is_told_as_it_is() -> None:
    async with SimulatedEngine(seed=1) as engine:
        maker = ExperienceMaker("rloo", source=SingleTurnAgentLoop(engine, reward=seen))
        await engine.close()
        with pytest.raises(EngineClosedError):
            await maker.generate_samples([[1]], num_samples=2)


async def test_bad_arguments_are_refused_with_the_reason() -> None:
    engine = SimulatedEngine()
    for options, error, message in (
        ({"adaptive_kl": AdaptiveKL(0.1, 1)}, ValueError, "has no divergence to weigh"),
        ({"attach": EngineScorer(engine).attached}, TypeError, "is async; await it yourself"),
        ({"source": object()}, TypeError, "neither an agent loop nor a Sampler"),
        ({"source": Sampler(engine)}, ValueError, "pass either reward or group_reward"),
        ({"reward": seen}, ValueError, "an agent loop has its own"),
    ):
        with pytest.raises(error, match=message):
            ExperienceMaker("rloo", **options)
    maker = ExperienceMaker(source=Sampler(engine), reward=seen)
    for prompts, options, message in (
        ("one prompt", {}, "is one prompt; give a list"),
        ([[1], [2]], {"references": ["a"]}, "2 prompts came with 1 references"),
        ([{"prompt": "a", "label": 1}], {"labels": [2]}, "a row has label=1 already"),
        ([{"answer": 1}], {}, "the row has no prompt"),
        ([[1]], {"num_samples": 0}, "num_samples=0 asks for nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            await maker.generate_samples(prompts, **options)
    with pytest.raises(ValueError, match="has no source"):
        await ExperienceMaker().generate_samples([[1]])
