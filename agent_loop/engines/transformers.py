"""Plain PyTorch: `TransformersEngine`, the embedded engine without vLLM, over transformers' own continuous batching."""

import asyncio
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from agent_loop.engines._transformers_adapters import load_layers
from agent_loop.engines._transformers_backend import Backend, CacheSize, Sampled, death
from agent_loop.engines._transformers_flight import Flight, StopStrings
from agent_loop.engines._transformers_model import chosen, eos_of, length_of, likeliest, load_model
from agent_loop.engines._transformers_weights import plan_copies
from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import (
    ALL_TOKENS,
    Capabilities,
    Completion,
    Engine,
    EngineLoad,
    FinishReason,
    OnTokens,
    PauseMode,
    TopTokens,
    WeightSource,
)
from agent_loop.engines.checks import check_call, names_of
from agent_loop.engines.values import scores
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError
from agent_loop.sampling import SamplingParams, seed_number, whole

DTYPES = ("float32", "bfloat16", "float16")
LEAST_CACHE = 8192


class TransformersEngine(Engine):
    """`transformers.ContinuousBatchingManager`, made to keep the promises of `Engine`.

    Requests join and leave the batch at token boundaries. All of `SamplingParams` is supported. A request's seed and the
    position of a token decide the draw, whatever runs beside it; a response that is continued with its seed goes on as
    if it had not been interrupted. Greedy requests report log-probabilities at temperature 1, as vLLM does. Requests in
    flight at a weight update keep the attention cache that the old weights made. Prompts are never shared between
    requests, so that no request is served with what older weights, or another adapter, computed. Requests of all adapters
    and of the model run in one batch.
    """

    offers = Capabilities(score=True, top_tokens=ALL_TOKENS, adapters=True, load=True)

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str = "cpu",
        max_length: int | None = None,
        seed: int = 0,
        max_requests: int = 256,
        cache_tokens: int | None = None,
        max_batch_tokens: int = 512,
    ) -> None:
        """Say which engine; `open` loads the model and starts it.

        Args:
            model: a folder in Hugging Face's format, a name on its hub, or a loaded model, which the engine then shares:
                nobody else may change it or train it while the engine samples.
            tokenizer: needed for stop strings; a folder's own is loaded where it has one.
            dtype: "float32", "bfloat16" or "float16"; a loaded model keeps its own.
            device: such as "cpu" or "cuda:0"; a loaded model keeps its own.
            max_length: the most tokens of prompt and response together; None takes the model's.
            seed: of requests that bring none.
            max_requests: sampled for at once; more wait.
            cache_tokens: of all running requests together; None is `max_length`, and 8192 at least. Memory grows with
                it, and with its product with `max_batch_tokens` (the attention mask).
            max_batch_tokens: computed in one step; longer prompts take several.

        Raises:
            ValueError: a bound is crossed.
        """
        super().__init__()
        if not isinstance(model, str | Path | PreTrainedModel):
            raise ValueError(f"model is a {type(model).__name__}; give a folder, a name on the Hugging Face hub, or a PreTrainedModel")
        if model == "":
            raise ValueError("model is empty; give a folder or a name on the Hugging Face hub")
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise ValueError(f"tokenizer={tokenizer!r:.60} has no decode; pass a tokenizer of transformers, or one like it")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {DTYPES}")
        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device={device!r:.60} is none that torch knows; give one such as 'cpu' or 'cuda:0'") from error
        sizes = {"max_length": max_length, "max_requests": max_requests, "cache_tokens": cache_tokens, "max_batch_tokens": max_batch_tokens}
        for name, value in sizes.items():
            if value is not None and whole(name, value) < 2:
                raise ValueError(f"{name}={value} is out of bounds; it must be 2 or more")
        self._source, self._dtype, self._device = model, dtype, device
        self._tokenizer, self._max_length, self._cache_tokens = tokenizer, max_length, cache_tokens
        self._max_requests, self._max_batch_tokens = max_requests, max_batch_tokens
        self._seeds = random.Random(seed_number("seed", seed))
        self._backend: Backend | None = None
        self._opened = self._closed = False
        self._dead: EngineDeadError | None = None
        self._paused = False
        self._count = 0
        self._flights: dict[str, Flight] = {}
        self._keys: dict[str, Flight] = {}
        self._running: set[str] = set()
        self._updating = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()

    # What the model is

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and response together; the engine must be open."""
        return self._max_length or length_of(self._open_backend().model)

    @property
    def vocab_size(self) -> int:
        """Token ids lie in `range(vocab_size)`; the engine must be open."""
        return int(self._open_backend().model.config.get_text_config().vocab_size)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Of the model's generation config, or else its config, and of the tokenizer; the engine must be open."""
        return eos_of(self._open_backend().model, self._tokenizer)

    # Starting and stopping

    async def open(self) -> None:
        """Load the model and start the generation thread.

        Raises:
            ValueError: `max_length` is beyond the model's, or `cache_tokens` cannot hold one request of it.
            EngineClosedError: it was opened before; make a new one.
            EngineDeadError: the generation thread did not start, with its reason as the cause.
        """
        if self._opened or self._closed:
            raise EngineClosedError("this engine was opened before; make a new one")
        self._opened = True
        model = await asyncio.to_thread(self._load)
        backend = Backend(model, self._cache_size(model), self)
        try:
            await backend.start()
            if self._closed:
                raise EngineClosedError("the engine was closed while it opened")
        except BaseException:
            await backend.stop()
            raise
        self._backend = backend

    def _load(self) -> Any:
        if isinstance(self._source, PreTrainedModel):
            return self._source
        model, self._tokenizer = load_model(self._source, self._dtype, self._tokenizer)
        return model.to(self._device)

    def _cache_size(self, model: Any) -> CacheSize:
        length = self._max_length or length_of(model)
        if length > length_of(model):
            raise ValueError(f"max_length={length} is beyond the model's {length_of(model)}; lower it")
        tokens = self._cache_tokens or max(length, LEAST_CACHE)
        if tokens < length:
            raise ValueError(f"cache_tokens={tokens} cannot hold one request of max_length={length}; raise it, or lower max_length")
        return CacheSize(tokens, self._max_requests, self._max_batch_tokens)

    async def close(self) -> None:
        """End requests in flight as aborted, and the generation thread; the model is left as it was given."""
        self._closed = True
        backend, self._backend = self._backend, None
        if backend is not None:
            for flight in list(self._flights.values()):
                self._finish(flight, "abort")
            await backend.stop()

    async def health(self) -> None:
        """Return if the generation thread lives."""
        self._live_backend()

    def load(self) -> EngineLoad | None:
        """What runs and waits; None while paused. The library does not tell what it preempts: that waits, and is not counted."""
        if self._backend is None or self._paused:
            return None
        running = self._backend.active
        return EngineLoad(running, max(0, len(self._running) - running))

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise EngineClosedError("the engine is closed; make a new one" if self._closed else "the engine is not open; use `async with`")
        return self._backend

    def _live_backend(self) -> Backend:
        backend = self._open_backend()
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead.__cause__
        return backend

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

        A piece is one token, whatever `on_tokens` asks for, and carries the finish reason "abort" until the last.
        """
        self._live_backend()
        self.check_media(media)
        check_call(request_id, session_id, on_tokens)
        ids = self.check_request(prompt_ids, params)
        with self.using_adapter(adapter) as used:
            flight = self._admit(ids.tolist(), params, request_id, None if used is None else used.adapter, on_tokens)
            try:
                if not self._paused:
                    self._submit(flight)
                return flight.completion(await flight.done)
            finally:
                self._leave(flight)

    def _admit(
        self, ids: list[int], params: SamplingParams, request_id: str, adapter: Adapter | None, on_tokens: OnTokens | None
    ) -> Flight:
        if params.stop and self._tokenizer is None:
            raise RequestRefusedError(f"stop={params.stop!r} needs a tokenizer, and the engine was made without one; pass tokenizer=")
        if request_id in self._flights:
            raise RequestRefusedError(f"request id {request_id!r} is in flight already; give every request its own")
        self._count += 1
        flight = Flight(
            key=str(self._count),
            request_id=request_id,
            prompt_ids=ids,
            params=params,
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids),
            strings=StopStrings(params.stop, self._tokenizer),
            on_tokens=on_tokens,
            adapter=adapter,
            done=asyncio.get_running_loop().create_future(),
        )
        self._flights[request_id] = self._keys[flight.key] = flight
        return flight

    def _submit(self, flight: Flight) -> None:
        try:
            self._live_backend().submit(flight.key, flight.prompt_ids, flight.params, flight.seed, flight.stop_ids, flight.adapter)
        except EngineDeadError as error:
            self._finish(flight, error)
        else:
            self._running.add(flight.key)
            self._idle.clear()

    def _finish(self, flight: Flight, result: FinishReason | Exception) -> None:
        # Left at once, not when its coroutine gets its turn: the request id must be free for whoever ended the request.
        self._leave(flight)
        flight.finish(result)

    def _leave(self, flight: Flight) -> None:
        """Forget a request, and free it in the library where it still runs; again is nothing."""
        if self._keys.pop(flight.key, None) is None:
            return
        del self._flights[flight.request_id]
        if flight.key in self._running and self._backend is not None:
            self._backend.cancel(flight.key)
        self._ran(flight.key)

    def _ran(self, key: str) -> None:
        self._running.discard(key)
        if not self._running:
            self._idle.set()

    # Scores

    async def score(
        self, token_ids: Sequence[int] | NDArray[np.int32], *, start: int = 1, adapter: str | Adapter | None = None
    ) -> NDArray[np.float32]:
        """See `Engine`. A forward pass of its own, between two steps of the generation, which stands still meanwhile."""
        backend = self._live_backend()
        ids = self.check_score(token_ids, start).tolist()
        with self.using_adapter(adapter) as used:
            under = None if used is None else used.adapter
            logprobs, _ = await backend.look(ids, lambda logits: chosen(logits[start - 1 : -1], ids[start:]), under)
        return scores(logprobs, start)

    async def top_tokens(
        self, token_ids: Sequence[int] | NDArray[np.int32], count: int, *, adapter: str | Adapter | None = None
    ) -> TopTokens:
        """See `Engine`. Done as `score`."""
        backend = self._live_backend()
        ids = self.check_top_tokens(token_ids, count).tolist()
        with self.using_adapter(adapter) as used:
            under = None if used is None else used.adapter
            (tokens, logprobs), version = await backend.look(ids, lambda logits: likeliest(logits[-1], count), under)
        return TopTokens.of(tokens, logprobs, version if under is None else under.version)

    # Adapters

    async def _load_adapter(self, adapter: Adapter, path: WeightSource) -> None:
        backend = self._live_backend()
        layers = await asyncio.to_thread(load_layers, backend.model, backend.attention, path)
        try:
            await self._live_backend().put_adapter(adapter, layers)
        except BaseException:
            backend.drop_adapter(adapter)  # cancelled, it was put there to the end
            raise

    def _forget_adapter(self, adapter: Adapter, loaded: None) -> None:
        if self._backend is not None:
            self._backend.drop_adapter(adapter)

    # What the generation thread says, on the event loop

    def on_sampled(self, tokens: Sequence[Sampled]) -> None:
        """Hand each token to its request."""
        for sampled in tokens:
            if sampled.last:
                self._ran(sampled.key)
            if flight := self._keys.get(sampled.key):
                self._hand(flight, sampled)
            elif not sampled.last and self._backend is not None:
                # Cancelled, yet still running: the library loses a cancellation that overtakes its request.
                self._backend.cancel(sampled.key)

    def _hand(self, flight: Flight, sampled: Sampled) -> None:
        try:
            reason = flight.take(sampled)
        except Exception as error:  # noqa: BLE001  # the user's callback failed, or no number came: the request raises it, others go on
            self._finish(flight, error)
        else:
            if reason is not None:
                self._finish(flight, reason)

    def on_failed(self, key: str, error: Exception) -> None:
        """One request failed."""
        if flight := self._keys.get(key):
            failure = EngineError(f"request {flight.request_id!r} failed: {error}")
            failure.__cause__ = error
            self._finish(flight, failure)

    def on_ended(self, error: BaseException | None) -> None:
        """The thread has ended: every request learns why. After `close` there is none left."""
        self._dead = death(error)
        for flight in list(self._flights.values()):
            self._finish(flight, death(error))

    # Control

    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """End the given requests, or all, with the tokens they have."""
        self._open_backend()
        asked = names_of(request_ids)
        for request_id in list(self._flights) if asked is None else asked:
            if flight := self._flights.get(request_id):
                self._finish(flight, "abort")

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stop sampling until `resume`; see `Engine.pause`. Frozen requests stay frozen under a second pause that waits."""
        if mode not in get_args(PauseMode):
            raise ValueError(f"unknown pause mode {mode!r}; known are {get_args(PauseMode)}")
        backend = self._live_backend()
        again, self._paused = self._paused, True
        if mode == "abort":
            await self.interrupt()
        if mode == "wait" and not again:
            try:
                await self._idle.wait()
            except asyncio.CancelledError:
                self._unpark()
                raise
        # Resumed while it waited: then there is nothing to hold.
        if self._paused and self._backend is backend:
            await backend.hold()

    async def resume(self) -> None:
        """Let frozen requests go on, and start those that arrived meanwhile."""
        await self._open_backend().release()
        self._unpark()

    def _unpark(self) -> None:
        self._paused = False
        for flight in [flight for flight in self._flights.values() if flight.key not in self._running]:
            self._submit(flight)

    async def _load_weights(self, source: WeightSource, version: int) -> None:
        async with self._updating:
            backend = self._live_backend()
            if version < self._version:
                raise ValueError(f"version={version} was overtaken by {self._version}")
            copies = await asyncio.to_thread(plan_copies, backend.model, source)
            # The weights and their version change together, between two steps: a token's stamp is exact.
            await backend.put_weights(copies, lambda: setattr(self, "_version", version))
