"""One `ContinuousBatchingManager` spoken to by coroutines: its generation thread, and the one thread that may pause it.

Whatever the generation thread has to say reaches a `Listener` on the event loop, in the order in which it happened.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from agent_loop.engines._transformers_adapters import Layers, Overlays
from agent_loop.engines._transformers_sampling import SamplingProcessor
from agent_loop.engines._transformers_weights import Copies, copy_all
from agent_loop.engines.adapters import Adapter
from agent_loop.errors import EngineDeadError
from agent_loop.sampling import SamplingParams

Result = TypeVar("Result")


class Sampled(NamedTuple):
    """One token of one request; `last` when the request ended with it (a stop token, or its length)."""

    key: str
    token: int
    logprob: float
    version: int
    last: bool


class Listener(Protocol):
    """What hears of tokens and of the end; all but `version` is called on the event loop."""

    @property
    def version(self) -> int:
        """Of the weights in force; read by the generation thread, changed only while that is paused."""

    def on_sampled(self, tokens: Sequence[Sampled]) -> None:
        """What one step gave: at most one token a request."""

    def on_failed(self, key: str, error: Exception) -> None:
        """One request failed, and the thread goes on."""

    def on_ended(self, error: BaseException | None) -> None:
        """The thread has ended, asked to or by `error`; it will not speak again."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bounds of the library's cache and batches, whose own defaults take most of the memory.

    Attributes:
        tokens: of all requests together that the cache holds; what does not fit waits, or is computed again.
        requests: the most that one step samples for.
        batch_tokens: the most that one step computes; longer prompts take several steps.
        page: tokens of one page; a request occupies whole pages.
    """

    tokens: int
    requests: int
    batch_tokens: int
    page: int = 32


class Backend:
    """Starts, pauses, feeds and stops the library's generation thread for one model."""

    def __init__(self, model: Any, size: CacheSize, listener: Listener) -> None:
        self.model = model
        self._was_training = bool(model.training)
        self.attention = model.config._attn_implementation
        self._listener = listener
        self._pause = ExitStack()
        self._held = False
        # One thread enters and leaves every pause: the library counts pauses by thread.
        self._control = ThreadPoolExecutor(1, thread_name_prefix="engine-control")
        self._overlays = Overlays(model)
        self._manager = _make_manager(model, size, self._overlays)
        self._manager.background_thread_status = _Ending(listener, asyncio.get_running_loop())
        self._manager.output_router = _Router(listener, asyncio.get_running_loop(), self._manager.background_thread_status)

    async def start(self) -> None:
        """Start the generation thread; returns when it runs and has its cache."""
        await self._on_control(self._start)

    async def hold(self) -> None:
        """Freeze the generation thread between two steps; twice is once."""
        await self._on_control(self._hold)

    async def release(self) -> None:
        """Let a frozen generation thread go on."""
        await self._on_control(self._release)

    async def put_weights(self, copies: Copies, then: Callable[[], None]) -> None:
        """Copy weights in place between two steps, and call `then` before the next; all of it, even when cancelled."""
        await self._on_control(self._put_weights, copies, then)

    async def put_adapter(self, adapter: Adapter, layers: Layers) -> None:
        """Have an adapter from the next step on, if a forward pass under it succeeds."""
        await self._on_control(self._put_adapter, adapter, layers)

    def drop_adapter(self, adapter: Adapter) -> None:
        """Let an adapter go that no request uses."""
        self._overlays.drop(adapter)

    async def look(self, ids: list[int], read: Callable[[Any], Result], adapter: Adapter | None) -> tuple[Result, int]:
        """What `read` makes of the logits [tokens, vocabulary] of one forward pass between two steps, and the version of the weights."""
        return await self._on_control(self._look, ids, read, adapter)

    async def stop(self) -> None:
        """End the generation thread and give the model back as it was."""
        await self._on_control(self._stop)
        self._control.shutdown()

    def submit(
        self, key: str, ids: list[int], params: SamplingParams, seed: int, stop_ids: frozenset[int], adapter: Adapter | None
    ) -> None:
        """Queue a request; `key` is never used twice: a late cancellation would hit the second bearer.

        Raises:
            EngineDeadError: the thread has ended.
        """
        under = {} if adapter is None else {"adapter": adapter}
        accepted = self._manager.add_request(
            ids,
            request_id=key,
            max_new_tokens=params.max_tokens,
            streaming=True,
            eos_token_id=sorted(stop_ids),
            params=params,
            seed=seed,
            **under,
        )
        if accepted is None:
            raise self._death()

    @property
    def active(self) -> int:
        """Requests that the library decodes now."""
        processor = self._manager.batch_processor
        return 0 if processor is None else len(processor.scheduler.active_requests)

    def cancel(self, key: str) -> None:
        """Free a request at the next step; one that is not there is ignored."""
        self._manager.cancel_request(key)

    async def _on_control(self, work: Callable[..., Result], *args: Any) -> Result:
        """Run on the control thread; a cancelled caller still waits for the end, for half-done work would have no owner."""
        future = asyncio.get_running_loop().run_in_executor(self._control, work, *args)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            future.exception()
            raise cancelled
        return future.result()

    def _start(self) -> None:
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        # The library seeds torch's global generators, which belong to the training loop.
        with torch.random.fork_rng(devices):
            self._manager.start()
            _running.add(self)
            with self._paused():
                pass

    def _hold(self) -> None:
        if not self._held:
            self._pause.enter_context(self._paused())
            self._held = True

    def _release(self) -> None:
        self._held = False
        self._pause.close()

    def _put_weights(self, copies: Copies, then: Callable[[], None]) -> None:
        with nullcontext() if self._held else self._paused():
            copy_all(copies)
            then()

    def _put_adapter(self, adapter: Adapter, layers: Layers) -> None:
        with nullcontext() if self._held else self._paused():
            self._overlays.put(adapter, layers)
        try:
            self._look([0, 0, 0], lambda logits: None, adapter)
        except BaseException:
            self._overlays.drop(adapter)
            raise

    def _look(self, ids: list[int], read: Callable[[Any], Result], adapter: Adapter | None) -> tuple[Result, int]:
        with (
            nullcontext() if self._held else self._paused(),
            self._plain_attention(),
            self._overlays.under(adapter, len(ids)),
            torch.inference_mode(),
        ):
            logits = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0]
            return read(logits), self._listener.version

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """The attention that the model came with: that of the generation knows no sequence outside its cache."""
        paged = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(paged)

    def end(self) -> None:
        """Ask the generation thread to end, from any thread; does not wait."""
        # In this order: a paused loop cannot end.
        self._release()
        self._manager.background_thread_status.request_stop(_Ending.HARD_STOP, 0)

    def _stop(self) -> None:
        _running.discard(self)
        self._release()
        self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()
        self._overlays.clear()
        self.model.train(self._was_training)

    def _paused(self) -> ExitStack:
        stack = ExitStack()
        try:
            stack.enter_context(self._manager.pause())
        except RuntimeError as error:
            raise self._death() from (self._manager.background_thread_status.fatal_error or error)
        return stack

    def _death(self) -> EngineDeadError:
        return death(self._manager.background_thread_status.fatal_error)


