"""Shows that a sampler gives, in order, what each input and seed stands for, frees the engine, judges, and is made by name."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from agent_loop import Sampler, SamplingParams, create_sampler, register_sampler, sampler_registry
from agent_loop.engines.base import Completion, Engine
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.transformers import TransformersEngine
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError
from agent_loop.samples import SampledSequence
from buffer import RolloutGroup, RolloutState
from tests.tiny_model import make_tiny_model, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
SHORT = SamplingParams(max_tokens=6, ignore_eos=True, seed=3)
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


def simulated(**options: Any) -> SimulatedEngine:
    return SimulatedEngine(vocab_size=512, eos_token_id=TOKENIZER.eos_token_id, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "model")


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["simulated", "transformers"])
async def sampler(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Sampler]:
    engine: Engine = simulated() if request.param == "simulated" else TransformersEngine(folder)
    async with Sampler(engine, TOKENIZER) as sampler:
        yield sampler


# --- over real engines


async def test_each_input_gets_its_samples_in_order_with_everything_a_token_has(sampler: Sampler) -> None:
    prompts = [[5, 6, 7], [9], [11, 12]]
    responses = await sampler.sample(prompts, SHORT, "", 3)
    assert [response.prompt_ids.tolist() for response in responses] == prompts
    for response in responses:
        for sequence in response.sequences:
            assert len(sequence.token_ids) == len(sequence.logprobs) == len(sequence.versions) == 6
            assert (sequence.finish_reason, set(sequence.versions.tolist())) == ("length", {sampler.engine.version})
            assert (sequence.logprobs <= 0).all()
            assert sequence.text == TOKENIZER.decode(sequence.token_ids.tolist(), skip_special_tokens=True)


async def test_every_sample_has_a_seed_of_its_own_and_a_seed_repeats_them_all(sampler: Sampler) -> None:
    first = await sampler.sample([[5, 6]] * 3, SHORT, num_samples=4)
    again = await sampler.sample([[5, 6]] * 3, SHORT, num_samples=4)
    tokens = [tuple(one.token_ids.tolist()) for response in first for one in response.sequences]
    assert len(set(tokens)) == 12
    assert tokens == [tuple(one.token_ids.tolist()) for response in again for one in response.sequences]
    direct = await sampler.engine.generate([5, 6], SHORT, request_id="direct")
    assert tokens[0] == tuple(direct.token_ids.tolist())
    np.testing.assert_allclose(first[0].sequences[0].logprobs, direct.logprobs, atol=1e-5)


async def test_without_a_seed_calls_differ(sampler: Sampler) -> None:
    params = SHORT.replace(seed=None, max_tokens=12)
    drawn = [tuple((await sampler.sample([5, 6], params))[0].sequences[0].token_ids.tolist()) for _ in range(4)]
    assert len(set(drawn)) == 4


async def test_a_chat_is_the_tokens_of_its_template(sampler: Sampler) -> None:
    expected = TOKENIZER.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    given = [expected, np.array(expected), {"prompt_ids": expected}, CHAT, {"messages": CHAT}, {"messages": CHAT, "tools": []}]
    responses = await sampler.sample(given, greedy)
    assert {tuple(response.prompt_ids.tolist()) for response in responses} == {tuple(expected)}
    assert len({tuple(response.sequences[0].token_ids.tolist()) for response in responses}) == 1


async def test_prompts_are_scored_where_that_is_asked(sampler: Sampler) -> None:
    prompts = [[5, 6, 7], [9]]
    responses = await sampler.sample(prompts, SHORT, prompt_logprobs=True)
    for prompt, response in zip(prompts, responses, strict=True):
        assert response.prompt_logprobs is not None
        # What the prompt's tokens would have been sampled with, one after the other.
        tops = [await sampler.engine.top_tokens(prompt[:end], 512) for end in range(1, len(prompt))]
        expected = [top.logprobs[top.token_ids == token][0] for top, token in zip(tops, prompt[1:], strict=True)]
        np.testing.assert_allclose(response.prompt_logprobs, expected, atol=1e-4)
    assert (await sampler.sample([5], SHORT))[0].prompt_logprobs is None


async def test_prompts_are_not_scored_by_an_engine_that_cannot() -> None:
    async with Sampler(SimulatedEngine(script=lambda prompt_ids: [7, 0])) as sampler:
        with pytest.raises(RequestRefusedError, match="cannot score prompts"):
            await sampler.sample([5], prompt_logprobs=True)


async def test_interrupted_sequences_keep_their_tokens_and_say_so(sampler: Sampler) -> None:
    async with asyncio.TaskGroup() as tasks:
        call = tasks.create_task(sampler.sample([[5], [6]], SHORT.replace(max_tokens=400)))
        while not await in_flight(sampler.engine, 2):
            pass
        await sampler.engine.interrupt()
    assert {response.sequences[0].finish_reason for response in call.result()} == {"abort"}


async def test_cancelling_frees_the_engine(sampler: Sampler) -> None:
    call = asyncio.create_task(sampler.sample([[5 + n] for n in range(20)], SHORT.replace(max_tokens=400), num_samples=2))
    while not await in_flight(sampler.engine, 2):
        pass
    call.cancel()
    await asyncio.wait({call})
    assert call.cancelled()
    while await in_flight(sampler.engine, 1):  # the generation thread of transformers hears of it at its next step
        pass
    assert len((await sampler.sample([5], SHORT))[0].sequences[0].token_ids) == 6


async def in_flight(engine: Engine, count: int) -> bool:
    await asyncio.sleep(0)
    load = engine.load()
    return load is not None and load.running + load.waiting >= count


# --- inputs


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ([5, 6], 1),
        (np.array([5, 6]), 1),
        (np.array([[5, 6], [7, 8]]), 2),
        ([[5]], 1),
        (([5], [6]), 2),
        (CHAT, 1),
        ([CHAT, [5]], 2),
        ([], 0),
    ],
)
async def test_one_and_many_inputs_are_told_apart(given: Any, count: int) -> None:
    async with Sampler(simulated(), TOKENIZER) as sampler:
        assert len(await sampler.sample(given, SHORT)) == count


async def test_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    async with Sampler(simulated(), TOKENIZER) as sampler:
        sampler.set_template("{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}:{{ messages[0]['content'] }}")
        (response,) = await sampler.sample({"messages": CHAT, "tools": tools}, SHORT)
    assert TOKENIZER.decode(response.prompt_ids.tolist()) == "add:What is 2 + 2?"


class Shout:
    """A template that is made with the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self.tokenizer.encode(conversation[0]["content"].upper())


