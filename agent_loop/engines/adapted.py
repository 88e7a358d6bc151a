"""`AdaptedEngine`: an engine whose policy is one of another's adapters."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter, InUse, check_keep
from agent_loop.engines.base import (
    Capabilities,
    Completion,
    Engine,
    EngineLoad,
    OnTokens,
    PauseMode,
    TopTokens,
    WeightSource,
    WeightTransfer,
)
from agent_loop.errors import RequestRefusedError
from agent_loop.sampling import SamplingParams, version_number


class AdaptedEngine(Engine):
    """`engine.with_adapter(name)`: the same engine, which samples and scores with an adapter where none is named.

    Its `version` is the adapter's, and `update_weights` adds the adapter's next version: so whatever trains, counts staleness or
    updates weights does it to the adapter, while the model under it, `base_model`, stays as it is. All else is the engine's:
    `interrupt` without names, `pause` and `close` are about everything that it runs.

    Two of one engine and adapter are equal.

    Args:
        engine: the one with the adapters.
        adapter: a name, whose newest version samples; or the very `Adapter`.
        keep: versions that `update_weights` keeps.

    Raises:
        ValueError: a bound is crossed.
    """

    def __init__(self, engine: Engine, adapter: str | Adapter, *, keep: int = 2) -> None:
        super().__init__()
        if not isinstance(adapter, str | Adapter) or not adapter:
            raise ValueError(f"adapter={adapter!r:.60} names none; give the name of an adapter, or an Adapter")
        self.adapter, self._engine, self._keep = adapter, engine, check_keep(keep)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdaptedEngine) and (self._engine, self.adapter) == (other._engine, other.adapter)

    def __hash__(self) -> int:
        return hash((self._engine, self.adapter))

    @property
    def base_model(self) -> Engine:
        """The engine without this adapter: a reference policy that costs no memory."""
        return self._engine.base_model

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """See `Engine`."""
        return self._engine.adapters

    @property
    def version(self) -> int:
        """Of the adapter; 0 before it has one."""
        return self._engine.adapter_version(self.adapter) if isinstance(self.adapter, str) else self.adapter.version

    @property
    def max_length(self) -> int:
        """See `Engine`."""
        return self._engine.max_length

    @property
    def vocab_size(self) -> int:
        """See `Engine`."""
        return self._engine.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See `Engine`."""
        return self._engine.eos_token_ids

    @property
    def capabilities(self) -> Capabilities:
        """See `Engine`."""
        return self._engine.capabilities

    async def open(self) -> None:
        """Open the engine, where this is what is entered."""
        await self._engine.open()

    async def close(self) -> None:
        """Close the engine."""
        await self._engine.close()

    def _which(self, adapter: str | Adapter | None) -> Adapter:
        return self._engine.check_adapter(self.adapter if adapter is None else adapter)

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
        """See `Engine`; without `adapter` with its own."""
        which = self._which(adapter)
        return await self._engine.generate(
            prompt_ids, params, request_id=request_id, session_id=session_id, adapter=which, media=media, on_tokens=on_tokens
        )

    async def score(
        self, token_ids: Sequence[int] | NDArray[np.int32], *, start: int = 1, adapter: str | Adapter | None = None
    ) -> NDArray[np.float32]:
        """See `Engine`; without `adapter` with its own."""
        return await self._engine.score(token_ids, start=start, adapter=self._which(adapter))

    async def top_tokens(
        self, token_ids: Sequence[int] | NDArray[np.int32], count: int, *, adapter: str | Adapter | None = None
    ) -> TopTokens:
        """See `Engine`; without `adapter` with its own."""
        return await self._engine.top_tokens(token_ids, count, adapter=self._which(adapter))

    async def interrupt(self, request_ids: Collection[str] | None = None) -> None:
        """See `Engine`."""
        await self._engine.interrupt(request_ids)

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See `Engine`."""
        await self._engine.pause(mode)

    async def resume(self) -> None:
        """See `Engine`."""
        await self._engine.resume()

    async def sleep(self, level: int = 1) -> None:
        """See `Engine`."""
        await self._engine.sleep(level)

    async def wake_up(self, *, weights_only: bool = False) -> None:
        """See `Engine`."""
        await self._engine.wake_up(weights_only=weights_only)

    async def update_weights(self, source: WeightSource | WeightTransfer, version: int) -> None:
        """Add the adapter's next version. Requests in flight end with theirs; those that come later have the new one.

        Raises:
            ValueError: `version` is not above those that the adapter had.
            AdapterError: it could not be loaded; the versions that were there still are.
        """
        if isinstance(self.adapter, Adapter):
            raise RequestRefusedError(
                f"this engine is pinned to {self.adapter}, which never changes; use with_adapter({self.adapter.name!r})"
            )
        if isinstance(source, WeightTransfer):
            raise RequestRefusedError("adapters do not come by a transfer of weights; give a folder")
        await self._engine.add_adapter(self.adapter, source, version_number(version), keep=self._keep)

    async def _load_weights(self, source: WeightSource, version: int) -> None:
        await self.update_weights(source, version)

    async def add_adapter(self, name: str, path: WeightSource, version: int | None = None, *, keep: int = 2) -> Adapter:
        """See `Engine`."""
        return await self._engine.add_adapter(name, path, version, keep=keep)

    async def remove_adapter(self, name: str) -> None:
        """See `Engine`."""
        await self._engine.remove_adapter(name)

    def adapter_version(self, name: str) -> int:
        """See `Engine`."""
        return self._engine.adapter_version(name)

    def check_adapter(self, adapter: str | Adapter) -> Adapter:
        """See `Engine`."""
        return self._engine.check_adapter(adapter)

    def using_adapter(self, adapter: str | Adapter | None) -> AbstractContextManager[InUse | None]:
        """See `Engine`."""
        return self._engine.using_adapter(adapter)

    async def health(self) -> None:
        """See `Engine`."""
        await self._engine.health()

    def load(self) -> EngineLoad | None:
        """See `Engine`."""
        return self._engine.load()
