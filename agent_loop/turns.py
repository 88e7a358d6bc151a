"""From the calls that a conversation made to rows to train on: for harnesses that encode the whole conversation anew for each call.

An agent loop of this package appends tokens and never encodes a sampled one again. A harness that speaks text cannot: its next prompt
may hold the model's answer in other tokens, or shortened. What the prompt says is what the model saw, so it overrules what was sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from buffer.rollout import RolloutState


@dataclass(frozen=True)
class Call:
    """One call of the engine: everything it was shown, and what it sampled.

    Attributes:
        prompt_ids: the whole prompt.
        token_ids: sampled.
        logprobs: of these, natural log.
        versions: of the weights that sampled them: one number, or one a token.
    """

    prompt_ids: ArrayLike
    token_ids: ArrayLike
    logprobs: ArrayLike
    versions: ArrayLike = 0


@dataclass
class Row:
    """Tokens as the model saw them in its last call and went on, of one or more calls.

    Attributes:
        prompt: tokens of the first call's prompt.
        ids, mask, logprobs, versions: of all tokens; the mask is 1 where one was sampled and still stands as it was.
        answer: where the last answer begins.
    """

    prompt: int
    ids: NDArray[np.int64]
    mask: NDArray[np.uint8]
    logprobs: NDArray[np.float64]
    versions: NDArray[np.int64]
    answer: int = field(default=0)

    def append_to(self, state: RolloutState) -> None:
        """Make this the prompt and the response of a rollout that has no response yet.

        Raises:
            ValueError: it has one.
        """
        if state.response_ids.size:
            raise ValueError(f"rollout {state.rollout_id} has a response already; reset() it first, or give an empty one")
        state.prompt_ids = self.ids[: self.prompt].astype(np.int32)
        changes = np.flatnonzero(np.diff(self.mask[self.prompt :])) + 1
        for span in np.split(np.arange(self.prompt, self.ids.size), changes):
            if span.size and self.mask[span[0]]:
                state.append(self.ids[span], logprobs=self.logprobs[span], version=self.versions[span])
            elif span.size:
                state.append(self.ids[span], trainable=False)


def reconciled(calls: Sequence[Call], *, max_drift: int = 1024) -> list[Row]:
    """The rows that a conversation's calls make, in order.

    A prompt that begins with all tokens so far goes on in the row. One that differs from them within the last answer, by fewer than
    `max_drift` tokens, overrules it: the tokens before stay as they were, those from there on are context, and nothing is learned from
    them. Any other begins a new row, since what was learned from stands no more. A row of which nothing was sampled is left out.

    Raises:
        ValueError: a call's tokens, log-probabilities and versions are not of one length, or `max_drift` is negative.
    """
    if max_drift < 0:
        raise ValueError(f"max_drift={max_drift} must be 0 or more; 0 begins a new row at any difference")
    rows: list[Row] = []
    for number, call in enumerate(calls):
        prompt = np.asarray(call.prompt_ids, np.int64).reshape(-1)
        kept = _kept(rows[-1], prompt, max_drift) if rows else None
        if kept is None:
            rows.append(_row(prompt))
        else:
            _cut(rows[-1], kept)
            _extend(rows[-1], prompt[kept:])
        rows[-1].answer = rows[-1].ids.size
        _answer(rows[-1], call, number)
    return [row for row in rows if row.mask.any()]


def _kept(row: Row, prompt: NDArray[np.int64], max_drift: int) -> int | None:
    """How many tokens of the row the prompt keeps; None where a new row begins."""
    shared = min(row.ids.size, prompt.size)
    differ = np.flatnonzero(row.ids[:shared] != prompt[:shared])
    matched = int(differ[0]) if differ.size else shared
    drift = row.ids.size - matched
    return matched if drift == 0 or (matched >= row.answer and drift < max_drift) else None


def _row(prompt: NDArray[np.int64]) -> Row:
    n = prompt.size
    return Row(n, prompt.copy(), np.zeros(n, np.uint8), np.zeros(n), np.zeros(n, np.int64))


def _cut(row: Row, kept: int) -> None:
    row.ids, row.mask, row.logprobs, row.versions = row.ids[:kept], row.mask[:kept], row.logprobs[:kept], row.versions[:kept]


def _extend(row: Row, ids: NDArray[np.int64], mask: int = 0, logprobs: ArrayLike = 0.0, versions: ArrayLike = 0) -> None:
    n = ids.size
    row.ids = np.concatenate([row.ids, ids])
    row.mask = np.concatenate([row.mask, np.full(n, mask, np.uint8)])
    row.logprobs = np.concatenate([row.logprobs, np.broadcast_to(np.asarray(logprobs, np.float64), (n,))])
    row.versions = np.concatenate([row.versions, np.broadcast_to(np.asarray(versions, np.int64), (n,))])


def _answer(row: Row, call: Call, number: int) -> None:
    ids = np.asarray(call.token_ids, np.int64).reshape(-1)
    sizes = {"logprobs": np.size(call.logprobs)} | ({"versions": np.size(call.versions)} if np.ndim(call.versions) else {})
    for name, size in sizes.items():
        if size != ids.size:
            raise ValueError(f"call {number} sampled {ids.size} tokens and brings {size} {name}; give one a token")
    _extend(row, ids, 1, np.asarray(call.logprobs, np.float64).reshape(-1), call.versions)
