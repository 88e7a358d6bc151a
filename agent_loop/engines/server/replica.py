"""One replica as the engine sees it, and the requests that it holds."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import InUse
from agent_loop.engines.base import Completion, OnTokens, TopLogprobs
from agent_loop.engines.server.answers import Piece
from agent_loop.engines.server.breaker import Backoff, Breaker
from agent_loop.engines.server.client import Server
from agent_loop.engines.server.facts import Facts
from agent_loop.engines.server.faults import ReplicaError
from agent_loop.errors import EngineError
from agent_loop.sampling import SamplingParams

ABORT_SECONDS = 5.0
"""For which the last tokens of a request that was ended early are waited for."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """How a replica of a `VLLMServerEngine` stands.

    Attributes:
        url: its address.
        serving: whether requests are sent there.
        in_flight: requests that it holds.
        cause: why it is not serving; empty where it is.
    """

    url: str
    serving: bool
    in_flight: int
    cause: str = ""


class Ticket:
    """A request that waits for a place at a replica, or has one.

    Attributes:
        session_id: of its rollout.
        begun: a replica has begun it, or it is to end before a pause; it goes before others start.
        called_back: whoever made it wants it to end.
        faults: how often a replica failed it.
        avoid: the replica that failed it last.
        over: set when it has ended.
        left: set when it has left its last replica.
        error: why it was cut off.
        was_cut: its talk with its last replica was ended by `cut`.
    """

    def __init__(self, session_id: str | None = None) -> None:
        self.session_id = session_id
        self.begun = self.called_back = self.was_cut = False
        self.faults, self.avoid = 0, ""
        self.over, self.left = asyncio.Event(), asyncio.Event()
        self.error: ReplicaError | None = None
        self._scope: asyncio.Timeout | None = None

    @asynccontextmanager
    async def talking(self) -> AsyncIterator[None]:
        """While it talks with its replica; `cut` ends that, with `TimeoutError`."""
        self.error, self.was_cut = None, False
        try:
            async with asyncio.timeout(None) as self._scope:
                yield
        finally:
            self._scope = None

    def cut(self, error: ReplicaError | None) -> None:
        """End its talk with its replica: to go on elsewhere because of `error`, or at its caller's wish (None)."""
        if self._scope is not None and self._scope.when() is None:
            self.error, self.was_cut = error, True
            self._scope.reschedule(asyncio.get_running_loop().time())


