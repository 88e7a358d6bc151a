"""`SimulatedEngine`: an engine without a model, deterministic by seed, for tests and for simulation in virtual time.

    generate -> waiting (first come, first served) -> running, at most `slots` -> decoded -> Completion

`Batching` says who runs and how far each has come; the engine wakes up, by one timer, when it says that a request is due. The engine
starts no task. `interrupt`, `pause` and `close` act synchronously, so that a slot or a request id is free again before any other
coroutine runs.
"""

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import (
    ALL_TOKENS,
    Capabilities,
    Completion,
    EngineLoad,
    FinishReason,
    OnTokens,
    PauseMode,
    WeightSource,
    WeightTransfer,
)
from agent_loop.engines.checks import check_call, names_of
from agent_loop.engines.simulated_arguments import costs_of, policy_of
from agent_loop.engines.simulated_batching import Batching
from agent_loop.engines.simulated_clock import Alarm
from agent_loop.engines.simulated_costs import CostModel, Statistics
from agent_loop.engines.simulated_policy import Lengths, Policy, Request, Script
from agent_loop.engines.simulated_request import InFlight
from agent_loop.engines.simulated_scores import ScoresOfTable
from agent_loop.engines.simulated_table import weights_seed
from agent_loop.errors import EngineClosedError, EngineDeadError, RequestRefusedError
from agent_loop.sampling import SamplingParams, whole

Fail = Callable[[str, int], Exception | None]


