"""One request of a simulated engine: its tokens so far, with the versions that sampled them, and who is shown them."""

import asyncio

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import InUse
from agent_loop.engines.base import Completion, FinishReason, OnTokens, piece_tokens
from agent_loop.engines.simulated_batching import Job
from agent_loop.engines.simulated_policy import Decoder, Known, Request
from agent_loop.engines.simulated_table import adapted_seed
from agent_loop.sampling import SamplingParams


class InFlight(Job):
    """A request and what became of it so far.

    `begin` decides how it is decoded: a `Known` response is not touched before someone wants to see tokens of it, any other is
    decoded token by token.
    """

    __slots__ = (
        "_adapter",
        "_decoder",
        "_ids",
        "_known",
        "_logprobs",
        "_on_tokens",
        "_piece",
        "_runs",
        "_shown",
        "_whole",
        "ended",
        "outcome",
        "params",
        "what",
    )

    def __init__(
        self,
        number: int,
        what: Request,
        params: SamplingParams,
        on_tokens: OnTokens | None,
        ended: "asyncio.Future[None]",
        adapter: InUse | None = None,
    ) -> None:
        super().__init__(number, what.ids, 0 if adapter is None else hash(adapter.adapter) % 2**64)
        self._adapter = adapter
        self.what, self.params, self.ended = what, params, ended
        self.outcome: FinishReason | Exception | None = None
        self._on_tokens, self._shown = on_tokens, 0
        self._piece = 0 if on_tokens is None else piece_tokens(on_tokens)
        self._decoder: Decoder | None = None
        self._known: Known | None = None
        self._ids: list[int] = []  # prompt and response, where it is decoded token by token
        self._logprobs: list[float] = []
        self._runs: list[tuple[int, int]] = []  # (tokens so far, version of the last of them)
        self._whole: Completion | None = None

    @property
    def begun(self) -> bool:
        """It had a slot."""
        return self._decoder is not None

    def begin(self, decoder: Decoder, eos_token_ids: frozenset[int], *, pieces: bool) -> None:
        """It has its slot; `pieces` says whether `on_tokens` is called before the end."""
        self._decoder = decoder
        if not pieces:
            self._piece = 0
        if isinstance(decoder, Known):
            stops = self.params.stop_token_ids if self.params.ignore_eos else {*self.params.stop_token_ids, *eos_token_ids}
            self._known = decoder.until(stops, self.params.max_tokens)
        else:
            self._ids = self.prompt.tolist()

    def next_due(self) -> int:
        """How many tokens it has when something must be done next."""
        if self._known is None:
            return self.decoded + 1
        size = self._known.token_ids.size
        return min(size, self._shown + self._piece) if self._piece else size

    def reach(self, weights: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """It has decoded one token more, or all that it was to have by now; why it ends with that, if it does."""
        if self._known is None:
            reason = self._step(weights, eos_token_ids)
        elif self.decoded < self._known.token_ids.size:
            reason = None
        else:
            reason = "stop" if self._known.whole else "length"
        return reason

    def _step(self, weights: int, eos_token_ids: frozenset[int]) -> FinishReason | None:
        assert self._decoder is not None
        if self._adapter is not None:
            weights = adapted_seed(weights, self._adapter.loaded)
        token, logprob, last = self._decoder(self._ids, weights)
        self._ids.append(token)
        self._logprobs.append(logprob)
        if last or token in self.params.stop_token_ids or (token in eos_token_ids and not self.params.ignore_eos):
            return "stop"
        return "length" if len(self._logprobs) == self.params.max_tokens else None

    @property
    def size(self) -> int:
        """How many tokens of the response are there."""
        return len(self._logprobs) if self._known is None else self.decoded

    def stamp(self, version: int) -> None:
        """The tokens so far that have no version yet were sampled by this one, of the weights; an adapter's have the adapter's."""
        if self._adapter is not None:
            version = self._adapter.adapter.version
        if self.size > (self._runs[-1][0] if self._runs else 0):
            self._runs.append((self.size, version))

    def end(self, outcome: FinishReason | Exception, version: int) -> None:
        """It is over, and its caller is woken."""
        self.outcome = outcome
        self.stamp(version)
        if not self.ended.done():  # as that of a cancelled call is
            self.ended.set_result(None)

    def result(self) -> Completion:
        """What its caller gets, once it has ended."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        self._whole = self._part(0)
        return self._whole

    def context(self) -> NDArray[np.int32]:
        """Prompt and response, once it has ended."""
        return np.concatenate([self.prompt, self._token_ids(0)])

    def show(self, version: int, at_least: int = 1) -> None:
        """Show `on_tokens` what it has not seen yet, if that is so many tokens; `version` is that of those without a stamp."""
        if self._on_tokens is not None and self.size - self._shown >= at_least:
            start, self._shown = self._shown, self.size
            self._on_tokens(self._part(start, version) if start or self._whole is None else self._whole)

    def show_piece(self, version: int) -> None:
        """Show what it has not seen yet, if it is as much as it wants to see at once."""
        if self._piece:
            self.show(version, self._piece)

    def _part(self, start: int, version: int = 0) -> Completion:
        known = self._known
        logprobs = np.array(self._logprobs[start:], np.float32) if known is None else known.logprobs[start : self.size]
        reason: FinishReason = self.outcome if isinstance(self.outcome, str) else "abort"
        return Completion(self._token_ids(start), logprobs, self._versions(start, version), reason, first=start)

    def _token_ids(self, start: int) -> NDArray[np.int32]:
        if self._known is not None:
            return self._known.token_ids[start : self.size]
        return np.array(self._ids[self.prompt.size + start :], np.int32)

    def _versions(self, start: int, version: int) -> NDArray[np.int32]:
        versions = np.empty(self.size - start, np.int32)
        versions[:] = version if self._adapter is None else self._adapter.adapter.version
        begun = 0
        for end, stamped in self._runs:
            versions[max(0, begun - start) : max(0, end - start)] = stamped
            begun = end
        return versions
