"""Beam search over an engine that tells likely tokens: for evaluation; `create_sampler("beam_search", engine=...)`."""

import asyncio
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from agent_loop.chat import Tokenizer
from agent_loop.engines.base import Completion, Engine, FinishReason, TopTokens
from agent_loop.errors import RequestRefusedError, first_error
from agent_loop.sample_inputs import Prompt
from agent_loop.sampler import Sampler
from agent_loop.samples import SampledSequence
from agent_loop.sampling import SamplingParams, number, whole

MOST_BEAMS = 256
"""A step compares as many continuations as beams by likely tokens: more would hold up the event loop."""

MOST_PENALTY = 10
"""Of `length_penalty`, above 0 or below: powers of any length are numbers."""

_PLAIN = SamplingParams()
_DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "top_logprobs", "structured_outputs")

NOT_FOR_TRAINING = (
    "beam search gives no training rollouts: beams are the likeliest responses, not samples of the policy, so what is estimated from them "
    "is biased; train on an engine's own samples, and evaluate with beams"
)


@dataclass(frozen=True, slots=True)
class Beam:
    """A response on its way: a value a token."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()
    total: float = 0.0

    def extended(self, token: int, logprob: float, version: int) -> "Beam":
        """With a token more."""
        total = self.total + logprob
        return Beam((*self.token_ids, token), (*self.logprobs, logprob), (*self.versions, version), total)

    def score(self, length_penalty: float) -> float:
        """The log-probability of all tokens, by their number to the power of `length_penalty`."""
        return self.total / math.pow(len(self.token_ids), length_penalty)

    def at_best(self, length_penalty: float, longest: int) -> float:
        """No continuation up to `longest` tokens scores above this: more tokens are certain at best, and it is monotonic in length."""
        return max(self.total / math.pow(length, length_penalty) for length in (len(self.token_ids) + 1, longest))


class Search:
    """The beams of one input; pure: it is told the likely tokens of each step.

    Args:
        beams: how many go on, and how many finished ones are kept.
        stops: tokens that finish a beam.
        longest: tokens after which a beam is finished as it is.
        length_penalty: see `Beam.score`.
    """

    def __init__(self, beams: int, stops: Collection[int], longest: int, length_penalty: float) -> None:
        self._beams, self._stops, self._longest, self._penalty = beams, frozenset(stops), longest, length_penalty
        self.running = [Beam()]
        self.finished: list[tuple[Beam, FinishReason]] = []

    @property
    def needed(self) -> int:
        """So many likely tokens of each beam are enough: beside those that stop, as many as can go on."""
        return self._beams + len(self._stops)

    def step(self, likely: Iterable[TopTokens]) -> None:
        """Go on by a token, given the likely ones of each running beam, in order."""
        told = list(likely)
        ranked = self._ranked(told)

        def beam(score: float, context: tuple[int, ...], token: int, place: int, logprob: float) -> Beam:
            return self.running[place].extended(token, logprob, told[place].version)

        # A beam may stop only if it is among those that would go on: else an unlikely EOS, cheap since it is short, would win.
        self._finish([beam(*one) for one in ranked[: self._beams] if one[2] in self._stops], "stop")
        self.running = [beam(*one) for one in [one for one in ranked if one[2] not in self._stops][: self._beams]]
        if self.running and len(self.running[0].token_ids) == self._longest:
            self._finish(self.running, "length")
            self.running = []
        if len(self.finished) == self._beams:
            worst = self.finished[-1][0].score(self._penalty)
            self.running = [beam for beam in self.running if beam.at_best(self._penalty, self._longest) > worst]

    def _ranked(self, told: list[TopTokens]) -> list[tuple[float, tuple[int, ...], int, int, float]]:
        """Continuations in the order of `_order`, as (-score, tokens so far, token, which beam, its log-probability).

        Those that are surely left out are not among them, nearly all: a step of many beams would hold up the event loop.
        """
        sizes = [top.token_ids.size for top in told]
        tokens, logprobs = np.concatenate([top.token_ids for top in told]), np.concatenate([top.logprobs for top in told])
        totals = np.repeat([beam.total for beam in self.running], sizes) + logprobs.astype(np.float64)
        scores = totals / math.pow(len(self.running[0].token_ids) + 1, self._penalty)
        going = scores[~np.isin(tokens, list(self._stops))]
        least = np.partition(going, -self._beams)[-self._beams] if going.size > self._beams else -np.inf
        kept = np.flatnonzero(scores >= least)
        places = np.repeat(np.arange(len(told)), sizes)[kept].tolist()
        contexts = [self.running[place].token_ids for place in places]
        return sorted(zip((-scores[kept]).tolist(), contexts, tokens[kept].tolist(), places, logprobs[kept].tolist(), strict=True))

    def _finish(self, beams: Iterable[Beam], reason: FinishReason) -> None:
        self.finished += [(beam, reason) for beam in beams]
        self.finished.sort(key=lambda ended: self._order(ended[0]))
        del self.finished[self._beams :]

    def _order(self, beam: Beam) -> tuple[float, tuple[int, ...]]:
        return -beam.score(self._penalty), beam.token_ids


class BeamSearchSampler(Sampler):
    """Gives the likeliest responses instead of samples, the best first; deterministic.

    The score of a response is its log-probability divided by its length to the power of `length_penalty`, and stands in `score`.
    Responses are compared when they are finished: by EOS, a stop token, or `max_tokens`. The search goes on until no running beam can
    come among the best any more. `num_samples` is at most `beams`; where there are fewer responses at all, fewer are given.

    It is for evaluation only, and refused where an engine of an agent loop is wanted.

    Args:
        engine: with `capabilities.top_tokens` of `beams` and the number of stop tokens together.
        tokenizer: as of `Sampler`.
        beams: how many go on at each step, from 1 to 256.
        length_penalty: 1 is the mean log-probability of a token, 0 the log-probability of all, more prefers longer responses.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, *, beams: int = 4, length_penalty: float = 1.0) -> None:
        super().__init__(engine, tokenizer, seed=0)
        if not 1 <= whole("beams", beams) <= MOST_BEAMS:
            raise ValueError(f"{beams=} is out of bounds; it must be from 1 to {MOST_BEAMS}")
        if abs(number("length_penalty", length_penalty)) > MOST_PENALTY:
            raise ValueError(f"{length_penalty=} is out of bounds; it must be from {-MOST_PENALTY} to {MOST_PENALTY}, and 1 is the mean")
        self.beams, self.length_penalty = beams, float(length_penalty)

    @property
    def generate(self) -> NoReturn:
        """Raises `TypeError`: an agent loop looks for this, and must not train on beams."""
        raise TypeError(NOT_FOR_TRAINING)

    async def _sequences(
        self, engine: Engine, prompt: Prompt, params: SamplingParams, key: tuple[int, int], num_samples: int
    ) -> tuple[SampledSequence, ...]:
        if prompt.images:
            raise RequestRefusedError("beam search asks for likely tokens, which engines tell of tokens alone; leave the images")
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.engine.eos_token_ids)
        search = Search(self.beams, stops, params.max_tokens, self.length_penalty)
        count = min(search.needed, self.engine.vocab_size)
        self._check(params, num_samples, count)
        while search.running:
            search.step(await _likely(engine, prompt, search.running, count))
        return tuple(self._sequence(beam, reason) for beam, reason in search.finished[:num_samples])

    def _check(self, params: SamplingParams, num_samples: int, count: int) -> None:
        if num_samples > self.beams:
            raise RequestRefusedError(f"num_samples={num_samples} is more than beams={self.beams}; raise beams")
        for name in _DRAWN:
            # Greedy or not is nothing to it, and a row of data may well say so.
            usual = (0.0, 1.0) if name == "temperature" else (getattr(_PLAIN, name),)
            if (given := getattr(params, name)) not in usual:
                raise RequestRefusedError(
                    f"{name}={given!r:.80} does not fit beam search, which draws nothing: leave all but max_tokens, stop_token_ids "
                    "and ignore_eos"
                )
        if count > (most := self.engine.capabilities.top_tokens):
            raise RequestRefusedError(
                f"beams={self.beams} need the {count} likeliest tokens of each step, and this engine tells {most}; use fewer beams, "
                "or an engine that tells more (VLLMEngine: max_logprobs)"
            )

    def _sequence(self, beam: Beam, reason: FinishReason) -> SampledSequence:
        completion = Completion.of(beam.token_ids, beam.logprobs, beam.versions, reason)
        return SampledSequence.of(completion, self._text(list(beam.token_ids)), beam.score(self.length_penalty))


async def _likely(engine: Engine, prompt: Prompt, beams: list[Beam], count: int) -> list[TopTokens]:
    try:
        async with asyncio.TaskGroup() as tasks:
            contexts = [np.concatenate([prompt.ids, np.array(beam.token_ids, np.int32)]) for beam in beams]
            calls = [tasks.create_task(engine.top_tokens(context, count)) for context in contexts]
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
    return [call.result() for call in calls]
