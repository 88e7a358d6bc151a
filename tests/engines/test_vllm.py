"""Shows that VLLMEngine keeps every promise of an engine: exact log-probabilities and versions, weights never mixed, a clean end."""

import asyncio
import json
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent_loop import Sampler, SingleTurnAgentLoop
from agent_loop.engines.base import Capabilities, Engine, EngineLoad, WeightSource
from agent_loop.engines.checkpoint import Checkpoint
from agent_loop.engines.vllm import VLLMEngine
from agent_loop.engines.vllm_load import LoadMonitor
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import SamplingParams
from agent_loop.testing import EngineSuite, InFlight
from buffer import RolloutGroup, RolloutState, Status
from tests.tiny_model import make_tiny_model

SLOTS = 16
SMALL: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": SLOTS}
TRANSFER: dict[str, Any] = {"weight_transfer_config": {"backend": "store"}, "worker_extension_cls": "tests.store_transfer.Extension"}
LONG = SamplingParams(max_tokens=200, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model that the engine starts with, and one with other weights."""
    folder = tmp_path_factory.mktemp("models")
    return make_tiny_model(folder / "old", seed=0), make_tiny_model(folder / "new", seed=1)


@pytest.fixture(scope="module", autouse=True)
def small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(models: tuple[Path, Path]) -> AsyncIterator[VLLMEngine]:
    async with Sleeper(models[0], **SMALL, **TRANSFER) as engine:
        yield engine


class Sleeper(VLLMEngine):
    """vLLM makes no engine for sleep without a GPU. Its workers on a CPU go to sleep all the same, and only keep their memory."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, sleep=True)


def all_logprobs(
    model: Path, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(len(response_ids), vocabulary) teacher-forced log-probabilities by transformers."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)(ids).logits[0].float()
    return torch.log_softmax(logits[len(prompt_ids) - 1 : -1] / temperature, -1)


def chosen(logprobs: torch.Tensor, response_ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.floating]:
    return logprobs.gather(1, torch.as_tensor(response_ids, dtype=torch.int64)[:, None])[:, 0].numpy()


def descendants() -> set[int]:
    """The processes below this one, Python's own resource trackers left out."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z" and b"resource_tracker" not in status.with_name("cmdline").read_bytes():
                parents[int(status.parent.name)] = int(fields[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def name_of(process: int) -> str:
    return Path(f"/proc/{process}/comm").read_text()


class TestVLLMEngine(EngineSuite):
    tolerance = 1e-3
    eos_temperature = 2.0  # the most that vLLM takes

    @pytest.fixture(autouse=True)
    def _models(self, models: tuple[Path, Path]) -> None:
        self.models = models

    def make_engine(self) -> Engine:
        return VLLMEngine(self.models[0], **SMALL)

    async def reference_logprobs(
        self, engine: Engine, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> NDArray[np.floating]:
        return chosen(all_logprobs(self.models[0], prompt_ids, response_ids, temperature), response_ids)

    def text(self, engine: Engine, token_ids: Sequence[int]) -> str:
        return AutoTokenizer.from_pretrained(self.models[0]).decode(token_ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    def original_weights(self, engine: Engine) -> WeightSource:
        return self.models[0]

    def new_weights(self, engine: Engine) -> WeightSource:
        return self.models[1]

    def spoilt_weights(self, engine: Engine) -> WeightSource:
        return load_file(self.models[0] / "model.safetensors") | {"model.norm.weight": torch.full((128,), torch.nan)}

    async def test_closing_ends_what_is_in_flight_and_is_idempotent(self, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[override]
        before = descendants()
        capfd.readouterr()
        await super().test_closing_ends_what_is_in_flight_and_is_idempotent()
        assert descendants() == before
        out, err = capfd.readouterr()
        assert out == ""
        assert "INFO" not in err
        assert "it/s" not in err

    # --- what only vLLM needs shown

    async def test_truncated_sampling_gives_the_logprobs_of_the_truncated_distribution(self, engine: VLLMEngine) -> None:
        prompt, k = [5, 6, 7], 4
        params = SamplingParams(max_tokens=24, temperature=0.8, top_k=k, ignore_eos=True)
        response = (await engine.generate(prompt, params, request_id="top-k")).token_ids.tolist()
        logprobs = all_logprobs(self.models[0], prompt, response, 0.8)
        kept = torch.where(logprobs >= logprobs.topk(k, -1).values[:, -1:], logprobs, -torch.inf).log_softmax(-1)
        again = await engine.generate(prompt, params.replace(seed=4), request_id="top-k")
        assert np.isfinite(chosen(kept, response)).all()
        expected = all_logprobs(self.models[0], prompt, again.token_ids.tolist(), 0.8)
        expected = torch.where(expected >= expected.topk(k, -1).values[:, -1:], expected, -torch.inf).log_softmax(-1)
        np.testing.assert_allclose(again.logprobs, chosen(expected, again.token_ids.tolist()), atol=1e-3)

    async def test_a_stop_string_ends_the_response_and_all_its_tokens_are_kept(self, engine: VLLMEngine) -> None:
        tokenizer = AutoTokenizer.from_pretrained(self.models[0])
        whole = (await engine.generate([5, 6], LONG, request_id="whole")).token_ids.tolist()
        stop = next(text for text in (tokenizer.decode(whole[at : at + 2]) for at in range(10, 100)) if text.isascii() and len(text) > 2)
        response = await engine.generate([5, 6], LONG.replace(stop=(stop,)), request_id="stopped")
        kept = response.token_ids.tolist()
        assert response.finish_reason == "stop"
        assert kept == whole[: len(kept)]
        assert stop in tokenizer.decode(kept)
        assert stop not in tokenizer.decode(kept[:-1])

    async def test_waiting_lets_those_finish_that_found_no_slot_yet(self, engine: VLLMEngine) -> None:
        async with asyncio.TaskGroup() as tasks:
            calls = [InFlight(tasks, engine, [5, number], LONG, f"slot-{number}") for number in range(2 * SLOTS)]
            await calls[0].seen()
            await engine.pause("wait")
            assert all(len(call.tokens) == LONG.max_tokens for call in calls)
            await engine.resume()

    async def test_a_request_held_back_by_a_wait_can_be_interrupted(self, engine: VLLMEngine) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = await InFlight(tasks, engine, [5, 6], LONG, "running").seen()
            pausing = tasks.create_task(engine.pause("wait"))
            await asyncio.sleep(0)  # the pause starts here
            held = InFlight(tasks, engine, [5, 7], LONG, "held")
            await asyncio.sleep(0)  # and here its request is held back
            await engine.interrupt(["held"])
            response = await held.task
            assert (response.finish_reason, len(response.token_ids)) == ("abort", 0)
            await pausing
            await engine.resume()
        assert running.task.result().finish_reason == "length"

    async def test_an_interrupt_misses_no_request_that_has_just_started(self, engine: VLLMEngine) -> None:
        async with asyncio.TaskGroup() as tasks:
            calls = [InFlight(tasks, engine, [5, number], LONG, f"fresh-{number}") for number in range(2 * SLOTS)]
            await asyncio.sleep(0)  # every task has run to its first wait
            await engine.interrupt()
        assert {call.task.result().finish_reason for call in calls} == {"abort"}

    async def test_it_says_what_runs_and_what_waits_for_a_slot(self, engine: VLLMEngine) -> None:
        async with asyncio.TaskGroup() as tasks:
            calls = [InFlight(tasks, engine, [5, number], LONG, f"load-{number}") for number in range(SLOTS + 5)]
            await calls[0].seen(5)
            assert engine.load() == EngineLoad(SLOTS, 5)
            await engine.pause("keep")
            assert engine.load() is None, "what waits while it is paused is no sign of a full engine"
            await engine.resume()
            await engine.interrupt([f"load-{number}" for number in range(8)])
            await calls[-1].seen(5)
            assert engine.load() == EngineLoad(SLOTS - 3, 0)
            await engine.interrupt()
        await engine.generate([5, 6], LONG.replace(max_tokens=3), request_id="last")
        assert engine.load() == EngineLoad(0, 0)

    async def test_a_structured_rollout_that_was_interrupted_begins_anew(self, engine: VLLMEngine) -> None:
        pattern = "[0-9]{150}"
        sampling = SamplingParams(max_tokens=400, seed=3, structured_outputs={"regex": pattern})
        loop = SingleTurnAgentLoop(engine, AutoTokenizer.from_pretrained(self.models[0]), sampling=sampling)
        group = RolloutGroup(1, [RolloutState(1, 0, "default", prompt_ids=np.array([5, 6], np.int32))])
        seen = Seen()
        loop.watch(group, seen)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(loop.generate_group(group))
            await seen.some.wait()
            assert loop.snapshot(group).rollouts[0].response_ids.size == 0, "a part of a structure cannot be continued"
            await loop.interrupt([group.group_id])
        (state,) = (await running).rollouts
        assert (state.status, state.response_ids.size) == (Status.INTERRUPTED, 0)
        (state,) = (await loop.generate_group(group)).rollouts
        assert state.status is Status.COMPLETED
        assert re.fullmatch(pattern, state.text or "")

    async def test_one_request_id_names_one_request(self, engine: VLLMEngine) -> None:
        async with asyncio.TaskGroup() as tasks:
            await InFlight(tasks, engine, [5, 6], LONG, "same").seen()
            with pytest.raises(RequestRefusedError, match="same"):
                await engine.generate([5, 6], LONG, request_id="same")
            await engine.interrupt()

    async def test_a_sampler_over_it_gives_every_sample_tokens_of_its_own(self, engine: VLLMEngine) -> None:
        sampler = Sampler(engine, AutoTokenizer.from_pretrained(self.models[0]))
        params, chat = LONG.replace(max_tokens=8), [{"role": "user", "content": "What is 2 + 2?"}]
        responses = await sampler.sample([chat, [5, 6]], params, num_samples=3)
        from_a_thread = await asyncio.to_thread(sampler.sample_sync, [chat, [5, 6]], params, num_samples=3)
        for response, again in zip(responses, from_a_thread, strict=True):
            tokens = [sequence.token_ids.tolist() for sequence in response.sequences]
            assert len({tuple(ids) for ids in tokens}) == 3
            assert tokens == [sequence.token_ids.tolist() for sequence in again.sequences]
            for sequence in response.sequences:
                expected = chosen(
                    all_logprobs(self.models[0], response.prompt_ids.tolist(), sequence.token_ids.tolist()), sequence.token_ids
                )
                np.testing.assert_allclose(sequence.logprobs, expected, atol=1e-3)

    async def test_a_prompt_that_takes_several_steps_is_scored_whole(self, engine: VLLMEngine) -> None:
        prompt = [3 + (7 * step) % 100 for step in range(510)]
        expected = chosen(all_logprobs(self.models[0], prompt[:1], prompt[1:]), prompt[1:])
        for scores in await asyncio.gather(*(engine.score(prompt) for _ in range(6))):  # more than one step takes
            np.testing.assert_allclose(scores, expected, atol=1e-3)

    # --- weights

    @pytest.mark.parametrize("recompute", [False, True])
    async def test_logprobs_across_an_update_are_those_of_the_stamped_weights(self, engine: VLLMEngine, recompute: bool) -> None:
        # Longer than a block of the cache, which later requests would share if the update let them.
        prompt = [3 + (7 * step) % 100 for step in range(280)]
        engine.recompute = recompute
        async with self.weights_restored(engine) as version, asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, prompt, LONG, "across").seen(5)
            await engine.update_weights(self.models[1], version + 1)
            later = await engine.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True), request_id="later")
            later_ids = later.token_ids.tolist()
            response = await call.task
        ids, versions = response.token_ids.tolist(), response.versions
        expected = {version: chosen(all_logprobs(self.models[0], prompt, ids), ids)}
        if recompute:  # otherwise the new weights see a cache that the old ones made
            expected[version + 1] = chosen(all_logprobs(self.models[1], prompt, ids), ids)
        for stamp, logprobs in expected.items():
            np.testing.assert_allclose(response.logprobs[versions == stamp], logprobs[versions == stamp], atol=1e-3)
        assert set(versions.tolist()) == {version, version + 1}
        assert later.versions.tolist() == [version + 1] * 8
        np.testing.assert_allclose(later.logprobs, chosen(all_logprobs(self.models[1], prompt, later_ids), later_ids), atol=1e-3)
        engine.recompute = False

    @pytest.mark.parametrize("kind", ["mapping", "pairs"])
    async def test_weights_come_from_tensors_too(self, engine: VLLMEngine, kind: str) -> None:
        # A state dict names the tied output matrix as well, which the folder does not.
        state = AutoModelForCausalLM.from_pretrained(self.models[1], dtype=torch.float32).state_dict()
        assert "lm_head.weight" in state
        async with self.weights_restored(engine) as version:
            await engine.update_weights(state if kind == "mapping" else iter(state.items()), version + 1)
            response = await engine.generate([5, 6], SamplingParams(max_tokens=8, ignore_eos=True), request_id="tensors")
            ids = response.token_ids.tolist()
        np.testing.assert_allclose(response.logprobs, chosen(all_logprobs(self.models[1], [5, 6], ids), ids), atol=1e-3)

    async def test_weights_come_by_a_transfer_and_requests_in_flight_go_on(self, engine: VLLMEngine) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.models[1], dtype=torch.float32)
        trainer = await asyncio.to_thread(store_trainer, model, engine.weight_sync_client())
        async with self.weights_restored(engine) as version, asyncio.TaskGroup() as tasks:
            call = await InFlight(tasks, engine, [5, 6, 7], LONG, "across").seen(5)
            await engine.update_weights(trainer, version + 1)
            response = await engine.generate([5, 6], SamplingParams(max_tokens=8, ignore_eos=True), request_id="transferred")
            # Cancelled, it is sent to its end: half of the weights would be worse.
            trainer.sending.clear()
            trainer.go_on.clear()
            updating = tasks.create_task(engine.update_weights(trainer, version + 2))
            await asyncio.to_thread(trainer.sending.wait)
            updating.cancel()
            await asyncio.sleep(0)
            trainer.go_on.set()
            await asyncio.wait({updating})
            assert (updating.cancelled(), engine.version) == (True, version + 2)
            again = await engine.generate([5, 6], SamplingParams(max_tokens=8, ignore_eos=True, seed=1), request_id="again")
        for one, stamp in ((response, version + 1), (again, version + 2)):
            ids = one.token_ids.tolist()
            np.testing.assert_allclose(one.logprobs, chosen(all_logprobs(self.models[1], [5, 6], ids), ids), atol=1e-3)
            assert one.versions.tolist() == [stamp] * 8
        assert {version, version + 1} <= set(call.task.result().versions.tolist())

    async def test_a_transfer_that_does_not_fit_changes_nothing(self, engine: VLLMEngine) -> None:
        old, version = await self.greedy(engine), engine.version
        model = AutoModelForCausalLM.from_pretrained(self.models[1], dtype=torch.float32)
        trainer = await asyncio.to_thread(store_trainer, model.model.layers, engine.weight_sync_client())
        with pytest.raises(WeightUpdateError, match="missing"):
            await engine.update_weights(trainer, version + 1)
        with pytest.raises(RuntimeError, match="outside an update"):
            await asyncio.to_thread(trainer.send_weights)
        with pytest.raises(RuntimeError, match="to_thread"):
            store_trainer(model, engine.weight_sync_client())
        assert (await self.greedy(engine), engine.version) == (old, version)

    @pytest.mark.parametrize(
        ("fault", "match"),
        [
            ("missing", "1 missing"),
            ("unknown", "1 unknown"),
            ("shape", "other shapes"),
            ("cut", "cut short"),
            ("spoilt", "no sound safetensors file"),
            ("twice", "in two files"),
            ("empty", "no safetensors files"),
        ],
    )
    async def test_weights_that_do_not_fit_are_refused(self, engine: VLLMEngine, tmp_path: Path, fault: str, match: str) -> None:
        tensors = load_file(self.models[1] / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        if fault == "missing":
            del tensors[name]
        if fault == "unknown":
            tensors["model.layers.7.mlp.up_proj.weight"] = tensors[name].clone()
        if fault == "shape":
            tensors[name] = tensors[name].T.contiguous()
        if fault != "empty":
            save_file(tensors, tmp_path / "model.safetensors")
        if fault == "cut":
            os.truncate(tmp_path / "model.safetensors", 100_000)
        if fault == "spoilt":
            spoil_offsets(tmp_path / "model.safetensors")
        if fault == "twice":
            save_file({name: tensors[name]}, tmp_path / "more.safetensors")
        await self.refused(engine, tmp_path, match)

    async def refused(self, engine: VLLMEngine, folder: Path, match: str) -> None:
        """Loading `folder` fails, and the old weights go on and can be replaced."""
        old, version = await self.greedy(engine), engine.version
        with pytest.raises(WeightUpdateError, match=match):
            await engine.update_weights(folder, version + 1)
        assert engine.version == version
        assert await self.greedy(engine) == old
        response = await engine.generate([5, 6], SamplingParams(max_tokens=8, ignore_eos=True), request_id="after")
        ids = response.token_ids.tolist()
        np.testing.assert_allclose(response.logprobs, chosen(all_logprobs(self.models[0], [5, 6], ids), ids), atol=1e-3)
        assert response.versions.tolist() == [version] * 8
        async with self.weights_restored(engine):
            await engine.update_weights(self.models[1], version + 1)
            assert await self.greedy(engine) != old

    @pytest.mark.parametrize("turns", [1, 10, 30, 100, 300])
    async def test_a_cancelled_update_leaves_one_policy_and_its_version(self, engine: VLLMEngine, turns: int) -> None:
        """Cancelled after so many turns of the loop, wherever that is: the output fits the version."""
        async with self.weights_restored(engine) as version:
            updating = asyncio.create_task(engine.update_weights(self.models[1], version + 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            updating.cancel()
            await asyncio.wait({updating})
            response = await engine.generate([5, 6], SamplingParams(max_tokens=8, ignore_eos=True), request_id="cancelled")
            ids = response.token_ids.tolist()
            expected = all_logprobs(self.models[engine.version - version], [5, 6], ids)
            np.testing.assert_allclose(response.logprobs, chosen(expected, ids), atol=1e-3)
            assert response.versions.tolist() == [engine.version] * 8


def store_trainer(model: torch.nn.Module, client: Any, **options: Any) -> Any:
    from tests.store_transfer import StoreTrainer  # which imports vLLM

    return StoreTrainer(model, client, **options)


class Seen:
    """A watcher of a group that says when the first tokens came."""

    piece_tokens = 1

    def __init__(self) -> None:
        self.some = asyncio.Event()

    def decoded(self, member: int, tokens: int) -> None:
        self.some.set()

    def ended(self, member: int) -> None:
        self.some.set()


def spoil_offsets(file: Path) -> None:
    """Make two tensors overlap: names, shapes and size stay right, and no reader can load the file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = next(name for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][0] == 0)
    header[first]["data_offsets"][1] -= 4
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(data[:8] + text + data[8 + length :])


def test_importing_the_module_imports_nothing_heavy() -> None:
    heavy = "{'vllm', 'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys, agent_loop.engines.vllm as module; module.VLLMEngine('some/model'); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_the_load_of_several_engine_processes_is_that_of_all_as_each_told_it_last() -> None:
    monitor = LoadMonitor()
    assert monitor.load() == EngineLoad(0, 0)
    for engine, running, waiting, skipped in [(0, 9, 9, 9), (1, 3, 2, 1), (0, 4, 0, 1)]:
        monitor.record(engine, SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting, num_skipped_waiting_reqs=skipped))
    monitor.record(1, None)
    assert monitor.load() == EngineLoad(7, 4)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": ""}, "model is empty"),
        ({"model": Path("no/such/folder")}, "no/such/folder"),
        ({"model": "m", "max_model_len": 1}, "max_model_len=1"),
        ({"model": "m", "logprobs_mode": "raw_logprobs"}, "logprobs_mode"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VLLMEngine(**arguments)  # type: ignore[arg-type]


class Unchecked(VLLMEngine):
    """Looks at new weights less closely, so that a load can break off in the engine process."""

    def _checked(self, folder: Path) -> Checkpoint:
        return Checkpoint(folder, {}, ())


@pytest.mark.parametrize("way", ["load", "transfer"])
async def test_an_engine_whose_weights_break_off_midway_is_given_up(models: tuple[Path, Path], tmp_path: Path, way: str) -> None:
    tensors = load_file(models[1] / "model.safetensors")
    names = sorted(tensors)
    # Split inside a layer whose tensors the engine fuses (q, k and v): it is left half filled.
    at = names.index("model.layers.1.self_attn.q_proj.weight")
    save_file({name: tensors[name] for name in names[:at]}, tmp_path / "model-00001.safetensors")
    save_file({name: tensors[name] for name in names[at:]}, tmp_path / "model-00002.safetensors")
    spoil_offsets(tmp_path / "model-00002.safetensors")
    before = descendants()
    async with Unchecked(models[0], **SMALL, **TRANSFER) as engine:
        for ask in (engine.sleep, engine.wake_up):
            with pytest.raises(RequestRefusedError, match="enable_sleep_mode"):
                await ask()
        source: Any = tmp_path
        if way == "transfer":
            model = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.float32)
            source = await asyncio.to_thread(store_trainer, model, engine.weight_sync_client(), fail_after=at)
        call = asyncio.create_task(engine.generate([5, 6], LONG, request_id="in-flight"))
        await asyncio.sleep(0)  # the request starts here
        with pytest.raises(EngineDeadError, match="mixture"):
            await engine.update_weights(source, 1)
        assert (await call).finish_reason == "abort"
        assert set((await call).versions.tolist()) <= {0}
        with pytest.raises(EngineDeadError, match="mixture"):
            await engine.generate([5, 6], LONG, request_id="after")
        assert engine.version == 0
    assert descendants() == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"worker_extension_cls": "builtins.dict"}, "WorkerExtension"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "needs GPUs"),
        ({"weight_transfer_config": {}}, "'nccl' needs GPUs"),
        ({"enable_sleep_mode": True}, "[Ss]leep mode"),
    ],
)
async def test_what_a_cpu_cannot_is_refused_before_a_process_starts(models: tuple[Path, Path], arguments: Any, match: str) -> None:
    before = descendants()
    with pytest.raises(EngineError, match=match):
        await VLLMEngine(models[0], **SMALL, **arguments).open()
    assert descendants() == before


