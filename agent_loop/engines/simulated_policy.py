"""What a simulated engine says: policies that name the next token and its log-probability, without a model."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agent_loop.sampling import SamplingParams

_STANDARD = NormalDist()


class Request(NamedTuple):
    """What a response may depend on.

    Attributes:
        ids: (n,) int32, the prompt; it holds kept tokens too where a response is continued.
        request_id: of this request.
        seed: that of its sampling parameters.
        session_id: the same for all requests of one rollout.
    """

    ids: NDArray[np.int32]
    request_id: str
    seed: int | None = None
    session_id: str | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """`ids` as Python's numbers."""
        return tuple(self.ids.tolist())

    @property
    def session(self) -> str:
        """What stays the same when a response is continued by another request."""
        return self.key if self.session_id is None else f"session:{self.session_id}"

    @property
    def key(self) -> str:
        """What its random numbers are drawn from: its own seed, else its id."""
        return f"id:{self.request_id}" if self.seed is None else f"seed:{self.seed}"


class Step(NamedTuple):
    """One sampled token; `last` where the policy has no more to say, whatever the token is."""

    token: int
    logprob: float
    last: bool = False


Decoder = Callable[[Sequence[int], int], Step]
"""(prompt and response so far, seed of the weights in force) -> the next step of one request."""


class Policy(Protocol):
    """A model in place of a model; `start` must be a pure function, so that a run can be repeated."""

    @property
    def vocab_size(self) -> int:
        """Token ids lie in `range(vocab_size)`."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a response."""

    def start(self, request: Request, params: SamplingParams) -> Decoder:
        """The decoder of one request; a `Known` response costs the engine nothing a token."""


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(slots=True, eq=False)
class Known:
    """A response that is known when its request starts; also the decoder that gives it token by token.

    Attributes:
        start: tokens of the prompt.
        token_ids: (n,) int32.
        logprobs: (n,) float32.
        whole: the response is over after these tokens; else more would come, were they asked for.
    """

    start: int
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    whole: bool = True

    def __call__(self, context: Sequence[int], weights: int) -> Step:
        """See `Decoder`."""
        place = len(context) - self.start
        last = self.whole and place + 1 == self.token_ids.size
        return Step(int(self.token_ids[place]), float(self.logprobs[place]), last)

    def until(self, stops: Iterable[int], most: int) -> "Known":
        """Its beginning up to the first of the tokens `stops`, and to `most` tokens."""
        ids, whole = self.token_ids[:most], self.whole and self.token_ids.size <= most
        for stop in stops:
            found = ids == stop
            if (first := int(found.argmax())) or found[0]:
                ids, whole = ids[: first + 1], True
        return Known(self.start, ids, self.logprobs[: ids.size], whole)


@dataclass(frozen=True)
class ScriptedPolicy:
    """Says what `script(request)` tells it to: the whole response to the request's prompt.

    A prompt that ends in a proper beginning of its own scripted response is a continuation, and gets the rest. That keeps the
    policy a pure function, the same in another process; it takes the shortest prompt for which this holds.

    Log-probabilities are made up, -0.1 to -1.0 by token id: no distribution stands behind them, but they tell tokens apart.
    """

    script: Callable[[Request], Sequence[int]]
    vocab_size: int = 64
    eos_token_ids: frozenset[int] = frozenset({0})

    def start(self, request: Request, params: SamplingParams) -> Known:
        """See `Policy`."""
        ids = np.array(self._rest(request), np.int32)
        return Known(request.ids.size, ids, scripted_logprob(ids))

    def _rest(self, request: Request) -> tuple[int, ...]:
        ids = request.prompt_ids
        for size in range(1, len(ids) + 1):
            response = tuple(self.script(request._replace(ids=request.ids[:size])))
            if len(response) > len(ids) - size and response[: len(ids) - size] == ids[size:]:
                return response[len(ids) - size :]
        raise ValueError(f"the script gave no token for request {request.request_id}; give at least one (an EOS will do)")


