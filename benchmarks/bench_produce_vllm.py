"""What producing costs beside vLLM: tokens a second of `produce_batch` and of a bare `asyncio.gather` over `AsyncLLM.generate`.

    python -m benchmarks.bench_produce_vllm [--model FOLDER] [--groups 16] [--rounds 9] [--hidden 128]

Both sample the same prompts with the same long-tailed lengths in one engine, in turns. `produce_batch` over-issues by a half, keeps
what is unfinished, and stores everything in a buffer on disk; its tokens are all that it sampled. Without a model one is made, by
default a tiny one, for which the work outside of the model weighs most. The loop's own work is in CPU time of its thread: the clock
tells little on a machine that others use too. What the process holds when the engine is open is kept from the garbage collector, as
vLLM's own server does: with torch and vLLM loaded, a full collection takes tenths of a second.
"""

import argparse
import asyncio
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.vllm import VLLMEngine
from benchmarks.workload import in_rounds, print_table, ratios, scratch, spread
from buffer import ReplayBuffer, RolloutState
from producer import AsyncProduceStrategy, ReplayPromptSampler

GROUP_SIZE, MEDIAN, LONGEST, ROWS = 8, 64, 256, 512


@dataclass(frozen=True)
class Round:
    """What one contender did in one round."""

    tokens: float
    seconds: float
    loop: float  # seconds that the event loop's thread computed

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def loop_a_token(self) -> float:
        return self.loop / self.tokens


def make_rows() -> list[dict[str, Any]]:
    """Prompts of 8 tokens, each with a length of its own, log-normal."""
    noise = np.random.default_rng(0)
    lengths = np.clip(noise.lognormal(np.log(MEDIAN), 0.6, ROWS), 4, LONGEST).astype(int).tolist()
    return [{"prompt_ids": noise.integers(10, 500, 8).tolist(), "sampling": {"max_tokens": length}} for length in lengths]


async def reward(state: RolloutState) -> float:
    """A judgement that costs nothing."""
    return float(state.index % 2)


class Bare:
    """The requests of one batch after the other, as a user of vLLM would write it, log-probabilities included."""

    def __init__(self, engine: VLLMEngine, rows: Sequence[dict[str, Any]], groups: int) -> None:
        self._llm: Any = engine._llm
        self._rows, self._groups, self._next = rows, groups, 0

    async def __call__(self) -> Round:
        batch = [self._rows[(self._next + n) % len(self._rows)] for n in range(self._groups) for _ in range(GROUP_SIZE)]
        first, self._next = self._next, self._next + self._groups
        began, computed = time.perf_counter(), time.thread_time()
        tokens = await asyncio.gather(*(self._ask(row, f"bare-{first}-{n}") for n, row in enumerate(batch)))
        return Round(sum(tokens), time.perf_counter() - began, time.thread_time() - computed)

    async def _ask(self, row: dict[str, Any], request_id: str) -> int:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        final, length = RequestOutputKind.FINAL_ONLY, row["sampling"]["max_tokens"]
        asked = VLLMSamplingParams(max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False, output_kind=final)
        async for output in self._llm.generate(TokensPrompt(prompt_token_ids=list(row["prompt_ids"])), asked, request_id):
            part = output.outputs[0]
        return len([entry[token].logprob for token, entry in zip(part.token_ids, part.logprobs, strict=True)])


class Produced:
    """A batch after the other through `produce_batch`."""

    def __init__(self, engine: VLLMEngine, buffer: ReplayBuffer, rows: Sequence[dict[str, Any]], groups: int, threshold: float) -> None:
        self._loop = SingleTurnAgentLoop(engine, reward=reward, sampling=SamplingParams(ignore_eos=True))
        self._sampler = ReplayPromptSampler(list(rows), buffer, group_size=GROUP_SIZE, shuffle=False)
        self._strategy = AsyncProduceStrategy(buffer, staleness_threshold=threshold, progress=False)
        self._groups, self._task = groups, f"by {threshold:g}"

    async def __call__(self) -> Round:
        began, computed = time.perf_counter(), time.thread_time()
        batch = await self._strategy.produce_batch(self._loop, self._sampler, self._groups, self._task)
        return Round(batch.metrics["produce/tokens"], time.perf_counter() - began, time.thread_time() - computed)


async def measure(model: Path, url: str, groups: int, rounds: int) -> dict[str, list[Round]]:
    """Rounds of both contenders in one engine."""
    rows = make_rows()
    async with ReplayBuffer.open(url) as buffer, VLLMEngine(model, max_model_len=512, enforce_eager=True) as engine:
        contenders: dict[str, Any] = {
            "`asyncio.gather` over `AsyncLLM.generate`": Bare(engine, rows, groups),
            "the same, again": Bare(engine, rows, groups),
            "`produce_batch`, over-issuing by 0.5": Produced(engine, buffer, rows, groups, 0.5),
        }
        gc.collect()
        gc.freeze()
        results = await in_rounds(contenders, rounds)
        assert (await buffer.audit()).ok
    return results


def widened(folder: Path, hidden: int) -> Path:
    """The tests' tiny model, or a larger one of the same kind without meaning."""
    from tests.tiny_model import make_tiny_model

    model = make_tiny_model(folder)
    if hidden != 128:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(model)
        config.update({"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": hidden // 64, "num_hidden_layers": 8})
        config.layer_types = None
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        assert json.loads((model / "config.json").read_text())["hidden_size"] == hidden
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, scratch() as disk:
        model = args.model or widened(Path(folder), args.hidden)
        results = asyncio.run(measure(model, f"sqlite:///{disk}/run.db", args.groups, args.rounds))
    base = [one.rate for one in next(iter(results.values()))]
    print(f"{args.groups} groups of {GROUP_SIZE} a batch, {args.rounds} rounds")
    print(f"responses of {MEDIAN} tokens in the median and at most {LONGEST}")
    rows = [
        [
            name,
            spread([one.rate for one in own], ",.0f"),
            spread(ratios([one.rate for one in own], base)),
            spread([one.loop_a_token for one in own], ".0f", 1e6),
        ]
        for name, own in results.items()
    ]
    print_table(["", "tokens/s", "of the first", "event loop, us a token"], rows)


if __name__ == "__main__":
    main()
