"""What engines take and give, as values that are checked where they are made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agent_loop.errors import EngineError

FinishReason = Literal["stop", "length", "abort"]
PauseMode = Literal["abort", "wait", "keep"]

_FINISH_REASONS = get_args(FinishReason)

WeightSource = str | Path | Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Where new weights come from: a folder in Hugging Face's format, or a state dict (mapping or (name, tensor) pairs)."""


@runtime_checkable
class WeightTransfer(Protocol):
    """The trainer's end of a transfer that moves weights past this process, such as vLLM's `TrainerWeightTransferEngine`."""

    def send_weights(self) -> None:
        """Send all weights, and return when the engine has them; blocks, and is called in a thread."""


OnTokens = Callable[["Completion"], None]
"""Called with the tokens that are new since the last call, as a piece of a completion; on the event loop.

One with an attribute `piece_tokens` may be shown so many tokens at once: an engine for which a piece costs much waits for them.
"""


def piece_tokens(on_tokens: OnTokens) -> int:
    """How many tokens `on_tokens` may be shown at once; 1 where it does not say."""
    return max(1, int(getattr(on_tokens, "piece_tokens", 1)))


@dataclass(frozen=True, slots=True)
class Completion:
    """What one request gave: arrays of one length, a value a token.

    Attributes:
        token_ids: int32, the sampled tokens, the ending one included.
        logprobs: float32, natural log of the probability with which each token was sampled.
        versions: int32, `engine.version` when each token was sampled; under an adapter that of the adapter.
        finish_reason: "stop" (EOS, a stop token or string), "length", or "abort" (interrupted: the tokens so far).
        top: the likeliest tokens at each position, where `top_logprobs` asked for them; pieces have none.

    `first`, of a piece, is how many tokens of the response come before it, for messages; it is not kept.

    Raises:
        ValueError: arrays of unlike lengths, or an unknown finish reason.
        EngineError: a log-probability that is none (NaN, infinite, above 0), with the token's position in the response.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    finish_reason: FinishReason
    top: "TopLogprobs | None" = None
    first: InitVar[int] = 0

    def __post_init__(self, first: int) -> None:
        sizes = (len(self.token_ids), len(self.logprobs), len(self.versions))
        if not sizes[0] == sizes[1] == sizes[2]:
            raise ValueError(f"token_ids, logprobs and versions have lengths {sizes}; they need one length")
        if self.finish_reason not in _FINISH_REASONS:
            raise ValueError(f"unknown finish reason {self.finish_reason!r}; known are {_FINISH_REASONS}")
        check_logprobs(self.logprobs, "token", first=first, sampled=True)

    @classmethod
    def of(
        cls, token_ids: Sequence[int], logprobs: Sequence[float], versions: int | Sequence[int], finish_reason: str, *, first: int = 0
    ) -> "Completion":
        """A completion from lists; one number as `versions` stands for all tokens."""
        ids = np.asarray(token_ids, np.int32)
        stamped = np.full(ids.shape, versions, np.int32) if np.ndim(versions) == 0 else np.asarray(versions, np.int32)
        return cls(ids, np.asarray(logprobs, np.float32), stamped, finish_reason, first=first)  # type: ignore[arg-type]  # it is checked


@dataclass(frozen=True, slots=True, eq=False)
class TopLogprobs:
    """The likeliest tokens at each position of a response, under the distribution that was sampled from.

    Attributes:
        token_ids: (n, k) int32, the likeliest first.
        logprobs: (n, k) float32, natural log; -inf of tokens that truncation or structure left no chance.

    Raises:
        EngineError: a log-probability that is none, with its position.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def __post_init__(self) -> None:
        check_logprobs(self.logprobs, "a likely token at position")


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is.

    Attributes:
        running: requests that it decodes now.
        waiting: requests that it has and does not decode: they found no slot, or no room in its cache.
        preemptions: requests whose cache it has given up so far, to be computed again; those that wait for that count as waiting.
    """

    running: int
    waiting: int
    preemptions: int = 0


ALL_TOKENS = (1 << 31) - 1
"""In what a class of engines offers: as many tokens as the vocabulary has."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do beyond what every engine must.

    Attributes:
        score: it has `score`.
        top_tokens: the most that `top_tokens` gives; 0: it has none.
        adapters: it has `add_adapter`, and `generate`, `score` and `top_tokens` take an adapter; requests of several run at once.
        top_logprobs: the most that `SamplingParams.top_logprobs` may ask for; 0: none.
        structured_outputs: it takes `SamplingParams.structured_outputs`.
        images: `generate` takes images as `media`.
        sleep: it has `sleep` and `wake_up`.
        transfer: `update_weights` takes a `WeightTransfer`.
        load: it has `load`.
    """

    score: bool = False
    top_tokens: int = 0
    adapters: bool = False
    top_logprobs: int = 0
    structured_outputs: bool = False
    images: bool = False
    sleep: bool = False
    transfer: bool = False
    load: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The likeliest next tokens after some context.

    Attributes:
        token_ids: (n,) int32, the likeliest first, of equally likely ones the lowest id.
        logprobs: (n,) float32, natural log, at temperature 1 and without truncation.
        version: `engine.version` that gave them; under an adapter that of the adapter.

    Raises:
        EngineError: a log-probability that is none, with its place.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    version: int

    def __post_init__(self) -> None:
        check_logprobs(self.logprobs, "likely token")

    @classmethod
    def of(cls, token_ids: Iterable[int], logprobs: Iterable[float], version: int) -> "TopTokens":
        """From pairs in any order."""
        pairs = sorted(zip(logprobs, token_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        return cls(np.array([token for _, token in pairs], np.int32), np.array([logprob for logprob, _ in pairs], np.float32), version)


ROUNDING = 1e-3
"""So far above 0 a log-probability may be: sums over a large vocabulary are rounded."""

_NEVER = -float("inf")
_most, _least = np.maximum.reduce, np.minimum.reduce


def check_logprobs(logprobs: NDArray[np.floating], what: str, *, first: int = 0, sampled: bool = False) -> None:
    """Raise `EngineError` unless all are log-probabilities: numbers, and not above 0 by more than `ROUNDING`.

    Args:
        logprobs: a value for each token, or a row for each position.
        what: the word for one of the tokens, for the message.
        first: the position of the first of them.
        sampled: also -inf is refused: what was sampled was possible.
    """
    # A maximum and a minimum with NaN among the values are NaN, and a comparison with that is false. `max` takes thrice as long for few.
    if not logprobs.size or (_most(logprobs, None) <= ROUNDING and (not sampled or _least(logprobs, None) > _NEVER)):
        return
    sound = (logprobs <= ROUNDING) & (not sampled or logprobs > _NEVER)
    place = int(np.argmin(sound)) // (logprobs.size // len(logprobs))
    worst = logprobs.reshape(-1)[int(np.argmin(sound))]
    raise EngineError(
        f"{what} {first + place} has log-probability {worst}; it must be a number{', finite' if sampled else ''} and at most 0. Weights "
        "that hold NaN, or have grown too large, say such things: look at them, and update_weights with sound ones"
    )


def scores(logprobs: NDArray[np.floating] | list[float], start: int) -> NDArray[np.float32]:
    """What `Engine.score` gives, checked: the log-probabilities of tokens from position `start` on."""
    values = np.asarray(logprobs, np.float32)
    check_logprobs(values, "scored token", first=start)
    return values
