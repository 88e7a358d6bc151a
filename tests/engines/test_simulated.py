"""Shows that the simulated engine keeps every promise of an engine, samples what it says it samples, and says what it is told to."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Completion, Engine, WeightSource
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import lognormal_lengths, scripted_logprob
from agent_loop.engines.simulated_table import TablePolicy, shape_logits
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError
from agent_loop.sampling import SamplingParams
from agent_loop.testing import EngineSuite, InFlight


class TestSimulatedEngine(EngineSuite):
    tolerance = 1e-6

    @pytest_asyncio.fixture
    async def engine(self) -> AsyncIterator[Engine]:
        async with self.make_engine() as engine:
            yield engine

    def make_engine(self) -> Engine:
        return SimulatedEngine(slots=16)

    async def reference_logprobs(
        self, engine: Engine, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> NDArray[np.floating]:
        assert isinstance(engine, SimulatedEngine)
        return engine.reference_logprobs(prompt_ids, response_ids, engine.version, SamplingParams(temperature=temperature))

    def original_weights(self, engine: Engine) -> WeightSource:
        return {"seed": 0}

    def new_weights(self, engine: Engine) -> WeightSource:
        return "checkpoints/step-1"

    def broken_weights(self, engine: Engine) -> WeightSource:
        return {"no": "seed"}

    def adapter_sources(self, engine: Engine) -> Sequence[WeightSource]:
        return {"seed": 4}, "adapters/math"

    async def adapted_logprobs(
        self, engine: Engine, adapter: Adapter, source: WeightSource, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> NDArray[np.floating]:
        assert isinstance(engine, SimulatedEngine)
        return engine.reference_logprobs(prompt_ids, response_ids, engine.version, adapter=adapter)

    def broken_adapter(self, engine: Engine) -> WeightSource:
        return {"no": "seed"}


class TestWithARate(TestSimulatedEngine):
    """The same promises where a token takes time."""

    def make_engine(self) -> Engine:
        return SimulatedEngine(slots=64, tokens_per_second=20_000.0)


LOGITS = np.log([0.4, 0.3, 0.15, 0.1, 0.05])


def probabilities(context: Sequence[int] = (0,), **params: object) -> list[float]:
    return [round(float(p), 6) for p in np.exp(shape_logits(LOGITS, context, SamplingParams(**params)))]  # type: ignore[arg-type]


def test_sampling_parameters_shape_the_distribution() -> None:
    assert probabilities() == [0.4, 0.3, 0.15, 0.1, 0.05]
    assert probabilities(temperature=0.5) == pytest.approx(np.array([0.16, 0.09, 0.0225, 0.01, 0.0025]) / 0.285, abs=1e-6)
    assert probabilities(temperature=0.0) == [1, 0, 0, 0, 0]
    assert probabilities(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=1e-6)
    assert probabilities(top_p=0.5) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0], abs=1e-6)
    assert probabilities(top_p=1e-9) == [1, 0, 0, 0, 0]
    assert probabilities(min_p=0.3) == pytest.approx(np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85, abs=1e-6)
    penalised = np.array([0.4**2, 0.3, 0.15, 0.1, 0.05])  # a negative logit is multiplied
    assert probabilities(context=(0, 0), repetition_penalty=2.0) == pytest.approx(penalised / penalised.sum(), abs=1e-6)


async def test_tokens_are_drawn_from_the_distribution_they_report() -> None:
    params = SamplingParams(max_tokens=4000, ignore_eos=True, top_k=3, temperature=0.8, seed=1)
    async with SimulatedEngine(vocab_size=4, max_length=5000) as engine:
        response = await engine.generate([1], params, request_id="one")
        assert isinstance(engine.policy, TablePolicy)
        contexts = [1, *response.token_ids.tolist()[:-1]]
        for last in range(4):
            nexts = [token for before, token in zip(contexts, response.token_ids.tolist(), strict=True) if before == last]
            expected = np.exp(engine.policy.log_probs([last], 0, params))
            np.testing.assert_allclose(np.bincount(nexts, minlength=4) / len(nexts), expected, atol=0.08)


async def test_one_key_continues_an_interrupted_response_to_the_same_tokens() -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=1.3)
    async with SimulatedEngine() as engine:
        whole = await engine.generate([5, 6], params, request_id="r")
        for kept in (1, 17, 39):
            start = whole.token_ids[:kept].tolist()
            rest = await engine.generate([5, 6, *start], params.replace(max_tokens=40 - kept), request_id="r")
            assert start + rest.token_ids.tolist() == whole.token_ids.tolist()


async def test_engines_of_one_seed_agree_and_of_two_seeds_do_not() -> None:
    async def tokens(seed: int) -> bytes:
        async with SimulatedEngine(seed=seed) as engine:
            return (await answer(engine, [5], max_tokens=30, ignore_eos=True)).token_ids.tobytes()

    assert await tokens(1) == await tokens(1) != await tokens(2)


# --- scripts and lengths


async def answer(engine: Engine, prompt: Sequence[int], request_id: str = "r", **params: object) -> Completion:
    return await engine.generate(prompt, SamplingParams(**params), request_id=request_id)  # type: ignore[arg-type]


async def test_a_script_gives_its_tokens_and_stops() -> None:
    async with SimulatedEngine(script=lambda prompt: [*reversed(prompt), 9]) as engine:
        response = await answer(engine, [1, 2, 3])
        assert (response.token_ids.tolist(), response.finish_reason) == ([3, 2, 1, 9], "stop")
        assert response.logprobs.tolist() == pytest.approx(scripted_logprob(np.array([3, 2, 1, 9])).tolist())
        assert (await answer(engine, [1, 2, 3], max_tokens=2)).finish_reason == "length"
        assert (await answer(engine, [1, 0, 3])).token_ids.tolist() == [3, 0]  # an EOS in a script ends the response


@settings(deadline=None)
@given(prompt=st.lists(st.integers(10, 20), min_size=1, max_size=6), kept=st.integers(0, 4))
def test_a_scripted_response_continues_where_it_was_kept(prompt: list[int], kept: int) -> None:
    script = [1, 2, 3, 4, 0]

    async def run() -> list[int]:
        async with SimulatedEngine(script=lambda _: script) as engine:
            return list((await answer(engine, prompt + script[:kept])).token_ids)

    assert script[:kept] + asyncio.run(run()) == script


async def test_a_script_without_a_token_is_an_error_that_says_so() -> None:
    async with SimulatedEngine(script=lambda _: []) as engine:
        with pytest.raises(ValueError, match="gave no token for request r"):
            await answer(engine, [1])


async def test_lengths_are_those_given_and_survive_an_interruption() -> None:
    async with SimulatedEngine(lengths=lambda request: {"short": 1, "long": 50}[request.request_id]) as engine:
        assert len((await answer(engine, [1], "short")).token_ids) == 1
        whole = await answer(engine, [1], "long")
        assert (len(whole.token_ids), whole.finish_reason) == (50, "stop")
        rest = await answer(engine, [1, *whole.token_ids[:20].tolist()], "long")
        assert len(rest.token_ids) == 30
    async with SimulatedEngine(lengths=0) as engine:
        with pytest.raises(ValueError, match="a response of 0 tokens"):
            await answer(engine, [1])


async def test_lognormal_lengths_have_their_median_and_their_bound() -> None:
    async with SimulatedEngine(lengths=lognormal_lengths(20, 1.0, longest=100, seed=3), slots=1000) as engine:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(answer(engine, [1], str(number))) for number in range(400)]
        lengths = [len(call.result().token_ids) for call in calls]
    assert 16 <= np.median(lengths) <= 25
    assert max(lengths) == 100


# --- slots


async def test_at_most_slots_requests_decode_at_once_in_order_of_arrival() -> None:
    most, order = 0, list[int]()

    async def one(engine: SimulatedEngine, number: int) -> None:
        def watch(_: Completion) -> None:
            nonlocal most
            most = max(most, engine.running)
            if number not in order:
                order.append(number)

        await engine.generate([1], SamplingParams(max_tokens=5), request_id=str(number), on_tokens=watch)

    async with SimulatedEngine(slots=3, lengths=5) as engine:
        async with asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(one(engine, number))
        assert (engine.running, engine.waiting) == (0, 0)
    assert (most, order) == (3, list(range(10)))


async def test_a_cancelled_or_interrupted_request_gives_its_slot_to_the_next() -> None:
    long = SamplingParams(max_tokens=1000)
    async with SimulatedEngine(slots=1, lengths=1000) as engine, asyncio.TaskGroup() as tasks:
        calls = [InFlight(tasks, engine, [1], long, str(number)) for number in range(4)]
        await calls[0].seen()
        assert (engine.running, engine.waiting) == (1, 3)
        calls[0].task.cancel()
        await calls[1].seen()
        await engine.interrupt(["1", "2"])  # one that decodes and one that waits
        await calls[3].seen()
        assert calls[2].task.result().token_ids.size == 0
        assert calls[2].task.result().finish_reason == "abort"
        await engine.interrupt()


async def test_requests_in_flight_need_different_ids() -> None:
    async with SimulatedEngine(lengths=100) as engine, asyncio.TaskGroup() as tasks:
        await InFlight(tasks, engine, [1], SamplingParams(), "same").seen()
        with pytest.raises(RequestRefusedError, match="'same' is in flight"):
            await answer(engine, [1], "same")


async def test_kept_requests_stand_still_and_later_ones_wait() -> None:
    async with SimulatedEngine(slots=1, lengths=100) as engine, asyncio.TaskGroup() as tasks:
        frozen = await InFlight(tasks, engine, [1], SamplingParams(), "frozen").seen(3)
        await engine.pause("keep")
        count, waiting = len(frozen.tokens), InFlight(tasks, engine, [1], SamplingParams(), "waiting")
        for _ in range(20):
            await asyncio.sleep(0)
        assert (len(frozen.tokens), len(waiting.tokens)) == (count, 0)
        assert (engine.running, engine.waiting) == (1, 1)
        await engine.resume()
    assert (len(frozen.tokens), len(waiting.tokens)) == (100, 100)


async def test_a_slot_freed_during_a_pause_is_given_after_it() -> None:
    async with SimulatedEngine(slots=1, lengths=100) as engine, asyncio.TaskGroup() as tasks:
        frozen, queued = (InFlight(tasks, engine, [1], SamplingParams(), name) for name in ("frozen", "queued"))
        await frozen.seen()
        await engine.pause("keep")
        await engine.interrupt(["frozen"])
        await frozen.task
        assert (engine.running, engine.waiting) == (0, 1)
        await engine.resume()
    assert len(queued.tokens) == 100


async def test_close_returns_when_every_request_has() -> None:
    async with SimulatedEngine(slots=1) as engine, asyncio.TaskGroup() as tasks:
        calls = [InFlight(tasks, engine, [1], SamplingParams(max_tokens=1000, ignore_eos=True), name) for name in "ab"]
        await calls[0].seen()
        await engine.close()
        assert [call.task.result().finish_reason for call in calls] == ["abort", "abort"]


# --- failures


async def test_failures_are_raised_on_the_attempts_they_are_asked_for() -> None:
    def fail(name: str, attempt: int) -> Exception | None:
        return EngineError("injected") if (name, attempt) == ("a", 1) else None

    async with SimulatedEngine(lengths=3, fail=fail) as engine:
        with pytest.raises(EngineError, match="injected"):
            await answer(engine, [1], "a")
        assert (await answer(engine, [1], "a")).finish_reason == "stop"
        assert (engine.running, engine.waiting) == (0, 0)


async def test_a_dead_engine_fails_everything_in_flight_and_after() -> None:
    def fail(name: str, attempt: int) -> Exception | None:
        return EngineDeadError("out of memory") if name == "deadly" else None

    async with SimulatedEngine(slots=3, lengths=1000, fail=fail) as engine:
        # gather, for the first failure in a task group would cancel the others
        calls = [answer(engine, [1], name, max_tokens=1000) for name in ("a", "b", "deadly", "queued")]
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert [(type(error), str(error)[-13:]) for error in errors] == [(EngineDeadError, "out of memory")] * 4
        with pytest.raises(EngineDeadError, match="out of memory"):
            await engine.health()
        with pytest.raises(EngineDeadError, match="out of memory"):
            await answer(engine, [1], "later")


async def test_an_error_in_on_tokens_reaches_the_caller_and_frees_the_slot() -> None:
    def broken(_: Completion) -> None:
        raise RuntimeError("broken checkpoint")

    async with SimulatedEngine(slots=1, lengths=5) as engine:
        with pytest.raises(RuntimeError, match="broken checkpoint"):
            await engine.generate([1], SamplingParams(), request_id="r", on_tokens=broken)
        assert (await answer(engine, [1])).finish_reason == "stop"


# --- arguments


def test_arguments_are_checked_at_construction() -> None:
    for arguments, message in [
        ({"slots": 0}, "slots=0"),
        ({"tokens_per_second": 0.0}, "tokens_per_second=0.0"),
        ({"max_length": 1}, "max_length=1"),
        ({"lengths": 3, "policy": TablePolicy()}, "at most one"),
    ]:
        with pytest.raises(ValueError, match=message):
            SimulatedEngine(**arguments)  # type: ignore[arg-type]


async def test_what_a_simulated_engine_cannot_do_is_refused() -> None:
    with pytest.raises(EngineClosedError):
        await SimulatedEngine().pause()
    async with SimulatedEngine(lengths=3) as engine:
        with pytest.raises(RequestRefusedError, match="stop_token_ids"):
            await answer(engine, [1], stop=("\n",))
        with pytest.raises(TypeError, match="no distribution"):
            engine.reference_logprobs([1], [2], 0)
        with pytest.raises(ValueError, match="unknown pause mode"):
            await engine.pause("soft")  # type: ignore[arg-type]


async def test_a_continued_response_keeps_its_length() -> None:
    """By its session: the continuation is another request, with a longer prompt and a seed of its own."""
    lengths = lognormal_lengths(20, 1.0, longest=100, seed=3)
    async with SimulatedEngine(lengths=lengths) as engine:
        for member in range(8):
            session, params = f"math-1-{member}", SamplingParams(max_tokens=100, seed=member)
            whole = await engine.generate([5], params, request_id="whole", session_id=session)
            kept = whole.token_ids[: whole.token_ids.size // 2]
            rest = await engine.generate([5, *kept], params.replace(seed=member + 100), request_id="rest", session_id=session)
            assert kept.size + rest.token_ids.size == whole.token_ids.size


async def test_a_prefix_cache_serves_one_version_of_one_adapter() -> None:
    costs = CostModel(slots=1, tokens_per_second=1e6, prefix_cache_tokens=1000, block_tokens=4)
    async with SimulatedEngine(costs=costs) as engine:
        cached = []
        for adapter in (None, None, "a", "a", "b", "a", None):
            if adapter is not None and adapter not in {one.name for one in engine.adapters}:
                await engine.add_adapter(adapter, {"seed": 1})  # of the same weights, even so
            await engine.generate([5] * 9, SamplingParams(max_tokens=1), request_id="r", adapter=adapter)
            cached.append(engine.statistics().cached_tokens)
    assert cached == [0, 8, 8, 16, 16, 24, 32]
