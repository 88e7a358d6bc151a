"""Adapters of VLLMEngine keep the suite's promises, stay what they were when their folders are written over, and leave no folder behind."""

import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Engine, WeightSource
from agent_loop.engines.vllm import VLLMEngine
from agent_loop.errors import AdapterError
from agent_loop.testing_adapters import AdapterSuite
from tests.tiny_adapter import adapted_model, make_tiny_adapter
from tests.tiny_model import make_tiny_model

# Fewer at once than the tests have: vLLM drops some, and loads them again.
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 16}
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {name: make_tiny_model(root / name, seed=seed) for seed, name in enumerate(("old", "new"))}
    made["one"] = make_tiny_adapter(root / "one", made["old"], seed=1)
    options = {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True}
    return made | {"two": make_tiny_adapter(root / "two", made["old"], seed=2, r=8, **options)}


@pytest.fixture(scope="module", autouse=True)
def small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


def copies() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("millrace-adapter-*"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(folders: dict[str, Path]) -> AsyncIterator[VLLMEngine]:
    before = copies()
    async with VLLMEngine(folders["old"], **SMALL, **LORA) as engine:
        yield engine
        await engine.add_adapter("left", folders["one"])
    assert copies() <= before


class TestAdaptersOfVLLM(AdapterSuite):
    tolerance = 1e-3

    @pytest.fixture(autouse=True)
    def _folders(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    def make_engine(self) -> Engine:
        return VLLMEngine(self.folders["old"], **SMALL, **LORA)

    def original_weights(self, engine: Engine) -> WeightSource:
        return self.folders["old"]

    def new_weights(self, engine: Engine) -> WeightSource:
        return self.folders["new"]

    async def reference_logprobs(
        self, engine: Engine, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> NDArray[np.floating]:
        return teacher_forced(plain_model(self.folders["old"]), prompt_ids, response_ids)

    def adapter_sources(self, engine: Engine) -> Sequence[WeightSource]:
        return self.folders["one"], self.folders["two"]

    async def adapted_logprobs(
        self, engine: Engine, adapter: Adapter, source: WeightSource, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> NDArray[np.floating]:
        assert isinstance(source, Path)
        return teacher_forced(adapted_model(self.folders["old"], source), prompt_ids, response_ids)

    async def test_an_adapter_stays_what_it_was_when_its_folder_is_written_over(self, engine: VLLMEngine, tmp_path: Path) -> None:
        prompt, before = self.prompts(engine, 1)[0], copies()
        async with self.removed(engine, "kept", "b", "c") as (first, second):
            folder = shutil.copytree(first, tmp_path / "saved")  # type: ignore[arg-type]
            kept = await engine.add_adapter("kept", folder)
            shutil.rmtree(folder)
            shutil.copytree(second, folder)  # type: ignore[arg-type]
            for name in "bc":  # takes both of vLLM's slots
                await engine.add_adapter(name, folder)
                await self.under(engine, prompt, name, name)
            response = await self.under(engine, prompt, "kept", "kept")
            expected = await self.expected(engine, (kept, first), prompt, response.token_ids.tolist())
            np.testing.assert_allclose(response.logprobs, expected, atol=self.tolerance)
        assert copies() == before

    async def test_what_vllm_cannot_load_is_told_at_once_and_leaves_the_engine_alive(self, engine: VLLMEngine, tmp_path: Path) -> None:
        before = copies()
        async with self.removed(engine) as (first, _):
            large = make_tiny_adapter(tmp_path / "large", self.folders["old"], seed=1, r=32)
            spoilt = shutil.copytree(first, tmp_path / "spoilt")  # type: ignore[arg-type]
            weights = load_file(spoilt / "adapter_model.safetensors")
            save_file({name: tensor * torch.nan for name, tensor in weights.items()}, spoilt / "adapter_model.safetensors")
            foreign = make_tiny_adapter(tmp_path / "foreign", self.folders["old"], seed=1, use_dora=True)
            for folder, reason in ((large, "32"), (spoilt, "not finite"), (foreign, "use_dora=True"), ({"seed": 1}, "no folder")):
                with pytest.raises(AdapterError, match=reason):
                    await engine.add_adapter("bad", folder)  # type: ignore[arg-type]
            await engine.health()
        assert copies() == before


@functools.cache
def plain_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def teacher_forced(model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> NDArray[np.floating]:
    logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(response_ids).unsqueeze(1)).squeeze(1).numpy()
