"""The part of `agent_loop.testing.EngineSuite` about adapters; of an engine that declares none it asks only that it refuses them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Completion, Engine, WeightSource
from agent_loop.errors import AdapterError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import SamplingParams
from agent_loop.testing_base import InFlight, Suite, catches, caught


class AdapterSuite(Suite):
    """Every test leaves the engine without adapters."""

    @asynccontextmanager
    async def removed(self, engine: Engine, *names: str) -> AsyncIterator[tuple[WeightSource, WeightSource]]:
        """The two sources; afterwards no adapter has one of these names."""
        first, second = self.adapter_sources(engine)
        try:
            yield first, second
        finally:
            for name in {adapter.name for adapter in engine.adapters} & set(names):
                await engine.remove_adapter(name)
            assert not engine.adapters

    async def expected(
        self, engine: Engine, under: tuple[Adapter, WeightSource] | None, prompt: Sequence[int], response: Sequence[int]
    ) -> NDArray[np.floating]:
        """The reference's log-probabilities at temperature 1, under an adapter or without."""
        if under is None:
            return await self.reference_logprobs(engine, prompt, response, 1.0)
        return await self.adapted_logprobs(engine, *under, prompt, response)

    async def under(self, engine: Engine, prompt: Sequence[int], adapter: str | Adapter | None, name: str, tokens: int = 16) -> Completion:
        """A seeded response, under an adapter or without."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=5)
        return await engine.generate(prompt, params, request_id=name, adapter=adapter)

    async def test_unknown_adapters_are_refused_with_those_that_are_there(self, engine: Engine) -> None:
        for nobody in ("nobody", "", Adapter("nobody", 3)):
            with pytest.raises(RequestRefusedError, match=r"unknown adapter .*none is loaded"):
                await self.under(engine, [1, 1], nobody, "unknown")
        if not engine.capabilities.adapters:
            with pytest.raises(RequestRefusedError, match="adapters"):
                await engine.add_adapter("nobody", "folder")
            return
        async with self.removed(engine, "known") as (source, _):
            await engine.add_adapter("known", source, 7)
            with pytest.raises(RequestRefusedError, match=r"'nobody'.*known@7"):
                await self.under(engine, [1, 1], "nobody", "unknown")
            for call in (engine.score([1, 1, 1], adapter="nobody"), engine.top_tokens([1, 1], 1, adapter="nobody")):
                with pytest.raises(RequestRefusedError):
                    await call
            with pytest.raises(RequestRefusedError, match=r"'nobody'.*known@7"):
                await engine.remove_adapter("nobody")
            for bad, value in (({"name": ""}, "''"), ({"keep": 0}, "keep=0"), ({"version": 7}, "version=7"), ({"version": 2.5}, "2.5")):
                with pytest.raises(ValueError, match=value):
                    await engine.add_adapter(**{"name": "known", "path": source} | bad)

    async def test_requests_of_several_adapters_at_once_are_each_sampled_and_scored_under_their_own(self, engine: Engine) -> None:
        if not engine.capabilities.adapters:
            return
        async with self.removed(engine, "a", "b") as sources:
            pairs = [(await engine.add_adapter(name, source), source) for name, source in zip("ab", sources, strict=True)]
            ways = [None, *pairs]
            prompts = [prompt for prompt in self.prompts(engine, 3) for _ in ways]
            async with asyncio.TaskGroup() as tasks:
                calls = [
                    tasks.create_task(self.under(engine, prompt, None if way is None else way[0], f"mixed-{number}", 24))
                    for number, (prompt, way) in enumerate(zip(prompts, ways * 3, strict=True))
                ]
            for prompt, way, call in zip(prompts, ways * 3, calls, strict=True):
                response = call.result()
                tokens = response.token_ids.tolist()
                right = await self.expected(engine, way, prompt, tokens)
                np.testing.assert_allclose(response.logprobs, right, atol=self.tolerance)
                assert set(response.versions.tolist()) == {engine.version if way is None else way[0].version}
                # What would show if another policy had sampled it.
                for other in ways:
                    if other is not way:
                        assert not np.allclose(await self.expected(engine, other, prompt, tokens), right, atol=10 * self.tolerance)
                adapter = None if way is None else way[0].name
                if engine.capabilities.score:
                    scores = await engine.score(prompt + tokens, start=len(prompt), adapter=adapter)
                    np.testing.assert_allclose(scores, right, atol=self.tolerance)
                if engine.capabilities.top_tokens:
                    top = await engine.top_tokens(prompt, 1, adapter=adapter)
                    likeliest = await self.expected(engine, way, prompt, top.token_ids.tolist())
                    np.testing.assert_allclose(top.logprobs, likeliest, atol=self.tolerance)
                    assert top.version == (engine.version if way is None else way[0].version)

    @catches
    async def test_a_new_version_leaves_requests_in_flight_with_theirs(self, engine: Engine) -> None:
        if not engine.capabilities.adapters:
            return
        prompt = self.prompts(engine, 1)[0]
        async with self.removed(engine, "in-flight") as (first, second):
            start = engine.with_adapter("in-flight").version + 3
            old = await engine.add_adapter("in-flight", first, start, keep=1)
            whole = await engine.generate(prompt, self.long(), request_id="whole", adapter="in-flight")
            async with asyncio.TaskGroup() as tasks:
                call = await InFlight(tasks, engine, prompt, self.long(), "before", "in-flight").seen(2)
                new = await engine.add_adapter("in-flight", second, keep=1)
                kept, in_flight = list(engine.adapters), not call.task.done()
                after = tasks.create_task(self.under(engine, prompt, "in-flight", "after"))
            caught(in_flight)
            assert kept == [old, new]  # the old one is beyond what is kept, and used
            assert call.task.result().token_ids.tolist() == whole.token_ids.tolist()
            assert set(call.task.result().versions.tolist()) == {start}
            assert (new.version, set(after.result().versions.tolist())) == (start + 1, {start + 1})
            expected = await self.expected(engine, (new, second), prompt, after.result().token_ids.tolist())
            np.testing.assert_allclose(after.result().logprobs, expected, atol=self.tolerance)
            assert list(engine.adapters) == [new]
            with pytest.raises(RequestRefusedError, match=f"{old}; loaded are {new}"):
                await self.under(engine, prompt, old, "too-old")

    async def test_prefix_caches_and_old_versions_are_each_adapters_own(self, engine: Engine) -> None:
        if not engine.capabilities.adapters:
            return
        # Long enough for whole blocks of a cache, which the next request would find.
        short = self.prompts(engine, 5)[4]
        prompt = (short * 300)[: min(300, engine.max_length // 2)]
        async with self.removed(engine, "cached") as (first, second):
            one = (await engine.add_adapter("cached", first), first)
            two = (await engine.add_adapter("cached", second), second)
            for number, way in enumerate([None, one, two, one, None]):
                response = await self.under(engine, prompt, None if way is None else way[0], f"cached-{number}", 8)
                expected = await self.expected(engine, way, prompt, response.token_ids.tolist())
                np.testing.assert_allclose(response.logprobs, expected, atol=self.tolerance)
            three = await engine.add_adapter("cached", first)
            assert engine.adapters == (two[0], three)
            assert set((await self.under(engine, prompt, "cached", "newest", 2)).versions.tolist()) == {three.version}

    async def test_an_adapter_that_cannot_be_loaded_is_told_and_never_replaced_by_the_model(self, engine: Engine) -> None:
        if not engine.capabilities.adapters:
            return
        async with self.removed(engine, "broken") as (source, _):
            before = await self.greedy(engine)
            with pytest.raises(AdapterError, match="broken"):
                await engine.add_adapter("broken", self.broken_adapter(engine))
            with pytest.raises(RequestRefusedError, match="unknown adapter 'broken'"):
                await self.under(engine, [1, 1], "broken", "fallback")
            first = await engine.add_adapter("broken", source)
            with pytest.raises(AdapterError, match="broken"):
                await engine.add_adapter("broken", self.broken_adapter(engine), first.version + 1)
            assert set((await self.under(engine, [1, 1], "broken", "still-there")).versions.tolist()) == {first.version}
            assert await self.greedy(engine) == before

    async def test_removed_adapters_serve_what_they_began_and_weights_change_only_without_any(self, engine: Engine) -> None:
        if not engine.capabilities.adapters:
            return
        prompt = self.prompts(engine, 2)[1]
        async with self.removed(engine, "removed") as (source, _), self.weights_restored(engine) as version:
            adapter = await engine.add_adapter("removed", source)
            async with asyncio.TaskGroup() as tasks:
                served = await InFlight(tasks, engine, prompt, self.long(), "served", "removed").seen(2)
                cancelled = await InFlight(tasks, engine, prompt, self.long(), "cancelled", "removed").seen(2)
                await engine.remove_adapter("removed")
                with pytest.raises(RequestRefusedError, match="unknown adapter 'removed'"):
                    await self.under(engine, prompt, "removed", "late")
                with pytest.raises(WeightUpdateError, match=str(adapter)):
                    await engine.update_weights(self.new_weights(engine), version + 1)
                cancelled.task.cancel()
            tokens = served.task.result().token_ids.tolist()
            expected = await self.expected(engine, (adapter, source), prompt, tokens)
            np.testing.assert_allclose(served.task.result().logprobs, expected, atol=self.tolerance)
            await engine.update_weights(self.new_weights(engine), version + 1)
            assert set((await self.under(engine, prompt, None, "new-weights")).versions.tolist()) == {version + 1}

    @catches
    async def test_an_adapter_can_be_the_policy_over_the_model_as_its_reference(self, engine: Engine) -> None:
        if not engine.capabilities.adapters:
            return
        prompt = self.prompts(engine, 3)[2]
        async with self.removed(engine, "policy") as (first, second):
            policy = engine.with_adapter("policy")
            at_start = policy.version
            await policy.update_weights(first, at_start + 1)
            async with asyncio.TaskGroup() as tasks:
                call = await InFlight(tasks, policy, prompt, self.long(), "policy").seen(2)
                await policy.update_weights(second, at_start + 2)
                await policy.interrupt(["policy"])
            kept = call.task.result()
            caught(kept.finish_reason != "length")
            assert (kept.finish_reason, set(kept.versions.tolist()), policy.version) == ("abort", {at_start + 1}, at_start + 2)
            context = prompt + kept.token_ids.tolist()
            rest = await policy.generate(context, SamplingParams(max_tokens=8, ignore_eos=True, seed=1), request_id="policy")
            newest = (policy.check_adapter("policy"), second)
            expected = await self.expected(engine, newest, context, rest.token_ids.tolist())
            np.testing.assert_allclose(rest.logprobs, expected, atol=self.tolerance)
            assert set(rest.versions.tolist()) == {at_start + 2}
            if engine.capabilities.score:
                reference = await policy.base_model.score(context, start=len(prompt))
                np.testing.assert_allclose(
                    reference, await self.expected(engine, None, prompt, context[len(prompt) :]), atol=self.tolerance
                )
                assert not np.allclose(await policy.score(context, start=len(prompt)), reference, atol=10 * self.tolerance)