_running: weakref.WeakSet[Backend] = weakref.WeakSet()


def _end_all() -> None:
    for backend in list(_running):
        backend.end()


# Without this, a program that forgets to close its engine never ends: the interpreter waits for the library's thread
# before it calls what `atexit` holds. A daemon thread instead would be torn down inside torch, which aborts the process.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]  # how concurrent.futures ends its own threads


def death(cause: BaseException | None) -> EngineDeadError:
    """The error for a generation thread that has ended."""
    error = EngineDeadError(f"the generation thread has ended: {cause or 'it was stopped'}; close this engine and make a new one")
    error.__cause__ = cause
    return error


def _make_manager(model: Any, size: CacheSize, overlays: Overlays) -> Any:
    # Its errors reach the user as exceptions; its warnings are about choices made below.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    config = ContinuousBatchingConfig(
        page_size=size.page,
        num_blocks=-(-size.tokens // size.page) + 1,
        max_batch_tokens=size.batch_tokens,
        max_requests_per_batch=min(size.requests, size.batch_tokens),
        max_blocks_per_request=0,
        # Shared blocks are found by their tokens alone, and a request in flight registers its old blocks again after
        # an update: a later request would be served what the old weights computed.
        allow_block_sharing=False,
        # A step must be over, tokens delivered, when the next begins: versions and the sampling rest on it.
        use_async_batching=False,
        use_cuda_graph=False,
        # Would change the numbers, and look for kernels on the network.
        auto_switch_to_flash=False,
        return_logprobs=False,
    )
    manager = model.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), config)
    processors = _Processors(LogitsProcessorList([SamplingProcessor()]), per_request_processors=True)
    processors.overlays = overlays
    processors.tensors_required = 1
    manager.logit_processor = processors
    return manager


class _Processors(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]  # transformers is not typed
    """Is told of each batch before its forward pass, on the thread that computes it; tells the adapters whose tokens stand where."""

    overlays: Overlays

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        # All of them: also those that compute a part of a long prompt, and sample nothing yet.
        self.overlays.line_up([(one.state.logit_processor_kwargs.get("adapter"), one.query_length) for one in requests_in_batch])
        prepared: torch.Tensor = super().prepare_tensor_args(requests_in_batch, arg_storage)
        return prepared


class _Router(continuous_api.OutputRouter):  # type: ignore[misc]  # transformers is not typed
    """Takes the newest token off each output where it is made: the library's outputs repeat the whole response.

    One router for all requests rather than a handler for each: it hears late tokens of cancelled requests too.
    """

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop, status: "_Ending") -> None:
        super().__init__()
        self._listener, self._loop, self._status = listener, loop, status

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        version = self._listener.version
        tokens = [Sampled(out.request_id, out.generated_tokens[-1], out.logprobs[-1], version, out.is_finished()) for out in outputs]
        _post(self._loop, self._listener.on_sampled, tokens)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        # When the thread is ending, `on_ended` follows and speaks for all requests.
        if self._status.can_accept_new_requests() is None:
            _post(self._loop, self._listener.on_failed, state.request_id, error)


class _Ending(continuous_api.BackgroundThreadStatus):  # type: ignore[misc]  # transformers is not typed
    """Tells of the thread's end, on every way out, after which nothing is accepted any more."""

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._listener, self._loop = listener, loop

    def mark_as_stopped(self) -> None:
        super().mark_as_stopped()
        _post(self._loop, self._listener.on_ended, self.fatal_error)


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> None:
    # A loop that was closed without closing the engine has nobody left to tell.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)
