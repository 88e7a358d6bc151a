"""`Desk`: where requests wait until a replica has room for them, in order of arrival."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

from agent_loop.engines.server.replica import Replica, Ticket
from agent_loop.engines.server.routing import Affinity, choose

Gate = Literal["open", "draining", "shut"]
"""Who may go to a replica: all; those that were begun; none."""


class Desk:
    """Gives each request a place, the least loaded replica's but for the session's own; at most `limit` a replica. Acts synchronously."""

    def __init__(self, serving: Callable[[], list[Replica]], limit: int, slack: int) -> None:
        self._serving, self._limit, self._slack = serving, limit, slack
        self._queue: deque[tuple[Ticket, asyncio.Future[Replica | None]]] = deque()
        self._affinity = Affinity()
        self._gate: Gate = "open"
        self._turn = self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        return self._waiting

    def set_gate(self, gate: Gate) -> None:
        """Say who may go."""
        self._gate = gate
        self.dispatch()

    async def place(self, ticket: Ticket) -> Replica | None:
        """The replica that holds the ticket from now on; None if it was called back before it had one."""
        future: asyncio.Future[Replica | None] = asyncio.get_running_loop().create_future()
        # One that was begun goes first: it holds tokens that others paid for.
        (self._queue.appendleft if ticket.begun else self._queue.append)((ticket, future))
        self._waiting += 1
        self.dispatch()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None and (replica := future.result()) is not None:
                self.leave(ticket, replica)
            raise
        finally:
            self._waiting -= 1

    def leave(self, ticket: Ticket, replica: Replica) -> None:
        """Give the place back."""
        replica.tickets.discard(ticket)
        ticket.left.set()
        self.dispatch()

    def call_back(self, tickets: Iterable[Ticket]) -> None:
        """End the waiting of these, without a place."""
        wanted = set(tickets)
        for ticket, future in self._queue:
            if ticket in wanted and not future.done():
                future.set_result(None)

    def begin_all(self, flights: Iterable[Ticket]) -> None:
        """Let these, and all that wait, go while the gate is "draining"."""
        for ticket in (*flights, *(entry[0] for entry in self._queue)):
            ticket.begun = True

    def refuse_all(self, error: Exception) -> None:
        """Fail all that wait."""
        for _, future in self._queue:
            if not future.done():
                future.set_exception(error)

    def dispatch(self) -> None:
        """Give out the places that are free."""
        while self._queue:
            ticket, future = self._queue[0]
            if future.done():
                self._queue.popleft()
                continue
            if not self._may_go(ticket) or (replica := self._route(ticket)) is None:
                return
            self._queue.popleft()
            replica.tickets.add(ticket)
            ticket.left.clear()
            future.set_result(replica)

    def close(self) -> None:
        """Wake up no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _may_go(self, ticket: Ticket) -> bool:
        return self._gate == "open" or (self._gate == "draining" and ticket.begun)

    def _route(self, ticket: Ticket) -> Replica | None:
        loop = asyncio.get_running_loop()
        now, serving = loop.time(), self._serving()
        asked = [replica for replica in serving if replica.busy.until <= now]
        asked = [replica for replica in asked if replica.url != ticket.avoid] or asked
        known = self._affinity.of(ticket.session_id)
        preferred = next((place for place, replica in enumerate(asked) if replica.url == known), None)
        self._turn += 1
        place = choose([len(replica.tickets) for replica in asked], self._limit, preferred, self._slack, self._turn)
        if place is None:
            self._wake_at(min((replica.busy.until for replica in serving if replica.busy.until > now), default=None))
            return None
        self._affinity.served(ticket.session_id, asked[place].url)
        return asked[place]

    def _wake_at(self, when: float | None) -> None:
        """Look again when a replica that had no room may be asked."""
        self.close()
        self._timer = None if when is None else asyncio.get_running_loop().call_at(when, self.dispatch)
