"""Shows that nonsense is refused by every public method of engines and samplers: at once, with the value, and nothing is harmed by it."""

import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from agent_loop import Adapter, Completion, Engine, Sampler, SamplingParams, TopTokens, create_sampler, register_sampler
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import Request, Step
from agent_loop.engines.transformers import TransformersEngine
from agent_loop.engines.vllm import VLLMEngine
from agent_loop.errors import EngineError, RequestRefusedError
from agent_loop.samples import SampledSequence
from tests.tiny_model import make_tiny_model

SHORT = SamplingParams(max_tokens=2, ignore_eos=True, seed=3)
NAN, INF = math.nan, math.inf


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["simulated", "transformers"])
async def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    simulated = request.param == "simulated"
    async with SimulatedEngine() if simulated else TransformersEngine(make_tiny_model(tmp_path_factory.mktemp("model"))) as engine:
        yield engine


def generate(prompt: Any = (5, 6), params: Any = SHORT, **options: Any) -> Callable[[Engine], Any]:
    return lambda engine: engine.generate(prompt, params, **{"request_id": "bad"} | options)


REQUESTS: list[tuple[Callable[[Engine], Any], str]] = [
    (generate([]), "empty"),
    (generate([[5, 6]]), "flat list"),
    (generate(np.array([[5, 6], [7, 8]])), "flat list"),
    (generate([[5], [6, 7]]), "flat list"),
    (generate(5), "5 are no token ids"),
    (generate(None), "None are no token ids"),
    (generate("hello"), "'hello' are no token ids"),
    (generate({5: 6}), "no token ids"),
    (generate([5.0, NAN]), "no token ids"),
    (generate([True]), "no token ids"),
    (generate(["5"]), "no token ids"),
    (generate([2**70]), "no token ids"),
    (generate([5, -1]), r"\[-1\] lie outside the vocabulary"),
    (generate(np.array([2**63 + 5], np.uint64)), "9223372036854775813.* outside the vocabulary"),
    (generate(params={"max_tokens": 2}), "no SamplingParams"),
    (generate(params=None), "no SamplingParams"),
    (generate(params=SHORT.replace(max_tokens=2**80)), "exceed the model's length"),
    (generate(request_id=None), "request_id=None"),
    (generate(request_id=5), "request_id=5"),
    (generate(request_id=""), "request_id=''"),
    (generate(session_id=5), "session_id=5"),
    (generate(on_tokens=5), "on_tokens=5 cannot be called"),
    (generate(adapter=5), "unknown adapter 5"),
    (generate(adapter=""), "unknown adapter ''"),
    (generate(adapter=[]), r"unknown adapter \[\]"),
    (generate(media=5), "no list of images"),
    (generate(media="cat.png"), "no list of images"),
    (generate(media=["cat.png"]), "takes none"),
    (lambda engine: engine.interrupt("r1"), "request_ids='r1' is no collection"),
    (lambda engine: engine.interrupt(5), "request_ids=5 is no collection"),
    (lambda engine: engine.interrupt({"r1": 1}), "no collection"),
    (lambda engine: engine.interrupt([5]), "holds 5, no request id"),
    (lambda engine: engine.interrupt([["r1"]]), "no request id"),
    (lambda engine: engine.pause("stop"), "unknown pause mode 'stop'"),
    (lambda engine: engine.pause(None), "unknown pause mode None"),
    (lambda engine: engine.pause([]), "unknown pause mode"),
    (lambda engine: engine.score([5]), "nothing to score"),
    (lambda engine: engine.score([[5, 6]]), "flat list"),
    (lambda engine: engine.score([5, 6, 7], start=0), "start=0"),
    (lambda engine: engine.score([5, 6, 7], start=NAN), "start=nan"),
    (lambda engine: engine.score([5, 6, 7], start=None), "start=None"),
    (lambda engine: engine.score([5, 6, 7], start=2**70), "nothing to score"),
    (lambda engine: engine.score([5, 6, 7], adapter="x"), "unknown adapter"),
    (lambda engine: engine.top_tokens([5], 0), "count=0"),
    (lambda engine: engine.top_tokens([5], "2"), "count='2'"),
    (lambda engine: engine.top_tokens([5], 10**9), "count=1000000000"),
    (lambda engine: engine.top_tokens(None, 2), "no token ids"),
    (lambda engine: engine.update_weights(5, 1), "5 holds no weights"),
    (lambda engine: engine.update_weights(None, 1), "None holds no weights"),
    (lambda engine: engine.update_weights("", 1), "'' holds no weights"),
    (lambda engine: engine.update_weights(b"folder", 1), "holds no weights"),
    (lambda engine: engine.update_weights({"seed": 1}, -1), "version=-1"),
    (lambda engine: engine.update_weights({"seed": 1}, None), "version=None"),
    (lambda engine: engine.update_weights({"seed": 1}, 1.5), "version=1.5"),
    (lambda engine: engine.update_weights({"seed": 1}, 2**31), "largest"),
    (lambda engine: engine.add_adapter(5, {"seed": 1}), "named 5"),
    (lambda engine: engine.add_adapter("", {"seed": 1}), "named ''"),
    (lambda engine: engine.add_adapter("a", None), "None holds no weights"),
    (lambda engine: engine.add_adapter("a", {"seed": 1}, -1), "version=-1"),
    (lambda engine: engine.add_adapter("a", {"seed": 1}, "1"), "version='1'"),
    (lambda engine: engine.add_adapter("a", {"seed": 1}, keep=0), "keep=0"),
    (lambda engine: engine.add_adapter("a", {"seed": 1}, keep=None), "keep=None"),
    (lambda engine: engine.remove_adapter(None), "unknown adapter"),
    (lambda engine: engine.remove_adapter(Adapter("a", 0)), "unknown adapter"),
    (lambda engine: engine.with_adapter(5), "adapter=5 names none"),
    (lambda engine: engine.with_adapter(""), "adapter='' names none"),
    (lambda engine: engine.with_adapter("a", keep=-1), "keep=-1"),
    (lambda engine: engine.with_adapter("a").update_weights(5, 1), "5 holds no weights"),
    (lambda engine: engine.with_adapter("a").update_weights({"seed": 1}, None), "version=None"),
    (lambda engine: engine.with_adapter("a").generate([5], SHORT, request_id="bad"), "unknown adapter 'a'"),
    (lambda engine: engine.sleep(NAN), "does not sleep"),
]


