"""The part of `agent_loop.testing.EngineSuite` about capabilities: what an engine declares works, what it does not declare is refused."""

import asyncio
import re
from collections.abc import Awaitable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from agent_loop.engines.base import Capabilities, Completion, Engine
from agent_loop.errors import EngineError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import SamplingParams
from agent_loop.testing_base import InFlight, Suite, catches, caught


class CapabilitySuite(Suite):
    """Scores and likely tokens are in `EngineSuite` itself, adapters in `AdapterSuite`."""

    async def test_an_engine_can_do_what_its_class_offers_and_no_more(self, engine: Engine) -> None:
        able = engine.capabilities
        for one in fields(Capabilities):
            offered, has = getattr(engine.offers, one.name), getattr(able, one.name)
            assert has <= offered, f"{one.name}={has}, of which the class offers {offered}"
            if offered and one.name not in engine.only_with:
                assert has, f"{one.name} is offered by the class, and only_with names no condition that this engine could lack"

    async def test_log_probabilities_that_are_no_numbers_are_refused_with_their_token(self, engine: Engine) -> None:
        prompt, spoilt = self.prompts(engine, 4)[3], self.spoilt_weights(engine)
        if spoilt is None:
            return
        old, came, shown = await self.greedy(engine), asyncio.Event(), list[int]()

        def show(piece: Completion) -> None:
            shown.extend(piece.token_ids.tolist())
            came.set()

        async with self.weights_restored(engine) as version:
            async with asyncio.TaskGroup() as tasks:
                call = tasks.create_task(_refusal(engine.generate(prompt, self.long(), request_id="spoilt", on_tokens=show)))
                call.add_done_callback(lambda _: came.set())
                await came.wait()
                await engine.update_weights(spoilt, version + 1)
            named = re.match(r"token (\d+) has log-probability nan", call.result())
            assert named is not None, call.result()
            assert int(named[1]) >= len(shown) >= 1  # counted from the first of the response, and shown to nobody
            short = SamplingParams(max_tokens=3, ignore_eos=True)
            assert (await _refusal(engine.generate(prompt, short, request_id="whole"))).startswith("token 0 has log-probability nan")
            if engine.capabilities.score:
                assert (await _refusal(engine.score(prompt, start=2))).startswith("scored token 2 has log-probability nan")
            if engine.capabilities.top_tokens:
                assert (await _refusal(engine.top_tokens(prompt, 1))).startswith("likely token 0 has log-probability nan")
        assert await self.greedy(engine) == old

    async def test_the_likeliest_tokens_of_each_position_come_with_a_response(self, engine: Engine) -> None:
        prompt, most = self.prompts(engine, 1)[0], engine.capabilities.top_logprobs
        params = SamplingParams(max_tokens=8, temperature=0.7, seed=6, ignore_eos=True)
        with pytest.raises(RequestRefusedError, match="top_logprobs"):
            await engine.generate(prompt, params.replace(top_logprobs=most + 1), request_id="too-many")
        plain = await engine.generate(prompt, params, request_id="plain")
        assert plain.top is None
        if not most:
            return
        count = min(3, most)
        async with asyncio.TaskGroup() as tasks:  # at once in one batch, each with its own number
            whole = tasks.create_task(engine.generate(prompt, params.replace(top_logprobs=count), request_id="whole"))
            one = InFlight(tasks, engine, prompt, params.replace(top_logprobs=1), "one")
        top, first, response = whole.result().top, one.task.result().top, whole.result().token_ids.tolist()
        assert top is not None
        assert first is not None
        assert response == plain.token_ids.tolist() == one.tokens
        np.testing.assert_allclose(whole.result().logprobs, plain.logprobs, atol=self.tolerance)
        assert (top.token_ids.shape, top.logprobs.shape) == ((8, count), (8, count))
        np.testing.assert_array_equal(first.token_ids, top.token_ids[:, :1])
        assert (np.diff(top.logprobs) <= 0).all()
        for place, likely in enumerate(top.token_ids.tolist()):
            expected = [(await self.reference_logprobs(engine, prompt + response[:place], [token], 0.7))[0] for token in likely]
            np.testing.assert_allclose(top.logprobs[place], expected, atol=self.tolerance)

    async def test_a_structured_response_has_the_structure(self, engine: Engine) -> None:
        prompt = self.prompts(engine, 1)[0]
        params = SamplingParams(max_tokens=32, seed=8, structured_outputs={"regex": "[0-9]{3}-[ab]"})
        if not engine.capabilities.structured_outputs:
            with pytest.raises(RequestRefusedError, match="structured_outputs"):
                await engine.generate(prompt, params, request_id="structured")
            return
        responses = await self.many(engine, [prompt] * 4, [params.replace(seed=seed) for seed in range(4)], "structured")
        for response in responses:
            assert re.fullmatch("[0-9]{3}-[ab]", self.text(engine, response.token_ids.tolist()))
            assert response.finish_reason == "stop"
        # The distribution that was sampled from leaves out what the structure forbids, so no token is less likely than without.
        free = await self.reference_logprobs(engine, prompt, responses[0].token_ids.tolist(), 1.0)
        assert (responses[0].logprobs >= free - self.tolerance).all()
        with pytest.raises(RequestRefusedError):
            await engine.generate(prompt, params.replace(structured_outputs={"regex": "[0-9"}), request_id="bad")
        assert await self.greedy(engine)

    @catches
    async def test_a_sleeping_engine_keeps_requests_waiting_and_goes_on_as_before(self, engine: Engine) -> None:
        if not engine.capabilities.sleep:
            for ask in (engine.sleep, engine.wake_up):
                with pytest.raises(RequestRefusedError, match="sleep"):
                    await ask()
            return
        await engine.wake_up()
        with pytest.raises(RequestRefusedError, match="level=3"):
            await engine.sleep(level=3)
        before, prompt = await self.greedy(engine), self.prompts(engine, 1)[0]
        for level in (1, 2):
            async with self.weights_restored(engine) as version, asyncio.TaskGroup() as tasks:
                running = await InFlight(tasks, engine, prompt, self.long(), "running").seen()
                await engine.sleep(level)
                await engine.sleep(level)
                stopped = await running.task
                waiting = InFlight(tasks, engine, prompt, SamplingParams(max_tokens=4, ignore_eos=True), "waiting")
                await self.opportunity(engine)
                with pytest.raises(WeightUpdateError, match="wake_up"):
                    await engine.update_weights(self.new_weights(engine), version + 1)
                await engine.wake_up(weights_only=True)
                await engine.update_weights(self.new_weights(engine), version + 1)
                await engine.wake_up()
                # None of its tokens was sampled in the sleep: all are of the weights that came before it ended.
                assert (await waiting.task).versions.tolist() == [version + 1] * 4
            caught(stopped.finish_reason != "length")
            assert stopped.finish_reason == "abort"
            await engine.sleep(level)
            await engine.wake_up()
            assert await self.greedy(engine) == before

    async def test_a_transfer_of_weights_is_refused_where_none_is_offered(self, engine: Engine) -> None:
        if engine.capabilities.transfer:
            return  # what sends weights is the engine's own; its own tests send some

        class Transfer:
            sent = False

            def send_weights(self) -> None:
                self.sent = True

        transfer, version, old = Transfer(), engine.version, await self.greedy(engine)
        with pytest.raises(WeightUpdateError):
            await engine.update_weights(transfer, version + 1)
        assert (transfer.sent, engine.version) == (False, version)
        assert await self.greedy(engine) == old

    async def test_images_are_refused_where_none_are_taken(self, engine: Engine) -> None:
        if not engine.capabilities.images:  # what an image is, and what it changes, only the model's own tests can say
            with pytest.raises(RequestRefusedError, match="images"):
                await engine.generate(self.prompts(engine, 1)[0], SamplingParams(max_tokens=1), request_id="seen", media=["image.png"])

    @catches
    async def test_it_tells_its_load_if_it_says_so(self, engine: Engine) -> None:
        async with asyncio.TaskGroup() as tasks:
            await InFlight(tasks, engine, self.prompts(engine, 1)[0], self.long(), "load").seen(3)
            load = engine.load()
            await engine.interrupt()
        assert (load is None) == (not engine.capabilities.load)
        caught(load is None or load.running + load.waiting >= 1)


async def _refusal(call: Awaitable[Any]) -> str:
    with pytest.raises(EngineError) as raised:
        await call
    return str(raised.value)