async def test_a_template_is_a_text_a_class_or_an_instance_and_none_is_the_tokenizers_own() -> None:
    async with Sampler(simulated(), TOKENIZER) as sampler:
        own = (await sampler.sample(CHAT, SHORT))[0].prompt_ids.tolist()
        seen = []
        for template in ("{{ messages[0]['content'] }}!", Shout, Shout(TOKENIZER), None):
            sampler.set_template(template)
            seen.append(TOKENIZER.decode((await sampler.sample(CHAT, SHORT))[0].prompt_ids.tolist()))
    assert seen == ["What is 2 + 2?!", "WHAT IS 2 + 2?", "WHAT IS 2 + 2?", TOKENIZER.decode(own)]


async def test_templates_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="no apply_chat_template"):
        Sampler(simulated(), TOKENIZER).set_template(7)
    with pytest.raises(ValueError, match="need a tokenizer"):
        Sampler(simulated()).set_template("{{ messages }}")


BAD: list[tuple[Any, str]] = [
    ([], "empty"),
    ([1, 9999], "9999"),
    ([1.5, 2.0], "no token ids"),
    ([True, False], "no token ids"),
    ([[1], [2, 3]], "flat list"),
    ("text", "generate_from_prompts"),
    ({"mesages": CHAT}, "mesages"),
    ({"messages": CHAT, "images": ["x.png"]}, "images"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}, "image"),
    ({"messages": [{"content": "who says it?"}]}, "no chat message"),
    ({"prompt_ids": [1], "sampling": {"heat": 2}}, "heat"),
    (7, "no input"),
    ({"messages": 5}, "no chat"),
    ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, "types"),
    ({"prompt": 5}, "no text"),
    ({"prompt_ids": [1], "images": 5}, "no list of images"),
    ({"prompt_ids": [1], "sampling": 5}, "no mapping"),
]


