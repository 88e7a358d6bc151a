"""`Control`: pauses, weight updates and adapters over all replicas, one after another."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import PauseMode, WeightSource
from agent_loop.engines.server.adapters import Lora, take_away
from agent_loop.engines.server.desk import Desk
from agent_loop.engines.server.faults import ReplicaError
from agent_loop.engines.server.fleet import Fleet
from agent_loop.engines.server.replica import Replica
from agent_loop.engines.server.requests import Requests
from agent_loop.engines.server.slumber import PARTS, Slumber
from agent_loop.engines.server.weights import Staged, Weights, check_seen, load
from agent_loop.errors import EngineError, WeightUpdateError


class Control:
    """What changes all replicas together.

    Attributes:
        lock: held by one such change.
        slumber: sends them all to sleep.
    """

    def __init__(self, fleet: Fleet, desk: Desk, weights: Weights, requests: Requests) -> None:
        self._fleet, self._desk, self._weights, self._requests = fleet, desk, weights, requests
        self.lock = asyncio.Lock()
        self.slumber = Slumber(fleet, desk, weights, requests)

    # Pauses; `lock` is held

    async def pause(self, mode: PauseMode) -> None:
        """Stop sampling; requests that arrive wait here."""
        self.slumber.check_awake(*PARTS)
        try:
            if mode == "wait":
                await self._drain()
            self._desk.set_gate("shut")
            if mode == "abort":
                await self._requests.interrupt(list(self._requests.flights.values()))
            await self._freeze()
        finally:
            if not self._fleet.frozen:
                self._desk.set_gate("open")

    async def resume(self) -> None:
        """Go on."""
        if self.slumber.asleep:
            self.slumber.paused = False
            return
        await self.thaw()
        self._desk.set_gate("open")

    async def _drain(self) -> None:
        """Let all requests in flight finish, those without a place included, while later ones wait here."""
        flights = list(self._requests.flights.values())
        self._desk.begin_all(flights)
        self._desk.set_gate("draining")
        await self.thaw()
        for flight in flights:
            await flight.over.wait()

    async def _freeze(self) -> None:
        self._fleet.frozen = True
        for replica in self._fleet.replicas.values():
            if not replica.serving:
                replica.cut(ReplicaError(f"{replica.url} does not serve"))
        await self._fleet.each(self._fleet.serving(), lambda replica: replica.server.pause())

    async def thaw(self) -> None:
        """Let the servers go on, if they stand still."""
        if self._fleet.frozen:
            self._fleet.frozen = False
            await self._fleet.each(self._fleet.serving(), lambda replica: replica.server.resume())

    # Adapters; `lock` is held

    async def add_adapter(self, adapter: Adapter, source: WeightSource) -> Lora:
        """Load an adapter into all replicas; where one refuses it, none keeps it. One that is lost has it before it serves again.

        Raises:
            ValueError: it is none that fits the model; no server was touched.
            EngineError: a replica refused it, or none serves.
        """
        self._requests.check_weights()
        self.slumber.check_awake(*PARTS)
        loras, errors = self._fleet.loras, dict[Replica, Exception]()
        lora = await loras.stage(adapter, source, self._weights.shapes)

        async def put(replica: Replica) -> None:
            try:
                await loras.put(replica, lora)
            except (ReplicaError, EngineError) as error:
                errors[replica] = error

        asked = self._fleet.serving()
        await self._for_each(asked, put)
        loaded = [replica for replica in asked if replica not in errors]
        refused = [error for error in errors.values() if not getattr(error, "lost", False)]
        if refused or not loaded:
            await self._for_each(asked, lambda replica: take_away(replica, lora.name))
            loras.let_go(lora)
            causes = "; ".join(map(str, refused or errors.values())) or f"no replica serves: {self._fleet.causes()}"
            raise EngineError(causes) from next(iter(errors.values()), None)
        # From here on it counts: whoever serves and lacks it, or came meanwhile, catches up first.
        loras.hold(lora)
        for replica in self._fleet.serving():
            if replica not in loaded:
                self._fleet.take_out(replica, errors.get(replica) or ReplicaError(f"{replica.url} missed the adapter {adapter}"))
        return lora

    async def drop_adapter(self, lora: Lora) -> None:
        """Have all replicas forget it."""
        self._fleet.loras.let_go(lora)
        await self._for_each(self._fleet.serving(), lambda replica: take_away(replica, lora.name))

    async def _for_each(self, replicas: Sequence[Replica], action: Callable[[Replica], Coroutine[Any, Any, None]]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for replica in replicas:
                tasks.create_task(action(replica))

    # Weights; `lock` is held

    async def update(self, source: WeightSource, version: int) -> None:
        """Put new weights into all replicas while none samples.

        Raises:
            ValueError: they do not fit the model; no server was touched.
            WeightUpdateError: no replica took them.
        """
        self.slumber.check_awake("weights")
        staged = await self._weights.stage(source)
        try:
            async with AsyncExitStack() as held:
                replicas = self._fleet.well()
                for replica in replicas:
                    await held.enter_async_context(replica.control)
                self._desk.set_gate("shut")
                await self._put(staged, version, replicas)
        except BaseException:
            staged.drop()
            raise
        finally:
            if not self._fleet.frozen:
                self._desk.set_gate("open")

    async def _put(self, staged: Staged, version: int, replicas: Sequence[Replica]) -> None:
        label, folder = self._weights.new_label(version), staged.checkpoint.folder

        async def prepare(replica: Replica) -> None:
            await replica.server.pause()
            await check_seen(replica.server, folder, extended=replica.extended)

        ready, errors = await self._fleet.each(replicas, prepare)
        loaded, more = await self._fleet.each(ready, lambda replica: load(replica.server, folder, label, extended=replica.extended))
        labelled, most = await self._fleet.each(loaded, lambda replica: replica.server.set_label(label))
        if not labelled:
            raise self._none_took(version, [*errors, *more, *most])
        # From here on they count: no token of theirs was sampled yet.
        self._weights.put_in_force(staged, label, version)
        self.slumber.hollow = False
        for replica in labelled:
            replica.label = label
        for replica in self._fleet.serving():
            if replica not in labelled:
                self._fleet.take_out(replica, ReplicaError(f"{replica.url} missed the weights of version {version}"))
        finished, _ = await self._fleet.each(labelled, self._go_on)
        for replica in finished:
            self._fleet.admit(replica)

    async def _go_on(self, replica: Replica) -> None:
        # Without `recompute` it clears nothing while requests are in flight; the salts see to those.
        await replica.server.reset_cache(running=self._weights.recompute)
        if not self._fleet.frozen:
            await replica.server.resume()

    def _none_took(self, version: int, errors: Sequence[Exception]) -> Exception:
        causes = "; ".join(map(str, errors)) or self._fleet.causes()
        in_force = self._weights.version
        error = WeightUpdateError(f"no replica took the weights of version {version}, {in_force} is still in force: {causes}")
        error.__cause__ = next(iter(errors), None)
        return error
