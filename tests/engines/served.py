"""An engine over simulated vLLM servers, and what is asked of it: for tests of what replicas do to it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from agent_loop.engines.base import Completion, Engine
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_table import adapted_seed
from agent_loop.engines.vllm_server import VLLMServerEngine
from agent_loop.sampling import SamplingParams
from tests.engines.simulated_server import GENERATE, SimulatedServer

PARAMS = SamplingParams(max_tokens=40, ignore_eos=True, seed=5)
REFERENCE = SimulatedEngine()
QUICK: dict[str, Any] = {"open_seconds": 5.0, "health_seconds": 0.05, "control_seconds": 2.0, "patience_seconds": 5.0}


def fast() -> SimulatedEngine:
    return SimulatedEngine(slots=16)


def slow() -> SimulatedEngine:
    """Slow enough that a test can act on what runs."""
    return SimulatedEngine(slots=16, tokens_per_second=400.0)


@asynccontextmanager
async def served(
    count: int = 2, make: Any = fast, *, tokenizer: bool = False, sleeps: bool = False, **options: Any
) -> AsyncIterator[tuple[VLLMServerEngine, list[SimulatedServer]]]:
    """An engine over so many servers."""
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(SimulatedServer(make, tokenizer=tokenizer, sleeps=sleeps)) for _ in range(count)]
        engine = await stack.enter_async_context(VLLMServerEngine([server.url for server in servers], **QUICK | options))
        for server in servers:
            server.calls.clear()  # those of the opening
        yield engine, servers


async def ask(engine: Engine, name: str, params: SamplingParams = PARAMS, **more: Any) -> Completion:
    return await engine.generate([5, 6, 7], params, request_id=name, **more)


def asked(server: SimulatedServer) -> int:
    return server.calls.count(GENERATE)


def check_tokens(completion: Completion, prompt: Sequence[int] = (5, 6, 7), seeds: tuple[int, ...] = (0,)) -> None:
    """Each log-probability is that of its token after all before it: one that was lost, doubled or misplaced would show."""
    ids, context = completion.token_ids.tolist(), list(prompt)
    policy: Any = REFERENCE.policy
    for token, logprob, version in zip(ids, completion.logprobs, completion.versions, strict=True):
        assert policy.log_probs(context, seeds[version], SamplingParams())[token] == pytest.approx(logprob, abs=1e-5)
        context.append(token)


def adapted_logprobs(seed: int, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> NDArray[np.floating]:
    """Under the adapter of this seed, on the weights that servers start with."""
    policy: Any = REFERENCE.policy
    context, found = list(prompt_ids), list[float]()
    for token in response_ids:
        found.append(policy.log_probs(context, adapted_seed(0, seed), SamplingParams())[token])
        context.append(token)
    return np.array(found)
