"""One request in flight: the tokens it has so far, and what ends it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from agent_loop.engines._transformers_backend import Sampled
from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Completion, FinishReason, OnTokens
from agent_loop.sampling import SamplingParams


class StopStrings:
    """Whether the newest token completes one of the `strings`, in the text that the tokens decode to."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self._strings, self._tokenizer = strings, tokenizer
        # A token stands for a byte or more, so a string that the newest token completes lies within this many; some
        # more, because a text cut out of the middle may begin with half a character.
        self._window = max((len(string.encode()) for string in strings), default=0) + 4

    def completed(self, tokens: Sequence[int]) -> bool:
        """`tokens` without their last are known to hold none of the strings."""
        if not self._strings:
            return False
        text = self._tokenizer.decode(tokens[-self._window :], skip_special_tokens=False)
        return any(string in text for string in self._strings)


@dataclass(slots=True, eq=False)
class Flight:
    """The tokens of one `generate` call.

    Attributes:
        key: names it in the library, once and for all.
        stop_ids: tokens that end it.
        adapter: under which it is sampled, with that version; None: under the weights alone, each token with theirs.
        done: holds its finish reason, or the error that ended it.
    """

    key: str
    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    strings: StopStrings
    on_tokens: OnTokens | None
    adapter: Adapter | None
    done: asyncio.Future[FinishReason]
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)

    def take(self, sampled: Sampled) -> FinishReason | None:
        """Add a token and show it to `on_tokens`; the finish reason if it was the last."""
        self._tokens.append(sampled.token)
        self._logprobs.append(sampled.logprob)
        version = sampled.version if self.adapter is None else self.adapter.version
        self._versions.append(version)
        reason: FinishReason | None = "length" if sampled.last else None
        if sampled.token in self.stop_ids or self.strings.completed(self._tokens):
            reason = "stop"
        if self.on_tokens is not None:
            before = len(self._tokens) - 1
            self.on_tokens(Completion.of([sampled.token], [sampled.logprob], version, reason or "abort", first=before))
        return reason

    def completion(self, reason: FinishReason) -> Completion:
        """All tokens so far."""
        return Completion.of(self._tokens, self._logprobs, self._versions, reason)

    def finish(self, result: FinishReason | Exception) -> None:
        """Wake the caller; only the first result counts."""
        if self.done.done():
            return
        if isinstance(result, Exception):
            self.done.set_exception(result)
        else:
            self.done.set_result(result)