@pytest.mark.parametrize(("bad", "match"), BAD)
async def test_a_bad_input_is_named_before_anything_is_generated(bad: Any, match: str) -> None:
    async with Sampler(simulated(), TOKENIZER) as sampler:
        with pytest.raises(RequestRefusedError, match=f"input 1: .*{match}"):
            await sampler.sample([[5], bad], SHORT)
        assert isinstance(sampler.engine, SimulatedEngine)
        assert sampler.engine.statistics().tokens == 0


async def test_bad_calls_are_refused() -> None:
    async with Sampler(simulated(), TOKENIZER) as sampler:
        with pytest.raises(RequestRefusedError, match="unknown adapter 'math'"):
            await sampler.sample([5], SHORT, "math")
        with pytest.raises(ValueError, match="num_samples=0"):
            await sampler.sample([5], SHORT, num_samples=0)
        with pytest.raises(ValueError, match="unknown sampling parameters"):
            await sampler.sample([5], {"heat": 1})
        with pytest.raises(RequestRefusedError, match="generate_from_prompts"):
            await sampler.sample("text")  # type: ignore[arg-type]
        for nothing in (5, None, np.array(5)):
            with pytest.raises(RequestRefusedError, match="no input"):
                await sampler.sample(nothing)  # type: ignore[arg-type]
        with pytest.raises(RequestRefusedError, match="no list of texts"):
            await sampler.generate_from_prompts(5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no mapping"):
            await sampler.sample([5], 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no Engine"):
        Sampler(TOKENIZER)
    with pytest.raises(TypeError, match="no decode"):
        Sampler(simulated(), len)  # type: ignore[arg-type]
    async with Sampler(simulated(), TOKENIZER) as sampler:
        sampler.set_template("{{ messages[0].nothing.there }}")
        with pytest.raises(RequestRefusedError, match="template failed"):
            await sampler.sample(CHAT)


async def test_a_call_is_sampled_under_one_version_of_the_adapter_that_it_names() -> None:
    seeded = SHORT.replace(seed=3, ignore_eos=True)
    async with Sampler(simulated()) as sampler:
        engine = sampler.engine
        assert isinstance(engine, SimulatedEngine)
        first = await sampler.add_adapter_to_model("math", {"seed": 1}, 5)
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(sampler.sample([[5], [6]], seeded, "math", num_samples=2, prompt_logprobs=True))
            await asyncio.sleep(0)
            await sampler.add_adapter("math", {"seed": 2}, keep=1)  # before its requests are on their way
            assert engine.adapters[0] == first
        assert {tuple(set(one.versions.tolist())) for response in call.result() for one in response.sequences} == {(5,)}
        for response in call.result():
            for one in response.sequences:
                expected = engine.reference_logprobs(response.prompt_ids.tolist(), one.token_ids.tolist(), 0, adapter=first)
                np.testing.assert_allclose(one.logprobs, expected, atol=1e-6)
        assert [str(adapter) for adapter in engine.adapters] == ["math@6"]


async def test_with_use_base_model_every_adapter_is_off() -> None:
    seeded = SHORT.replace(seed=3, ignore_eos=True)
    async with simulated() as engine:
        plain = await Sampler(engine).sample([5], seeded)
        await engine.add_adapter("math", {"seed": 1}, 5)
        for sampler, name in ((Sampler(engine), ""), (Sampler(engine), "math"), (Sampler(engine.with_adapter("math")), "")):
            off = await sampler.sample([5], seeded, name, use_base_model=True)
            assert off[0].sequences[0].token_ids.tolist() == plain[0].sequences[0].token_ids.tolist()
        adapted = await Sampler(engine.with_adapter("math")).sample([5], seeded)
        assert adapted[0].sequences[0].versions.tolist() == [5] * len(adapted[0].sequences[0].token_ids)
        with pytest.raises(RequestRefusedError, match="unknown adapter 'maths'; loaded are math@5"):
            await Sampler(engine).sample([5], seeded, "maths", use_base_model=True)
        beams = create_sampler("beam_search", engine, beams=2)
        found = [(await beams.sample([5], SamplingParams(max_tokens=4), name))[0].sequences[0].score for name in ("", "math")]
        assert found[0] != found[1]


def test_adapters_work_without_async_too() -> None:
    with Sampler(simulated()) as sampler:
        sampler.add_adapter_sync("math", {"seed": 1})
        assert sampler.sample_sync([5], SHORT, "math")[0].sequences[0].versions.max() == 0
        with pytest.raises(RequestRefusedError, match="unknown adapter 'code'"):
            sampler.sample_sync([5], SHORT, "code")


async def test_without_a_tokenizer_ids_work_and_text_is_refused() -> None:
    async with Sampler(simulated()) as sampler:
        assert (await sampler.sample([5], SHORT))[0].sequences[0].text is None
        with pytest.raises(RequestRefusedError, match="no tokenizer"):
            await sampler.sample({"prompt": "2 + 2"})
        with pytest.raises(RequestRefusedError, match="need a tokenizer"):
            await sampler.sample(CHAT)


async def test_parameters_are_an_object_or_a_mapping_and_a_row_has_its_own() -> None:
    async with Sampler(simulated()) as sampler:
        rows = [{"prompt_ids": [5]}, {"prompt_ids": [5], "sampling": {"max_tokens": 2}}]
        responses = await sampler.sample(rows, {"max_tokens": 4, "ignore_eos": True})
    assert [len(response.sequences[0].token_ids) for response in responses] == [4, 2]


# --- failures


async def test_the_error_of_one_input_names_it_and_the_others_are_freed() -> None:
    engine = simulated(fail=lambda request_id, attempt: EngineError("out of luck") if next(turns) == 2 else None, slots=8)
    turns = iter(range(100))
    async with Sampler(engine) as sampler:
        with pytest.raises(EngineError, match="input 2: out of luck"):
            await sampler.sample([[5], [6], [7], [8]], SHORT.replace(max_tokens=4000))
        assert engine.running + engine.waiting == 0


async def test_the_death_of_the_engine_is_told_as_it_is() -> None:
    engine = simulated(fail=lambda request_id, attempt: EngineDeadError("power cut"))
    async with Sampler(engine) as sampler:
        with pytest.raises(EngineDeadError, match=r"^power cut"):
            await sampler.sample([[5], [6]])


class Odd(SimulatedEngine):
    """Ends responses for a reason that nobody knows."""

    async def generate(self, *args: Any, **options: Any) -> Completion:
        completion = await super().generate(*args, **options)
        object.__setattr__(completion, "finish_reason", "bored")
        return completion


async def test_unknown_finish_reasons_raise() -> None:
    async with Sampler(Odd()) as sampler:
        with pytest.raises(ValueError, match="unknown finish reason 'bored'") as raised:
            await sampler.sample([[5]])
    assert raised.value.__notes__ == ["input 0 of Sampler.sample"]
    with pytest.raises(ValueError, match="bored"):
        SampledSequence(np.zeros(0), np.zeros(0), np.zeros(0), "bored")  # type: ignore[arg-type]


# --- text and scores


async def test_prompts_are_encoded_as_they_are() -> None:
    async with Sampler(simulated(), TOKENIZER) as sampler:
        responses = await sampler.generate_from_prompts(["2 + 2 =", "3 + 3 ="], SHORT, num_samples=2)
        one = await sampler.generate_from_prompts("2 + 2 =", SHORT)
        with pytest.raises(RequestRefusedError, match="prompt 1 is 7"):
            await sampler.generate_from_prompts(["a", 7])  # type: ignore[list-item]
    assert [response.prompt_ids.tolist() for response in responses] == [TOKENIZER.encode("2 + 2 ="), TOKENIZER.encode("3 + 3 =")]
    assert one[0].sequences[0].token_ids.tolist() == responses[0].sequences[0].token_ids.tolist()


async def test_rewards_see_the_row_and_scores_stand_beside_their_sequences() -> None:
    def wanted_tokens(state: RolloutState) -> float:
        assert state.text == TOKENIZER.decode(state.response_ids.tolist(), skip_special_tokens=True)
        if state.row["answer"] == "none":
            raise LookupError("no such answer")
        return float(state.response_ids[0]) + float(state.row["answer"])

    rows = [{"prompt_ids": [5], "answer": "1000"}, {"prompt": "2 + 2 =", "answer": "none"}, {"messages": CHAT, "answer": "0"}]
    async with Sampler(simulated(), TOKENIZER) as sampler:
        scored = await sampler.generate_and_score(rows, wanted_tokens, SHORT, num_samples=2)
    assert [one.score for one in scored[0].sequences] == [one.token_ids[0] + 1000.0 for one in scored[0].sequences]
    assert [(one.score, "no such answer" in str(one.error)) for one in scored[1].sequences] == [(None, True)] * 2
    assert [one.error for one in scored[2].sequences] == [None] * 2


async def test_a_group_reward_judges_the_samples_of_an_input_together() -> None:
    async def ranks(group: RolloutGroup) -> list[float]:
        if group.rollouts[0].row["prompt_ids"] == [6]:
            raise ValueError("a draw")
        return [float(index) for index, _ in enumerate(group.rollouts)]

    async with Sampler(simulated()) as sampler:
        scored = await sampler.generate_and_score(
            [{"prompt_ids": [5]}, {"prompt_ids": [6]}], None, SHORT, group_reward=ranks, num_samples=3
        )
        with pytest.raises(ValueError, match="either reward or group_reward"):
            await sampler.generate_and_score([5])
    assert [one.score for one in scored[0].sequences] == [0, 1, 2]
    assert all("a draw" in str(one.error) for one in scored[1].sequences)


async def test_what_was_interrupted_is_not_judged() -> None:
    async with Sampler(simulated(slots=2)) as sampler, asyncio.TaskGroup() as tasks:
        params = SHORT.replace(max_tokens=4000)
        one = tasks.create_task(sampler.generate_and_score([5], lambda state: 1.0, params, num_samples=2))
        both = tasks.create_task(sampler.generate_and_score([5], None, params, num_samples=2, group_reward=lambda group: [1.0, 1.0]))
        while not await in_flight(sampler.engine, 4):
            pass
        await sampler.engine.interrupt()
    ends = [sequence for call in (one, both) for response in call.result() for sequence in response.sequences]
    assert [(end.finish_reason, end.score, end.error) for end in ends] == [("abort", None, None)] * 4


# --- without async


def test_a_script_samples_inside_with(folder: Path) -> None:
    with create_sampler("transformers", folder) as sampler:
        first = sampler.sample_sync([CHAT, [5]], SHORT, num_samples=2)
        again = sampler.sample_sync([CHAT, [5]], SHORT, num_samples=2)
    assert [len(response.sequences) for response in first] == [2, 2]
    assert first[1].sequences[1].token_ids.tolist() == again[1].sequences[1].token_ids.tolist()
    with pytest.raises(EngineClosedError, match="with sampler"):
        sampler.sample_sync([5])
    assert not [thread for thread in threading.enumerate() if thread.name == "millrace-sampler"]


async def test_a_notebook_whose_loop_runs_samples_too() -> None:
    sampler = Sampler(simulated())
    sampler.open_sync()
    with pytest.raises(RuntimeError, match="open already"):
        sampler.open_sync()
    assert len(sampler.sample_sync([5], SHORT)[0].sequences[0].token_ids) == 6
    with pytest.raises(RuntimeError, match="another event loop"):
        await sampler.sample([5])
    sampler.close_sync()
    sampler.close_sync()


async def test_on_the_engines_own_loop_sync_is_refused_and_from_another_thread_it_works() -> None:
    async with simulated() as engine:
        sampler = Sampler(engine)
        with pytest.raises(RuntimeError, match=r"await sampler\.sample"):
            sampler.sample_sync([5], SHORT)
        there = await asyncio.to_thread(sampler.sample_sync, [5], SHORT)
        here = await sampler.sample([5], SHORT)
    assert there[0].sequences[0].token_ids.tolist() == here[0].sequences[0].token_ids.tolist()


def test_errors_of_a_sync_call_are_raised_and_one_that_does_not_open_leaves_no_thread(tmp_path: Path) -> None:
    with Sampler(simulated()) as sampler, pytest.raises(RequestRefusedError, match="9999"):
        sampler.sample_sync([9999])
    with pytest.raises(EngineClosedError, match="open_sync"):
        Sampler(simulated()).sample_sync([5])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError), create_sampler("transformers", tmp_path):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "millrace-sampler"]


