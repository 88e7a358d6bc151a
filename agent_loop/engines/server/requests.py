"""`Requests`: what is in flight over the replicas, each request from one replica to the next until it is over."""

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from agent_loop.engines.adapters import InUse
from agent_loop.engines.base import piece_tokens
from agent_loop.engines.server.answers import Answer, Entry, Piece, read_whole
from agent_loop.engines.server.client import generate_body, look_body
from agent_loop.engines.server.desk import Desk
from agent_loop.engines.server.facts import Facts
from agent_loop.engines.server.faults import OtherWeights, ReplicaBusy, ReplicaError
from agent_loop.engines.server.fleet import Fleet
from agent_loop.engines.server.media import check_room, check_taken, content_parts
from agent_loop.engines.server.replica import ABORT_SECONDS, Flight, Replica, Ticket
from agent_loop.engines.server.weights import AT_START, Weights
from agent_loop.errors import EngineClosedError, EngineDeadError, EngineError
from agent_loop.sampling import SamplingParams

Result = TypeVar("Result")


@dataclass(frozen=True)
class Manner:
    """How requests are made.

    Attributes:
        stream_tokens: that a server sends at once where nobody watches them.
        attempts: replicas that may fail one request before it fails.
    """

    stream_tokens: int
    attempts: int


class Requests:
    """The requests of one engine.

    Attributes:
        flights: `generate` calls, by their ids.
        looks: those that are no rollouts: scores, and likely tokens.
    """

    def __init__(self, fleet: Fleet, desk: Desk, weights: Weights, manner: Manner) -> None:
        self.flights: dict[str, Flight] = {}
        self.looks: set[Ticket] = set()
        self._fleet, self._desk, self._weights, self._manner = fleet, desk, weights, manner
        self._names = itertools.count()

    async def finish(self, request_id: str, flight: Flight) -> None:
        """Let a request go on until it is over."""
        self.flights[request_id] = flight
        try:
            if flight.media:
                flight.parts = await asyncio.to_thread(content_parts, flight.media)
            while not flight.finish:
                await self._fly(flight)
            flight.show_held()
        finally:
            del self.flights[request_id]
            flight.over.set()

    async def _fly(self, flight: Flight) -> None:
        """Let it go on at one replica, as far as it gets there."""
        replica = await self._placed(flight)
        try:
            if replica is None or flight.called_back:
                flight.finish = "abort"
            else:
                flight.place = replica
                await self._talk(replica, flight)
        except ReplicaError as error:
            assert replica is not None
            self._blame(replica, flight, error)
            flight.settle(self._stop_ids(flight.params))
        finally:
            flight.server_id = None
            if replica is not None:
                self._desk.leave(flight, replica)

    def check_weights(self) -> None:
        """Raise `EngineError` while the servers hold what an earlier run left."""
        if self._weights.label is None:
            raise EngineError(
                "the servers hold weights that an earlier run left there; call update_weights before anything else, or make the "
                "engine with adopt=True to take them as they are"
            )

    async def _placed(self, ticket: Ticket) -> Replica | None:
        self.check_weights()
        if self._fleet.hopeless is not None and not ticket.called_back:
            raise EngineDeadError(str(self._fleet.hopeless))
        return None if ticket.called_back else await self._desk.place(ticket)

    async def _talk(self, replica: Replica, flight: Flight) -> None:
        loop = asyncio.get_running_loop()
        ids, params = flight.start()
        pieces = self._manner.stream_tokens if flight.on_tokens is None else piece_tokens(flight.on_tokens)
        name, salt = f"millrace-{id(self):x}-{next(self._names)}", self._weights.label or AT_START
        body = generate_body(self._model_of(flight.under), ids, params, self._stop_ids(params), name=name, salt=salt, piece=pieces)
        if flight.parts:
            body |= {"content_parts": flight.parts, "return_token_ids": True}
        piece = None
        try:
            async with flight.talking(), aclosing(self._stream(replica, flight, body)) as stream:
                async for piece in stream:
                    check_room(piece, params.max_tokens, self._facts.max_length)
                    flight.take(piece, self._weights.version, loop.time())
        except ReplicaError as error:
            if flight.parts and piece is None:
                await check_taken(replica.server, len(flight.parts), error)
            raise
        except TimeoutError:
            if not flight.was_cut:
                raise  # of `on_tokens`
            if flight.error is not None:
                raise flight.error from None
            flight.finish = "abort"
            return
        assert piece is not None, "a stream ends after a piece with a finish reason, or raises"
        oldest = flight.stamp(piece.labels, self._weights.versions)
        if oldest is not None and oldest < self._weights.versions[salt]:
            self._fleet.distrust(replica, OtherWeights(f"{replica.url} holds older weights than those in force; was it restarted?"))
        if piece.finish == "abort" and not flight.called_back:
            raise ReplicaError(f"{replica.url} ended a request that nobody interrupted; is it shutting down?", lost=True)
        flight.finish = piece.finish
        replica.busy.accepted()
        replica.breaker.succeeded()

    def _stream(self, replica: Replica, flight: Flight, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        return replica.server.stream(body, flight.session_id, self._facts.vocab_size, flight.params.top_logprobs)

    def _model_of(self, under: InUse | None) -> str:
        """What a request names as its model."""
        return self._facts.model if under is None else under.loaded.name

    @property
    def _facts(self) -> Facts:
        assert self._fleet.facts is not None
        return self._fleet.facts

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        # EOS by name: the server knows it from the tokenizer, which may be absent.
        ends = frozenset[int]() if params.ignore_eos else self._facts.eos_token_ids
        return ends.union(params.stop_token_ids)

    def _blame(self, replica: Replica, ticket: Ticket, error: ReplicaError) -> None:
        """Note that a replica failed a request; raises if too many did."""
        if isinstance(error, ReplicaBusy):
            replica.busy.refused(asyncio.get_running_loop().time(), error.retry_after, random.random())
            return
        ticket.avoid = replica.url
        if error is ticket.error:  # cut off by us, who know already
            return
        self._fleet.blame(replica, error)
        ticket.faults += 1
        if ticket.faults >= self._manner.attempts:
            raise EngineError(f"the request failed {ticket.faults} times, at last: {error}") from error

    # Ending them early

    async def interrupt(self, flights: Sequence[Flight]) -> None:
        """End these early; each returns what it has."""
        there: dict[Replica, list[str]] = {}
        loop = asyncio.get_running_loop()
        for flight in flights:
            flight.called_back = True
            if flight.server_id is None or flight.place is None:
                flight.cut(None)
            else:
                there.setdefault(flight.place, []).append(flight.server_id)
                loop.call_later(ABORT_SECONDS, flight.cut, None)
        self._desk.call_back(flights)
        await self._fleet.each(there, lambda replica: replica.server.abort(there[replica]))

    async def end_all(self) -> None:
        """End all at once, with what came of them; returns when those that are rollouts are over."""
        tickets = [*self.flights.values(), *self.looks]
        for ticket in tickets:
            ticket.called_back = True
            ticket.cut(None)
        self._desk.call_back(tickets)
        for ticket in tickets:
            await ticket.over.wait()

    # Looks

    async def look(self, ids: list[int], likely: int, under: InUse | None, read: Callable[[Answer, Entry], Result]) -> tuple[Result, int]:
        """What the answer to a request that is no rollout says, and its version: asked again where weights changed meanwhile."""
        ticket = Ticket()
        self.looks.add(ticket)
        try:
            while True:
                replica = await self._placed(ticket)
                if replica is None or ticket.called_back:
                    raise EngineClosedError("the engine was closed meanwhile")
                try:
                    body = look_body(self._model_of(under), ids, likely_tokens=likely, salt=self._weights.label or AT_START)
                    if (found := await self._asked(replica, ticket, body, read)) is not None:
                        return found, self._weights.version if under is None else under.adapter.version
                except ReplicaError as error:
                    self._blame(replica, ticket, error)
                finally:
                    self._desk.leave(ticket, replica)
        finally:
            self.looks.discard(ticket)
            ticket.over.set()

    async def _asked(
        self, replica: Replica, ticket: Ticket, body: dict[str, Any], read: Callable[[Answer, Entry], Result]
    ) -> Result | None:
        """What one replica's answer says; None if it is to be asked for again."""
        try:
            async with ticket.talking():
                answer = await replica.server.ask(body)
        except TimeoutError:
            return None  # it was cut off
        entry, told = read_whole(answer, self._facts.vocab_size)
        value = read(answer, entry)
        return value if told == body["cache_salt"] == self._weights.label else None
