"""How long the responses of a simulated run are: log-normal, or those of a recorded run; per prompt correlated, the same each time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from agent_loop.sampling import number, whole

Table = NDArray[np.int64]
"""(prompts, members) tokens of each response."""

_P99 = NormalDist().inv_cdf(0.99)


class ResponseLengths(ABC):
    """Lengths of all responses to `prompts` prompts, an epoch after the other; a value: asked again it says the same."""

    prompts: int
    longest: int

    @abstractmethod
    def epoch(self, number: int, members: int) -> Table:
        """Lengths in tokens of `members` responses to each prompt in the epoch of this number, from 0 on."""

    def drawn(self, groups: int, members: int) -> Table:
        """(groups, members): those of the first groups that are drawn, where prompts are drawn in their order."""
        epochs = [self.epoch(number, members) for number in range(-(-groups // self.prompts))]
        return np.concatenate(epochs)[:groups]


class LognormalLengths(ResponseLengths):
    """Log-normal lengths.

    Args:
        prompts: in the dataset.
        median: tokens.
        tail: the 99th percentile in medians.
        prompt_share: of the logarithm's variance, what belongs to the prompt and is the same in all epochs; from 0 to 1.
        longest: the most tokens, where a response is cut.
        seed: of all.
    """

    def __init__(self, prompts: int, *, median: float, tail: float = 10.0, prompt_share: float = 0.5, longest: int, seed: int = 0) -> None:
        if whole("prompts", prompts) < 1 or number("median", median) < 1 or whole("longest", longest) < median:
            raise ValueError(f"{prompts=} and {median=} must be 1 or more, and {longest=} no less than the median")
        if number("tail", tail) < 1 or not 0 <= number("prompt_share", prompt_share) <= 1:
            raise ValueError(f"{tail=} must be 1 or more (1: all are alike), and {prompt_share=} from 0 to 1")
        self.prompts, self.longest = prompts, longest
        self._median, self._sigma, self._share, self._seed = median, math.log(tail) / _P99, prompt_share, seed

    @lru_cache(maxsize=4)  # noqa: B019 - a run asks for the epoch under way again and again
    def epoch(self, number: int, members: int) -> Table:
        """See `ResponseLengths`."""
        of_prompt = np.random.default_rng([self._seed, 0]).normal(0.0, self._sigma * math.sqrt(self._share), (self.prompts, 1))
        rng = np.random.default_rng([self._seed, 1, number])
        own = rng.normal(0.0, self._sigma * math.sqrt(1 - self._share), (self.prompts, members))
        tokens = np.rint(self._median * np.exp(of_prompt + own))
        return np.clip(tokens, 1, self.longest).astype(np.int64)


class RecordedLengths(ResponseLengths):
    """Lengths that a run recorded.

    Args:
        recorded: by prompt the lengths of the responses to it, at least one; a prompt's responses are drawn from its own.
        scale: recorded tokens in a simulated one.
        seed: of the draws.
    """

    def __init__(self, recorded: Mapping[str, Sequence[int]], *, scale: float = 1.0, seed: int = 0) -> None:
        if not recorded or any(not lengths or min(lengths) < 1 for lengths in recorded.values()):
            raise ValueError("each prompt needs one recorded response or more, each of 1 token or more")
        self._tokens = [np.maximum(1, np.rint(np.sort(np.asarray(lengths)) / scale)).astype(np.int64) for lengths in recorded.values()]
        self.prompts, self._seed = len(self._tokens), seed
        self.longest = int(max(tokens[-1] for tokens in self._tokens))

    @lru_cache(maxsize=4)  # noqa: B019 - as above
    def epoch(self, number: int, members: int) -> Table:
        """See `ResponseLengths`. Where a prompt has as many responses as members, all are there once."""
        rng = np.random.default_rng([self._seed, number])
        return np.stack([_drawn(tokens, members, rng) for tokens in self._tokens])


def _drawn(tokens: NDArray[np.int64], members: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.choice(tokens, members, replace=tokens.size < members)
