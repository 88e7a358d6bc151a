"""vLLM servers over HTTP as one engine: `VLLMServerEngine` spreads requests over replicas and keeps them at one policy."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from agent_loop.arguments import at_least, positive
from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import (
    ALL_TOKENS,
    Capabilities,
    Completion,
    Engine,
    EngineLoad,
    OnTokens,
    PauseMode,
    TopTokens,
    WeightSource,
)
from agent_loop.engines.checks import check_call, names_of
from agent_loop.engines.server.adapters import Lora, Loras
from agent_loop.engines.server.answers import read_likely, read_scores
from agent_loop.engines.server.breaker import Breaker
from agent_loop.engines.server.checks import check_structure, checked_ends, checked_urls
from agent_loop.engines.server.client import Server, new_session, server_url
from agent_loop.engines.server.control import Control
from agent_loop.engines.server.desk import Desk
from agent_loop.engines.server.facts import Facts
from agent_loop.engines.server.fleet import Care, Fleet
from agent_loop.engines.server.replica import Flight, Replica, ReplicaStatus
from agent_loop.engines.server.requests import Manner, Requests
from agent_loop.engines.server.weights import AT_START, Weights, version_of
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError, RequestRefusedError, first_error
from agent_loop.sampling import SamplingParams, whole

Result = TypeVar("Result")


class VLLMServerEngine(Engine):
    """One or many `vllm serve` processes, each of which holds the whole model: replicas.

    A request goes to the replica with the fewest in flight, and requests of one session to the same one while it costs little. Where a
    replica breaks off, the request goes on at another one with the tokens that it has. New weights are put into all replicas while
    none of them samples; one that misses them serves again when it has caught up. Versions and log-probabilities are the servers' own
    record; of tokens whose replica died, the version is that in force when they arrived.

    The servers need `VLLM_SERVER_DEV_MODE=1`, `--enable-scale-out` and `--logprobs-mode processed_logprobs`. Whoever reaches the
    endpoints of that mode governs the server: bind it to loopback or a private interface.
    """

    offers = Capabilities(
        score=True,
        top_tokens=ALL_TOKENS,
        adapters=True,
        top_logprobs=ALL_TOKENS,
        structured_outputs=True,
        images=True,
        sleep=True,
        load=True,
    )
    only_with: ClassVar[Mapping[str, str]] = {
        "top_tokens": "up to `max_logprobs`, 20 by default",
        "top_logprobs": "one fewer than `max_logprobs`, 20 by default",
        "structured_outputs": "from servers with a tokenizer",
        "sleep": "from servers with `--enable-sleep-mode`, on GPUs, and our worker extension",
        "images": "with a model that sees, from servers with our worker extension",
        "adapters": "from servers with `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`",
    }

    def __init__(
        self,
        urls: str | Iterable[str],
        *,
        api_key: str | None = None,
        adopt: bool = False,
        max_in_flight: int = 256,
        affinity_slack: int = 8,
        stream_tokens: int = 16,
        attempts: int = 5,
        recompute: bool = False,
        weights_folder: str | Path | None = None,
        vocab_size: int | None = None,
        eos_token_ids: Collection[int] | None = None,
        max_logprobs: int = 20,
        open_seconds: float = 600.0,
        health_seconds: float = 5.0,
        control_seconds: float = 60.0,
        load_seconds: float = 1800.0,
        stall_seconds: float = 300.0,
        patience_seconds: float = 60.0,
    ) -> None:
        """Say which servers; `open` connects to them.

        Args:
            urls: of the servers, such as "http://127.0.0.1:8000".
            api_key: of the servers, where they ask for one.
            adopt: take the weights that the servers hold, with the version that they are labelled with. Otherwise servers that an
                earlier engine updated serve after the first `update_weights` only.
            max_in_flight: requests that a replica holds at once; more wait here.
            affinity_slack: how many requests more than the least loaded replica that of the session may have.
            stream_tokens: how many tokens a server sends at once where nobody watches them; so many are lost at most when it dies.
            attempts: replicas that may fail one request before it fails.
            recompute: at a weight update, compute the attention cache of requests in flight anew.
            weights_folder: where weights that are given as tensors, and copies of adapters, are written for the servers; None: the
                temporary folder.
            vocab_size: of the model; None asks the server.
            eos_token_ids: tokens that end a response; None asks the server.
            max_logprobs: what the servers were told with `--max-logprobs`.
            open_seconds: for which servers that are not up yet are waited for.
            health_seconds: between two probes of a replica.
            control_seconds: for which a control call may go unanswered.
            load_seconds: for which loading weights may take.
            stall_seconds: for which a response that has begun may stand still before it goes on elsewhere.
            patience_seconds: for which requests wait while no replica serves; then they fail with `EngineDeadError`.

        Raises:
            ValueError: no address, one that is no server's, or one given twice; a bound is crossed.
        """
        super().__init__()
        self._urls = checked_urls(urls)
        for name, value in (("max_in_flight", max_in_flight), ("stream_tokens", stream_tokens), ("attempts", attempts)):
            at_least(name, value, 1)
        at_least("max_logprobs", max_logprobs, 0)
        at_least("affinity_slack", affinity_slack, 0)
        if vocab_size is not None:
            at_least("vocab_size", vocab_size, 1)
        times = {"open": open_seconds, "health": health_seconds, "control": control_seconds, "load": load_seconds}
        for name, seconds in (times | {"stall": stall_seconds, "patience": patience_seconds}).items():
            positive(f"{name}_seconds", seconds)
        self._api_key, self._adopt = api_key, adopt
        self._max_logprobs = max_logprobs
        self._connect_seconds, self._control_seconds, self._load_seconds = min(10.0, control_seconds), control_seconds, load_seconds
        self._weights = Weights(weights_folder, recompute=recompute)
        care = Care(open_seconds, health_seconds, stall_seconds, patience_seconds)
        self._fleet = Fleet(self._weights, Loras(weights_folder), care, vocab_size, checked_ends(eos_token_ids))
        self._desk = self._fleet.desk = Desk(self._fleet.serving, max_in_flight, affinity_slack)
        self._requests = Requests(self._fleet, self._desk, self._weights, Manner(stream_tokens, attempts))
        self._control = Control(self._fleet, self._desk, self._weights, self._requests)
        self._session: Any = None
        self._group: asyncio.TaskGroup | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._facts: Facts | None = None
        self._closed = False

    # What the model is

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and response together; the engine must be open."""
        return self._alive().max_length

    @property
    def vocab_size(self) -> int:
        """Token ids lie in `range(vocab_size)`; the engine must be open."""
        return self._alive().vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Of the model's generation config, or else its config; the engine must be open."""
        return self._alive().eos_token_ids

    @property
    def capabilities(self) -> Capabilities:
        """What the servers' arguments leave of `offers`."""
        facts = self._alive()
        most = min(self._max_logprobs, facts.vocab_size)
        return replace(
            self.offers,
            top_tokens=most,
            top_logprobs=max(0, most - 1),
            structured_outputs=facts.tokenizer,
            images=facts.images,
            sleep=facts.sleep,
            adapters=facts.adapters,
        )

    def _alive(self) -> Facts:
        if self._closed:
            raise EngineClosedError("the engine was closed; make a new one")
        if self._facts is None:
            raise EngineClosedError("the engine is not open; use `async with`, or await open()")
        return self._facts

    # Opening and closing

    async def open(self) -> None:
        """Connect to the servers, and wait for those that are not up yet; they must all serve the same.

        Raises:
            EngineError: a server did not come up, is too old, was started without what is needed, or serves another model, with the
                remedy.
            EngineClosedError: this engine was closed; make a new one.
        """
        if self._closed:
            raise EngineClosedError("this engine was closed; make a new one")
        if self._group is not None:
            raise EngineError("this engine is open already")
        self._session = new_session(self._api_key, self._connect_seconds)
        try:
            replicas = [self._replica(url) for url in self._urls]
            self._fleet.replicas = {replica.url: replica for replica in replicas}
            await _together(self._fleet.connect(replica, adopt=self._adopt) for replica in replicas)
            assert self._fleet.facts is not None
            self._begin(replicas, self._fleet.facts)
        except BaseException:
            await self._session.close()
            raise
        self._group = await asyncio.TaskGroup().__aenter__()
        self._facts = self._fleet.facts
        for replica in replicas:
            if replica.label == self._weights.label:
                self._fleet.admit(replica)
            self._tend(replica)

    def _tend(self, replica: Replica) -> None:
        assert self._group is not None
        self._tasks.append(self._group.create_task(self._fleet.tend(replica)))

    def _begin(self, replicas: Sequence[Replica], facts: Facts) -> None:
        labels = sorted({replica.label for replica in replicas})
        if not self._adopt:
            self._weights.begin(AT_START if labels == [AT_START] else None, facts.root, tied=facts.tied)
            return
        version = version_of(labels[0]) if len(labels) == 1 else None
        if version is None:
            raise EngineError(f"weights labelled {labels} cannot be adopted: all servers must hold the same, with a version")
        self._weights.begin(labels[0], facts.root, tied=facts.tied)
        self._version = self._weights.version

    def _replica(self, url: str) -> Replica:
        return Replica(Server(self._session, url, self._control_seconds, self._load_seconds), Breaker())

    async def close(self) -> None:
        """Let go of the servers, which run on; requests in flight return what they have, with "abort"."""
        if self._closed:
            return
        self._closed = True
        if self._group is None:
            return
        await self._requests.end_all()
        async with self._control.lock:  # an update under way comes to its end: half of one would spoil the servers
            await self._wakened()
            for task in self._tasks:
                task.cancel()
            for lora in self._adapters.clear():
                await self._control.drop_adapter(lora)
        await self._group.__aexit__(None, None, None)  # an update that waited for the lock finds the engine closed
        self._fleet.close()
        self._desk.close()
        self._weights.drop()
        await self._session.close()

    async def _wakened(self) -> None:
        """Let servers that sleep or stand still go on; those whose weights are nowhere sleep on."""
        with suppress(EngineDeadError):
            await self._control.slumber.wake_up(weights_only=False)
            await self._control.thaw()

    async def health(self) -> None:
        """Return if a replica answers."""
        self._alive()
        if self._fleet.hopeless is not None:
            raise EngineDeadError(str(self._fleet.hopeless))
        well, errors = await self._fleet.each(self._fleet.serving(), lambda replica: replica.server.health())
        if not well:
            raise EngineDeadError(f"no replica serves: {self._fleet.causes()}") from next(iter(errors), None)

    def load(self) -> EngineLoad | None:
        """Requests that a token came of run, the others wait; None while paused."""
        if self._facts is None or self._fleet.frozen:
            return None
        running = sum(flight.decoding for flight in self._requests.flights.values())
        return EngineLoad(running, len(self._requests.flights) - running)

    # Replicas

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """How each replica stands."""
        return tuple(replica.status() for replica in self._fleet.replicas.values())

    async def until_serving(self, count: int) -> None:
        """Wait until `count` replicas serve.

        Raises:
            ValueError: `count` is no number of replicas.
            EngineError: they hold weights of an earlier run, and wait for `update_weights` themselves.
        """
        self._alive()
        at_least("count", count, 1)
        self._requests.check_weights()
        await self._fleet.until_serving(count)

    async def add_replica(self, url: str, *, open_seconds: float = 10.0) -> None:
        """Take a further server in, while others serve; it is given the weights and adapters in force, and gets requests from then on.

        Args:
            url: its address.
            open_seconds: for which it is waited for where it is not up. One that starts and one that is not there look the same, so give
                a server that was just started the minutes that it needs.

        Raises:
            EngineError: it did not come up, or is not one that this engine can use.
            ValueError: the address is no server's, or is there already; `open_seconds` is not above 0.
        """
        self._alive()
        replica = self._replica(server_url(url))
        await self._fleet.take_in(replica, positive("open_seconds", open_seconds), self._alive)
        self._tend(replica)

    async def remove_replica(self, url: str, *, drain: bool = True) -> None:
        """Send a replica no more requests; those that it has end there, or without `drain` go on elsewhere at once.

        Raises:
            ValueError: there is no such replica.
        """
        self._alive()
        await self._fleet.send_away(server_url(url), drain=drain)

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

        Pieces given to `on_tokens` carry `version` as it is when they arrive, and the finish reason "abort" until the last. A stop string
        of which one half came before a replica died, and the other half after, is not found. A structured response whose replica died
        begins anew at another one, so that `on_tokens` is shown its tokens at its end.
        """
        ids = self.check_request(prompt_ids, params)
        self.check_media(media)
        check_call(request_id, session_id, on_tokens)
        check_structure(params.structured_outputs)
        if request_id in self._requests.flights:
            raise RequestRefusedError(f"request id {request_id!r} is in flight already; give every request its own")
        with self.using_adapter(adapter) as used:
            flight = Flight(ids, params, session_id, on_tokens, used, media)
            await self._requests.finish(request_id, flight)
            return flight.completion()

    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """End the given requests, or all, early; see `Engine.interrupt`.

        Of one that no token came of yet, what the server may have sampled meanwhile is left there.
        """
        self._alive()
        flights, asked = self._requests.flights, names_of(request_ids)
        chosen = list(flights) if asked is None else [name for name in asked if name in flights]
        await self._requests.interrupt([flights[name] for name in chosen])

    # Scores

    async def score(
        self, token_ids: Sequence[int] | NDArray[np.int32], *, start: int = 1, adapter: str | Adapter | None = None
    ) -> NDArray[np.float32]:
        """See `Engine`. A prefill beside the other requests; the prefix cache is of no use to it."""
        ids = self.check_score(token_ids, start).tolist()
        with self.using_adapter(adapter) as used:
            scores, _ = await self._requests.look(ids, 0, used, lambda answer, _: read_scores(answer, ids))
        return np.array(scores[start - 1 :], np.float32)

    async def top_tokens(
        self, token_ids: Sequence[int] | NDArray[np.int32], count: int, *, adapter: str | Adapter | None = None
    ) -> TopTokens:
        """See `Engine`. One step beside the other requests, with the prefix cache."""
        ids = self.check_top_tokens(token_ids, count).tolist()
        vocab_size = self.vocab_size
        with self.using_adapter(adapter) as used:
            likely, version = await self._requests.look(ids, count, used, lambda _, entry: read_likely(entry, count, vocab_size))
        return TopTokens.of(likely.keys(), likely.values(), version)

    # Pauses

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stop sampling until `resume`; see `Engine.pause`. Control calls are carried out one after another."""
        if mode not in get_args(PauseMode):
            raise ValueError(f"unknown pause mode {mode!r}; known are {get_args(PauseMode)}")
        async with self._control.lock:
            self._alive()
            await self._control.pause(mode)

    async def resume(self) -> None:
        """Go on after `pause`."""
        async with self._control.lock:
            self._alive()
            await self._control.resume()

    async def sleep(self, level: int = 1) -> None:
        """See `Engine`; level 2 only without adapters. A replica that does not answer stays out until the others wake up."""
        if whole("level", level) not in (1, 2):
            raise RequestRefusedError(f"level={level} is not known; 1 keeps the weights in main memory, 2 drops them")
        self._check_sleep()
        await self._to_its_end(lambda: self._control.slumber.sleep(level))

    async def wake_up(self, *, weights_only: bool = False) -> None:
        """See `Engine`."""
        self._check_sleep()
        await self._to_its_end(lambda: self._control.slumber.wake_up(weights_only=weights_only))

    def _check_sleep(self) -> None:
        if not self.capabilities.sleep:
            raise RequestRefusedError(
                "these servers do not sleep: that needs --enable-sleep-mode, which vLLM takes on GPUs only, and the worker extension"
            )

    # Weights

    async def _load_weights(self, source: WeightSource, version: int) -> None:
        """Put new weights into all replicas while none samples, with requests in flight frozen meanwhile.

        A path must lead to the same folder here and at all servers; tensors are written to a temporary folder first. What does not fit
        the model is refused before a server is touched. Cancelled, it comes to its end first. A replica where a load breaks off is out
        until it is restarted: what it holds may be a mixture.
        """
        try:
            await self._to_its_end(lambda: self._control.update(source, version))
        finally:
            self._version = self._weights.version

    # Adapters

    async def _load_adapter(self, adapter: Adapter, path: WeightSource) -> Lora:
        """Load it into all replicas or none, from a copy in `weights_folder`; a replica that was lost meanwhile has it before it serves."""
        return await self._to_its_end(lambda: self._control.add_adapter(adapter, path), undo=self._drop)

    def _forget_adapter(self, adapter: Adapter, loaded: Lora) -> None:
        self._drop(loaded)

    def _drop(self, lora: Lora) -> None:
        if self._group is not None and not self._closed:
            self._group.create_task(self._control.drop_adapter(lora))

    async def _to_its_end(self, change: Callable[[], Coroutine[Any, Any, Result]], undo: Callable[[Result], None] | None = None) -> Result:
        """Make a change of all replicas; a cancellation that comes meanwhile is raised when it is made, and undone."""
        self._alive()
        assert self._group is not None
        making = self._group.create_task(self._changed(change))
        cancelled: asyncio.CancelledError | None = None
        while not making.done():
            try:
                await asyncio.wait([making])
            except asyncio.CancelledError as error:
                cancelled = error
        result, failure = making.result()
        if cancelled is not None:
            if failure is None and undo is not None:
                undo(result[0])
            raise cancelled
        if failure is not None:
            raise failure
        return result[0]

    async def _changed(self, change: Callable[[], Coroutine[Any, Any, Result]]) -> tuple[list[Result], Exception | None]:
        """What came of it, or what it raised: a task's failure would end its siblings."""
        try:
            async with self._control.lock:
                self._alive()
                return [await change()], None
        except Exception as error:  # noqa: BLE001 - it is raised where the change was asked for
            return [], error


async def _together(actions: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once; the first failure is raised as it is, and ends the others."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for action in actions:
                tasks.create_task(action)
    except* EngineError as group:
        raise first_error(group) from None
