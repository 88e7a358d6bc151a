"""What a request of the simulated engine costs beside an empty one: 256 slots, 10 000 requests waiting, in virtual time.

    python -m benchmarks.bench_simulated_engine [--requests 40000] [--repeats 5]

Each request is made by a coroutine of its own that makes the next when it has its response. The baseline is the same coroutines, each
of which awaits a future that a callback of the loop resolves: what asyncio itself takes. CPU time of the one thread.
"""

import argparse
import asyncio
import statistics
import time

from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_costs import CostModel
from agent_loop.engines.simulated_policy import lognormal_lengths
from agent_loop.sampling import SamplingParams
from producer.simulate import virtual_time

WAITING = 10_000
PARAMS = SamplingParams(max_tokens=8000)
LENGTHS = lognormal_lengths(200, 0.8, longest=8000, seed=1, prompt_share=0.5)
CONSTANT = CostModel(slots=256, tokens_per_second=50.0)
FALLING = CostModel(slots=256, tokens_per_second=50.0, half_batch=64)
FULL = CostModel(
    slots=256,
    tokens_per_second=50.0,
    half_batch=64,
    prefill_tokens_per_second=20_000,
    prefix_cache_tokens=200_000,
    kv_tokens=80_000,
    update_seconds=1.0,
)


async def bare(requests: int) -> None:
    """Every request is a future that the loop resolves in its next turn."""
    loop = asyncio.get_running_loop()

    async def one(first: int) -> None:
        for _ in range(first, requests, WAITING):
            future = loop.create_future()
            loop.call_soon(future.set_result, None)
            await future

    async with asyncio.TaskGroup() as tasks:
        for number in range(WAITING):
            tasks.create_task(one(number))


async def simulated(requests: int, costs: CostModel, *, shown: bool = False) -> None:
    """The same through the engine; groups of 16 have one prompt."""
    prompts = [[1 + group % 50, 1 + group // 50 % 50, 1 + group // 2500, *range(1, 30)] for group in range(-(-requests // 16))]
    async with SimulatedEngine(lengths=LENGTHS, vocab_size=100_000, max_length=16_000, costs=costs, pieces=False) as engine:

        async def one(first: int) -> None:
            watch = (lambda piece: None) if shown else None
            for number in range(first, requests, WAITING):
                name = str(number)
                await engine.generate(prompts[number // 16], PARAMS, request_id=name, session_id=name, on_tokens=watch)

        async with asyncio.TaskGroup() as tasks:
            for number in range(WAITING):
                tasks.create_task(one(number))


def microseconds(requests: int, kind: str) -> float:
    """CPU time of one request."""
    made = {
        "asyncio alone": lambda: bare(requests),
        "constant rate": lambda: simulated(requests, CONSTANT),
        "constant rate, tokens shown at the end": lambda: simulated(requests, CONSTANT, shown=True),
        "rate by batch size": lambda: simulated(requests, FALLING),
        "and prefill, prefix cache, one preemption in three requests": lambda: simulated(requests, FULL),
    }[kind]()
    began = time.thread_time()
    virtual_time.run(made)
    return (time.thread_time() - began) / requests * 1e6


KINDS = (
    "asyncio alone",
    "constant rate",
    "constant rate, tokens shown at the end",
    "rate by batch size",
    "and prefill, prefix cache, one preemption in three requests",
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print("| | us a request, median (least to most) |\n| --- | ---: |")
    for kind in KINDS:
        taken = [microseconds(arguments.requests, kind) for _ in range(arguments.repeats)]
        print(f"| {kind} | {statistics.median(taken):.0f} ({min(taken):.0f} to {max(taken):.0f}) |")


if __name__ == "__main__":
    main()
