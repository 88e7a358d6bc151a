"""What a `VLLMEngine` tells of given tokens: requests that are no rollouts."""

import itertools
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter, InUse
from agent_loop.engines.base import TopTokens
from agent_loop.engines.values import scores
from agent_loop.engines.vllm_adapter import look_params, prompt_logprobs
from agent_loop.engines.vllm_weights import WeightsOfVLLM


class ScoresOfVLLM(WeightsOfVLLM):
    """Scores and likely tokens of a `VLLMEngine`."""

    def __init__(self) -> None:
        super().__init__()
        self._looks = itertools.count()

    async def score(
        self, token_ids: Sequence[int] | NDArray[np.int32], *, start: int = 1, adapter: str | Adapter | None = None
    ) -> NDArray[np.float32]:
        """See `Engine`. A prefill beside the other requests; the prefix cache is of no use to it."""
        ids = self.check_score(token_ids, start).tolist()
        with self.using_adapter(adapter) as used:
            output, _ = await self._look(ids, look_params(), used)
        return scores(prompt_logprobs(output.prompt_logprobs, ids)[start - 1 :], start)

    async def top_tokens(
        self, token_ids: Sequence[int] | NDArray[np.int32], count: int, *, adapter: str | Adapter | None = None
    ) -> TopTokens:
        """See `Engine`. One step beside the other requests, with the prefix cache."""
        ids = self.check_top_tokens(token_ids, count).tolist()
        with self.using_adapter(adapter) as used:
            output, version = await self._look(ids, look_params(likely_tokens=count), used)
        told = output.outputs[0].logprobs
        likely = dict(zip(told.token_ids, told.logprobs, strict=True))  # the sampled token is told twice
        return TopTokens.of(likely.keys(), likely.values(), version if used is None else used.adapter.version)

    async def _look(self, ids: list[int], params: Any, used: InUse | None) -> tuple[Any, int]:
        """The answer to a request that is no rollout, and the version of the weights: asked again where a pause ended it, or weights
        changed meanwhile, since parts of a long prompt are computed in several steps."""
        from vllm.inputs.engine import tokens_input

        under = None if used is None else used.loaded.request
        while True:
            version, name = self._version, f"millrace-look-{next(self._looks)}"
            given = tokens_input(ids, cache_salt=str(version))
            with self._translated():
                async with aclosing(self._alive().generate(given, params, name, lora_request=under)) as outputs:
                    async for output in outputs:
                        if output.outputs[0].finish_reason != "abort" and version == self._version:
                            return output, version