class SimulatedEngine(ScoresOfTable):
    """Continuous batching without a model.

    Args:
        script: the response to a prompt, token by token (see `ScriptedPolicy` for continuations).
        lengths: responses of given lengths; their tokens mean nothing. Neither this nor `script`: a `TablePolicy`, which has
            a real distribution, honours every sampling parameter, and changes with the weights.
        policy: any other policy; it brings its own vocabulary and seed.
        fail: called with (request_id, attempt from 1) when a request first gets a slot; an exception that it returns is raised. An
            `EngineDeadError` kills the engine: everything in flight, and all that comes later, fails too.
        costs: how many requests decode at once, and how long everything takes.
        slots: short for `costs=CostModel(slots=...)`.
        tokens_per_second: short for `costs=CostModel(tokens_per_second=...)`.
        pieces: whether `on_tokens` is called while a request runs, as often as it asks. False: only when the request ends or is ended,
            with all its tokens: a simulation of many requests has no use for more.

    A response is a pure function of the engine's seed, the prompt, the sampling parameters and their seed (else the request id), the
    weights and the adapter. An adapter shifts the distribution of a `TablePolicy`, as other weights do; a `script` says the same under
    all of them.
    """

    offers = Capabilities(score=True, top_tokens=ALL_TOKENS, adapters=True, load=True)
    only_with: ClassVar[Mapping[str, str]] = dict.fromkeys(("score", "top_tokens"), "without `script`, `lengths` or another policy")

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
        costs: CostModel | None = None,
        slots: int | None = None,
        tokens_per_second: float | None = None,
        pieces: bool = True,
    ) -> None:
        super().__init__()
        if whole("max_length", max_length) < 2:
            raise ValueError(f"{max_length=} leaves no room for a prompt and a token; it must be 2 or more")
        if fail is not None and not callable(fail):
            raise ValueError(f"fail={fail!r:.60} cannot be called; give a function of a request's id and its attempt")
        self.costs = costs_of(costs, slots, tokens_per_second)
        self.policy = policy_of(script, lengths, policy, seed=seed, vocab_size=vocab_size, eos_token_id=eos_token_id)
        self._fail, self._attempts = fail, dict[str, int]()
        self._max_length, self._pieces = max_length, pieces
        self._weights = 0
        self._requests: dict[str, InFlight] = {}  # by id, those that have not ended
        self._calls: dict[int, InFlight] = {}  # by number, those whose `generate` has not returned
        self._held: dict[int, InFlight] = {}  # by number, those that came during a pause
        self._returning: dict[int, asyncio.Event] = {}
        self._numbers = itertools.count()
        self._batch = Batching[InFlight](self.costs)
        self._alarm = Alarm(self._go_on, turns=self.costs.tokens_per_second is None)
        self._open = self._paused = self._frozen = self._going_on = False
        self._updates = 0
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
        return self._batch.running

    @property
    def waiting(self) -> int:
        """Requests in flight that hold no slot."""
        return self._batch.waiting + len(self._held)

    def load(self) -> EngineLoad | None:
        """See `Engine`."""
        return None if self._paused else EngineLoad(self.running, self.waiting, self._batch.preemptions)

    def statistics(self) -> Statistics:
        """What it did until now."""
        self._catch_up()
        return self._batch.statistics(len(self._held))

    async def open(self) -> None:
        """See `Engine`."""
        self._open = True
        self._alarm.open()

    async def close(self) -> None:
        """See `Engine`."""
        self._open = self._paused = False
        await self.interrupt()
        self._thaw()
        await self._returned(list(self._calls.values()))

    async def health(self) -> None:
        """See `Engine`."""
        self._check_alive()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._death()
        if not self._open:
            raise EngineClosedError("the engine is not open; use it inside `async with`")

    def _death(self) -> EngineDeadError:
        error = EngineDeadError(f"the engine is gone: {self._dead}")
        error.__cause__ = self._dead
        return error

    # -- a request's life

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
        """See `Engine`."""
        self._check_alive()
        self.check_media(media)
        check_call(request_id, session_id, on_tokens)
        what = Request(self.check_request(prompt_ids, params), request_id, params.seed, session_id)
        if params.stop:
            raise RequestRefusedError(f"stop={params.stop} needs decoded text, and a simulated engine has none; use stop_token_ids")
        if request_id in self._requests:
            raise RequestRefusedError(f"request {request_id!r} is in flight already; ids must be unique among those")
        with self.using_adapter(adapter) as used:
            request = InFlight(next(self._numbers), what, params, on_tokens, asyncio.get_running_loop().create_future(), used)
            self._requests[request_id] = self._calls[request.number] = request
            try:
                self._arrive(request)
                await request.ended
                return request.result()
            finally:
                self._leave(request)

    def _arrive(self, request: InFlight) -> None:
        if self._paused:
            self._held[request.number] = request
        else:
            self._catch_up()
            self._batch.add(request)
            self._settle()

    def _leave(self, request: InFlight) -> None:
        try:
            self._end([request], "abort")  # where the call was cancelled, or failed
            request.show(self._version)
        finally:
            del self._calls[request.number]
            if (returned := self._returning.pop(request.number, None)) is not None:
                returned.set()

    def _begin(self, request: InFlight) -> None:
        """It has a slot."""
        try:
            if not request.begun:
                self._maybe_fail(request.what.request_id)
                request.begin(self.policy.start(request.what, request.params), self.eos_token_ids, pieces=self._pieces)
            self._batch.expect(request, request.next_due())
        except Exception as error:  # noqa: BLE001 - it is raised where the request was made
            self._take_out(request, error)

    def _maybe_fail(self, request_id: str) -> None:
        if self._fail is None:
            return
        self._attempts[request_id] = self._attempts.get(request_id, 0) + 1
        error = self._fail(request_id, self._attempts[request_id])
        if isinstance(error, EngineDeadError):
            self._dead = error
            for other in [other for name, other in self._requests.items() if name != request_id]:
                self._take_out(other, self._death())
        if error is not None:
            raise error

    def _reach(self, request: InFlight) -> None:
        """It is due: its response ends, or more of it is to be shown or decoded."""
        if request.outcome is not None:  # ended by what another was shown
            return
        try:
            reason = request.reach(self._weights, self.eos_token_ids)
            if reason is None:
                request.show_piece(self._version)
        except Exception as error:  # noqa: BLE001 - it is raised where the request was made
            self._take_out(request, error)
        else:
            if reason is not None:
                self._take_out(request, reason)
            elif request.outcome is None:
                self._batch.expect(request, request.next_due())

    def _end(self, requests: Collection[InFlight], outcome: FinishReason) -> None:
        """End those of the requests that have not ended; their ids and slots are free at once."""
        if any(request.outcome is None for request in requests):
            self._catch_up()
            for request in requests:
                self._take_out(request, outcome)
            self._settle()

    def _take_out(self, request: InFlight, outcome: FinishReason | Exception) -> None:
        if request.outcome is None:
            del self._requests[request.what.request_id]
            self._held.pop(request.number, None)
            self._batch.remove(request)
            request.end(outcome, self._version)
            if self.costs.prefix_cache_tokens and request.begun:
                self._batch.remember(request.context(), request.salt)

    # -- time

    def _go_on(self) -> None:
        """Let happen what was to happen until now."""
        self._going_on, now = True, self._alarm.now()
        try:
            while due := self._batch.advance(now):
                for request in due:
                    self._reach(request)
                self._admit()
        finally:
            self._going_on = False
            self._settle()

    def _catch_up(self) -> None:
        """To the present, for a call. What is due then is left to the alarm: where that is late, a call must not pay for it."""
        if not self._going_on:  # else a callback of a request calls, in the midst of it
            self._batch.approach(self._alarm.now())

    def _settle(self) -> None:
        """Give free slots away, and wake up when the next request is due."""
        if not self._going_on:
            self._admit()
            self._alarm.set(self._batch.next_time())

    def _admit(self) -> None:
        while (request := self._batch.admit()) is not None:
            self._begin(request)

    # -- control

    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """See `Engine`."""
        asked = names_of(request_ids)
        chosen = list(self._requests) if asked is None else [name for name in asked if name in self._requests]
        self._end([self._requests[name] for name in chosen], "abort")

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See `Engine`. Returns with "wait" when those in flight, waiting ones included, have finished."""
        if mode not in get_args(PauseMode):
            raise ValueError(f"unknown pause mode {mode!r}; known are {get_args(PauseMode)}")
        self._check_alive()
        self._paused = True
        if mode == "abort":
            await self.interrupt()
        elif mode == "keep":
            self._frozen = True
            self._stand()
        else:
            await self._returned([request for request in self._calls.values() if request.number not in self._held])

    async def resume(self) -> None:
        """See `Engine`."""
        self._check_alive()
        self._paused = False
        for request in self._held.values():
            self._batch.add(request)
        self._held.clear()
        self._thaw()

    def _stand(self) -> None:
        self._catch_up()
        self._batch.stand()
        self._settle()

    def _thaw(self) -> None:
        """End a pause; nothing goes on before the weights are there, where they are being updated."""
        self._frozen = False
        self._go_unless_held_up()

    def _go_unless_held_up(self) -> None:
        self._catch_up()
        if not self._frozen and not self._updates:
            self._batch.go()
        self._settle()

    async def _returned(self, requests: Collection[InFlight]) -> None:
        for request in requests:
            if request.number in self._calls:
                await self._returning.setdefault(request.number, asyncio.Event()).wait()

    async def update_weights(self, source: WeightSource | WeightTransfer, version: int) -> None:
        """See `Engine`. `source` is a mapping with an integer "seed", or any path: its name stands for its content."""
        self._check_alive()
        await super().update_weights(source, version)

    async def _load_weights(self, source: WeightSource, version: int) -> None:
        weights = weights_seed(source)
        if self.costs.update_seconds:
            await self._stand_still(self.costs.update_seconds)
            self._check_alive()
        # No await from here on: tokens must never be sampled from weights that their version does not name.
        self._catch_up()
        for request in self._requests.values():
            self._batch.count(request)
            request.stamp(self._version)
        self._batch.forget_prefixes()
        self._weights = weights
        self._weights_of[version] = weights

    async def _stand_still(self, seconds: float) -> None:
        self._updates += 1
        self._stand()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._updates -= 1
            self._go_unless_held_up()
