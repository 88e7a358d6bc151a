"""`SimulatedEngine`: an engine without a model, deterministic by seed, for tests and for simulation in virtual time.

    generate -> waiting (first come, first served) -> running, at most `slots` -> decoded token by token -> Completion

Each `generate` call decodes itself; the engine starts no task of its own. `interrupt`, `pause` and `close` only mark requests,
synchronously, so that a slot or a request id is free again before any other coroutine runs.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.base import Completion, Engine, FinishReason, OnTokens, PauseMode, WeightSource, piece_tokens
from agent_loop.engines.simulated_policy import Decoder, Lengths, Policy, Request, Script, Step, TablePolicy, policy_for, weights_seed
from agent_loop.errors import EngineClosedError, EngineDeadError, RequestRefusedError
from agent_loop.sampling import SamplingParams

Fail = Callable[[str, int], Exception | None]


class SimulatedEngine(Engine):
    """Continuous batching without a model.

    Args:
        script: the response to a prompt, token by token (see `ScriptedPolicy` for continuations).
        lengths: responses of given lengths; their tokens mean nothing. Neither this nor `script`: a `TablePolicy`, which has
            a real distribution, honours every sampling parameter, and changes with the weights.
        policy: any other policy; it brings its own vocabulary and seed.
        fail: called with (request_id, attempt from 1) when a request gets its slot; an exception that it returns is raised. An
            `EngineDeadError` kills the engine: everything in flight, and all that comes later, fails too.
        slots: requests that decode at once; others wait in order of arrival.
        tokens_per_second: of each request, on the event loop's clock. None: a token costs one turn of the loop.

    A response is a pure function of the engine's seed, the prompt, the sampling parameters and their seed (else the request id).
    """

    def __init__(
        self,
        *,
        script: Script | None = None,
        lengths: Lengths | None = None,
        policy: Policy | None = None,
        fail: Fail | None = None,
        seed: int = 0,
        vocab_size: int = 64,
        eos_token_id: int = 0,
        max_length: int = 4096,
        slots: int = 64,
        tokens_per_second: float | None = None,
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (script, lengths, policy)) > 1:
            raise ValueError("script, lengths and policy each say what is generated; give at most one")
        if slots < 1 or max_length < 2 or (tokens_per_second is not None and tokens_per_second <= 0):
            raise ValueError(f"{slots=} must be 1 or more, {max_length=} 2 or more, {tokens_per_second=} above 0")
        if policy is None:
            policy = policy_for(script, lengths, seed, vocab_size, eos_token_id)
        self.policy = policy
        self._fail, self._attempts = fail, dict[str, int]()
        self._max_length, self._slots, self._rate = max_length, slots, tokens_per_second
        self._weights = 0
        self._weights_of = {0: 0}
        self._requests: dict[str, _InFlight] = {}  # in order of arrival
        self._open = self._paused = False
        self._dead: EngineDeadError | None = None

    @property
    def max_length(self) -> int:
        """See `Engine`."""
        return self._max_length

    @property
    def vocab_size(self) -> int:
        """See `Engine`."""
        return self.policy.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `Engine`."""
        return self.policy.eos_token_ids

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return sum(request.has_slot for request in self._requests.values())

    @property
    def waiting(self) -> int:
        """Requests in flight that hold no slot yet."""
        return len(self._requests) - self.running

    async def open(self) -> None:
        """See `Engine`."""
        self._open = True

    async def close(self) -> None:
        """See `Engine`."""
        self._open = self._paused = False
        ending = list(self._requests.values())
        await self.interrupt()
        for request in ending:
            await request.returned.wait()

    async def health(self) -> None:
        """See `Engine`."""
        self._check_alive()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"the engine is gone: {self._dead}") from self._dead
        if not self._open:
            raise EngineClosedError("the engine is not open; use it inside `async with`")

    async def generate(
        self,
        prompt_ids: Sequence[int] | NDArray[np.int32],
        params: SamplingParams,
        *,
        request_id: str,
        session_id: str | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        """See `Engine`."""
        self._check_alive()
        ids = tuple(self.check_request(prompt_ids, params).tolist())
        if params.stop:
            raise RequestRefusedError(f"stop={params.stop} needs decoded text, and a simulated engine has none; use stop_token_ids")
        if request_id in self._requests:
            raise RequestRefusedError(f"request {request_id!r} is in flight already; ids must be unique among those")
        request = self._requests[request_id] = _InFlight(Request(ids, request_id, params.seed, session_id), params, held=self._paused)
        try:
            self._admit()
            await request.may_decode.wait()
            await self._decode(request, None if on_tokens is None else _Shown(request, on_tokens))
            return request.completion()
        finally:
            self._forget(request)
            request.returned.set()

    async def _decode(self, request: "_InFlight", shown: "_Shown | None") -> None:
        if request.finish_reason is not None:
            return
        self._maybe_fail(request.what.request_id)
        decoder = self.policy.start(request.what, request.params)
        try:
            await self._decode_with(decoder, request, shown)
        finally:
            if shown is not None:
                shown.all()

    async def _decode_with(self, decoder: Decoder, request: "_InFlight", shown: "_Shown | None") -> None:
        while request.finish_reason is None:
            await request.may_decode.wait()
            await self._token_time(request)
            if request.finish_reason is None and request.may_decode.is_set():
                self._check_alive()
                request.take(decoder(request.context, self._weights), self._version, self.eos_token_ids)
                if shown is not None:
                    shown.another()

    async def _token_time(self, request: "_InFlight") -> None:
        if self._rate is None:
            await asyncio.sleep(0)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(1 / self._rate):
                    await request.ended.wait()

    def _maybe_fail(self, request_id: str) -> None:
        self._check_alive()
        if self._fail is None:
            return
        self._attempts[request_id] = self._attempts.get(request_id, 0) + 1
        error = self._fail(request_id, self._attempts[request_id])
        if isinstance(error, EngineDeadError):
            self._dead = error
            for request in self._requests.values():
                request.may_decode.set()  # also those that wait for a slot or a resume: each finds the engine dead
        if error is not None:
            raise error

    def _admit(self) -> None:
        """Give free slots to those that wait, in order of arrival."""
        free = self._slots - self.running
        for request in list(self._requests.values()):
            if free and not request.has_slot and not request.held:
                request.has_slot = True
                request.may_decode.set()
                free -= 1

    def _forget(self, request: "_InFlight") -> None:
        # Its id may already belong to a later request: an interrupted one is forgotten before its `generate` returns.
        if self._requests.get(request.what.request_id) is request:
            del self._requests[request.what.request_id]
            self._admit()

    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """See `Engine`."""
        chosen = list(self._requests) if request_ids is None else [name for name in request_ids if name in self._requests]
        ending = [self._requests.pop(name) for name in dict.fromkeys(chosen)]
        for request in ending:
            request.end("abort")
        self._admit()

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See `Engine`. Returns with "wait" when those in flight, waiting ones included, have finished."""
        if mode not in get_args(PauseMode):
            raise ValueError(f"unknown pause mode {mode!r}; known are {get_args(PauseMode)}")
        self._check_alive()
        self._paused = True
        if mode == "abort":
            await self.interrupt()
        elif mode == "keep":
            for request in self._requests.values():
                request.held = True
                request.may_decode.clear()
        else:
            for request in [request for request in self._requests.values() if not request.held]:
                await request.returned.wait()

    async def resume(self) -> None:
        """See `Engine`."""
        self._check_alive()
        self._paused = False
        for request in self._requests.values():
            request.held = False
            if request.has_slot:
                request.may_decode.set()
        self._admit()

    async def update_weights(self, source: WeightSource, version: int) -> None:
        """See `Engine`. `source` is a mapping with an integer "seed", or any path: its name stands for its content."""
        self._check_alive()
        await super().update_weights(source, version)

    async def _load_weights(self, source: WeightSource, version: int) -> None:
        # No await in here: tokens must never be sampled from weights that their version does not name.
        self._weights = weights_seed(source)
        self._weights_of[version] = self._weights

    def reference_logprobs(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], version: int, params: SamplingParams | None = None
    ) -> NDArray[np.float64]:
        """(len(response_ids),) float64: log-probability of each response token under `version`; needs a `TablePolicy`."""
        if not isinstance(self.policy, TablePolicy):
            raise TypeError(f"{type(self.policy).__name__} has no distribution to take log-probabilities from")
        if version not in self._weights_of:
            raise ValueError(f"version={version} was never in force; known are {sorted(self._weights_of)}")
        context, logprobs = [int(token) for token in prompt_ids], []
        for token in map(int, response_ids):
            logprobs.append(self.policy.log_probs(context, self._weights_of[version], params or SamplingParams())[token])
            context.append(token)
        return np.array(logprobs, np.float64)


class _InFlight:
    """One request and what became of it so far. `may_decode` is clear while it waits for a slot or is frozen."""

    def __init__(self, what: Request, params: SamplingParams, *, held: bool) -> None:
        self.what, self.params, self.held = what, params, held
        self.has_slot = False
        self.context = list(what.prompt_ids)
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.may_decode, self.ended, self.returned = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def take(self, step: Step, version: int, eos_token_ids: frozenset[int]) -> None:
        """Add a sampled token, and see whether it is the last."""
        token, logprob, last = step
        self.context.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        ends = token in self.params.stop_token_ids or (token in eos_token_ids and not self.params.ignore_eos)
        if ends or last:
            self.end("stop")
        elif len(self.logprobs) == self.params.max_tokens:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        """Set the finish reason and wake whoever decodes it."""
        self.finish_reason = reason
        self.ended.set()
        self.may_decode.set()

    def completion(self, start: int = 0) -> Completion:
        """The tokens from `start` on; "abort" for an unfinished response."""
        ids = self.context[len(self.what.prompt_ids) + start :]
        return Completion.of(ids, self.logprobs[start:], self.versions[start:], self.finish_reason or "abort")


class _Shown:
    """Shows the tokens of a request to `on_tokens`, in pieces of the size it asks for; the last may be smaller."""

    __slots__ = ("_next", "_on_tokens", "_piece_tokens", "_request")

    def __init__(self, request: _InFlight, on_tokens: OnTokens) -> None:
        self._request, self._on_tokens, self._piece_tokens = request, on_tokens, piece_tokens(on_tokens)
        self._next = 0

    def another(self) -> None:
        """A token was added."""
        if len(self._request.logprobs) - self._next >= self._piece_tokens:
            self.all()

    def all(self) -> None:
        """Show what was not shown yet."""
        start, self._next = self._next, len(self._request.logprobs)
        if start < self._next:
            self._on_tokens(self._request.completion(start=start))