async def test_cancelled_while_it_opens_it_leaves_no_process(models: tuple[Path, Path]) -> None:
    before, engine = descendants(), VLLMEngine(models[0], **SMALL)
    opening = asyncio.create_task(engine.open())
    while descendants() == before:
        await asyncio.to_thread(os.sched_yield)
    for _ in range(2):  # an impatient user
        opening.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({opening})
    assert opening.cancelled()
    assert descendants() == before
    with pytest.raises(EngineClosedError):
        await engine.health()


async def test_two_workers_share_a_model_and_the_end_of_one_is_the_end_of_all(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, which the trained model will be in; a worker is killed in mid-generation."""
    monkeypatch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")  # else vLLM wants a NUMA node for each worker
    before = descendants()
    async with VLLMEngine(models[0], **SMALL | {"dtype": "bfloat16"}, tensor_parallel_size=2) as engine:
        with pytest.raises(RequestRefusedError, match="weight_transfer_config"):
            engine.weight_sync_client()
        await engine.update_weights(models[1], 1)
        params = SamplingParams(max_tokens=24, ignore_eos=True, seed=1)
        response = (await engine.generate([5, 6, 7], params, request_id="shared")).token_ids.tolist()
        again = await engine.generate([5, 6, 7], params, request_id="again")
        expected = chosen(all_logprobs(models[1], [5, 6, 7], response, dtype=torch.bfloat16), response)
        assert again.token_ids.tolist() == response
        assert np.abs(again.logprobs - expected).mean() <= 2e-2  # a logit of 8 is rounded to a sixteenth
        workers = [process for process in descendants() - before if "Worker" in name_of(process)]
        assert len(workers) == 2
        began = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(dead(engine, number, began)) for number in range(2 * SLOTS)]
            await began.wait()
            os.kill(workers[0], signal.SIGKILL)
        for call in calls:
            assert call.result().__cause__ is not None
    assert descendants() == before


async def dead(engine: VLLMEngine, number: int, began: asyncio.Event) -> EngineDeadError:
    with pytest.raises(EngineDeadError) as raised:
        await engine.generate([5, number], LONG, request_id=f"doomed-{number}", on_tokens=lambda piece: began.set())
    return raised.value


async def test_whoever_waits_for_an_engine_that_dies_is_told(engine: VLLMEngine, models: tuple[Path, Path]) -> None:
    """Last, because it kills the engine: stopped first, so that every call is waiting when it dies."""
    (process,) = [child for child in multiprocessing.active_children() if child.name == "EngineCore"]
    assert process.pid is not None
    engine_pids = descendants()
    assert process.pid in engine_pids
    call = asyncio.create_task(engine.generate([5, 6], LONG, request_id="doomed"))
    os.kill(process.pid, signal.SIGSTOP)
    waiting = [
        call,
        asyncio.create_task(engine.health()),
        asyncio.create_task(engine.update_weights(models[1], engine.version + 1)),
        asyncio.create_task(engine.generate([5, 7], LONG, request_id="late")),
    ]
    await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGKILL)
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, EngineDeadError), repr(outcome)
        assert outcome.__cause__ is not None
    for ask in (engine.health, engine.interrupt, engine.pause, engine.resume):
        with pytest.raises(EngineDeadError, match="-9"):
            await ask()
    await asyncio.to_thread(wait_for_end, engine_pids)


def wait_for_end(pids: set[int]) -> None:
    """Return when all of these processes have ended; raise if that takes more than a minute."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([handle], [], [], 60)[0], f"process {pid} outlives its engine"
        os.close(handle)
