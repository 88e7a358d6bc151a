"""`Slumber`: all servers of an engine give their accelerators' memory up for a while, and take it back."""

from agent_loop.engines.server.desk import Desk
from agent_loop.engines.server.fleet import Fleet
from agent_loop.engines.server.replica import Replica
from agent_loop.engines.server.requests import Requests
from agent_loop.engines.server.weights import LOADING, Weights, load
from agent_loop.errors import EngineDeadError, EngineError, RequestRefusedError

PARTS = ("weights", "kv_cache")


class Slumber:
    """The sleep of one engine; whoever calls holds the lock of changes.

    Attributes:
        asleep: the parts of memory that are given up.
        paused: the engine was paused when it fell asleep, and is to be so when it wakes up.
        hollow: the weights were dropped, and none were put in their place yet.
    """

    def __init__(self, fleet: Fleet, desk: Desk, weights: Weights, requests: Requests) -> None:
        self._fleet, self._desk, self._weights, self._requests = fleet, desk, weights, requests
        self.asleep: list[str] = []
        self.paused = self.hollow = False

    def check_awake(self, *parts: str) -> None:
        """Raise `EngineError` if one of these parts of memory is given up."""
        if any(part in self.asleep for part in parts):
            raise EngineError(f"the engine sleeps; await wake_up({'weights_only=True' if parts == ('weights',) else ''}) first")

    async def sleep(self, level: int) -> None:
        """Fall asleep; a replica that does not is out until the others have woken up."""
        if self.asleep:
            return
        if level == 2 and self._fleet.loras.there:
            raise RequestRefusedError("level=2 drops adapters too, which nothing would bring back; remove them first, or use level 1")
        self._requests.check_weights()
        self.asleep, self.hollow, self.paused = list(PARTS), level == 2, self._fleet.frozen
        self._desk.set_gate("shut")
        self._fleet.frozen = self._fleet.asleep = True
        await self._requests.interrupt(list(self._requests.flights.values()))
        for look in self._requests.looks:
            look.cut(None)  # it is asked again in the morning

        async def lie_down(replica: Replica) -> None:
            if level == 2:  # whoever finds the server so finds no weights
                await replica.server.set_label(f"{LOADING}:asleep")
            replica.asleep = True
            await replica.server.sleep(level)

        await self._fleet.each(self._fleet.serving(), lie_down)

    async def wake_up(self, *, weights_only: bool) -> None:
        """Take the memory of the weights back, and unless `weights_only` the rest, and go on.

        Raises:
            EngineDeadError: the weights were dropped, and are not where they came from any more.
        """
        if "weights" in self.asleep:
            await self._fleet.each(self._fleet.serving(), lambda replica: replica.server.wake_up("weights"))
            self.asleep.remove("weights")
        if self.asleep and not weights_only:
            if self.hollow:
                await self._fill()
            await self._fleet.each(self._fleet.serving(), self._rise)
            self.asleep, self.hollow, self._fleet.asleep = [], False, False
            for replica in self._fleet.replicas.values():
                if not replica.serving:
                    replica.kick.set()  # it waited for this
            if not self.paused:
                self._fleet.frozen = False
                self._desk.set_gate("open")

    async def _fill(self) -> None:
        try:
            folder, label = self._weights.folder(), self._weights.label
        except Exception as error:
            raise EngineDeadError(f"weights were dropped in the sleep: {error}; update_weights brings others") from error

        async def fill(replica: Replica) -> None:
            await load(replica.server, folder, str(label), extended=replica.extended)
            await replica.server.set_label(str(label))

        await self._fleet.each(self._fleet.serving(), fill)

    async def _rise(self, replica: Replica) -> None:
        await replica.server.wake_up("kv_cache")  # after which it goes on
        replica.asleep = False
        if self.paused:
            await replica.server.pause()
