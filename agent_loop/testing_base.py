"""What the parts of `agent_loop.testing.EngineSuite` have in common: what a subclass gives, and requests to try."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Completion, Engine, WeightSource
from agent_loop.sampling import SamplingParams

_Test = TypeVar("_Test", bound=Callable[..., Awaitable[None]])


class MissedError(AssertionError):
    """A request was over before the test could act on it."""


def catches(test: _Test) -> _Test:
    """Of a test that must act on requests in flight: it is tried up to `attempts` times, while they are over too soon."""

    @wraps(test)
    async def tried(self: "Suite", *args: Any, **kwargs: Any) -> None:
        for _ in range(self.attempts - 1):
            try:
                return await test(self, *args, **kwargs)
            except MissedError:
                continue
        return await test(self, *args, **kwargs)

    return cast(_Test, tried)


def caught(in_flight: bool) -> None:
    """Raises `MissedError` where the request of a test was not in flight any more; outside of task groups, which would wrap it."""
    if not in_flight:
        raise MissedError("a request was over before the test could act on it: raise `long_tokens`, or `attempts` of an engine elsewhere")


class InFlight:
    """One `generate` call as a task of `tasks`, with the pieces that `on_tokens` saw."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        engine: Engine,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        adapter: str | Adapter | None = None,
    ) -> None:
        self.pieces: list[Completion] = []
        self._came = asyncio.Event()
        named: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
        self.task = tasks.create_task(engine.generate(prompt_ids, params, request_id=request_id, on_tokens=self._on_tokens, **named))
        # Whoever waits for tokens that never come is woken by the end of the call.
        self.task.add_done_callback(lambda _: self._came.set())

    def _on_tokens(self, piece: Completion) -> None:
        self.pieces.append(piece)
        self._came.set()

    @property
    def tokens(self) -> list[int]:
        """The tokens seen so far."""
        return [int(token) for piece in self.pieces for token in piece.token_ids]

    async def seen(self, count: int = 1) -> "InFlight":
        """Wait until `on_tokens` has shown `count` tokens; fails if the call ends before."""
        while len(self.tokens) < count:
            assert not self.task.done(), f"the request ended after {len(self.tokens)} tokens, before {count} were seen: {self.task}"
            self._came.clear()
            await self._came.wait()
        return self


class Suite(ABC):
    """What a subclass of the suite gives, and what its tests ask for."""

    tolerance: float = 1e-4
    """Largest difference of a log-probability from the reference."""

    long_tokens: int = 256
    """Tokens of a request that must still be in flight when the test acts on it; raise it for a very fast engine."""

    attempts: int = 1
    """Of a test that must catch requests in flight. More than one is for an engine elsewhere, which may end them before it is told."""

    eos_temperature: float = 20.0
    """Where 32 responses of `long_tokens` tokens surely hold an EOS; nearly uniform, which fits vocabularies up to a thousand or so."""

    @abstractmethod
    def make_engine(self) -> Engine:
        """A further engine, not open: the suite opens and closes it."""

    @abstractmethod
    async def reference_logprobs(
        self, engine: Engine, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float
    ) -> NDArray[np.floating]:
        """(len(response_ids),) teacher-forced log-probabilities at `temperature` under the original weights, by other means."""

    @abstractmethod
    def original_weights(self, engine: Engine) -> WeightSource:
        """The weights that the engine was made with."""

    @abstractmethod
    def new_weights(self, engine: Engine) -> WeightSource:
        """Weights different enough to change greedy output."""

    def broken_weights(self, engine: Engine) -> WeightSource:
        """Weights that cannot be loaded."""
        return "no/such/folder/of/weights"

    def spoilt_weights(self, engine: Engine) -> WeightSource | None:
        """The original weights with NaN where it reaches every log-probability, and no cache; None where weights hold no numbers."""
        return None

    def adapter_sources(self, engine: Engine) -> Sequence[WeightSource]:
        """Two adapters, each of which changes greedy output in its way; an engine that declares adapters needs them."""
        raise NotImplementedError(f"{type(engine).__name__} declares adapters: give adapter_sources and adapted_logprobs")

    async def adapted_logprobs(
        self, engine: Engine, adapter: Adapter, source: WeightSource, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> NDArray[np.floating]:
        """`reference_logprobs` at temperature 1 with an adapter on the original weights; `source` is what it was loaded from."""
        raise NotImplementedError(f"{type(engine).__name__} declares adapters: give adapter_sources and adapted_logprobs")

    def broken_adapter(self, engine: Engine) -> WeightSource:
        """An adapter that cannot be loaded."""
        return "no/such/folder/of/an/adapter"

    def text(self, engine: Engine, token_ids: Sequence[int]) -> str:
        """What these tokens say, without special ones; needed of engines with `capabilities.structured_outputs`."""
        raise NotImplementedError("this engine takes structured_outputs; give the suite `text`, which decodes tokens")

    def prompts(self, engine: Engine, count: int) -> list[list[int]]:
        """`count` different prompts without an EOS."""
        usable = [token for token in range(min(engine.vocab_size, 200)) if token not in engine.eos_token_ids]
        return [[usable[(7 * number + step * step) % len(usable)] for step in range(3 + number % 5)] for number in range(count)]

    def long(self, **changes: object) -> SamplingParams:
        """A seeded request that goes on for `long_tokens` tokens."""
        return SamplingParams(max_tokens=self.long_tokens, ignore_eos=True, seed=11).replace(**changes)

    async def many(self, engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], name: str) -> list[Completion]:
        """All at once, results in order."""
        async with asyncio.TaskGroup() as tasks:
            requests = zip(prompts, params, strict=True)
            calls = [tasks.create_task(engine.generate(ids, how, request_id=f"{name}-{n}")) for n, (ids, how) in enumerate(requests)]
        return [call.result() for call in calls]

    async def greedy(self, engine: Engine) -> list[list[int]]:
        """What the weights in force say to four prompts."""
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        return [one.token_ids.tolist() for one in await self.many(engine, self.prompts(engine, 4), [params] * 4, "greedy")]

    async def opportunity(self, engine: Engine) -> None:
        """Time in which an engine that should stand still would show that it does not; no test passes by its length."""
        for _ in range(50):
            await asyncio.sleep(0)
        await engine.health()

    @asynccontextmanager
    async def weights_restored(self, engine: Engine) -> AsyncIterator[int]:
        """Yield the version at the start; put the original weights back at the end, as a higher version."""
        try:
            yield engine.version
        finally:
            await engine.resume()
            await engine.update_weights(self.original_weights(engine), engine.version + 1)
