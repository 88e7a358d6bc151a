"""The transformers engine keeps the engine's contract, and what it promises beyond: stop strings, whole updates, a death told."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Completion, Engine, EngineLoad, WeightSource
from agent_loop.engines.transformers import TransformersEngine
from agent_loop.errors import EngineClosedError, EngineDeadError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import SamplingParams
from agent_loop.testing import EngineSuite, InFlight
from tests.tiny_adapter import adapted_model, make_tiny_adapter
from tests.tiny_model import make_tiny_model

PROMPT = [262, 222, 20, 261, 222, 21]
TIED = ("lm_head.weight", "model.embed_tokens.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny models of one shape and different weights."""
    root = tmp_path_factory.mktemp("models")
    return make_tiny_model(root / "zero", seed=0), make_tiny_model(root / "one", seed=1)


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> Any:
    """The first model, plain, for reference."""
    return AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(folders: tuple[Path, Path]) -> AsyncIterator[TransformersEngine]:
    async with TransformersEngine(folders[0]) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapters(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the first model, of different layers, ranks and scalings."""
    root = tmp_path_factory.mktemp("adapters")
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True}
    return (
        make_tiny_adapter(root / "one", folders[0], seed=1),
        make_tiny_adapter(root / "two", folders[0], seed=2, r=8, target_modules="all-linear", **patterns),
    )


class TestTransformersEngine(EngineSuite):
    tolerance = 1e-3

    @pytest.fixture(autouse=True)
    def _models(self, folders: tuple[Path, Path], model: Any, adapters: tuple[Path, Path]) -> None:
        self.folders, self.model, self.adapters = folders, model, adapters

    def make_engine(self) -> Engine:
        return TransformersEngine(self.folders[0])

    async def reference_logprobs(
        self, engine: Engine, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> NDArray[np.floating]:
        logits = teacher_forced(self.model, prompt_ids, response_ids) / temperature
        return picked(logits.log_softmax(-1), response_ids)

    def original_weights(self, engine: Engine) -> WeightSource:
        return self.folders[0]

    def new_weights(self, engine: Engine) -> WeightSource:
        return self.folders[1]

    def spoilt_weights(self, engine: Engine) -> WeightSource:
        return load_file(self.folders[0] / "model.safetensors") | {"model.norm.weight": torch.full((128,), torch.nan)}

    def adapter_sources(self, engine: Engine) -> Sequence[WeightSource]:
        return self.adapters

    async def adapted_logprobs(
        self, engine: Engine, adapter: Adapter, source: WeightSource, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> NDArray[np.floating]:
        assert isinstance(source, Path)
        logits = teacher_forced(adapted_model(self.folders[0], source), prompt_ids, response_ids)
        return picked(logits.log_softmax(-1), response_ids)


@torch.no_grad()
def teacher_forced(model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
    """Logits (len(response_ids), vocabulary) that predict the response, of one plain forward pass."""
    return model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1].float()


def picked(logprobs: torch.Tensor, tokens: Sequence[int]) -> NDArray[np.floating]:
    return logprobs.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).numpy()


async def together(engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
    """All requests at once; results in order."""
    async with asyncio.TaskGroup() as tasks:
        pairs = enumerate(zip(prompts, params, strict=True))
        calls = [tasks.create_task(engine.generate(ids, how, request_id=f"together-{n}")) for n, (ids, how) in pairs]
    return [call.result() for call in calls]


# --- sampling


def reference_distribution(logits: torch.Tensor, seen: Sequence[int], params: SamplingParams) -> torch.Tensor:
    """The log-probabilities that one row of `logits` should be sampled from, by the plain definitions."""
    logits = logits.clone()
    for token in set(seen):
        logits[token] = logits[token] / params.repetition_penalty if logits[token] > 0 else logits[token] * params.repetition_penalty
    logits /= params.temperature
    probs = logits.softmax(-1)
    allowed = probs >= params.min_p * probs.max()
    if params.top_k:
        allowed &= torch.isin(torch.arange(len(logits)), logits.topk(params.top_k).indices)
    if params.top_p < 1:
        kept = (probs * allowed) / (probs * allowed).sum()
        order = kept.argsort(descending=True)
        allowed[order[kept[order].cumsum(0) - kept[order] >= params.top_p]] = False
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 0.9, "temperature": 1.5},
    ],
    ids=lambda changes: "-".join(changes),
)
async def test_logprobs_are_those_of_the_truncated_distribution(engine: TransformersEngine, model: Any, changes: dict[str, Any]) -> None:
    truncated = SamplingParams(max_tokens=24, ignore_eos=True, seed=1).replace(**changes)
    # Plain and greedy requests beside it: each row of a batch has its own parameters.
    plain, greedy = SamplingParams(max_tokens=24, ignore_eos=True, seed=2), SamplingParams(max_tokens=24, temperature=0.0)
    response = (await together(engine, [PROMPT] * 3, [plain, truncated, greedy]))[1]
    tokens = response.token_ids.tolist()
    logits = teacher_forced(model, PROMPT, tokens)
    rows = [reference_distribution(logits[step], [*PROMPT, *tokens[:step]], truncated) for step in range(len(tokens))]
    np.testing.assert_allclose(response.logprobs, picked(torch.stack(rows), tokens), atol=1e-3)


async def test_bfloat16_logprobs_equal_a_plain_forward_pass(folders: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16)
    async with TransformersEngine(folders[0], dtype="bfloat16") as engine:
        params = [SamplingParams(max_tokens=32, ignore_eos=True, seed=seed) for seed in range(4)]
        for response in await together(engine, [PROMPT] * 4, params):
            tokens = response.token_ids.tolist()
            expected = picked(teacher_forced(model, PROMPT, tokens).log_softmax(-1), tokens)
            np.testing.assert_allclose(response.logprobs, expected, atol=2e-2)


async def test_tokens_come_as_often_as_the_model_says(engine: TransformersEngine, model: Any) -> None:
    """The first token of 2000 seeds, in ten bins of a tenth of the probability each."""
    params = [SamplingParams(max_tokens=1, seed=seed) for seed in range(2000)]
    first = [response.token_ids[0] for response in await together(engine, [PROMPT] * 2000, params)]
    probs = teacher_forced(model, PROMPT, [0])[0].softmax(-1).double()
    bins = (probs.cumsum(0) - probs / 2).mul(10).long().clamp(max=9)
    expected = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, probs) * len(first)
    found = torch.bincount(bins[torch.tensor(first)], minlength=10)
    # 9 degrees of freedom: 27.9 is passed by one run in a thousand, and the seeds are fixed.
    assert float(((found - expected) ** 2 / expected).sum()) < 27.9


async def test_a_response_continued_with_its_seed_is_the_uninterrupted_one(engine: TransformersEngine) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True, seed=9)
    whole = (await engine.generate(PROMPT, params, request_id="whole")).token_ids.tolist()
    rest = await engine.generate(PROMPT + whole[:15], params.replace(max_tokens=25), request_id="rest")
    assert rest.token_ids.tolist() == whole[15:]


# --- stop strings


async def test_a_stop_string_ends_the_response_with_the_token_that_completes_it(
    engine: TransformersEngine, folders: tuple[Path, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    params = SamplingParams(max_tokens=60, ignore_eos=True, seed=4)
    whole = (await engine.generate(PROMPT, params, request_id="whole")).token_ids.tolist()
    # A string over two tokens that decode to text, found for the first time there.
    texts = [tokenizer.decode(token) for token in whole]
    at = next(n for n in range(20, 60) if "\ufffd" not in texts[n - 1] + texts[n])
    stop = texts[at - 1][-1:] + texts[at][:1]
    first = next(n for n in range(60) if stop in tokenizer.decode(whole[: n + 1]))
    pieces: list[Completion] = []
    stopped = await engine.generate(PROMPT, params.replace(stop=("never\n\n\n", stop)), request_id="stopped", on_tokens=pieces.append)
    assert stopped.token_ids.tolist() == whole[: first + 1] == [int(token) for piece in pieces for token in piece.token_ids]
    assert stopped.finish_reason == pieces[-1].finish_reason == "stop"
    assert {piece.finish_reason for piece in pieces[:-1]} == {"abort"}


async def test_stop_strings_without_a_tokenizer_are_refused(model: Any) -> None:
    async with TransformersEngine(model) as engine:
        with pytest.raises(RequestRefusedError, match="tokenizer"):
            await engine.generate(PROMPT, SamplingParams(stop=("x",)), request_id="refused")


# --- requests


async def test_a_request_id_in_flight_is_refused_and_free_at_once_after_an_interrupt(engine: TransformersEngine) -> None:
    async with asyncio.TaskGroup() as tasks:
        call = await InFlight(tasks, engine, PROMPT, SamplingParams(max_tokens=200, ignore_eos=True), "twice").seen()
        with pytest.raises(RequestRefusedError, match="twice"):
            await engine.generate(PROMPT, SamplingParams(), request_id="twice")
        await engine.interrupt(["twice"])
        again = await engine.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True), request_id="twice")
    assert (call.task.result().finish_reason, again.finish_reason) == ("abort", "length")


async def test_a_callback_that_raises_fails_its_own_request_only(engine: TransformersEngine) -> None:
    def refuse(_: Completion) -> None:
        raise LookupError("no checkpoint today")

    async with asyncio.TaskGroup() as tasks:
        other = await InFlight(tasks, engine, PROMPT, SamplingParams(max_tokens=50, ignore_eos=True), "other").seen()
        with pytest.raises(LookupError, match="no checkpoint today"):
            await engine.generate(PROMPT, SamplingParams(max_tokens=50), request_id="raises", on_tokens=refuse)
    assert len(other.task.result().token_ids) == 50


def counted_rows(model: Any) -> list[int]:
    """A list that grows by the number of tokens that each forward pass of `model` computes."""
    rows: list[int] = []
    model.register_forward_hook(lambda _, args, kwargs, output: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    return rows


async def test_requests_share_forward_passes(folders: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    rows, lengths = counted_rows(model), range(8, 72, 4)
    async with TransformersEngine(model) as engine:
        await engine.pause()
        async with asyncio.TaskGroup() as tasks:
            for length in lengths:
                tasks.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=length, ignore_eos=True), request_id=str(length)))
            await asyncio.sleep(0)
            await engine.resume()
    # As many steps as the longest has tokens, and some more where requests missed the first; not the sum of all.
    assert max(lengths) <= len(rows) < sum(lengths) / 4
    assert sum(rows) == sum(lengths) + (len(PROMPT) - 1) * len(lengths)


async def test_ended_requests_take_no_part_in_later_steps(folders: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    rows, endless = counted_rows(model), SamplingParams(max_tokens=500, ignore_eos=True)
    async with TransformersEngine(model) as engine:
        for repeat in range(10):
            async with asyncio.TaskGroup() as tasks:
                cancelled = [tasks.create_task(engine.generate(PROMPT, endless, request_id=f"cancelled-{n}")) for n in range(8)]
                cut = [tasks.create_task(engine.generate(PROMPT, endless, request_id=f"cut-{n}")) for n in range(8)]
                await InFlight(tasks, engine, PROMPT, SamplingParams(max_tokens=1 + repeat), "marker").seen()
                for call in cancelled:
                    call.cancel()
                await engine.interrupt([f"cut-{n}" for n in range(8)])
            assert all(call.cancelled() for call in cancelled)
            assert {call.result().finish_reason for call in cut} == {"abort"}
            await engine.generate(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True), request_id="alone")
            assert set(rows[-20:]) == {1}


async def test_a_full_cache_and_long_prompts_change_nothing(engine: TransformersEngine, folders: tuple[Path, Path]) -> None:
    prompts = [[2 + (13 * n + step) % 250 for step in range(40 + 9 * n)] for n in range(12)]
    params = [SamplingParams(max_tokens=100, ignore_eos=True, seed=n) for n in range(12)]
    expected = await together(engine, prompts, params)
    # Room for three or so at their full length: requests are put back and computed again, prompts take many steps.
    async with TransformersEngine(folders[0], cache_tokens=512, max_batch_tokens=24) as small:
        found = await together(small, prompts, params)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)


# --- weights


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


BROKEN = {
    "missing": without("model.norm.weight"),
    "both tied names missing": without(*TIED),
    "another shape": lambda state: state | {"model.norm.weight": torch.zeros(7)},
    "a foreign name": lambda state: state | {"module.extra": torch.zeros(1)},
    "no tensor": lambda state: state | {"model.norm.weight": [1.0] * 128},
    "no values": lambda state: state | {"model.norm.weight": torch.empty(128, device="meta")},
    "tied but different": lambda state: state | {"lm_head.weight": state[TIED[1]] + 1},
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_broken_update_touches_no_weight(engine: TransformersEngine, folders: tuple[Path, Path], case: str) -> None:
    params, version = SamplingParams(max_tokens=16, seed=1, ignore_eos=True), engine.version
    before = await engine.generate(PROMPT, params, request_id="before")
    # All tensors of the other model but one that is wrong, in the order in which a loader would come upon them.
    weights = BROKEN[case](load_file(folders[1] / "model.safetensors"))
    with pytest.raises(WeightUpdateError, match=r"weight|module\.extra"):
        await engine.update_weights(weights, version + 1)
    after = await engine.generate(PROMPT, params, request_id="after")
    assert after.token_ids.tolist() == before.token_ids.tolist()
    assert (after.logprobs.tolist(), engine.version) == (before.logprobs.tolist(), version)


async def test_a_file_cut_short_touches_no_weight(engine: TransformersEngine, folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole = (folders[1] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) * 2 // 3])
    version = engine.version
    with pytest.raises(WeightUpdateError, match="cut short"):
        await engine.update_weights(tmp_path, version + 1)
    assert engine.version == version


FORMS: dict[str, Callable[[dict[str, torch.Tensor]], WeightSource]] = {
    "mapping": lambda state: state,
    "pairs": lambda state: iter(state.items()),
    "both tied names": lambda state: state | dict.fromkeys(TIED, state[TIED[1]]),
    "the other tied name": lambda state: without(TIED[1])(state) | {TIED[0]: state[TIED[1]]},
    "bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
async def test_weights_come_in_many_forms(folders: tuple[Path, Path], form: str) -> None:
    params = SamplingParams(max_tokens=16, seed=1, ignore_eos=True)
    async with TransformersEngine(folders[0]) as engine:
        await engine.update_weights(FORMS[form](load_file(folders[1] / "model.safetensors")), 1)
        response = await engine.generate(PROMPT, params, request_id="updated")
    tokens = response.token_ids.tolist()
    other = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    expected = picked(teacher_forced(other, PROMPT, tokens).log_softmax(-1), tokens)
    np.testing.assert_allclose(response.logprobs, expected, atol=5e-2 if form == "bfloat16" else 1e-3)


async def test_the_version_changes_at_the_very_token_where_the_weights_do(folders: tuple[Path, Path]) -> None:
    # A zero as the last norm makes every token equally likely: the log-probability tells which weights sampled it.
    flat = load_file(folders[0] / "model.safetensors") | {"model.norm.weight": torch.zeros(128)}
    uniform = np.float32(-np.log(512))
    async with TransformersEngine(folders[0]) as engine:
        for version in range(1, 21, 2):
            with a_busy_event_loop():
                async with asyncio.TaskGroup() as tasks:
                    params = SamplingParams(max_tokens=500, ignore_eos=True, seed=version)
                    calls = [await InFlight(tasks, engine, PROMPT, params, f"{version}-{n}").seen(1 + version) for n in range(3)]
                    await engine.update_weights(flat, version)
                    for call in calls:  # however far behind this loop is, each goes on until it has tokens of both
                        while call.pieces[-1].versions[-1] < version:
                            await call.seen(len(call.tokens) + 1)
                    await engine.interrupt()
            for call in calls:
                response = call.task.result()
                assert set(response.versions.tolist()) == {version - 1, version}
                np.testing.assert_array_equal(np.isclose(response.logprobs, uniform, atol=1e-6), response.versions == version)
            await engine.update_weights(folders[0], version + 1)


@contextmanager
def a_busy_event_loop() -> Iterator[None]:
    """Keep the event loop behind the generation thread, as a training step beside it would: it must not matter when it hears."""
    loop, busy = asyncio.get_running_loop(), [True]

    def block() -> None:
        time.sleep(0.004)
        if busy[0]:
            loop.call_soon(block)

    block()
    try:
        yield
    finally:
        busy[0] = False


async def test_later_requests_use_nothing_that_old_weights_computed(folders: tuple[Path, Path]) -> None:
    prompt = [2 + step % 250 for step in range(200)]
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    other = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    async with TransformersEngine(folders[0]) as engine, asyncio.TaskGroup() as tasks:
        await engine.generate(prompt, greedy, request_id="finished")
        # One in flight over the update keeps its cache, and must not lend it.
        old = await InFlight(tasks, engine, prompt, greedy.replace(max_tokens=250), "in-flight").seen(2)
        await engine.update_weights(folders[1], 1)
        await old.seen(60)
        response = await engine.generate(prompt, greedy, request_id="later")
        tokens = response.token_ids.tolist()
    np.testing.assert_allclose(response.logprobs, picked(teacher_forced(other, prompt, tokens).log_softmax(-1), tokens), atol=1e-3)


async def test_a_cancelled_update_is_whole_or_not_at_all(folders: tuple[Path, Path]) -> None:
    async with TransformersEngine(folders[0]) as engine:
        greedy = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        old = await engine.generate(PROMPT, greedy, request_id="old")
        reached, go_on = threading.Event(), threading.Event()

        def pairs() -> Any:
            reached.set()
            go_on.wait()
            yield from load_file(folders[1] / "model.safetensors").items()

        async with asyncio.TaskGroup() as tasks:
            update = tasks.create_task(engine.update_weights(pairs(), 1))
            await asyncio.to_thread(reached.wait)
            update.cancel()
            go_on.set()
        new = await engine.generate(PROMPT, greedy, request_id="new")
        assert update.cancelled()
        assert (engine.version, new.token_ids.tolist()) == (0, old.token_ids.tolist())


# --- load


async def test_it_says_what_runs_and_what_waits_for_a_slot(folders: tuple[Path, Path]) -> None:
    endless = SamplingParams(max_tokens=400, ignore_eos=True)
    engine = TransformersEngine(folders[0], max_requests=2)
    assert engine.load() is None
    async with engine, asyncio.TaskGroup() as tasks:
        assert engine.load() == EngineLoad(0, 0)
        first, _, third = [InFlight(tasks, engine, PROMPT, endless, f"load-{n}") for n in range(3)]
        await first.seen(5)
        assert engine.load() == EngineLoad(2, 1)
        await engine.pause("keep")
        assert engine.load() is None, "what waits while it is paused is no sign of a full engine"
        await engine.resume()
        await engine.interrupt(["load-0"])
        await third.seen(2)
        assert engine.load() == EngineLoad(2, 0)
        await engine.interrupt()


# --- life and death


async def test_a_death_of_the_thread_reaches_every_request_with_its_cause(folders: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)

    def explode(*_: Any) -> None:
        raise ArithmeticError("the device fell off the bus")

    async with TransformersEngine(model) as engine, asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(raised(engine.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True), request_id=str(n))))
            for n in range(3)
        ]
        marker = await engine.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), request_id="marker")
        model.model.layers[0].register_forward_pre_hook(explode)
        for error in [await call for call in calls] + [
            await raised(engine.generate(PROMPT, SamplingParams(), request_id="late")),
            await raised(engine.health()),
            await raised(engine.pause("keep")),
            await raised(engine.update_weights(folders[1], 1)),
        ]:
            assert isinstance(error, EngineDeadError)
            assert isinstance(error.__cause__, ArithmeticError)
    assert marker.finish_reason == "length"
    with pytest.raises(EngineClosedError):
        await engine.health()


async def raised(work: Any) -> BaseException:
    """The error that `work` ends with."""
    with pytest.raises(EngineDeadError) as caught:
        await work
    return caught.value


async def test_a_cache_that_does_not_fit_is_told_at_the_start(folders: tuple[Path, Path]) -> None:
    with pytest.raises(EngineDeadError) as caught:
        async with TransformersEngine(folders[0], cache_tokens=1 << 40):
            pass
    assert isinstance(caught.value.__cause__, MemoryError)


async def test_bounds_are_checked(folders: tuple[Path, Path]) -> None:
    for arguments in ({"dtype": "int8"}, {"max_length": 1}, {"max_requests": 0}, {"cache_tokens": -1}, {"max_batch_tokens": 1}):
        with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
            TransformersEngine(folders[0], **arguments)
    for arguments in ({"max_length": 513}, {"cache_tokens": 100}):
        with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
            await TransformersEngine(folders[0], **arguments).open()


async def test_an_engine_leaves_no_thread_no_output_and_the_model_as_it_was(
    folders: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32, attn_implementation="eager").train()
    capfd.readouterr()
    threads, random_state = set(threading.enumerate()), torch.get_rng_state()
    async with TransformersEngine(model) as engine:
        await engine.generate(PROMPT, SamplingParams(max_tokens=5), request_id="one")
        await engine.interrupt()
    gc.collect()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (model.training, model.config._attn_implementation) == (True, "eager")
    # Only the event loop's own pool, which serves every `to_thread`, may have grown.
    assert {thread.name for thread in set(threading.enumerate()) - threads if not thread.name.startswith("asyncio")} == set()
    assert capfd.readouterr() == ("", "")


FORGETFUL = """
import asyncio, sys
from agent_loop.engines.transformers import TransformersEngine
from agent_loop.sampling import SamplingParams

async def main():
    engine = TransformersEngine(sys.argv[1])
    await engine.open()
    asyncio.get_running_loop().create_task(engine.generate([1, 1], SamplingParams(max_tokens=500, ignore_eos=True), request_id="left"))
    await engine.generate([1, 1], SamplingParams(max_tokens=3), request_id="one")
    await engine.pause("keep") if sys.argv[2] == "paused" else None

asyncio.run(main())
print("over")
"""


@pytest.mark.parametrize("state", ["running", "paused"])
def test_a_program_that_forgets_to_close_the_engine_ends_all_the_same(folders: tuple[Path, Path], state: str) -> None:
    program = [sys.executable, "-c", FORGETFUL, str(folders[0]), state]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[2])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "over\n", "")
