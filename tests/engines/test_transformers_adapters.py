"""Adapters of the transformers engine: a full cache and half precision change nothing, what does not fit is refused, the model is kept."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from agent_loop.engines.transformers import TransformersEngine
from agent_loop.errors import AdapterError
from agent_loop.sampling import SamplingParams
from agent_loop.testing import InFlight
from tests.tiny_adapter import adapted_model, make_tiny_adapter
from tests.tiny_model import make_tiny_model

PROMPT = [262, 222, 20, 261, 222, 21]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "model", seed=0)


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_tiny_adapter(root / str(seed), folder, seed=seed, r=2 + seed) for seed in range(3)]


@torch.no_grad()
def teacher_forced(model: Any, prompt: list[int], response: list[int]) -> np.ndarray:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1).numpy()


async def test_a_full_cache_and_long_prompts_leave_each_token_under_its_own_adapter(folder: Path, adapters: list[Path]) -> None:
    names, prompts = [None, "0", "1", "2"] * 2, [[2 + (13 * n + step) % 250 for step in range(40 + 9 * n)] for n in range(8)]
    # Room for two or so at their full length: requests are put back and computed again, prompts take several steps.
    async with TransformersEngine(folder, max_length=160, cache_tokens=256, max_batch_tokens=32) as engine:
        for name, path in enumerate(adapters):
            await engine.add_adapter(str(name), path)
        async with asyncio.TaskGroup() as tasks:
            calls = [
                tasks.create_task(
                    engine.generate(prompt, SamplingParams(max_tokens=24, ignore_eos=True, seed=n), request_id=str(n), adapter=name)
                )
                for n, (prompt, name) in enumerate(zip(prompts, names, strict=True))
            ]
    models = {None: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}
    models |= {str(name): adapted_model(folder, path) for name, path in enumerate(adapters)}
    for prompt, name, call in zip(prompts, names, calls, strict=True):
        expected = teacher_forced(models[name], prompt, call.result().token_ids.tolist())
        np.testing.assert_allclose(call.result().logprobs, expected, atol=1e-3)


async def test_half_precision_agrees_with_peft(folder: Path, adapters: list[Path]) -> None:
    model = adapted_model(folder, adapters[1], torch.bfloat16)
    async with TransformersEngine(folder, dtype="bfloat16", max_length=160, cache_tokens=256) as engine:
        await engine.add_adapter("one", adapters[1])
        sampled = await engine.generate(PROMPT, SamplingParams(max_tokens=32, ignore_eos=True, seed=1), request_id="one", adapter="one")
        tokens = sampled.token_ids.tolist()
        scores = await engine.score(PROMPT + tokens, start=len(PROMPT), adapter="one")
    expected = teacher_forced(model, PROMPT, tokens)
    np.testing.assert_allclose(scores, expected, atol=2e-2)
    # Token by token the sums are rounded otherwise, here and there by a whole step of the logits.
    assert np.abs(sampled.logprobs - expected).mean() < 2e-2


def configured(**changes: Any) -> Callable[[Path], None]:
    """Write other settings into an adapter's configuration."""

    def change(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def reweighted(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Write other weights into an adapter's file."""

    def rewrite(path: Path) -> None:
        save_file(change(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors")

    return rewrite


def cut(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "a configuration that does not parse": (lambda path: (path / "adapter_config.json").write_text("{"), "does not parse"),
    "cut off": (cut, "cut short"),
    "another kind": (configured(peft_type="LOHA"), "LOHA"),
    "DoRA": (configured(use_dora=True), "use_dora=True"),
    "biases": (configured(bias="all"), "bias='all'"),
    "whole layers": (configured(modules_to_save=["lm_head"]), "modules_to_save"),
    "an init that changes the model": (configured(init_lora_weights="pissa"), "pissa"),
    "one factor missing": (reweighted(lambda state: {name: state[name] for name in state if name != FIRST}), "q_proj"),
    "a layer missing": (reweighted(lambda state: {name: state[name] for name in state if ".0.self_attn.q_proj" not in name}), "q_proj"),
    "a layer too many": (configured(target_modules=["v_proj", "down_proj"]), "q_proj"),
    "another rank": (configured(r=7), "rank 7"),
    "not finite": (reweighted(lambda state: state | {FIRST: state[FIRST] * torch.inf}), "not finite"),
    "another model": (reweighted(lambda state: state | {FIRST: state[FIRST][:, :64].contiguous()}), "another model"),
    "factors that do not fit": (reweighted(lambda state: state | {FIRST: state[FIRST][:1].contiguous()}), "do not fit"),
}


async def test_adapters_that_do_not_fit_are_refused_with_the_reason(folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=16, ignore_eos=True, seed=1)
    output = make_tiny_adapter(tmp_path / "output", folder, seed=1, target_modules=["lm_head"])
    async with TransformersEngine(folder) as engine:
        before = await engine.generate(PROMPT, params, request_id="before")
        for number, (what, (spoil, reason)) in enumerate(BROKEN.items()):
            spoilt = shutil.copytree(adapters[0], tmp_path / str(number))
            spoil(spoilt)
            with pytest.raises(AdapterError, match=reason):
                await engine.add_adapter("spoilt", spoilt)
            assert engine.adapters == (), what
        with pytest.raises(AdapterError, match="lm_head"):
            await engine.add_adapter("spoilt", output)
        with pytest.raises(AdapterError, match="no folder"):
            await engine.add_adapter("spoilt", {"seed": 1})
        after = await engine.generate(PROMPT, params, request_id="after")
    assert after.logprobs.tolist() == before.logprobs.tolist()


async def test_an_adapter_is_read_once_and_a_frozen_engine_takes_one(folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    own, params = shutil.copytree(adapters[0], tmp_path / "own"), SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    async with TransformersEngine(folder) as engine:
        await engine.pause("keep")
        await engine.add_adapter("own", own)
        shutil.rmtree(own)
        await engine.resume()
        response = (await engine.generate(PROMPT, params, request_id="own", adapter="own")).token_ids.tolist()
        scores = await engine.score(PROMPT + response, start=len(PROMPT), adapter="own")
    np.testing.assert_allclose(scores, teacher_forced(adapted_model(folder, adapters[0]), PROMPT, response), atol=1e-3)


async def test_versions_added_at_once_are_each_their_own_and_a_cancelled_one_is_not_there(folder: Path, adapters: list[Path]) -> None:
    async with TransformersEngine(folder) as engine:
        async with asyncio.TaskGroup() as tasks:
            adding = [tasks.create_task(engine.add_adapter("one", path, keep=3)) for path in adapters]
            cancelled = tasks.create_task(engine.add_adapter("one", adapters[0], keep=3))
            await adding[1]
            cancelled.cancel()
        added = [call.result() for call in adding]
        assert [adapter.version for adapter in engine.adapters] == [0, 1, 2]
        for adapter, path in zip(added, adapters, strict=True):
            scores = await engine.score(PROMPT, adapter=adapter)
            np.testing.assert_allclose(scores, teacher_forced(adapted_model(folder, path), PROMPT[:1], PROMPT[1:]), atol=1e-3)
        assert (await engine.add_adapter("one", adapters[0])).version == 3


async def test_who_shares_the_model_sees_it_without_adapters_and_gets_it_back_as_it_was(folder: Path, adapters: list[Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names, hidden = list(model.state_dict()), torch.randn(1, 5, 128)
    layer = model.model.layers[0].self_attn.q_proj
    plain = layer(hidden)
    async with TransformersEngine(model) as engine, asyncio.TaskGroup() as tasks:
        await engine.add_adapter("one", adapters[1])
        await InFlight(tasks, engine, PROMPT, SamplingParams(max_tokens=300, ignore_eos=True), "one", "one").seen()
        seen: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: seen.append(layer(hidden)))
        thread.start()
        thread.join()
        # Not to the bit: another thread may share the sum out differently. The adapter changes far more.
        torch.testing.assert_close(seen[0], plain, rtol=0, atol=1e-5)
        assert list(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())