@pytest.mark.parametrize("case", REQUESTS, ids=[match for _, match in REQUESTS])
async def test_an_engine_refuses_what_it_cannot_mean(engine: Engine, case: tuple[Callable[[Engine], Any], str]) -> None:
    call, match = case
    with pytest.raises(ValueError, match=match):
        await call(engine)
    assert (engine.version, engine.adapters) == (0, ())
    assert (await engine.generate([5, 6], SHORT, request_id="bad")).finish_reason == "length"  # no id is taken, nothing is paused


SAMPLES: list[tuple[Callable[[Sampler], Any], str]] = [
    (lambda sampler: sampler.sample(None), "no input"),
    (lambda sampler: sampler.sample([5, None]), "input 0"),
    (lambda sampler: sampler.sample([[[5]]]), "input 0: .*flat list"),
    (lambda sampler: sampler.sample(np.zeros((1, 1, 1), int)), "input 0: .*flat list"),
    (lambda sampler: sampler.sample([NAN]), "input 0"),
    (lambda sampler: sampler.sample([5], 0), "no mapping"),
    (lambda sampler: sampler.sample([5], "greedy"), "no mapping"),
    (lambda sampler: sampler.sample([5], []), "no mapping"),
    (lambda sampler: sampler.sample([5], {5: 1, "x": 2}), "unknown sampling parameters"),
    (lambda sampler: sampler.sample([5], {"seed": -1}), "seed=-1"),
    (lambda sampler: sampler.sample({"prompt_ids": [5], "sampling": {"seed": 2**70}}), "input 0: seed=1180591620717411303424"),
    (lambda sampler: sampler.sample({"prompt_ids": [5], "sampling": 0}), "no mapping"),
    (lambda sampler: sampler.sample([5], SHORT, 5), "unknown adapter 5"),
    (lambda sampler: sampler.sample([5], SHORT, num_samples=0), "num_samples=0"),
    (lambda sampler: sampler.sample([5], SHORT, num_samples=None), "num_samples=None"),
    (lambda sampler: sampler.sample([5], SHORT, num_samples=2.0), "num_samples=2.0"),
    (lambda sampler: sampler.sample([5], SHORT, num_samples=10**9), "num_samples=1000000000 .* at most|num_samples=1000000000 is out"),
    (lambda sampler: sampler.generate_from_prompts(None), "no list of texts"),
    (lambda sampler: sampler.generate_from_prompts({"a": 1}), "no list of texts"),
    (lambda sampler: sampler.generate_from_prompts([None]), "prompt 0"),
    (lambda sampler: sampler.generate_from_prompts(b"a"), "prompt 0"),
    (lambda sampler: sampler.generate_from_prompts("a"), "no tokenizer"),
    (lambda sampler: sampler.generate_and_score([5]), "one judge"),
    (lambda sampler: sampler.generate_and_score([5], 5), "reward=5 cannot be called"),
    (lambda sampler: sampler.generate_and_score([5], group_reward="x"), "group_reward='x' cannot be called"),
    (lambda sampler: sampler.generate_and_score([5], len, reward_timeout=0), "reward_timeout=0"),
    (lambda sampler: sampler.generate_and_score([5], len, reward_timeout=NAN), "reward_timeout=nan"),
    (lambda sampler: sampler.generate_and_score([5], len, reward_timeout=None), "reward_timeout=None"),
    (lambda sampler: sampler.add_adapter("a", 5), "5 holds no weights"),
    (lambda sampler: sampler.remove_adapter(5), "unknown adapter"),
    (lambda sampler: sampler.set_template(5), "no apply_chat_template"),
    (lambda sampler: sampler.set_template("{{ x }}"), "need a tokenizer"),
]


