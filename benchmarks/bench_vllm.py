"""What `VLLMEngine.generate` costs over bare `AsyncLLM.generate`: tokens a second of both in one process, in turns.

    python benchmarks/bench_vllm.py [--model FOLDER] [--requests 256] [--tokens 64] [--repeats 5]

Without a model a tiny one is made, for which the work outside the model weighs most: the ratio is a lower bound.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent_loop.decoding import Decoding
from agent_loop.engines.vllm import VLLMEngine
from agent_loop.sampling import SamplingParams

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


async def ours(engine: VLLMEngine, request_id: str, params: SamplingParams) -> int:
    return len((await engine.generate(PROMPT, params, request_id=request_id)).token_ids)


async def in_pieces(engine: VLLMEngine, request_id: str, params: SamplingParams) -> int:
    """As agent loops ask: the tokens come as they are sampled, in pieces."""
    return len((await engine.generate(PROMPT, params, request_id=request_id, on_tokens=Decoding(0, None))).token_ids)


async def singly(engine: VLLMEngine, request_id: str, params: SamplingParams) -> int:
    """Likewise, each token by itself."""
    return len((await engine.generate(PROMPT, params, request_id=request_id, on_tokens=lambda piece: None)).token_ids)


async def bare(engine: VLLMEngine, request_id: str, params: SamplingParams) -> int:
    """The same request as a user of vLLM would write it, log-probabilities included."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    final = RequestOutputKind.FINAL_ONLY
    asked = VLLMSamplingParams(max_tokens=params.max_tokens, ignore_eos=True, logprobs=0, detokenize=False, output_kind=final)
    llm: Any = engine._llm
    async for output in llm.generate(TokensPrompt(prompt_token_ids=list(PROMPT)), asked, request_id):
        part = output.outputs[0]
    logprobs = [entry[token].logprob for token, entry in zip(part.token_ids, part.logprobs, strict=True)]
    return len(logprobs)


async def rate(ask: Callable[..., Awaitable[int]], engine: VLLMEngine, requests: int, params: SamplingParams) -> float:
    """Tokens a second of `requests` coroutines at once."""
    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(ask(engine, f"{start}-{number}", params) for number in range(requests))))
    return tokens / (time.perf_counter() - start)


async def loop_time(ask: Callable[..., Awaitable[int]], engine: VLLMEngine, requests: int, params: SamplingParams) -> float:
    """Microseconds of the event loop's thread for a token."""
    start = time.thread_time()
    await rate(ask, engine, requests, params)
    return (time.thread_time() - start) / (requests * params.max_tokens) * 1e6


async def measure(model: Path, requests: int, tokens: int, repeats: int) -> None:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    rows: list[tuple[float, float]] = []
    async with VLLMEngine(model, max_model_len=512, enforce_eager=True) as engine:
        for ask in (ours, bare):
            await rate(ask, engine, requests, params)  # warm-up
        for repeat in range(repeats):
            order = (ours, bare) if repeat % 2 == 0 else (bare, ours)
            rates = {ask: await rate(ask, engine, requests, params) for ask in order}
            rows.append((rates[ours], rates[bare]))
        ways: dict[str, Callable[..., Awaitable[int]]] = {"at the end": ours, "in pieces": in_pieces, "singly": singly}
        loop_times = {name: [await loop_time(ask, engine, requests, params) for _ in range(repeats)] for name, ask in ways.items()}
    print(f"{requests} coroutines, {tokens} tokens each\n\n| repeat | VLLMEngine tokens/s | AsyncLLM tokens/s | ratio |\n|---|---|---|---|")
    for number, (a, b) in enumerate(rows):
        print(f"| {number} | {a:,.0f} | {b:,.0f} | {a / b:.3f} |")
    print(f"| median | | | {statistics.median(a / b for a, b in rows):.3f} |")
    print("\n| tokens come | event loop, µs a token, median (least to most) |\n|---|---|")
    for name, times in loop_times.items():
        print(f"| {name} | {statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            from tests.tiny_model import make_tiny_model

            args.model = make_tiny_model(folder)
        asyncio.run(measure(args.model, args.requests, args.tokens, args.repeats))


if __name__ == "__main__":
    main()
