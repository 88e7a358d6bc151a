"""Shows that VLLMServerEngine keeps every promise of an engine over two real vLLM servers, and that one that is killed costs no token."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Engine, WeightSource
from agent_loop.engines.vllm_server import VLLMServerEngine
from agent_loop.errors import AdapterError, RequestRefusedError
from agent_loop.sampling import SamplingParams
from agent_loop.testing import EngineSuite, InFlight
from examples.two_replicas import Replica
from tests.tiny_adapter import adapted_model, make_tiny_adapter
from tests.tiny_model import make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.timeout(600)  # two servers start at once, which takes minutes where much else runs
SMALL = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager")
SLEEP = ("--worker-extension-cls", "tests.engines.sleeping_worker.SleepingExtension")  # instead of our own: the last one counts
LORA = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")
LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model that the servers start with, and one with other weights."""
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_model(folder / "old", seed=0), make_tiny_model(folder / "new", seed=1)


@pytest.fixture(scope="module")
def adapters(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return make_tiny_adapter(folder / "one", models[0], seed=1), make_tiny_adapter(folder / "two", models[0], seed=2, r=8)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def servers(models: tuple[Path, Path], logs: Path) -> Iterator[list[Replica]]:
    """Two, started at once."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        yield [stack.enter_context(Replica(models[0], *SMALL, *LORA, *SLEEP, log=logs / f"{number}.log")) for number in range(2)]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(servers: list[Replica], logs: Path) -> AsyncIterator[VLLMServerEngine]:
    engine = VLLMServerEngine([server.url for server in servers], open_seconds=480.0, health_seconds=1.0, control_seconds=30.0)
    try:
        await engine.open()
    except BaseException:
        print(last_words(logs))
        raise
    yield engine
    await engine.close()


def last_words(logs: Path) -> str:
    """What the servers wrote at last, to be shown where they do not come up."""
    return "\n\n".join(log.read_text()[-5000:] for log in sorted(logs.iterdir()))


@cache
def reference(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def logprobs(model: Path, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float = 1.0) -> NDArray[np.floating]:
    """(len(response_ids),) teacher-forced log-probabilities by transformers."""
    return teacher_forced(reference(model), prompt_ids, response_ids, temperature)


def teacher_forced(model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float = 1.0) -> NDArray[np.floating]:
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    with torch.inference_mode():
        logits = model(ids).logits[0]
    chosen = torch.log_softmax(logits[len(prompt_ids) - 1 : -1] / temperature, -1)
    return chosen.gather(1, torch.as_tensor(response_ids, dtype=torch.int64)[:, None])[:, 0].numpy()


class TestVLLMServerEngine(EngineSuite):
    tolerance = 1e-3
    attempts = 10  # two servers and the tests share a machine
    eos_temperature = 2.0  # the most that vLLM takes

    @pytest.fixture(autouse=True)
    def _places(self, models: tuple[Path, Path], adapters: tuple[Path, Path], servers: list[Replica]) -> None:
        self.models, self.adapters, self.servers = models, adapters, servers

    def make_engine(self) -> Engine:
        return VLLMServerEngine([server.url for server in self.servers], adopt=True)

    async def reference_logprobs(
        self, engine: Engine, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> NDArray[np.floating]:
        return logprobs(self.models[0], prompt_ids, response_ids, temperature)

    def original_weights(self, engine: Engine) -> WeightSource:
        return self.models[0]

    def new_weights(self, engine: Engine) -> WeightSource:
        return self.models[1]

    def adapter_sources(self, engine: Engine) -> Sequence[WeightSource]:
        return self.adapters

    async def adapted_logprobs(
        self, engine: Engine, adapter: Adapter, source: WeightSource, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> NDArray[np.floating]:
        return teacher_forced(adapted_model(self.models[0], source), prompt_ids, response_ids)  # type: ignore[arg-type]

    def text(self, engine: Engine, token_ids: Sequence[int]) -> str:
        return str(make_tiny_tokenizer().decode(token_ids, skip_special_tokens=True))

    # Two servers may run apart on a busy machine: at one, requests are in flight together.

    async def test_interrupting_one_leaves_the_others(self, engine: Engine) -> None:
        async with VLLMServerEngine(self.servers[0].url, adopt=True) as one:
            await super().test_interrupting_one_leaves_the_others(one)

    async def test_interrupting_all_ends_all_and_requests_right_after_run(self, engine: Engine) -> None:
        async with VLLMServerEngine(self.servers[1].url, adopt=True) as other:
            await super().test_interrupting_all_ends_all_and_requests_right_after_run(other)

    # --- what only servers need shown

    async def test_logprobs_across_an_update_are_those_of_the_stamped_weights(self, engine: VLLMServerEngine) -> None:
        # Longer than a block of the cache, which later requests would share if the update let them.
        prompt = [3 + (7 * step) % 100 for step in range(280)]
        state = AutoModelForCausalLM.from_pretrained(self.models[1], dtype=torch.float32).state_dict()
        async with self.weights_restored(engine) as version, asyncio.TaskGroup() as tasks:
            calls = [InFlight(tasks, engine, prompt, LONG, f"across-{number}") for number in range(4)]
            for call in calls:
                await call.seen()
            await engine.update_weights(state, version + 1)
            later = [await engine.generate(prompt, LONG.replace(max_tokens=8), request_id="later") for _ in range(2)]
        for call in calls:
            ids, versions = call.task.result().token_ids, call.task.result().versions
            old = versions == version
            np.testing.assert_allclose(call.task.result().logprobs[old], logprobs(self.models[0], prompt, ids.tolist())[old], atol=1e-3)
            assert set(versions.tolist()) <= {version, version + 1}
        assert any(len(set(call.task.result().versions.tolist())) == 2 for call in calls)
        for response in later:
            np.testing.assert_allclose(response.logprobs, logprobs(self.models[1], prompt, response.token_ids.tolist()), atol=1e-3)

    async def test_what_vllm_cannot_load_is_told_and_leaves_the_servers_as_they_were(
        self, engine: VLLMServerEngine, tmp_path: Path
    ) -> None:
        large = make_tiny_adapter(tmp_path / "large", self.models[0], seed=1, r=32)
        with pytest.raises(AdapterError, match=r"LoRA rank 32 is greater than max_lora_rank 8"):
            await engine.add_adapter("large", large)
        await engine.pause("keep")  # it is no sampling: adapters come and go meanwhile
        async with self.removed(engine, "small") as (source, _):
            await engine.add_adapter("small", source)
            await engine.resume()
            assert len(await engine.score([5, 6, 7], adapter="small")) == 2
        assert all(one.serving for one in engine.replicas())

    async def test_a_stop_string_ends_the_response_and_what_vllm_refuses_is_refused(self, engine: VLLMServerEngine) -> None:
        response = await engine.generate([5, 6], LONG.replace(stop=("a", "e", "1", " ")), request_id="stopped")
        assert response.finish_reason == "stop"
        with pytest.raises(RequestRefusedError, match="400"):
            await engine.generate([5, 6], LONG.replace(temperature=1e9, max_tokens=1, repetition_penalty=1e-300), request_id="odd")

    async def test_requests_of_a_killed_server_finish_at_the_other_with_every_token_once(
        self, engine: VLLMServerEngine, servers: list[Replica]
    ) -> None:
        """Last, since one server is gone afterwards."""
        prompts = self.prompts(engine, 32)
        async with asyncio.TaskGroup() as tasks:
            calls = [
                InFlight(tasks, engine, prompt, LONG.replace(seed=number), f"killed-{number}") for number, prompt in enumerate(prompts)
            ]
            await calls[0].seen(3)
            victim = max(range(2), key=lambda place: engine.replicas()[place].in_flight)
            assert engine.replicas()[victim].in_flight
            servers[victim].kill()
        for prompt, call in zip(prompts, calls, strict=True):
            response = call.task.result()
            assert (len(response.token_ids), response.finish_reason) == (200, "length")
            assert response.token_ids.tolist() == call.tokens
            np.testing.assert_allclose(response.logprobs, logprobs(self.models[0], prompt, call.tokens), atol=1e-3)
        assert [one.serving for one in engine.replicas()] == [place != victim for place in range(2)]
        await engine.health()