# --- by name


async def test_samplers_are_made_by_name(folder: Path) -> None:
    async with create_sampler("simulated", seed=1, vocab_size=512, tokenizer=TOKENIZER, template="{{ messages[0]['content'] }}") as sampler:
        (response,) = await sampler.sample(CHAT, SHORT)
    assert TOKENIZER.decode(response.prompt_ids.tolist()) == CHAT[0]["content"]
    assert type(create_sampler("vllm", folder).engine).__name__ == "VLLMEngine"


def test_names_are_registered_by_a_decorator_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_registry, "_registered", {})

    @register_sampler("mine")
    class Mine(Sampler):
        def __init__(self, slots: int) -> None:
            super().__init__(SimulatedEngine(slots=slots))

    assert isinstance(create_sampler("mine", slots=2), Mine)
    for taken in ("mine", "vllm", ""):
        with pytest.raises(ValueError, match="taken are"):
            register_sampler(taken)
    with pytest.raises(ValueError, match=r"'nobody'; known are \[.*'mine', 'simulated', 'transformers', 'vllm', 'vllm_server'\]"):
        create_sampler("nobody")
    register_sampler("wrong")(SimulatedEngine)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="no Sampler"):
        create_sampler("wrong")


def test_installed_packages_offer_samplers_by_entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A real distribution on the path, as pip lays it out."""
    (tmp_path / "their_samplers.py").write_text(
        "from agent_loop import Sampler\nfrom agent_loop.engines.simulated import SimulatedEngine\n"
        "def make(**options):\n    return Sampler(SimulatedEngine(**options))\n"
    )
    for package, target in (("theirs", "their_samplers:make"), ("others", "other_samplers:make")):
        metadata = tmp_path / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        offers = f"{package} = their_samplers:make\nboth = {target}\n"
        (metadata / "entry_points.txt").write_text(f"[{sampler_registry.ENTRY_POINTS}]\n{offers}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert create_sampler("theirs", slots=3).engine.costs.slots == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="several packages offer a sampler 'both'"):
        create_sampler("both")
    with pytest.raises(ValueError, match="'theirs'"):
        create_sampler("nobody")
