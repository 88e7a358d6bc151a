"""What `VLLMEngine` costs over bare `AsyncLLM` in the same process, and `TransformersEngine` beside both.

    python -m benchmarks.bench_vllm [--model FOLDER] [--requests 256] [--tokens 64] [--rounds 5] [--demo]

Each round runs all contenders in an order of its own, and ratios are taken round by round. Without a model a tiny one is made, for which
the work outside of the model weighs most. The loop's own work is in CPU time of its thread: the clock tells little on a machine that
others use too. What the process holds when the engine is open is kept from the garbage collector, as vLLM's own server does.
"""

import argparse
import asyncio
import gc
import importlib
import itertools
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agent_loop.decoding import Decoding
from agent_loop.engines.base import Engine
from agent_loop.engines.transformers import TransformersEngine
from agent_loop.engines.vllm import VLLMEngine
from agent_loop.sampling import SamplingParams
from benchmarks.workload import in_rounds, print_table, ratios, scratch, spread

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
Ask = Callable[[str, SamplingParams], Awaitable[int]]
_NAMES = itertools.count()


@dataclass(frozen=True)
class Round:
    """What one contender did in one round."""

    seconds: float
    loop: float  # seconds that the event loop's thread computed
    tokens: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def loop_a_token(self) -> float:
        return self.loop / self.tokens * 1e6


def ours(engine: Engine, on_tokens: Callable[[], Any] = lambda: None) -> Ask:
    """`generate`, with an `on_tokens` of its own for each request."""

    async def ask(request_id: str, params: SamplingParams) -> int:
        return len((await engine.generate(PROMPT, params, request_id=request_id, on_tokens=on_tokens())).token_ids)

    return ask


def bare(engine: VLLMEngine, *, streamed: bool = False) -> Ask:
    """The same request as a user of vLLM would write it, log-probabilities included."""
    from vllm import SamplingParams as VLLMSamplingParams
    from vllm import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
    llm: Any = engine._llm

    async def ask(request_id: str, params: SamplingParams) -> int:
        asked = VLLMSamplingParams(max_tokens=params.max_tokens, ignore_eos=True, logprobs=0, detokenize=False, output_kind=kind)
        logprobs: list[float] = []
        async for output in llm.generate(TokensPrompt(prompt_token_ids=list(PROMPT)), asked, request_id):
            part = output.outputs[0]
            logprobs += [entry[token].logprob for token, entry in zip(part.token_ids, part.logprobs, strict=True)]
        return len(logprobs)

    return ask


def together(ask: Ask, requests: int, params: SamplingParams) -> Callable[[], Awaitable[Round]]:
    """`requests` coroutines at once."""

    async def run() -> Round:
        start, computed = time.perf_counter(), time.thread_time()
        tokens = sum(await asyncio.gather(*(ask(f"r-{next(_NAMES)}", params) for _ in range(requests))))
        return Round(time.perf_counter() - start, time.thread_time() - computed, tokens)

    return run


