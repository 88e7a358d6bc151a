"""The adapters of a `VLLMServerEngine`: each a copy of its folder, which every replica in rotation holds under a name that is made once.

A request names its adapter to the server as its model. A server that lacks it refuses, so that nothing is answered by the model itself.
"""

import asyncio
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.lora import copied_lora
from agent_loop.engines.server.faults import NoSuchEndpoint, ReplicaError
from agent_loop.engines.server.replica import Replica
from agent_loop.errors import EngineError


@dataclass(frozen=True)
class Lora:
    """An adapter as servers have it.

    Attributes:
        name: by which requests name it; no other one ever has it.
        folder: its own, from which servers may load it again at any time.
    """

    name: str
    folder: "tempfile.TemporaryDirectory[str]"


class Loras:
    """The adapters that every replica in rotation holds."""

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = folder
        self._prefix = f"millrace:{uuid.uuid4().hex[:12]}:"
        self._held: dict[str, Lora] = {}

    @property
    def there(self) -> bool:
        """Whether there is one."""
        return bool(self._held)

    async def stage(self, adapter: Adapter, path: Any, model: Mapping[str, tuple[int, ...]]) -> Lora:
        """A copy where servers can load it, or `ValueError` where the folder holds no adapter that fits; not to be cancelled."""
        return Lora(f"{self._prefix}{adapter}", await asyncio.to_thread(copied_lora, path, model, self._folder))

    def hold(self, lora: Lora) -> None:
        """From now on no replica comes into rotation without it."""
        self._held[lora.name] = lora

    def let_go(self, lora: Lora) -> None:
        """No replica needs it any more."""
        self._held.pop(lora.name, None)
        lora.folder.cleanup()

    async def put(self, replica: Replica, lora: Lora) -> None:
        """Load it there; the server's errors."""
        if replica.extended:
            await replica.server.rpc("mend_rows_without_adapter")
        try:
            await replica.server.load_adapter(lora.name, lora.folder.name)
        except NoSuchEndpoint as error:
            raise ReplicaError(
                f"{error}; if it does not find the folder, give weights_folder, on a file system that all servers share"
            ) from error

    async def bring(self, replica: Replica) -> None:
        """Have it hold all of them, and none that is gone; at its end nothing was awaited since that was so."""
        there = await self._there(replica)
        for name in there - self._held.keys():
            await take_away(replica, name)
        while lacking := self._held.keys() - there:
            name = min(lacking)
            await self.put(replica, self._held[name])
            there.add(name)

    async def check(self, replica: Replica) -> None:
        """Raise `ReplicaError` if it lacks one: it was restarted."""
        if lacking := self._held.keys() - await self._there(replica):
            raise ReplicaError(f"{replica.url} lacks {len(lacking)} adapters that it was given; was it restarted?")

    async def _there(self, replica: Replica) -> set[str]:
        if not self._held:
            return set[str]()
        names = {model.get("id") for model in await replica.server.models()}
        return {name for name in names if isinstance(name, str) and name.startswith(self._prefix)}


async def take_away(replica: Replica, name: str) -> None:
    """Have a replica forget an adapter; one that does not answer is found out by its probes."""
    with suppress(ReplicaError, EngineError):
        await replica.server.unload_adapter(name)
