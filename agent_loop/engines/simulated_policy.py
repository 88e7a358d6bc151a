"""What a simulated engine says: policies that name the next token and its log-probability, without a model."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.base import WeightSource
from agent_loop.sampling import SamplingParams


class Request(NamedTuple):
    """What a response may depend on. `prompt_ids` holds kept tokens too where a response is continued."""

    prompt_ids: tuple[int, ...]
    request_id: str
    seed: int | None
    session_id: str | None = None

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
        """The decoder of one request."""


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class TablePolicy:
    """A Markov chain: seeded logits for each (weights, last token), sampled as a language model is.

    The random number of a token depends on the engine's seed, the request's key and the token's place in the context,
    so a response that was interrupted and continued under one key equals the uninterrupted one.
    """

    vocab_size: int = 64
    eos_token_ids: frozenset[int] = frozenset({0})
    seed: int = 0
    scale: float = 1.5

    def start(self, request: Request, params: SamplingParams) -> Decoder:
        """See `Policy`."""

        def step(context: Sequence[int], weights: int) -> Step:
            logprobs = self.log_probs(context, weights, params)
            if params.temperature == 0:
                return Step(int(np.argmax(logprobs)), 0.0)
            cumulated = np.cumsum(np.exp(logprobs))
            token = int(np.searchsorted(cumulated, uniform(self.seed, request.key, len(context)) * cumulated[-1], side="right"))
            return Step(token, float(logprobs[token]))

        return step

    def log_probs(self, context: Sequence[int], weights: int, params: SamplingParams) -> NDArray[np.float64]:
        """(vocab_size,) float64: the distribution that the token after `context` is sampled from; -inf where truncated."""
        return shape_logits(self.logits(context, weights), context, params)

    def logits(self, context: Sequence[int], weights: int) -> NDArray[np.float64]:
        """(vocab_size,) float64: the raw logits after `context`."""
        return _logits(self.vocab_size, self.scale, weights, int(context[-1]))


@lru_cache(maxsize=4096)
def _logits(vocab_size: int, scale: float, weights: int, last: int) -> NDArray[np.float64]:
    logits = np.random.default_rng([weights, last]).normal(0.0, scale, vocab_size)
    logits.flags.writeable = False  # one array is shared by all who ask
    return logits


def shape_logits(logits: NDArray[np.float64], context: Sequence[int], params: SamplingParams) -> NDArray[np.float64]:
    """Log-probabilities after penalty, temperature and truncation, in vLLM's order: penalty, temperature, min_p, top_k, top_p.

    The repetition penalty is that of CTRL (Keskar et al. 2019), over prompt and response. Temperature 0 leaves all mass on the
    largest logit.
    """
    shaped = np.array(logits, dtype=np.float64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.asarray(context))
        shaped[seen] = np.where(shaped[seen] > 0, shaped[seen] / params.repetition_penalty, shaped[seen] * params.repetition_penalty)
    if params.temperature == 0:
        return np.where(np.arange(shaped.size) == np.argmax(shaped), 0.0, -np.inf)
    shaped /= params.temperature
    if params.min_p > 0:
        shaped[shaped < shaped.max() + math.log(params.min_p)] = -np.inf
    if 0 < params.top_k < shaped.size:
        shaped[shaped < np.sort(shaped)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        shaped[_beyond_top_p(shaped, params.top_p)] = -np.inf
    return _log_softmax(shaped)


def _beyond_top_p(logits: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices outside the smallest set of likeliest tokens whose mass reaches `top_p`; the likeliest is never among them."""
    order = np.argsort(-logits, kind="stable")
    masses = np.exp(_log_softmax(logits)[order])
    beyond: NDArray[np.intp] = order[np.cumsum(masses) - masses >= top_p]
    return beyond


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


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

    def start(self, request: Request, params: SamplingParams) -> Decoder:
        """See `Policy`."""
        rest, start = self._rest(request), len(request.prompt_ids)

        def step(context: Sequence[int], weights: int) -> Step:
            place = len(context) - start
            return Step(rest[place], scripted_logprob(rest[place]), last=place + 1 == len(rest))

        return step

    def _rest(self, request: Request) -> tuple[int, ...]:
        ids = request.prompt_ids
        for size in range(1, len(ids) + 1):
            response = tuple(self.script(request._replace(prompt_ids=ids[:size])))
            if len(response) > len(ids) - size and response[: len(ids) - size] == ids[size:]:
                return response[len(ids) - size :]
        raise ValueError(f"the script gave no token for request {request.request_id}; give at least one (an EOS will do)")


def scripted_logprob(token: int) -> float:
    """The made-up log-probability of a scripted token."""
    return -(1 + token % 10) / 10


Script = Callable[[Sequence[int]], Sequence[int]]
"""The whole response to a prompt."""

Lengths = int | Callable[[Request], int]
"""How long responses are, EOS included: one number, or a function of the request."""


def filler(lengths: Lengths, vocab_size: int, eos: int) -> Callable[[Request], Sequence[int]]:
    """A script of given lengths: the last token of the vocabulary over and over, then EOS. No prompt may end in that token."""

    def script(request: Request) -> list[int]:
        length = lengths if isinstance(lengths, int) else lengths(request)
        if length < 1:
            raise ValueError(f"a response of {length} tokens for request {request.request_id}; lengths are 1 or more")
        return [vocab_size - 1] * (length - 1) + [eos]

    return script


def lognormal_lengths(median: float, sigma: float, *, longest: int, seed: int = 0) -> Callable[[Request], int]:
    """Long-tailed lengths for `SimulatedEngine(lengths=...)`: log-normal, at most `longest`, drawn for each rollout."""

    def length(request: Request) -> int:
        # Neither the prompt nor the request's own seed has a part in it: a continuation has others, and must keep its length.
        place = min(max(uniform(seed, "length", request.session), 1e-12), 1 - 1e-12)
        return min(longest, max(1, round(median * math.exp(sigma * NormalDist().inv_cdf(place)))))

    return length


def policy_for(script: Script | None, lengths: Lengths | None, seed: int, vocab_size: int, eos: int) -> Policy:
    """The policy that the arguments of `SimulatedEngine` ask for."""
    eos_ids = frozenset({eos})
    if script is not None:
        return ScriptedPolicy(lambda request: script(request.prompt_ids), vocab_size, eos_ids)
    if lengths is not None:
        return ScriptedPolicy(filler(lengths, vocab_size, eos), vocab_size, eos_ids)
    return TablePolicy(vocab_size, eos_ids, seed)


def weights_seed(source: WeightSource) -> int:
    """The seed that stands for `source`: a mapping's "seed", or the hash of a path's name."""
    if isinstance(source, str | Path):
        return int.from_bytes(hashlib.blake2b(str(source).encode(), digest_size=8).digest(), "big")
    given = dict(source) if isinstance(source, Mapping | Iterable) else {}
    if not isinstance(given.get("seed"), int):
        raise ValueError(f"simulated weights are a path or a mapping with an integer 'seed', not {source!r:.100}")
    return int(given["seed"])
