"""`Fleet`: which replicas are in rotation. One task a replica looks after it: probes it, takes it out when it fails, brings it back."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from agent_loop.engines.server.adapters import Loras
from agent_loop.engines.server.breaker import Breaker
from agent_loop.engines.server.desk import Desk
from agent_loop.engines.server.facts import DEV_MODE, Facts, facts_of
from agent_loop.engines.server.faults import NoSuchEndpoint, OtherWeights, ReplicaError
from agent_loop.engines.server.replica import ABORT_SECONDS, Flight, Replica
from agent_loop.engines.server.weights import AT_START, LOADING, Weights, check_seen, load
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError


@dataclass(frozen=True)
class Care:
    """How replicas are looked after; all in seconds.

    Attributes:
        open_seconds: for which a server that is to come up is waited for.
        health: between two probes of a replica that serves.
        stall: for which a response that has begun may stand still before it goes on elsewhere.
        patience: for which requests wait while no replica serves.
    """

    open_seconds: float
    health: float
    stall: float
    patience: float


class Fleet:
    """The replicas of one engine.

    Attributes:
        replicas: by address.
        facts: what all of them serve; None before the first one was connected.
        loras: the adapters that all in rotation hold.
        frozen: the engine is paused, or sleeps.
        asleep: it sleeps; nobody comes into rotation.
        hopeless: no replica served for longer than `Care.patience`; why.
    """

    def __init__(self, weights: Weights, loras: Loras, care: Care, vocab_size: int | None, eos_token_ids: Collection[int] | None) -> None:
        self.replicas: dict[str, Replica] = {}
        self.facts: Facts | None = None
        self.frozen = self.asleep = False
        self.hopeless: EngineDeadError | None = None
        self.desk: Desk
        self._weights, self.loras, self._care = weights, loras, care
        self._vocab_size, self._eos_token_ids = vocab_size, eos_token_ids
        self._changed, self._closed = asyncio.Event(), False
        self._despairs: asyncio.TimerHandle | None = None

    def serving(self) -> list[Replica]:
        """Those in rotation."""
        return [replica for replica in self.replicas.values() if replica.serving]

    def well(self) -> list[Replica]:
        """Those that new weights can be put into."""
        return [replica for replica in self.replicas.values() if replica.well]

    def causes(self) -> str:
        """Why those that do not serve do not."""
        return "; ".join(f"{replica.url}: {replica.cause}" for replica in self.replicas.values() if not replica.serving) or "there is none"

    async def each(
        self, replicas: Iterable[Replica], action: Callable[[Replica], Awaitable[None]]
    ) -> tuple[list[Replica], list[Exception]]:
        """Do something with each replica at once; those with which it failed are taken out. The others, and the errors."""
        done, errors = list[Replica](), list[Exception]()

        async def act(replica: Replica) -> None:
            try:
                await action(replica)
                done.append(replica)
            except (ReplicaError, EngineError) as error:
                errors.append(error)
                self.take_out(replica, error)

        async with asyncio.TaskGroup() as tasks:
            for replica in replicas:
                tasks.create_task(act(replica))
        return done, errors

    async def until_serving(self, count: int) -> None:
        """Wait until so many are in rotation."""
        while len(self.serving()) < count:
            if self._closed:
                raise EngineClosedError("the engine was closed meanwhile")
            await self._changed.wait()

    # Coming

    async def connect(self, replica: Replica, *, adopt: bool, seconds: float | None = None) -> None:
        """Wait for a server to come up, by default as long as for the first ones, and learn what it serves.

        Raises:
            EngineError: it did not come up, or is not one that this engine can use.
        """
        loop, seconds = asyncio.get_running_loop(), self._care.open_seconds if seconds is None else seconds
        end, breaker = loop.time() + seconds, Breaker(base=0.1, most=2.0)
        while True:
            try:
                return await self._meet(replica, adopt=adopt)
            except ReplicaError as error:
                breaker.trip(loop.time())
                if breaker.due is None or breaker.due >= end:
                    raise EngineError(
                        f"{replica.url} did not come up in {seconds:g} s: {error}; start it, or give it more open_seconds where it starts"
                    ) from error
                await asyncio.sleep(breaker.due - loop.time())

    async def _meet(self, replica: Replica, *, adopt: bool) -> None:
        server = replica.server
        await server.health()
        try:
            paused, label = await server.is_paused(), await server.label()
        except NoSuchEndpoint as error:
            raise EngineError(f"{server.url} has no development endpoints; {DEV_MODE} ({error})") from error
        if label.startswith(LOADING):
            raise EngineError(_mixture(server.url))
        if paused and adopt:
            raise EngineError(f"{server.url} is paused, and another engine may want it so; resume it, or open without adopt")
        if paused:
            await server.wake_up()  # it may sleep, too
        replica.facts = await facts_of(server, vocab_size=self._vocab_size, eos_token_ids=self._eos_token_ids)
        if self.facts is not None:
            replica.facts.check_same(self.facts, server.url, next(iter(self.replicas), "the others"))
        self.facts = self.facts or replica.facts
        replica.label, replica.well = label, True

    async def take_in(self, replica: Replica, seconds: float, check_open: Callable[[], object]) -> None:
        """Have a further server serve, with the weights and adapters in force.

        Raises:
            EngineError: it did not come up, or is not one that this engine can use.
            ValueError: it is there already.
        """
        self._check_new(replica)
        await self.connect(replica, adopt=False, seconds=seconds)
        check_open()
        self._check_new(replica)
        self.replicas[replica.url] = replica
        try:
            async with replica.control:
                await self.recover(replica)
        except BaseException as error:
            self.retire(replica, "it was not taken in")
            del self.replicas[replica.url]
            if isinstance(error, ReplicaError):
                raise EngineError(f"{replica.url} was not taken in: {error}") from error
            raise

    def _check_new(self, replica: Replica) -> None:
        if replica.url in self.replicas:
            raise ValueError(f"{replica.url} is a replica of this engine already")

    async def send_away(self, url: str, *, drain: bool) -> None:
        """Send a replica no more requests, and wait until those that it has are over; without `drain` they go on elsewhere at once."""
        replica = self.replicas.get(url)
        if replica is None:
            raise ValueError(f"{url} is no replica of this engine; it has {sorted(self.replicas)}")
        replica.leaving = True
        self.retire(replica, "it was removed")
        if not drain:
            replica.cut(ReplicaError(f"{replica.url} was removed"))
        for ticket in list(replica.tickets):
            await ticket.over.wait() if drain else None
        self.replicas.pop(replica.url, None)
        replica.kick.set()

    # In rotation

    def admit(self, replica: Replica) -> None:
        """Put it into rotation."""
        replica.serving, replica.cause = True, ""
        replica.breaker.close()
        self._change()

    def blame(self, replica: Replica, error: ReplicaError) -> None:
        """A request failed there: look after it at once if nothing tells whether it lives, or when that happens too often."""
        now = asyncio.get_running_loop().time()
        if not replica.serving:
            return  # others that it failed at the same time told us
        if error.lost or isinstance(error, NoSuchEndpoint):  # an adapter that is not there: it was restarted
            replica.breaker.trip(now)
        else:
            replica.breaker.failed(now)
        if replica.breaker.due is not None:
            replica.serving, replica.cause = False, str(error)
            if self.frozen:
                replica.cut(error)  # what it resumes to must not run
            self._change()
            replica.kick.set()

    def retire(self, replica: Replica, cause: str) -> None:
        """Send it no more requests."""
        replica.serving, replica.well, replica.cause = False, False, cause
        self._change()

    def distrust(self, replica: Replica, error: OtherWeights) -> None:
        """Send it no more requests; those that it has are ended when it is recovered."""
        replica.serving, replica.cause = False, str(error)
        replica.breaker.trip(asyncio.get_running_loop().time())
        self._change()
        replica.kick.set()

    def take_out(self, replica: Replica, error: Exception) -> None:
        """It does not serve until it was probed; its requests go on elsewhere."""
        replica.serving, replica.cause = False, str(error)
        replica.breaker.trip(asyncio.get_running_loop().time())
        replica.cut(ReplicaError(str(error), lost=True))
        self._change()
        replica.kick.set()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        if self.serving():
            self.hopeless = None
            self._hope()
        elif self._despairs is None:
            self._despairs = asyncio.get_running_loop().call_later(self._care.patience, self._despair)
        self.desk.dispatch()

    def _despair(self) -> None:
        self.hopeless = EngineDeadError(f"no replica serves for {self._care.patience:g} s: {self.causes()}")
        self.desk.refuse_all(self.hopeless)

    def close(self) -> None:
        """Nobody comes any more."""
        self._closed = True
        self._changed.set()
        self._hope()

    def _hope(self) -> None:
        if self._despairs is not None:
            self._despairs.cancel()
            self._despairs = None

    # Looking after one

    async def tend(self, replica: Replica) -> None:
        """Look after a replica until it leaves."""
        while not replica.leaving:
            try:
                async with replica.control:
                    await (self._probe(replica) if replica.serving else self.recover(replica))
            except OtherWeights as error:
                if not replica.leaving:
                    self.distrust(replica, error)
            except (ReplicaError, EngineError) as error:
                if not replica.leaving:
                    replica.well = False
                    self.take_out(replica, error)
                    replica.kick.clear()
            await self._rest(replica)

    async def _rest(self, replica: Replica) -> None:
        now, due = asyncio.get_running_loop().time(), replica.breaker.due
        try:
            async with asyncio.timeout(self._care.health if due is None else max(0.0, due - now)):
                await replica.kick.wait()
        except TimeoutError:
            pass
        replica.kick.clear()

    async def _probe(self, replica: Replica) -> None:
        await replica.server.health()
        if self.asleep:
            return
        if await replica.server.label() != self._weights.label:
            raise OtherWeights(f"{replica.url} holds other weights than those in force: it was restarted, or another engine has it too")
        await self.loras.check(replica)
        now = asyncio.get_running_loop().time()
        for ticket in list(replica.tickets):
            if isinstance(ticket, Flight) and ticket.decoding and not self.frozen and now - ticket.touched > self._care.stall:
                ticket.cut(ReplicaError(f"{replica.url} sent nothing more of a response for {self._care.stall:g} s"))

    async def recover(self, replica: Replica) -> None:
        """Bring a replica back into rotation, with the weights and adapters in force; it must be held by `control`.

        Where those cannot be loaded it is well, and left for the next update.
        """
        server = replica.server
        if self.asleep:
            raise ReplicaError(f"{server.url} waits until the engine, which sleeps, wakes up")
        await server.health()
        if replica.asleep:
            await server.wake_up()
            replica.asleep = False
        label = await server.label()
        if label.startswith(LOADING):
            raise ReplicaError(_mixture(server.url))
        if label not in (AT_START, replica.label, *self._weights.versions):
            raise EngineError(f"{server.url} was given weights labelled {label!r:.80} by another engine; one engine has it at a time")
        if label != replica.label or not replica.well:
            await self._meet(replica, adopt=False)
        if label != self._weights.label:
            await self._end_there(replica)
            replica.breaker.close()
            await self._bring(replica)
        if await server.is_paused():
            await server.resume()
        await self.loras.bring(replica)
        if replica.label == self._weights.label and not replica.leaving and not self.asleep:  # nothing was awaited since
            self.admit(replica)

    async def _end_there(self, replica: Replica) -> None:
        """Have its requests go on elsewhere, those that it began with its own word on the weights that sampled them."""
        begun = [ticket for ticket in replica.tickets if isinstance(ticket, Flight)]
        await replica.server.abort([flight.server_id for flight in begun if flight.server_id is not None])
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                for flight in begun:
                    while flight in replica.tickets and flight.server_id is not None:
                        await flight.left.wait()
        replica.cut(ReplicaError(f"{replica.url} holds other weights than those in force"))

    async def _bring(self, replica: Replica) -> None:
        label, extended = self._weights.label, replica.extended
        try:
            folder = self._weights.folder()
            await check_seen(replica.server, folder, extended=extended)
        except (ReplicaError, EngineError) as error:
            replica.cause = str(error)
            return
        if label is None:
            replica.cause = "its weights were left by an earlier run; it waits for the next update"
            return
        await replica.server.pause()
        await load(replica.server, folder, label, extended=extended)
        await replica.server.reset_cache(running=False)
        await replica.server.set_label(label)
        replica.label = label


def _mixture(url: str) -> str:
    return f"{url} holds weights that may be a mixture, because a load of new ones broke off; restart it"
