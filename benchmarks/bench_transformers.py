"""Tokens per second of `TransformersEngine` with 16 concurrent requests of unequal length, against one-by-one `model.generate`.

    python -m benchmarks.bench_transformers [model folder]

Both run the same requests in one process with the same weights and threads; the tiny model is made where none is given.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from agent_loop.engines.transformers import TransformersEngine
from agent_loop.sampling import SamplingParams

REQUESTS = 16
LENGTHS = [32 + 22 * index for index in range(REQUESTS)]
PROMPTS = [[2 + (7 * index + step) % 200 for step in range(8 + index)] for index in range(REQUESTS)]


def one_by_one(folder: Path) -> float:
    """Tokens per second of plain `generate`, request after request."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(prompt: list[int], length: int) -> None:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=length, min_new_tokens=length)
        assert out.shape[1] == len(prompt) + length

    run(PROMPTS[0], 8)
    start = time.perf_counter()
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        run(prompt, length)
    return sum(LENGTHS) / (time.perf_counter() - start)


async def together(folder: Path) -> float:
    """Tokens per second of the engine, all requests at once."""
    async with TransformersEngine(folder, seed=0) as engine:

        async def run(index: int, length: int) -> None:
            params = SamplingParams(max_tokens=length, ignore_eos=True, seed=index)
            assert len((await engine.generate(PROMPTS[index], params, request_id=str(index))).token_ids) == length

        await run(0, 8)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for index, length in enumerate(LENGTHS):
                tasks.create_task(run(index, length))
        return sum(LENGTHS) / (time.perf_counter() - start)


def main() -> None:
    """Print both rates and their ratio."""
    # More threads only fight over a model this small, and for the cores with whatever else runs.
    torch.set_num_threads(1 if len(sys.argv) == 1 else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1])
        else:
            from tests.tiny_model import make_tiny_model

            folder = make_tiny_model(scratch)
        alone, batched = one_by_one(folder), asyncio.run(together(folder))
    print(f"{REQUESTS} requests of {LENGTHS[0]} to {LENGTHS[-1]} tokens, {torch.get_num_threads()} threads")
    print(f"one by one {alone:.0f} tokens/s, together {batched:.0f} tokens/s, ratio {batched / alone:.2f}")


if __name__ == "__main__":
    main()