def scripted_logprob(tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """The made-up log-probabilities of scripted tokens."""
    return (-(1 + tokens % 10) / 10).astype(np.float32)


Script = Callable[[Sequence[int]], Sequence[int]]
"""The whole response to a prompt."""

Lengths = int | Callable[[Request], int]
"""How long responses are, EOS included: one number, or a function of the request, whose prompt is then without kept tokens."""


class FillerPolicy:
    """Says responses of given lengths: the last token of the vocabulary over and over, then EOS.

    Those tokens at the end of a prompt are taken for what a continued response has already, so no prompt of its own may end in one.
    All responses are parts of one array, which cannot be written to.
    """

    def __init__(self, lengths: Lengths, vocab_size: int = 64, eos_token_id: int = 0) -> None:
        self.vocab_size, self.eos_token_ids = vocab_size, frozenset({eos_token_id})
        self._lengths, self._eos = lengths, eos_token_id
        self._token_ids, self._logprobs = np.empty(0, np.int32), np.empty(0, np.float32)

    def start(self, request: Request, params: SamplingParams) -> Known:
        """See `Policy`."""
        kept = self._kept(request.ids)
        length = self._length(request._replace(ids=request.ids[: request.ids.size - kept]) if kept else request)
        left = max(1, length - kept)
        size = min(left, params.max_tokens)
        if size >= self._token_ids.size:
            self._grow(2 * size)
        # Up to and with the EOS that ends the array, or of the fillers before it.
        part = slice(-size, None) if left == size else slice(0, size)
        return Known(request.ids.size, self._token_ids[part], self._logprobs[part], whole=left == size)

    def _kept(self, ids: NDArray[np.int32]) -> int:
        if ids[-1] != self.vocab_size - 1:
            return 0
        others = np.flatnonzero(ids != self.vocab_size - 1)
        return int(ids.size - 1 - (others[-1] if others.size else 0))

    def _length(self, request: Request) -> int:
        length = self._lengths if isinstance(self._lengths, int) else self._lengths(request)
        if length < 1:
            raise ValueError(f"a response of {length} tokens for request {request.request_id}; lengths are 1 or more")
        return length

    def _grow(self, size: int) -> None:
        self._token_ids = np.full(size + 1, self.vocab_size - 1, np.int32)
        self._token_ids[-1] = self._eos
        self._logprobs = scripted_logprob(self._token_ids)
        self._token_ids.flags.writeable = self._logprobs.flags.writeable = False  # shared by all who ask


def lognormal_lengths(median: float, sigma: float, *, longest: int, seed: int = 0, prompt_share: float = 0.0) -> Callable[[Request], int]:
    """Long-tailed lengths for `SimulatedEngine(lengths=...)`: log-normal, at most `longest`, drawn for each rollout.

    Args:
        median: tokens.
        sigma: standard deviation of the logarithm.
        longest: the most tokens.
        seed: of the draws.
        prompt_share: how much of the logarithm's variance belongs to the prompt, the same for all rollouts of it, in all epochs; the
            rest belongs to the rollout, which keeps it over interruptions. From 0 to 1.
    """
    if not (median > 0 and sigma >= 0 and longest >= 1 and 0 <= prompt_share <= 1):
        raise ValueError(f"{median=} must be above 0, {sigma=} 0 or more, {longest=} 1 or more, {prompt_share=} from 0 to 1")
    of_prompt, of_rollout = sigma * math.sqrt(prompt_share), sigma * math.sqrt(1 - prompt_share)

    @lru_cache(maxsize=1 << 16)
    def shared(prompt: bytes) -> float:
        return of_prompt * _normal(seed, "prompt", prompt.hex())

    def length(request: Request) -> int:
        # Neither the request's id nor its own seed has a part in it where there is a session: a continuation has others.
        logarithm = of_rollout * _normal(seed, "length", request.session)
        if of_prompt:
            logarithm += shared(request.ids.tobytes())
        return min(longest, max(1, round(median * math.exp(logarithm))))

    return length


def empirical_lengths(recorded: Mapping[tuple[int, ...], Sequence[int]], *, seed: int = 0) -> Callable[[Request], int]:
    """Recorded lengths for `SimulatedEngine(lengths=...)`, drawn for each rollout, which keeps its own over interruptions.

    Args:
        recorded: the ids of each prompt and the lengths of its responses. A prompt that is not in it, or that has none, draws from
            the lengths of all.
        seed: of the draws.
    """
    every = sorted(length for lengths in recorded.values() for length in lengths)
    if not every or every[0] < 1:
        raise ValueError(f"recorded lengths must be 1 or more, and at least one; given were {len(every)}, the least is {every[:1]}")
    known = {prompt: sorted(lengths) for prompt, lengths in recorded.items()}

    def length(request: Request) -> int:
        choices = known.get(request.prompt_ids) or every
        return choices[int(uniform(seed, "length", request.session) * len(choices))]

    return length


def _normal(*parts: object) -> float:
    """A draw from the standard normal distribution that depends on nothing but `parts`."""
    return _STANDARD.inv_cdf(min(max(uniform(*parts), 1e-12), 1 - 1e-12))
