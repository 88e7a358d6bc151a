"""What engines take and give, as values that are checked where they are made."""

import numpy as np
from numpy.typing import NDArray

from agent_loop.errors import EngineError

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