def one_by_one(ask: Ask, requests: int, params: SamplingParams) -> Callable[[], Awaitable[Round]]:
    """The same, each after the one before; seconds are of one."""

    async def run() -> Round:
        start, computed, seconds = time.perf_counter(), time.thread_time(), list[float]()
        for _ in range(requests):
            start = time.perf_counter()
            await ask(f"r-{next(_NAMES)}", params)
            seconds.append(time.perf_counter() - start)
        return Round(sorted(seconds)[requests // 2], (time.thread_time() - computed) / requests, 1)

    return run


def interrupted(
    ask: Ask, stop: Callable[[list[str]], Awaitable[None]], requests: int, params: SamplingParams
) -> Callable[[], Awaitable[Round]]:
    """Milliseconds from the call that ends all requests to the last of their results, when all have had their first tokens' time."""

    async def run() -> Round:
        names = [f"r-{next(_NAMES)}" for _ in range(requests)]
        calls = asyncio.gather(*(ask(name, params) for name in names))
        await ask(f"r-{next(_NAMES)}", params.replace(max_tokens=8))
        start, computed = time.perf_counter(), time.thread_time()
        await stop(names)
        await calls
        return Round(time.perf_counter() - start, time.thread_time() - computed, 1)

    return run


async def vllm(model: Path, requests: int, tokens: int, rounds: int) -> None:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    one, long = params.replace(max_tokens=1), params.replace(max_tokens=400)
    async with VLLMEngine(model, max_model_len=512, enforce_eager=True) as engine:
        gc.collect()
        gc.freeze()
        llm: Any = engine._llm
        ways = {
            "`AsyncLLM.generate`, at the end": bare(engine),
            "the same, again": bare(engine),
            "`VLLMEngine.generate`, at the end": ours(engine),
            "`VLLMEngine`, in pieces of 16": ours(engine, lambda: Decoding(0, None)),
            "`AsyncLLM`, each token": bare(engine, streamed=True),
            "`VLLMEngine`, each token": ours(engine, lambda: lambda piece: None),
        }
        found = await in_rounds({name: together(ask, requests, params) for name, ask in ways.items()}, rounds)
        baseline = [r.rate for r in next(iter(found.values()))]
        print(f"{requests} coroutines, {tokens} tokens each, {rounds} rounds")
        print_table(
            ("tokens come", "tokens/s", "of the first", "event loop, us a token"),
            [
                (
                    name,
                    spread([r.rate for r in own], ",.0f"),
                    spread(ratios([r.rate for r in own], baseline)),
                    spread([r.loop_a_token for r in own], ".1f"),
                )
                for name, own in found.items()
            ],
        )
        alone = await in_rounds({"AsyncLLM": one_by_one(bare(engine), 50, one), "VLLMEngine": one_by_one(ours(engine), 50, one)}, rounds)
        stops = {
            "AsyncLLM": interrupted(bare(engine), llm.abort, requests, long),
            "VLLMEngine": interrupted(ours(engine), engine.interrupt, requests, long),
        }
        ends = await in_rounds(stops, rounds)
        print_table(
            ("", "one token, one request, ms p50", "event loop of it, ms", f"interrupt of {requests}, ms", "event loop of it, ms"),
            [
                (
                    name,
                    spread([r.seconds for r in alone[name]], ".2f", 1e3),
                    spread([r.loop for r in alone[name]], ".2f", 1e3),
                    spread([r.seconds for r in ends[name]], ".0f", 1e3),
                    spread([r.loop for r in ends[name]], ".0f", 1e3),
                )
                for name in alone
            ],
        )
        async with TransformersEngine(model, max_length=512, max_requests=requests) as other:
            await beside(engine, other, rounds, 16, params)


async def demo(model: Path, rounds: int) -> None:
    """The engines of `examples/train_arithmetic.py` beside each other, at its own requests and at fewer and longer ones."""
    async with (
        VLLMEngine(model, max_model_len=32, max_num_seqs=256, enforce_eager=True) as engine,
        TransformersEngine(model, max_length=32) as other,
    ):
        gc.collect()
        gc.freeze()
        for requests, tokens in ((1024, 4), (256, 16), (16, 16)):
            await beside(engine, other, rounds, requests, SamplingParams(max_tokens=tokens, ignore_eos=True))


async def beside(engine: Engine, other: Engine, rounds: int, requests: int, params: SamplingParams) -> None:
    """Both in turns, so that what else the machine does falls on both."""
    both = await in_rounds(
        {"VLLMEngine": together(ours(engine), requests, params), "TransformersEngine": together(ours(other), requests, params)}, rounds
    )
    rates = {name: [r.rate for r in own] for name, own in both.items()}
    print_table(
        (f"{requests} coroutines, {params.max_tokens} tokens each", "tokens/s", "of vLLM"),
        [(name, spread(own, ",.0f"), spread(ratios(own, rates["VLLMEngine"]))) for name, own in rates.items()],
    )


def demo_model(folder: Path) -> Path:
    """The model that the example trains, as it is before training: its weights are of no matter to its speed."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    trainer = importlib.import_module("arithmetic_trainer")
    return Path(trainer.Trainer(folder).save_weights())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--demo", action="store_true", help="only both engines beside each other, with the demo's model")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of this process: more fight over a model this small, and vLLM has its own
    with scratch() as folder:
        if args.model is None:
            from tests.tiny_model import make_tiny_model

            args.model = make_tiny_model(Path(folder) / "tiny")
        if not args.demo:
            asyncio.run(vllm(args.model, args.requests, args.tokens, args.rounds))
        asyncio.run(demo(demo_model(Path(folder) / "demo"), args.rounds))


if __name__ == "__main__":
    main()
