"""Tokens on their way: what was decoded of requests that still run, kept beside their rollouts until they end."""

from typing import Protocol

import numpy as np

from agent_loop.engines.base import Completion
from agent_loop.errors import EngineError
from buffer.rollout import RolloutState

MOST_PIECE_TOKENS = 16
"""Tokens that an engine may bring at once: each piece costs the event loop microseconds, whatever its size."""


class Watcher(Protocol):
    """Is told how the members of a running group get on; on the event loop, for each piece: it must be quick."""

    @property
    def piece_tokens(self) -> int:
        """How many tokens it can wait for, 1 or more."""

    def decoded(self, member: int, tokens: int) -> None:
        """So many tokens more were decoded of this member."""

    def ended(self, member: int) -> None:
        """This member is whole, and judged unless its group is to be judged; or it failed for good."""


class Decoding:
    """The tokens of one request so far, in the pieces in which they came.

    They are appended to the rollout once, when the request ends: for each piece it would copy the whole response, and
    only the completion has the last word on versions.

    With `whole` a part of a response is worth nothing: an engine starts a structure anew, so that the rest could not be sampled.
    """

    __slots__ = ("_member", "_pieces", "_watcher", "_whole")

    def __init__(self, member: int, watcher: Watcher | None, *, whole: bool = False) -> None:
        self._member, self._watcher, self._whole = member, watcher, whole
        self._pieces: list[Completion] = []

    @property
    def piece_tokens(self) -> int:
        """How many tokens the engine may bring at once."""
        return MOST_PIECE_TOKENS if self._watcher is None else min(MOST_PIECE_TOKENS, self._watcher.piece_tokens)

    def __call__(self, piece: Completion) -> None:
        """Keep a piece: this is the engine's `on_tokens`."""
        self._pieces.append(piece)
        if self._watcher is not None:
            self._watcher.decoded(self._member, len(piece.token_ids))

    def append_to(self, state: RolloutState) -> None:
        """Append everything that came to the response, unless a part of it is worth nothing."""
        if self._pieces and not self._whole:
            whole = self._joined()
            state.append(whole.token_ids, logprobs=whole.logprobs, version=whole.versions)

    def check(self, completion: Completion) -> None:
        """Raise `EngineError` unless the pieces are the beginning of the completion."""
        if self._pieces:
            tokens = self._joined().token_ids
            if not np.array_equal(tokens, completion.token_ids[: tokens.size]):
                raise EngineError(
                    f"the engine's pieces ({tokens.size} tokens) are not the beginning of its completion ({len(completion.token_ids)} "
                    "tokens); on_tokens must see each token once, in order"
                )

    def _joined(self) -> Completion:
        if len(self._pieces) > 1:
            ids = np.concatenate([piece.token_ids for piece in self._pieces])
            logprobs = np.concatenate([piece.logprobs for piece in self._pieces])
            versions = np.concatenate([piece.versions for piece in self._pieces])
            self._pieces = [Completion(ids, logprobs, versions, "abort")]
        return self._pieces[0]


def standing(state: RolloutState, decoding: Decoding | None, *, finished: bool) -> RolloutState:
    """A copy of a rollout at this moment, with what was decoded of the request under way."""
    copied = state.detached()
    if decoding is not None:
        decoding.append_to(copied)
    if not finished:
        copied.finish_reason = None  # as of a first turn, after which another is to come
    return copied
