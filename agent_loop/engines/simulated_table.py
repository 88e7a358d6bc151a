"""`TablePolicy`: a simulated model with a real distribution, that of sampling parameters and of weights."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.base import WeightSource
from agent_loop.engines.simulated_policy import Decoder, Request, Step, uniform
from agent_loop.sampling import SamplingParams


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


def weights_seed(source: WeightSource) -> int:
    """The seed that stands for `source`: a mapping's "seed", or the hash of a path's name."""
    if isinstance(source, str | Path):
        return int.from_bytes(hashlib.blake2b(str(source).encode(), digest_size=8).digest(), "big")
    given = dict(source) if isinstance(source, Mapping | Iterable) else {}
    if not isinstance(given.get("seed"), int):
        raise ValueError(f"simulated weights are a path or a mapping with an integer 'seed', not {source!r:.100}")
    return int(given["seed"])


@lru_cache(maxsize=256)
def adapted_seed(weights: int, adapter: int) -> int:
    """The seed that stands for weights with an adapter on top, from the seeds of both."""
    return int.from_bytes(hashlib.blake2b(f"{weights}+{adapter}".encode(), digest_size=8).digest(), "big")
