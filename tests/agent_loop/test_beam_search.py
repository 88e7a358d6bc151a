"""Shows that beam search finds what exhaustive search finds, the same each time, over real engines, and never trains."""

import asyncio
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop import SamplingParams, SingleTurnAgentLoop, create_sampler
from agent_loop.beam_search import BeamSearchSampler
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_table import TablePolicy
from agent_loop.engines.transformers import TransformersEngine
from agent_loop.errors import RequestRefusedError
from tests.tiny_model import make_tiny_model

Ranked = list[tuple[float, tuple[int, ...]]]


def table(vocabulary: int, scale: float = 1.5) -> SimulatedEngine:
    return SimulatedEngine(policy=TablePolicy(vocabulary, frozenset({0}), scale=scale))


def exhaustive(engine: SimulatedEngine, prompt: Sequence[int], longest: int, penalty: float, stops: set[int]) -> Ranked:
    """Every response there is, the best first: those that end in a stop, and those of full length without one before."""
    found: Ranked = []
    for length in range(1, longest + 1):
        for response in itertools.product(range(engine.vocab_size), repeat=length):
            if stops & set(response[:-1]) or (response[-1] not in stops and length < longest):
                continue
            total = float(engine.reference_logprobs(prompt, response, engine.version).sum())
            found.append((-total / length**penalty, response))
    return sorted(found)


@settings(max_examples=25)
@given(st.integers(2, 4), st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), st.integers(0, 50), st.booleans(), st.booleans())
def test_with_as_many_beams_as_prefixes_it_finds_what_exhaustive_search_finds(
    vocabulary: int, longest: int, penalty: float, weights: int, ignore_eos: bool, stopping: bool
) -> None:
    stops = (set() if ignore_eos else {0}) | ({1} if stopping else set())
    params = SamplingParams(max_tokens=longest, ignore_eos=ignore_eos, stop_token_ids=(1,) if stopping else ())
    every = vocabulary**longest

    async def search() -> None:
        async with table(vocabulary) as engine:
            await engine.update_weights({"seed": weights}, 1)
            sampler = create_sampler("beam_search", engine, beams=every, length_penalty=penalty)
            (response,) = await sampler.sample([vocabulary - 1], params, num_samples=every)
            expected = exhaustive(engine, [vocabulary - 1], longest, penalty, stops)
        found = [tuple(one.token_ids.tolist()) for one in response.sequences]
        assert set(found) == {tokens for _, tokens in expected}
        assert len(found) == len(expected)
        np.testing.assert_allclose([one.score for one in response.sequences], [-score for score, _ in expected], atol=1e-5)
        for one in response.sequences:
            assert one.finish_reason == ("stop" if one.token_ids[-1] in stops else "length")
            assert one.versions.tolist() == [1] * len(one.token_ids)

    asyncio.run(search())


@settings(max_examples=25)
@given(st.integers(1, 3), st.sampled_from([0.0, 1.0, 3.0, -1.0]), st.integers(0, 200))
def test_giving_up_beams_early_loses_nothing(beams: int, penalty: float, weights: int) -> None:
    """The same search to the last token, by hand."""
    params = SamplingParams(max_tokens=5)

    async def search() -> None:
        async with table(5, scale=3.0) as engine:
            await engine.update_weights({"seed": weights}, 1)
            (response,) = await create_sampler("beam_search", engine, beams=beams, length_penalty=penalty).sample(
                [4], params, num_samples=beams
            )
            ended: Ranked = []
            running: Ranked = [(0.0, ())]
            for _ in range(1, 6):
                # In the search's own arithmetic: two orders of the same steps are equally likely, and a last bit must not rank them.
                grown = [
                    (total + float(np.float32(engine.reference_logprobs([4, *tokens], [token], 1)[0])), (*tokens, token))
                    for total, tokens in running
                    for token in range(5)
                ]
                grown.sort(key=lambda one: (-one[0] / math.pow(len(one[1]), penalty), one[1]))
                ended += [one for one in grown[:beams] if one[1][-1] == 0]
                running = [one for one in grown if one[1][-1] != 0][:beams]
        ended = sorted(((-total / math.pow(len(tokens), penalty), tokens) for total, tokens in ended + running))
        assert [tuple(one.token_ids.tolist()) for one in response.sequences] == [tokens for _, tokens in ended[:beams]]

    asyncio.run(search())


async def test_more_beams_find_what_greedy_decoding_misses() -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    gains = []
    async with table(16) as engine:
        for start in range(1, 16):
            (greedy,) = (await create_sampler("beam_search", engine, beams=1).sample([start], params))[0].sequences
            (best,) = (await create_sampler("beam_search", engine, beams=8).sample([start], params))[0].sequences
            plain = await engine.generate([start], params.replace(temperature=0.0), request_id="greedy")
            assert greedy.token_ids.tolist() == plain.token_ids.tolist()
            gains.append(best.score - greedy.score)  # type: ignore[operator]
    assert max(gains) > 0.01


async def test_over_a_model_it_is_the_same_each_time_and_its_scores_are_the_engines(tmp_path: Path) -> None:
    async with TransformersEngine(make_tiny_model(tmp_path / "model")) as engine:
        sampler = create_sampler("beam_search", engine, beams=3)
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        first, again = [await sampler.sample([[5, 6, 7], [9]], params, num_samples=3) for _ in range(2)]
        for response, other in zip(first, again, strict=True):
            assert [one.token_ids.tolist() for one in response.sequences] == [one.token_ids.tolist() for one in other.sequences]
            scores = [one.score for one in response.sequences]
            assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
            for one in response.sequences:
                prompt = response.prompt_ids.tolist()
                logprobs = await engine.score(prompt + one.token_ids.tolist(), start=len(prompt))
                np.testing.assert_allclose(one.logprobs, logprobs, atol=1e-4)
                assert one.score == pytest.approx(logprobs.mean(), abs=1e-4)


async def test_it_is_refused_as_a_source_of_training_rollouts() -> None:
    async with SimulatedEngine() as engine:
        sampler = create_sampler("beam_search", engine)
        assert isinstance(sampler, BeamSearchSampler)
        with pytest.raises(TypeError, match="beams are the likeliest responses, not samples of the policy"):
            SingleTurnAgentLoop(sampler)  # type: ignore[arg-type]


async def test_what_does_not_fit_is_refused() -> None:
    async with SimulatedEngine() as engine:
        for bad, match in [({"temperature": 0.5}, "draws nothing"), ({"top_p": 0.5}, "draws nothing"), ({"stop": ("a",)}, "draws nothing")]:
            with pytest.raises(RequestRefusedError, match=match):
                await create_sampler("beam_search", engine).sample([5], bad)
        with pytest.raises(RequestRefusedError, match="num_samples=5 is more than beams=4"):
            await create_sampler("beam_search", engine).sample([5], num_samples=5)
        with pytest.raises(ValueError, match="beams=0"):
            create_sampler("beam_search", engine, beams=0)
        for penalty in (float("nan"), 1e6, -1e6):  # powers that are no numbers
            with pytest.raises(ValueError, match="length_penalty"):
                create_sampler("beam_search", engine, length_penalty=penalty)
    async with SimulatedEngine(script=lambda prompt_ids: [7, 0]) as scripted:
        with pytest.raises(RequestRefusedError, match="this engine tells 0"):
            await create_sampler("beam_search", scripted).sample([5])