class Flight(Ticket):
    """One `generate` call: the tokens that it has, from however many replicas.

    Attributes:
        finish: why it is over; None while it goes on.
        media: its images, and what the request tells of them once they were read.
        under: its adapter; None is the model itself.
        structured: its tokens must follow a structure, which begins at the first token of a request: it cannot go on, but begins anew.
        place: the replica that it was given last.
        server_id: its name there, known from the first piece on.
        touched: when it last got tokens, on the loop's clock.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        params: SamplingParams,
        session_id: str | None,
        on_tokens: OnTokens | None,
        under: InUse | None = None,
        media: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(session_id)
        self.media, self.parts = media, list[dict[str, str]]()
        self.under = under
        self.ids, self.params, self.on_tokens = ids.tolist(), params, on_tokens
        self.finish: str | None = None
        self.server_id: str | None = None
        self.place: Replica | None = None
        self.touched = 0.0
        self.structured = params.structured_outputs is not None
        self._tokens, self._logprobs, self._versions = list[int](), list[float](), list[int]()
        self._top = list[tuple[list[int], list[float]]]()
        self._here = 0  # where the tokens of the present replica start

    def start(self) -> tuple[list[int], SamplingParams]:
        """Prompt and parameters of what is still wanted, for a further replica."""
        if self.structured:
            for held in (self._tokens, self._logprobs, self._versions, self._top):
                held.clear()
        self._here, self.server_id = len(self._tokens), None
        if not self._here:
            return self.ids, self.params
        seed = self.params.seed
        # With its own seed, the rest would be drawn from the very numbers that the beginning was drawn from.
        seed = None if seed is None else (seed ^ (self._here * 0x9E3779B1)) & 0x7FFFFFFF
        return self.ids + self._tokens, self.params.of_request(self.params.max_tokens - self._here, seed)

    def take(self, piece: Piece, version: int, now: float) -> None:
        """Add tokens; they count as of `version` until the replica tells more. Under an adapter they are of its version."""
        version = version if self.under is None else self.under.adapter.version
        if len(self._tokens) + len(piece.tokens) > self.params.max_tokens:
            raise ReplicaError(f"more than the {self.params.max_tokens} tokens that were asked for")
        self.server_id, self.touched = piece.server_id, now
        self.begun = self.begun or bool(piece.tokens)
        if not piece.tokens:
            return
        self._tokens += piece.tokens
        self._logprobs += piece.logprobs
        self._versions += [version] * len(piece.tokens)
        self._top += piece.top
        if self.on_tokens is not None and not self.structured:
            self.on_tokens(Completion.of(piece.tokens, piece.logprobs, version, piece.finish or "abort"))

    def stamp(self, labels: list[str] | None, versions: dict[str, int]) -> int | None:
        """Set the versions of the present replica's tokens as that recorded them; gives the oldest of the weights.

        Raises:
            EngineError: it names weights that this engine did not put there.
        """
        count = len(self._tokens) - self._here
        if len(labels or ()) != count:
            raise ReplicaError(f"{count} tokens with versions of {len(labels or ())}")
        if foreign := set(labels or ()) - versions.keys():
            raise EngineError(
                f"tokens of weights labelled {sorted(foreign)}, which this engine has not put there; does another one update them?"
            )
        told = [versions[label] for label in labels or ()]
        if self.under is None:
            self._versions[self._here :] = told
        return min(told, default=None)

    @property
    def decoding(self) -> bool:
        """Whether its present replica has sent a token of it."""
        return self.server_id is not None

    def completion(self) -> Completion:
        """What it has; "abort" where it is not over."""
        completion = Completion.of(self._tokens, self._logprobs, self._versions, self.finish or "abort")
        return replace(completion, top=self._likeliest()) if self.params.top_logprobs else completion

    def _likeliest(self) -> TopLogprobs:
        shape = (len(self._top), self.params.top_logprobs)
        ids, logprobs = zip(*self._top, strict=True) if self._top else ((), ())
        return TopLogprobs(np.array(ids, np.int32).reshape(shape), np.array(logprobs, np.float32).reshape(shape))

    def show_held(self) -> None:
        """Show the tokens that were not shown as they came, because they might have been given up."""
        if self.structured and self.on_tokens is not None and self._tokens:
            self.on_tokens(Completion.of(self._tokens, self._logprobs, self._versions, self.finish or "abort"))

    def settle(self, stop_ids: Collection[int]) -> None:
        """It is over if all tokens came, though the replica broke off before it said why it ended."""
        if self._tokens and self._tokens[-1] in stop_ids and self._here < len(self._tokens):
            self.finish = "stop"
        elif len(self._tokens) == self.params.max_tokens:
            self.finish = "length"


@dataclass(eq=False)
class Replica:
    """What is known of one replica.

    Attributes:
        well: it answers, and serves our model.
        serving: it is in rotation: it is well, and holds the weights in force.
        leaving: it is in rotation no more, for good.
        cause: why it is not serving.
        asleep: it was sent to sleep, and was not woken up yet.
        label: of the weights that it holds, as last heard.
        tickets: requests that it holds.
        kick: wakes the task that looks after it.
        control: held by whoever changes its weights.
    """

    server: Server
    breaker: Breaker
    facts: Facts | None = None
    serving: bool = False
    well: bool = False
    leaving: bool = False
    asleep: bool = False
    cause: str = "it was not reached yet"
    label: str = ""
    busy: Backoff = field(default_factory=Backoff)
    tickets: set[Ticket] = field(default_factory=set)
    kick: asyncio.Event = field(default_factory=asyncio.Event)
    control: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        """Its address."""
        return self.server.url

    @property
    def extended(self) -> bool:
        """Whether its workers have our extension."""
        return self.facts is not None and self.facts.extended

    def status(self) -> ReplicaStatus:
        """For those outside."""
        return ReplicaStatus(self.url, self.serving, len(self.tickets), "" if self.serving else self.cause)

    def cut(self, error: ReplicaError) -> None:
        """Send its requests elsewhere."""
        for ticket in list(self.tickets):
            ticket.cut(error)
