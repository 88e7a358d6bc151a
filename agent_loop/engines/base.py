"""The engine's contract: prompt tokens in, sampled tokens with log-probabilities and versions out."""

import asyncio
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter, Adapters, InUse, check_keep
from agent_loop.engines.checks import Checks, check_source
from agent_loop.engines.values import (
    ALL_TOKENS,
    Capabilities,
    Completion,
    EngineLoad,
    FinishReason,
    OnTokens,
    PauseMode,
    TopLogprobs,
    TopTokens,
    WeightSource,
    WeightTransfer,
    piece_tokens,
)
from agent_loop.errors import AdapterError, EngineClosedError, EngineDeadError, RequestRefusedError, WeightUpdateError
from agent_loop.sampling import SamplingParams, version_number

__all__ = [
    "ALL_TOKENS",
    "Capabilities",
    "Completion",
    "Engine",
    "EngineLoad",
    "FinishReason",
    "OnTokens",
    "PauseMode",
    "TopLogprobs",
    "TopTokens",
    "WeightSource",
    "WeightTransfer",
    "piece_tokens",
]

_COUNTS = ("top_tokens", "top_logprobs")


class Engine(Checks):
    """An inference engine; an async context manager: `async with VLLMEngine(model) as engine`.

    Subclasses implement the abstract methods and pass `agent_loop.testing.EngineSuite`. All methods are
    coroutines of one event loop; many `generate` calls run at once.
    """

    offers: ClassVar[Capabilities] = Capabilities()
    """The most that an engine of this class can do; docs/reference/engines.md is made of it."""

    only_with: ClassVar[Mapping[str, str]] = {}
    """What a capability of `offers` needs, by its name, in words: an engine made without it lacks the capability."""

    _version = 0

    @property
    def version(self) -> int:
        """How many weight updates the policy has had; stamped on every sampled token."""
        return self._version

    @property
    @abstractmethod
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens after which the model ends its response."""

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do beyond what every engine must: `offers`, or a part of them. The engine must be open."""
        counts = {name: min(count, self.vocab_size) for name in _COUNTS if (count := getattr(self.offers, name))}
        return replace(self.offers, **counts)

    @abstractmethod
    async def open(self) -> None:
        """Start the engine; called by `async with`."""

    @abstractmethod
    async def close(self) -> None:
        """Stop it and everything it started; requests in flight end as aborted. Closing twice is fine."""

    @abstractmethod
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
        """Sample one response.

        Args:
            prompt_ids: prompt tokens, and those already sampled when a response is continued.
            params: `max_tokens` counts the tokens sampled by this call.
            request_id: unique among the requests in flight; names it for `interrupt`.
            session_id: the same for all requests of one rollout, its turns and continuations; an engine may keep by it
                what belongs together. None: the request stands alone.
            adapter: the name of one, whose newest version samples the whole response, or the very `Adapter`. None: the model itself.
            media: images that the prompt speaks of, in its order, where `capabilities.images`: of Pillow, paths of files, their bytes,
                or these as `data:` URLs in base64. The prompt has one image token for each, as chat templates write it: the engine
                makes as many of it as the model wants.
            on_tokens: sees new tokens as they come, for checkpoints; each token exactly once. Where the call fails or is
                cancelled, it has seen all tokens but those that an engine elsewhere had not sent yet.

        Returns:
            The whole response, or after `interrupt` the tokens so far with finish reason "abort".

        Raises:
            RequestRefusedError: an empty prompt, ids outside the vocabulary, no room for `max_tokens`, an adapter that is not there, or
                images that do not fit.
            EngineDeadError: the engine is gone.
            EngineError: this request failed.

        Cancelling the call frees the request in the engine.
        """

    async def score(
        self, token_ids: Sequence[int] | NDArray[np.int32], *, start: int = 1, adapter: str | Adapter | None = None
    ) -> NDArray[np.float32]:
        """Log-probabilities of given tokens, each after all before it.

        At temperature 1 and without truncation, all under one version of the weights. It is no request: `interrupt` does not end it.
        While the engine is paused it may wait for `resume`.

        Args:
            token_ids: prompt and response, at most `max_length - 1`.
            start: the first token that is scored; `len(prompt)` for those of a response.
            adapter: under which; as of `generate`.

        Returns:
            (len(token_ids) - start,) float32, natural log.

        Raises:
            RequestRefusedError: this engine has no scores (see `capabilities`), bad ids, no token after `start`, or an unknown adapter.
            EngineDeadError: the engine is gone.
        """
        raise RequestRefusedError(
            f"{type(self).__name__} gives no log-probabilities of given tokens; use an engine with capabilities.score"
        )

    async def top_tokens(
        self, token_ids: Sequence[int] | NDArray[np.int32], count: int, *, adapter: str | Adapter | None = None
    ) -> TopTokens:
        """The `count` likeliest next tokens after `token_ids`; otherwise as `score`.

        Raises:
            RequestRefusedError: bad ids, no room for a token more, `count` is beyond `capabilities.top_tokens`, or an unknown adapter.
            EngineDeadError: the engine is gone.
        """
        raise RequestRefusedError(f"{type(self).__name__} does not tell likely tokens; use an engine with capabilities.top_tokens")

    @abstractmethod
    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """End the given requests, or all, early: each `generate` returns what it has, with "abort".

        Requests that are not in flight are ignored. New requests are welcome at once.

        Raises:
            ValueError: one text in place of a collection of them.
        """

    @abstractmethod
    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stop sampling until `resume`; requests that arrive meanwhile wait.

        `mode` says what becomes of requests in flight: "abort" ends them early, "wait" lets them finish,
        "keep" freezes them, to go on after `resume`.
        """

    @abstractmethod
    async def resume(self) -> None:
        """Go on after `pause`; without a pause it does nothing."""

    async def sleep(self, level: int = 1) -> None:
        """Give the accelerator's memory up until `wake_up`, so that training can have it.

        Requests in flight end as aborted; those that arrive meanwhile wait. Caches are lost.

        Args:
            level: 1 keeps the weights in main memory, 2 drops them too.

        Raises:
            RequestRefusedError: this engine cannot (see `capabilities`), or there is no such level.
            EngineDeadError: the engine is gone.
        """
        raise RequestRefusedError(f"{type(self).__name__} does not sleep; use an engine with capabilities.sleep")

    async def wake_up(self, *, weights_only: bool = False) -> None:
        """Take the memory back after `sleep`, and go on; without a sleep it does nothing.

        After level 2 the weights in force are loaded again, unless `update_weights` brought others before.

        Args:
            weights_only: take back the memory of the weights alone, so that `update_weights` can fill it before the caches take theirs;
                a second call takes the rest.

        Raises:
            RequestRefusedError: this engine cannot sleep.
            EngineDeadError: the engine is gone, or the weights that it dropped are.
        """
        raise RequestRefusedError(f"{type(self).__name__} does not sleep; use an engine with capabilities.sleep")

    async def update_weights(self, source: WeightSource | WeightTransfer, version: int) -> None:
        """Put new weights in force and stamp tokens with `version` from then on.

        `source` is a folder, a state dict, or a transfer where `capabilities.transfer`. Requests in flight go on with the new weights,
        and carry both versions. Caches made with the old weights are dropped for requests that start later.

        Raises:
            ValueError: `version` is below the present one, or above what tokens can carry; or `source` is none of these.
            WeightUpdateError: the weights could not be loaded, or adapters are there, which were made for the old ones; the old weights
                and their version are still in force.
            EngineDeadError: the engine is gone.
        """
        version = version_number(version)
        if not isinstance(source, WeightTransfer):
            check_source(source)
        if version < self._version:
            raise ValueError(
                f"version={version} is below the engine's {self._version}; versions only grow: "
                "count up at each update, and after a rewind to an older checkpoint make a new engine"
            )
        try:
            with self._adapters.barred():
                if isinstance(source, WeightTransfer):
                    await self._transfer_weights(source, version)
                else:
                    await self._load_weights(source, version)
        except (WeightUpdateError, EngineDeadError, EngineClosedError):
            raise
        except Exception as error:
            raise WeightUpdateError(f"weights for version {version} were not loaded, {self._version} is still in force: {error}") from error
        self._version = version

    @abstractmethod
    async def _load_weights(self, source: WeightSource, version: int) -> None:
        """Load `source`; on failure raise and leave the old weights in force."""

    async def _transfer_weights(self, transfer: WeightTransfer, version: int) -> None:
        """As `_load_weights`, from a transfer."""
        raise ValueError(f"{type(self).__name__} takes no transfer of weights; give a folder or a state dict")

    # Adapters

    @cached_property
    def _adapters(self) -> Adapters:
        return Adapters(self._forget_adapter)

    @cached_property
    def _adding(self) -> asyncio.Lock:
        return asyncio.Lock()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Those that are loaded, in the order in which they came; also old versions that requests still use."""
        return self._adapters.loaded

    async def add_adapter(self, name: str, path: WeightSource, version: int | None = None, *, keep: int = 2) -> Adapter:
        """Load a LoRA adapter, or a new version of one; requests that name it from now on have it.

        A name and a version are one set of weights for ever. Requests in flight end with the version that they began with, and it stays
        loaded for them; old versions stay loaded for whoever asks for the very `Adapter`, as far as `keep` says.

        Args:
            name: which adapter.
            path: a folder in peft's format (`adapter_config.json`, `adapter_model.safetensors`); it is read now and not again.
            version: above all that the name ever had; None counts up, from 0.
            keep: how many versions of this name stay loaded, this one included: with a bound on staleness, that and one more.

        Raises:
            ValueError: a bound is crossed, or `path` is none.
            AdapterError: it could not be loaded. It is not there, and what was there still is.
            RequestRefusedError: this engine has no adapters (see `capabilities`).
            EngineDeadError: the engine is gone.
        """
        if not self.capabilities.adapters:
            raise RequestRefusedError(f"{type(self).__name__} has no adapters as it is; use an engine with capabilities.adapters")
        check_keep(keep)
        check_source(path)
        # One at a time: a version is counted up from those that are there.
        async with self._adding:
            return await self._added(name, path, version, keep)

    async def _added(self, name: str, path: WeightSource, version: int | None, keep: int) -> Adapter:
        with self._adapters.loading(name, version) as adapter:
            try:
                loaded = await self._load_adapter(adapter, path)
            except (AdapterError, EngineDeadError, EngineClosedError):
                raise
            except Exception as error:
                raise AdapterError(f"adapter {adapter} was not loaded: {error}") from error
            self._adapters.add(adapter, loaded, keep)
        return adapter

    async def _load_adapter(self, adapter: Adapter, path: WeightSource) -> Any:
        """Load it, and return what requests need of it; on failure, and cancelled, raise and leave nothing behind."""
        raise NotImplementedError(f"{type(self).__name__} declares adapters and does not implement _load_adapter")

    def _forget_adapter(self, adapter: Adapter, loaded: Any) -> None:  # most let it go by not holding it
        """It was removed, or has become too old, and no request uses it any more; `loaded` is what `_load_adapter` returned."""

    async def remove_adapter(self, name: str) -> None:
        """Take all versions of an adapter away; requests in flight end with theirs, and no other finds it.

        Raises:
            RequestRefusedError: no adapter has this name; those that there are are named.
        """
        self._adapters.remove(name)

    def adapter_version(self, name: str) -> int:
        """The highest version that this adapter has had; 0 before there was one."""
        return self._adapters.newest(name)

    def check_adapter(self, adapter: str | Adapter) -> Adapter:
        """The newest version of a name, or the very adapter, or `RequestRefusedError` naming those that are there."""
        return self._adapters.find(adapter)

    def using_adapter(self, adapter: str | Adapter | None) -> AbstractContextManager[InUse | None]:
        """For an engine's own methods: a block in which an adapter stays loaded; None where it is None, the model itself.

        Raises:
            RequestRefusedError: there is no such adapter.
        """
        return self._adapters.using(adapter)

    @property
    def base_model(self) -> "Engine":
        """This engine without an adapter: itself, unless it is one made by `with_adapter`."""
        return self

    def with_adapter(self, adapter: str | Adapter, *, keep: int = 2) -> "Engine":
        """This engine with an adapter as its policy: an engine that samples and scores with it where none is named.

        Its `version` is the adapter's, and its `update_weights` adds the adapter's next version, of which `keep` stay. So it is what an
        agent loop that trains an adapter is given; that there is one yet is not asked for. See `AdaptedEngine`.
        """
        from agent_loop.engines.adapted import AdaptedEngine  # which is an Engine

        return AdaptedEngine(self.base_model, adapter, keep=keep)

    @contextmanager
    def hold_adapter(self, adapter: str | Adapter) -> Iterator["Engine"]:
        """`with_adapter`, of one version: that of now, which stays loaded in this block, whatever is added or removed meanwhile.

        Raises:
            RequestRefusedError: there is no such adapter.
        """
        held = self.check_adapter(adapter)
        with self.using_adapter(held):
            yield self.with_adapter(held)

    @abstractmethod
    async def health(self) -> None:
        """Return if the engine answers, raise `EngineDeadError` (with the cause) if it does not."""

    def load(self) -> EngineLoad | None:
        """How busy the engine is, at no cost; None where it cannot say, or is paused."""
        return None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()