@pytest.mark.parametrize("case", SAMPLES, ids=[match for _, match in SAMPLES])
async def test_a_sampler_refuses_what_it_cannot_mean(engine: Engine, case: tuple[Callable[[Sampler], Any], str]) -> None:
    call, match = case
    sampler = Sampler(engine)
    with pytest.raises(ValueError, match=match):
        await call(sampler)
    assert len((await sampler.sample([5, 6], SHORT))[0].sequences) == 1


BEAMS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"beams": 0}, {}, "beams=0 is out of bounds"),
    ({"beams": -1}, {}, "beams=-1"),
    ({"beams": 10**6}, {}, "beams=1000000 is out of bounds; it must be from 1 to 256"),
    ({"beams": None}, {}, "beams=None"),
    ({"beams": 2.0}, {}, "beams=2.0"),
    ({"length_penalty": None}, {}, "length_penalty=None"),
    ({"length_penalty": NAN}, {}, "length_penalty=nan"),
    ({"length_penalty": 10**400}, {}, "length_penalty=1000"),
    ({}, {"temperature": 0.5}, "temperature=0.5 does not fit beam search"),
    ({}, {"top_k": 2}, "top_k=2 does not fit"),
    ({}, {"stop": ("a",)}, "stop=.* does not fit"),
    ({}, {"structured_outputs": {"json_object": True}}, "structured_outputs"),
]


