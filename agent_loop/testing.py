"""`EngineSuite`: what every engine promises, as a pytest class to subclass. A new engine starts by passing it.

    @pytest_asyncio.fixture(scope="module", loop_scope="session")  # or in the class, where starting one is cheap
    async def engine():
        async with MyEngine(...) as engine:
            yield engine

    class TestMyEngine(EngineSuite):
        def make_engine(self): return MyEngine(...)
        async def reference_logprobs(self, engine, prompt_ids, response_ids, temperature): ...
        def original_weights(self, engine): ...
        def new_weights(self, engine): ...
        def adapter_sources(self, engine): ...  # these two where the engine declares adapters
        async def adapted_logprobs(self, engine, adapter, source, prompt_ids, response_ids): ...

The suite needs pytest-asyncio in "auto" mode. The engine is shared by the tests; each leaves it running, unpaused and with the
original weights (at a higher version). No test sleeps: a request is known to be in flight by the first call of its `on_tokens`.
"""

import asyncio
from typing import get_args

import numpy as np
import pytest

from agent_loop.engines.base import Completion, Engine, PauseMode
from agent_loop.errors import EngineClosedError, RequestRefusedError
from agent_loop.sampling import SamplingParams
from agent_loop.testing_adapters import AdapterSuite
from agent_loop.testing_base import InFlight, catches, caught
from agent_loop.testing_capabilities import CapabilitySuite
from agent_loop.testing_weights import WeightSuite

__all__ = ["EngineSuite", "InFlight"]


class _InLargePieces:
    """An `on_tokens` that may be shown several tokens at once."""

    piece_tokens = 8

    def __init__(self) -> None:
        self.pieces: list[Completion] = []

    def __call__(self, piece: Completion) -> None:
        self.pieces.append(piece)


