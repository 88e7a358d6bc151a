"""What a simulated engine tells of given tokens, where it has a distribution."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Capabilities, Engine, TopTokens, WeightSource
from agent_loop.engines.simulated_policy import Policy
from agent_loop.engines.simulated_table import TablePolicy, adapted_seed, weights_seed
from agent_loop.engines.values import scores
from agent_loop.sampling import SamplingParams


class ScoresOfTable(Engine):
    """Scores, likely tokens and adapters of a `SimulatedEngine`: those of the seeds that its weights and adapters stand for."""

    policy: Policy

    def __init__(self) -> None:
        super().__init__()
        self._weights_of = {0: 0}
        self._adapter_seeds = dict[Adapter, int]()

    @abstractmethod
    def _check_alive(self) -> None:
        """Raise the error that says why the engine is not there."""

    @property
    def capabilities(self) -> Capabilities:
        """Adapters; and scores, where the policy is a `TablePolicy`: no other has a distribution."""
        able = super().capabilities
        return able if isinstance(self.policy, TablePolicy) else replace(able, score=False, top_tokens=0)

    async def _load_adapter(self, adapter: Adapter, path: WeightSource) -> int:
        """A simulated adapter is what simulated weights are: a mapping with an integer "seed", or any path."""
        self._check_alive()
        self._adapter_seeds[adapter] = seed = weights_seed(path)
        return seed

    async def score(
        self, token_ids: Sequence[int] | NDArray[np.int32], *, start: int = 1, adapter: str | Adapter | None = None
    ) -> NDArray[np.float32]:
        """See `Engine`. It takes no time and no slot."""
        self._check_alive()
        if not isinstance(self.policy, TablePolicy):
            return await super().score(token_ids, start=start, adapter=adapter)
        ids, which = self.check_score(token_ids, start), None if adapter is None else self.check_adapter(adapter)
        return scores(self.reference_logprobs(ids[:start].tolist(), ids[start:].tolist(), self._version, adapter=which), start)

    async def top_tokens(
        self, token_ids: Sequence[int] | NDArray[np.int32], count: int, *, adapter: str | Adapter | None = None
    ) -> TopTokens:
        """See `Engine`. It takes no time and no slot."""
        self._check_alive()
        if not isinstance(self.policy, TablePolicy):
            return await super().top_tokens(token_ids, count, adapter=adapter)
        ids, which = self.check_top_tokens(token_ids, count), None if adapter is None else self.check_adapter(adapter)
        logprobs = self.policy.log_probs(ids.tolist(), self._seed_under(self._version, which), SamplingParams())
        likeliest = np.argsort(-logprobs, kind="stable")[:count]
        return TopTokens.of(likeliest.tolist(), logprobs[likeliest].tolist(), self._version if which is None else which.version)

    def reference_logprobs(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        version: int,
        params: SamplingParams | None = None,
        adapter: Adapter | None = None,
    ) -> NDArray[np.float64]:
        """(len(response_ids),) float64: log-probability of each response token; needs a `TablePolicy`.

        Args:
            prompt_ids: what comes before the response.
            response_ids: what is scored.
            version: of the model's weights.
            params: of the distribution; None is temperature 1 without truncation.
            adapter: on top of the weights, one that is there or was.
        """
        if not isinstance(self.policy, TablePolicy):
            raise TypeError(f"{type(self.policy).__name__} has no distribution to take log-probabilities from")
        if version not in self._weights_of:
            raise ValueError(f"version={version} was never in force; known are {sorted(self._weights_of)}")
        weights = self._seed_under(version, adapter)
        context, logprobs = [int(token) for token in prompt_ids], []
        for token in map(int, response_ids):
            logprobs.append(self.policy.log_probs(context, weights, params or SamplingParams())[token])
            context.append(token)
        return np.array(logprobs, np.float64)

    def _seed_under(self, version: int, adapter: Adapter | None) -> int:
        weights = self._weights_of[version]
        return weights if adapter is None else adapted_seed(weights, self._adapter_seeds[adapter])
