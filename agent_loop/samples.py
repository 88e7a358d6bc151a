"""What a `Sampler` gives: a `SampleResponse` for each input, with its sequences."""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.base import Completion, FinishReason, TopLogprobs
from agent_loop.engines.values import check_logprobs


@dataclass(frozen=True, slots=True, eq=False)
class SampledSequence:
    """One response to one input.

    Attributes:
        token_ids: (n,) int32, the ending token included.
        logprobs: (n,) float32, natural log of the probability with which each token was sampled.
        versions: (n,) int32, `engine.version` when each token was sampled; under an adapter that of the adapter.
        finish_reason: "stop", "length", or "abort" where the engine was interrupted: the tokens so far.
        text: decoded from all ids at once, without special tokens; None where the sampler has no tokenizer.
        score: what the reward gave (`generate_and_score`); of beam search, the length-normalised log-probability. Else None.
        error: why the reward gave none.
        top: the likeliest tokens at each position, where `SamplingParams.top_logprobs` asked for them.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    finish_reason: FinishReason
    text: str | None = None
    score: float | None = None
    error: str | None = None
    top: TopLogprobs | None = None

    def __post_init__(self) -> None:
        if self.finish_reason not in get_args(FinishReason):
            raise ValueError(f"unknown finish reason {self.finish_reason!r}; known are {get_args(FinishReason)}")
        check_logprobs(self.logprobs, "token", sampled=True)

    @classmethod
    def of(cls, completion: Completion, text: str | None, score: float | None = None) -> "SampledSequence":
        """From what an engine gave."""
        ids, logprobs, versions = completion.token_ids, completion.logprobs, completion.versions
        return cls(ids, logprobs, versions, completion.finish_reason, text, score, top=completion.top)


@dataclass(frozen=True, slots=True, eq=False)
class SampleResponse:
    """The responses to one input.

    Attributes:
        prompt_ids: (n,) int32, what the engine was given.
        sequences: as many as were asked for; beam search gives the best first.
        prompt_logprobs: (n - 1,) float32, natural log, at temperature 1, of the prompt's tokens but the first; where they were asked for.
    """

    prompt_ids: NDArray[np.int32]
    sequences: tuple[SampledSequence, ...]
    prompt_logprobs: NDArray[np.float32] | None = None