@pytest.mark.parametrize("case", BEAMS, ids=[match for _, _, match in BEAMS])
async def test_beam_search_refuses_what_it_cannot_mean(engine: Engine, case: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    made, asked, match = case
    with pytest.raises(ValueError, match=match):
        await create_sampler("beam_search", engine, **made).sample([5], asked)


async def test_beam_search_is_the_same_greedy_or_not(engine: Engine) -> None:
    async def best(temperature: float) -> list[int]:
        sampler = create_sampler("beam_search", engine, beams=2)
        tokens: list[int] = (await sampler.sample([5], SHORT.replace(temperature=temperature)))[0].sequences[0].token_ids.tolist()
        return tokens

    assert await best(0.0) == await best(1.0)


PARAMS: list[dict[str, Any]] = [
    *(
        {name: value}
        for name in ("max_tokens", "top_k", "top_logprobs")
        for value in (None, "8", 2.5, NAN, -1, True, [8], np.array([1, 2]))
    ),
    *({name: value} for name in ("temperature", "top_p", "min_p") for value in (None, "1", NAN, INF, -0.1, True, [1.0], 10**400)),
    *({"repetition_penalty": value} for value in (None, 0, -1, NAN, INF, np.array([1.0, 2.0]))),
    *({"seed": value} for value in ("1", 1.5, NAN, True, -1, 2**63, 2**70, [1])),
    *({"stop": value} for value in (None, 5, "end", b"end", [5], [""], [None])),
    *({"stop_token_ids": value} for value in (None, 5, "5", ["5"], [1.5], [True], [-1], [2**70], [np.array([1, 2])])),
    *({"ignore_eos": value} for value in (None, "no", 1)),
    *(
        {"structured_outputs": value}
        for value in (5, "json", {}, {5: 1, "x": 2}, {"choice": "ab"}, {"choice": []}, {"regex": "a", "json": {}})
    ),
    {"top_p": 0},
    {"top_p": 1.1},
    {"min_p": 1.1},
    {"top_k": 2**40},
    {"max_tokens": 0},
]


@pytest.mark.parametrize("given", PARAMS, ids=[str(one)[:60] for one in PARAMS])
def test_parameters_out_of_bounds_are_refused_by_name(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=name):
        SamplingParams(**given)
    with pytest.raises(ValueError, match=name):
        SamplingParams().overridden(given)


def test_the_bounds_themselves_are_taken() -> None:
    widest = SamplingParams(seed=2**63 - 1, top_k=2**31 - 1, stop_token_ids=(2**31 - 1,), min_p=1, top_p=np.float32(1))
    assert (widest.seed, widest.min_p) == (2**63 - 1, 1.0)
    assert SamplingParams(seed=np.int64(0)).seed == 0
    assert VLLMEngine("name", seed=2**32 - 1).recompute is False


MADE: list[tuple[Callable[[], Any], str]] = [
    (lambda: create_sampler(None), "None is no name"),  # type: ignore[arg-type]
    (lambda: create_sampler([]), "no name"),  # type: ignore[arg-type]
    (lambda: create_sampler(""), "no sampler is named ''"),
    (lambda: create_sampler("simulated", seed=-1), "seed=-1"),
    (lambda: create_sampler("simulated", seed="x"), "seed='x'"),
    (lambda: create_sampler("simulated", seed=2**70), "seed=1180591620717411303424"),
    (lambda: create_sampler("simulated", vocab_size=0), "vocab_size=0"),
    (lambda: create_sampler("simulated", eos_token_id=64), "eos_token_id=64"),
    (lambda: create_sampler("simulated", max_length="9"), "max_length='9'"),
    (lambda: create_sampler("simulated", slots=0), "slots=0"),
    (lambda: create_sampler("simulated", tokens_per_second=NAN), "tokens_per_second=nan"),
    (lambda: create_sampler("simulated", script=5), "script=5"),
    (lambda: create_sampler("simulated", fail=5), "fail=5"),
    (lambda: create_sampler("simulated", lengths="long"), "lengths='long'"),
    (lambda: create_sampler("simulated", policy=5), "policy=5"),
    (lambda: create_sampler("transformers", 5), "model is a int"),
    (lambda: create_sampler("transformers", ""), "model is empty"),
    (lambda: TransformersEngine("name", dtype="float3"), "dtype='float3'"),
    (lambda: TransformersEngine("name", device="abacus"), "device='abacus'"),
    (lambda: TransformersEngine("name", device=None), "device=None"),  # type: ignore[arg-type]
    (lambda: TransformersEngine("name", tokenizer=5), "tokenizer=5"),
    (lambda: TransformersEngine("name", seed=-1), "seed=-1"),
    (lambda: TransformersEngine("name", max_length=1), "max_length=1"),
    (lambda: TransformersEngine("name", max_requests="9"), "max_requests='9'"),  # type: ignore[arg-type]
    (lambda: TransformersEngine("name", cache_tokens=NAN), "cache_tokens=nan"),  # type: ignore[arg-type]
    (lambda: VLLMEngine(None), "model=None"),  # type: ignore[arg-type]
    (lambda: VLLMEngine(""), "model is empty"),
    (lambda: VLLMEngine("name", seed=2**32), "seed=4294967296"),
    (lambda: VLLMEngine("name", max_model_len="9"), "max_model_len='9'"),  # type: ignore[arg-type]
    (lambda: Sampler(SimulatedEngine(), seed=2**63), "seed=9223372036854775808"),
    (lambda: Sampler(SimulatedEngine(), seed=1.5), "seed=1.5"),  # type: ignore[arg-type]
    (lambda: register_sampler(5), "5"),  # type: ignore[arg-type]
    (lambda: register_sampler(""), "not empty"),
]


@pytest.mark.parametrize("case", MADE, ids=[match for _, match in MADE])
def test_what_cannot_be_made_is_refused_when_it_is_made(case: tuple[Callable[[], Any], str]) -> None:
    make, match = case
    with pytest.raises(ValueError, match=match):
        make()


# --- what engines say


@pytest.mark.parametrize("logprob", [NAN, INF, -INF, 0.1])
async def test_what_is_no_log_probability_ends_its_request_with_the_place(logprob: float) -> None:
    class Spoilt:
        """Its third token is spoilt."""

        vocab_size, eos_token_ids = 8, frozenset({0})

        def start(self, request: Request, params: SamplingParams) -> Callable[..., Step]:
            return lambda context, weights: Step(5, logprob if len(context) == request.ids.size + 2 else -1.0)

    shown: list[Completion] = []
    async with SimulatedEngine(policy=Spoilt()) as engine:
        for watched in (None, shown.append):
            with pytest.raises(EngineError, match=f"token 2 has log-probability {logprob}"):
                await engine.generate([5], SamplingParams(max_tokens=5), request_id="r", on_tokens=watched)
        with pytest.raises(EngineError, match="input 1: token 2") as raised:
            await Sampler(engine).sample([{"prompt_ids": [5], "sampling": {"max_tokens": 2}}, [5]], {"max_tokens": 3})
    assert not isinstance(raised.value, RequestRefusedError)  # other weights may say something else to it
    assert [piece.logprobs.tolist() for piece in shown] == [[-1.0], [-1.0]]


def test_values_of_ones_own_engine_are_checked_where_they_are_made() -> None:
    one = np.ones(1, np.int32)
    for spoilt in (NAN, 1.0):
        with pytest.raises(EngineError, match="token 0"):
            SampledSequence(one, np.array([spoilt], np.float32), one, "stop")
        with pytest.raises(EngineError, match="likely token 1"):
            TopTokens(np.arange(2, dtype=np.int32), np.array([-1, spoilt], np.float32), 0)
    with pytest.raises(EngineError, match="likely token 0"):
        TopTokens.of([1, 2], [-1.0, INF], 0)
    assert TopTokens.of([1, 2], [-1.0, -INF], 0).token_ids.tolist() == [1, 2]  # impossible, and likely enough to be told
    assert Completion.of([1], [1e-6], 0, "stop").logprobs[0] > 0  # a sum that was rounded