class EngineSuite(AdapterSuite, CapabilitySuite, WeightSuite):
    """Subclass it, name the class `Test...`, give a fixture `engine` that yields an open engine, and the methods of `Suite`."""

    # --- sampling

    async def test_a_seed_repeats_a_response_alone_and_beside_others(self, engine: Engine) -> None:
        prompts = self.prompts(engine, 8)
        params = [SamplingParams(max_tokens=16, seed=number) for number in range(8)]
        alone = await engine.generate(prompts[3], params[3], request_id="alone")
        again = await engine.generate(prompts[3], params[3], request_id="another-id")
        beside = (await self.many(engine, prompts, params, "beside"))[3]
        assert alone.token_ids.tolist() == again.token_ids.tolist() == beside.token_ids.tolist()
        np.testing.assert_allclose(beside.logprobs, alone.logprobs, atol=self.tolerance)

    async def test_different_seeds_give_different_responses(self, engine: Engine) -> None:
        prompt = self.prompts(engine, 1)[0]
        params = [SamplingParams(max_tokens=16, ignore_eos=True, seed=seed) for seed in range(4)]
        responses = await self.many(engine, [prompt] * 4, params, "seed")
        assert len({tuple(one.token_ids.tolist()) for one in responses}) > 1

    async def test_without_a_seed_members_of_a_group_differ(self, engine: Engine) -> None:
        prompt = self.prompts(engine, 1)[0]
        responses = await self.many(engine, [prompt] * 4, [SamplingParams(max_tokens=16, ignore_eos=True)] * 4, "member")
        assert len({tuple(one.token_ids.tolist()) for one in responses}) > 1

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    async def test_logprobs_equal_the_reference(self, engine: Engine, temperature: float) -> None:
        prompts = self.prompts(engine, 4)
        params = [SamplingParams(max_tokens=24, temperature=temperature, seed=seed, ignore_eos=True) for seed in range(4)]
        for prompt, response in zip(prompts, await self.many(engine, prompts, params, "logprobs"), strict=True):
            expected = await self.reference_logprobs(engine, prompt, response.token_ids.tolist(), temperature)
            np.testing.assert_allclose(response.logprobs, expected, atol=self.tolerance)

    async def test_a_completion_has_one_value_a_token_of_the_promised_type(self, engine: Engine) -> None:
        response = await engine.generate(self.prompts(engine, 1)[0], SamplingParams(max_tokens=5, ignore_eos=True), request_id="types")
        types = [str(array.dtype) for array in (response.token_ids, response.logprobs, response.versions)]
        assert types == ["int32", "float32", "int32"]
        assert len(response.token_ids) == len(response.logprobs) == len(response.versions) == 5
        assert (response.logprobs <= 0).all()
        assert ((response.token_ids >= 0) & (response.token_ids < engine.vocab_size)).all()

    async def test_prompts_are_taken_as_a_list_and_as_an_array(self, engine: Engine) -> None:
        prompt, params = self.prompts(engine, 1)[0], SamplingParams(max_tokens=8, seed=3)
        from_list = await engine.generate(prompt, params, request_id="list")
        from_array = await engine.generate(np.array(prompt, np.int32), params, request_id="array")
        assert from_list.token_ids.tolist() == from_array.token_ids.tolist()

    # --- scores, where the engine has them

    async def test_scores_equal_the_reference_and_the_logprobs_of_what_was_sampled(self, engine: Engine) -> None:
        prompt = self.prompts(engine, 1)[0]
        response = (await engine.generate(prompt, self.long(max_tokens=24), request_id="scored")).token_ids.tolist()
        if not engine.capabilities.score:
            with pytest.raises(RequestRefusedError, match="score"):
                await engine.score(prompt + response)
            return
        scores = await engine.score(np.array(prompt + response, np.int32), start=len(prompt))
        assert (str(scores.dtype), scores.shape) == ("float32", (24,))
        np.testing.assert_allclose(scores, await self.reference_logprobs(engine, prompt, response, 1.0), atol=self.tolerance)
        from_second = await engine.score(prompt + response)
        expected = await self.reference_logprobs(engine, prompt[:1], prompt[1:] + response, 1.0)
        np.testing.assert_allclose(from_second, expected, atol=self.tolerance)

    async def test_the_likeliest_tokens_come_first_with_their_logprobs(self, engine: Engine) -> None:
        count, prompt = min(5, engine.capabilities.top_tokens), self.prompts(engine, 2)[1]
        if not count:
            with pytest.raises(RequestRefusedError, match="top_tokens"):
                await engine.top_tokens(prompt, 1)
            return
        top = await engine.top_tokens(prompt, count)
        assert (str(top.token_ids.dtype), str(top.logprobs.dtype), top.version) == ("int32", "float32", engine.version)
        assert (np.diff(top.logprobs) <= 0).all()
        assert len(set(top.token_ids.tolist())) == len(top.token_ids) == count
        expected = [(await self.reference_logprobs(engine, prompt, [token], 1.0))[0] for token in top.token_ids.tolist()]
        np.testing.assert_allclose(top.logprobs, expected, atol=self.tolerance)
        greedy = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        assert (await engine.generate(prompt, greedy, request_id="greedy")).token_ids.tolist() == [top.token_ids[0]]

    async def test_bad_scores_are_refused_with_the_value(self, engine: Engine) -> None:
        if engine.capabilities.score:
            too_long = [1] * engine.max_length
            for ids, start, value in [
                ([], 1, "empty"),
                ([1], 1, "1 tokens"),
                ([1, 1], 2, "2"),
                ([1, -7], 1, "-7"),
                (too_long, 1, "exceed"),
            ]:
                with pytest.raises(RequestRefusedError, match=value):
                    await engine.score(ids, start=start)
        for count in (0, engine.capabilities.top_tokens + 1):
            with pytest.raises(RequestRefusedError, match=r"count=|top_tokens"):
                await engine.top_tokens([1, 1], count)

    async def test_scoring_beside_a_request_changes_none_of_its_tokens(self, engine: Engine) -> None:
        if not engine.capabilities.score:
            return
        prompt = self.prompts(engine, 1)[0]
        whole = await engine.generate(prompt, self.long(), request_id="whole")
        async with asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, prompt, self.long(), "beside").seen(2)
            scores = await engine.score(prompt + call.tokens, start=len(prompt))
            assert (await engine.top_tokens(prompt, 1)).token_ids.size == 1
        assert call.tokens == whole.token_ids.tolist()
        np.testing.assert_allclose(scores, whole.logprobs[: scores.size], atol=self.tolerance)

    async def test_a_score_asked_during_a_pause_comes_when_it_ends_at_the_latest(self, engine: Engine) -> None:
        if not engine.capabilities.score:
            return
        prompt = self.prompts(engine, 4)[3]
        expected = await engine.score(prompt)
        async with asyncio.TaskGroup() as tasks:
            before = tasks.create_task(engine.score(prompt))
            await engine.pause("abort")
            during = tasks.create_task(engine.score(prompt))
            await self.opportunity(engine)
            await engine.resume()
        for scores in (before.result(), during.result()):
            np.testing.assert_allclose(scores, expected, atol=self.tolerance)

    async def test_scores_are_those_of_the_weights_in_force(self, engine: Engine) -> None:
        if not engine.capabilities.score:
            return
        prompt = self.prompts(engine, 4)[3]
        old = await engine.score(prompt)
        async with self.weights_restored(engine) as version:
            await engine.update_weights(self.new_weights(engine), version + 1)
            assert not np.allclose(await engine.score(prompt), old, atol=self.tolerance)
            assert (await engine.top_tokens(prompt, 1)).version == version + 1
        np.testing.assert_allclose(await engine.score(prompt), old, atol=self.tolerance)

    # --- how a response ends

    async def test_max_tokens_ends_with_length(self, engine: Engine) -> None:
        for count in (1, 7):
            params = SamplingParams(max_tokens=count, ignore_eos=True)
            response = await engine.generate(self.prompts(engine, 1)[0], params, request_id="max")
            assert (len(response.token_ids), response.finish_reason) == (count, "length")

    async def test_a_stop_token_ends_with_stop_and_is_kept(self, engine: Engine) -> None:
        prompt, params = self.prompts(engine, 1)[0], SamplingParams(max_tokens=16, seed=5, ignore_eos=True)
        whole = (await engine.generate(prompt, params, request_id="whole")).token_ids.tolist()
        stop = whole[len(whole) // 2]
        stopped = await engine.generate(prompt, params.replace(stop_token_ids=(stop,)), request_id="stopped")
        assert stopped.token_ids.tolist() == whole[: whole.index(stop) + 1]
        assert stopped.finish_reason == "stop"

    async def test_eos_ends_with_stop_and_is_the_last_token_and_nothing_else_is(self, engine: Engine) -> None:
        params = [SamplingParams(max_tokens=self.long_tokens, temperature=self.eos_temperature, seed=seed) for seed in range(32)]
        responses = await self.many(engine, self.prompts(engine, 32), params, "eos")
        ends = [response.token_ids[-1] in engine.eos_token_ids for response in responses]
        assert any(ends), "no response held an EOS; adjust eos_temperature or long_tokens"
        for response, ended in zip(responses, ends, strict=True):
            assert not set(response.token_ids[:-1].tolist()) & engine.eos_token_ids
            assert response.finish_reason == ("stop" if ended else "length")

    async def test_ignore_eos_goes_on_to_max_tokens(self, engine: Engine) -> None:
        params = [self.long(temperature=self.eos_temperature, seed=seed) for seed in range(8)]
        responses = await self.many(engine, self.prompts(engine, 8), params, "ignore-eos")
        assert {(len(response.token_ids), response.finish_reason) for response in responses} == {(self.long_tokens, "length")}

    async def test_on_tokens_sees_every_token_once(self, engine: Engine) -> None:
        async with asyncio.TaskGroup() as tasks:
            call = InFlight(tasks, engine, self.prompts(engine, 1)[0], SamplingParams(max_tokens=20, ignore_eos=True), "pieces")
        for name in ("token_ids", "logprobs", "versions"):
            joined = np.concatenate([getattr(piece, name) for piece in call.pieces])
            np.testing.assert_array_equal(joined, getattr(call.task.result(), name))

    async def test_larger_pieces_bring_every_token_once(self, engine: Engine) -> None:
        shown = _InLargePieces()
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        completion = await engine.generate(self.prompts(engine, 1)[0], params, request_id="large", on_tokens=shown)
        for name in ("token_ids", "logprobs", "versions"):
            np.testing.assert_array_equal(np.concatenate([getattr(piece, name) for piece in shown.pieces]), getattr(completion, name))

    async def test_32_concurrent_requests_all_return(self, engine: Engine) -> None:
        responses = await self.many(engine, self.prompts(engine, 32), [SamplingParams(max_tokens=24)] * 32, "concurrent")
        assert all(response.finish_reason in ("stop", "length") and 1 <= len(response.token_ids) <= 24 for response in responses)

    # --- refusals

    async def test_bad_requests_are_refused_with_the_value(self, engine: Engine) -> None:
        cases: list[tuple[list[int], SamplingParams, str]] = [
            ([], SamplingParams(), "empty"),
            ([1, engine.vocab_size], SamplingParams(max_tokens=1), str(engine.vocab_size)),
            ([-1, 1], SamplingParams(max_tokens=1), "-1"),
            ([1, 1], SamplingParams(max_tokens=engine.max_length), str(engine.max_length)),
        ]
        for prompt, params, value in cases:
            with pytest.raises(RequestRefusedError, match=value):
                await engine.generate(prompt, params, request_id="bad")
        for slip in (
            engine.generate([[1, 1]], SamplingParams(max_tokens=1), request_id="bad"),  # type: ignore[list-item]
            engine.generate([1, 1], {"max_tokens": 1}, request_id="bad"),  # type: ignore[arg-type]
            engine.generate([1, 1], SamplingParams(max_tokens=1), request_id=""),
            engine.interrupt("bad"),  # whose letters are no requests
            engine.update_weights(5, engine.version + 1),  # type: ignore[arg-type]
        ):
            with pytest.raises(ValueError):
                await slip
        good = await engine.generate([1, 1], SamplingParams(max_tokens=2, ignore_eos=True), request_id="bad")
        assert len(good.token_ids) == 2

    # --- interruption and cancellation

    @catches
    async def test_an_interrupted_request_returns_what_it_has_and_can_be_continued(self, engine: Engine) -> None:
        prompt = self.prompts(engine, 1)[0]
        whole = await engine.generate(prompt, self.long(), request_id="whole")
        async with asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, prompt, self.long(), "cut").seen(3)
            await engine.interrupt(["cut"])
        cut = call.task.result()
        kept = cut.token_ids.tolist()
        caught(cut.finish_reason != "length")
        assert cut.finish_reason == "abort"
        assert 3 <= len(kept) < self.long_tokens
        assert kept == call.tokens == whole.token_ids.tolist()[: len(kept)]
        np.testing.assert_allclose(cut.logprobs, whole.logprobs[: len(kept)], atol=self.tolerance)

        rest = await engine.generate(prompt + kept, SamplingParams(max_tokens=8, seed=2, ignore_eos=True), request_id="cut")
        expected = await self.reference_logprobs(engine, prompt + kept, rest.token_ids.tolist(), 1.0)
        np.testing.assert_allclose(rest.logprobs, expected, atol=self.tolerance)
        assert (len(rest.token_ids), rest.finish_reason) == (8, "length")

    @catches
    async def test_interrupting_one_leaves_the_others(self, engine: Engine) -> None:
        prompts = self.prompts(engine, 3)
        async with asyncio.TaskGroup() as tasks:
            calls = [InFlight(tasks, engine, prompt, self.long(), f"one-{n}") for n, prompt in enumerate(prompts)]
            for call in calls:
                await call.seen()
            await engine.interrupt([])
            await engine.interrupt(["one-1", "nobody"])
        first, interrupted, last = [call.task.result().finish_reason for call in calls]
        assert (first, last) == ("length", "length")
        caught(interrupted != "length")
        assert interrupted == "abort"

    @catches
    async def test_interrupting_all_ends_all_and_requests_right_after_run(self, engine: Engine) -> None:
        prompts = self.prompts(engine, 4)
        async with asyncio.TaskGroup() as tasks:
            calls = [InFlight(tasks, engine, prompt, self.long(), f"all-{n}") for n, prompt in enumerate(prompts)]
            await calls[0].seen()
            await engine.interrupt()
            after = await engine.generate(prompts[0], SamplingParams(max_tokens=3, ignore_eos=True), request_id="after")
        assert after.finish_reason == "length"
        reasons = {call.task.result().finish_reason for call in calls}
        caught("length" not in reasons)
        assert reasons == {"abort"}

    async def test_interrupting_when_nothing_is_in_flight_does_nothing(self, engine: Engine) -> None:
        await engine.interrupt()
        await engine.interrupt(["nobody"])
        response = await engine.generate(self.prompts(engine, 1)[0], SamplingParams(max_tokens=3, ignore_eos=True), request_id="after")
        assert response.finish_reason == "length"

    async def test_cancelling_frees_the_request(self, engine: Engine) -> None:
        prompts = self.prompts(engine, 64)
        # More than an engine runs at once, thrice under the same ids: what is not freed would block or be refused.
        for _ in range(3):
            async with asyncio.TaskGroup() as tasks:
                calls = [InFlight(tasks, engine, prompt, self.long(), f"cancelled-{n}") for n, prompt in enumerate(prompts)]
                await calls[0].seen()
                for call in calls:
                    call.task.cancel()
            # Some may be whole already where several attempts are allowed; none ends in part.
            ended = [call.task.result() for call in calls if not call.task.cancelled()]
            assert len(ended) < len(calls)
            assert {one.finish_reason for one in ended} <= ({"length"} if self.attempts > 1 else set())
        short = [SamplingParams(max_tokens=3, ignore_eos=True)] * 64
        assert {one.finish_reason for one in await self.many(engine, prompts, short, "cancelled")} == {"length"}

    # --- pausing

    @pytest.mark.parametrize("mode", get_args(PauseMode))
    @catches
    async def test_pause_and_resume(self, engine: Engine, mode: PauseMode) -> None:
        prompts = self.prompts(engine, 2)
        async with self.weights_restored(engine) as version, asyncio.TaskGroup() as tasks:
            before = await InFlight(tasks, engine, prompts[0], self.long(), "before").seen(2)
            await engine.pause(mode)
            during = InFlight(tasks, engine, prompts[1], SamplingParams(max_tokens=4, ignore_eos=True), "during")
            await self.opportunity(engine)  # the later request arrives here
            await engine.update_weights(self.new_weights(engine), version + 1)
            await engine.resume()
        # The version tells when a token was sampled: none of the later request's before the resume.
        assert during.task.result().versions.tolist() == [version + 1] * 4
        response = before.task.result()
        stamps, expected = set(response.versions.tolist()), {version, version + 1} if mode == "keep" else {version}
        caught(mode == "wait" or (response.finish_reason, stamps) != ("length", {version}))
        assert stamps == expected
        assert response.finish_reason == ("abort" if mode == "abort" else "length")
        assert len(response.token_ids) == self.long_tokens or mode == "abort"

    async def test_keeping_changes_no_token(self, engine: Engine) -> None:
        prompt = self.prompts(engine, 1)[0]
        whole = await engine.generate(prompt, self.long(), request_id="whole")
        async with asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, prompt, self.long(), "kept").seen(2)
            await engine.pause("keep")
            await engine.resume()
        assert call.task.result().token_ids.tolist() == whole.token_ids.tolist() == call.tokens

    @catches
    async def test_interrupting_while_paused_ends_frozen_requests(self, engine: Engine) -> None:
        async with asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, self.prompts(engine, 1)[0], self.long(), "frozen").seen()
            await engine.pause("keep")
            try:
                await engine.interrupt()
                response = await call.task
            finally:
                await engine.resume()
        caught(response.finish_reason != "length")
        assert response.finish_reason == "abort"

    async def test_resuming_without_a_pause_does_nothing(self, engine: Engine) -> None:
        await engine.resume()
        response = await engine.generate(self.prompts(engine, 1)[0], SamplingParams(max_tokens=3, ignore_eos=True), request_id="resumed")
        assert response.finish_reason == "length"

    # --- the engine's own life

    async def test_a_healthy_engine_says_so(self, engine: Engine) -> None:
        await engine.health()

    @catches
    async def test_closing_ends_what_is_in_flight_and_is_idempotent(self) -> None:
        engine = self.make_engine()
        with pytest.raises(EngineClosedError):
            await engine.generate([1, 1], SamplingParams(max_tokens=1), request_id="early")
        async with engine, asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, self.prompts(engine, 1)[0], self.long(), "closing").seen()
            await engine.close()
        caught(call.task.result().finish_reason != "length")
        assert call.task.result().finish_reason == "abort"
        await engine.close()
        with pytest.raises(EngineClosedError):
            await engine.generate([1, 1], SamplingParams(max_tokens=1), request_id="late")
        with pytest.raises(EngineClosedError):
            await engine.health()
