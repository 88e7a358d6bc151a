"""What `VLLMServerEngine` costs over a bare HTTP client, and what a second replica gives.

    python -m benchmarks.bench_servers [--repeats 5] [--real]

The simulated servers run in a thread of their own, so that the CPU time of the main thread is the client's alone. `--real` starts a vLLM
server of a tiny model, for which the work outside the model weighs most: the ratio is a lower bound.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent_loop.engines.base import Engine
from agent_loop.engines.server.answers import Events, read_piece
from agent_loop.engines.server.client import GENERATE, generate_body
from agent_loop.engines.server.replica import Flight
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.vllm_server import VLLMServerEngine
from agent_loop.sampling import SamplingParams
from examples.two_replicas import Replica
from tests.engines.simulated_server import SimulatedServer

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
PIECE = 16

Ask = Callable[[int], Awaitable[int]]


@contextlib.contextmanager
def simulated(make: Callable[[], SimulatedEngine], count: int) -> Iterator[list[str]]:
    """The addresses of so many servers in a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = [SimulatedServer(make) for _ in range(count)]
    try:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        yield [server.url for server in servers]
    finally:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.kill(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def ours(engine: VLLMServerEngine, params: SamplingParams) -> Ask:
    async def ask(number: int) -> int:
        return len((await engine.generate(PROMPT, params, request_id=str(number))).token_ids)

    return ask


def bare(session: aiohttp.ClientSession, url: str, model: str, params: SamplingParams) -> Ask:
    """The same request as one would write it by hand, its tokens and log-probabilities included."""

    async def ask(number: int) -> int:
        body = generate_body(model, PROMPT, params, (), name=f"bare-{number}", salt="default", piece=PIECE)
        tokens, logprobs = list[int](), list[float]()
        async with session.post(url + GENERATE, json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    tokens += choice["token_ids"]
                    logprobs += [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return len(tokens)

    return ask


def bare_httpx(client: httpx.AsyncClient, url: str, params: SamplingParams) -> Ask:
    """The same with httpx."""

    async def ask(number: int) -> int:
        body = generate_body("simulated", PROMPT, params, (), name=f"httpx-{number}", salt="default", piece=PIECE)
        tokens, logprobs = list[int](), list[float]()
        async with client.stream("POST", url + GENERATE, json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    tokens += choice["token_ids"]
                    logprobs += [entry["logprob"] for entry in choice["logprobs"]["content"]]
        return len(tokens)

    return ask


def read_only(session: aiohttp.ClientSession, url: str, params: SamplingParams) -> Ask:
    """The bytes of the same stream, read and thrown away: what the HTTP library takes."""

    async def ask(number: int) -> int:
        body = generate_body("simulated", PROMPT, params, (), name=f"read-{number}", salt="default", piece=PIECE)
        size = 0
        async with session.post(url + GENERATE, json=body) as response:
            while data := await response.content.readany():
                size += len(data)
        return size

    return ask


async def rate(ask: Ask, requests: int) -> float:
    """Tokens a second of `requests` coroutines at once."""
    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(ask(number) for number in range(requests))))
    return tokens / (time.perf_counter() - start)


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


async def scaling(repeats: int) -> None:
    """Two replicas against one, each with 8 slots of 25 tokens a second."""
    params, ratios = SamplingParams(max_tokens=32, ignore_eos=True), list[float]()
    with simulated(lambda: SimulatedEngine(slots=8, tokens_per_second=25.0), 2) as urls:
        for _ in range(repeats):
            rates = []
            for count in (1, 2):
                async with VLLMServerEngine(urls[:count]) as engine:
                    rates.append(await rate(ours(engine, params), 32))
            ratios.append(rates[1] / rates[0])
    print(f"| two replicas against one, 32 requests of 32 tokens, simulated | {spread(ratios)} |")


async def client_time(repeats: int) -> None:
    """CPU time of the client, and latency of a request alone: ours beside the bare one."""
    params = SamplingParams(max_tokens=64 * PIECE, ignore_eos=True)
    pieces: dict[str, list[float]] = {"ours": [], "only read": [], "bare": [], "bare, with httpx": []}
    alone: dict[str, list[float]] = {"ours": [], "bare": []}
    with simulated(lambda: SimulatedEngine(slots=64), 1) as (url,):
        async with VLLMServerEngine(url) as engine, aiohttp.ClientSession() as session, httpx.AsyncClient(timeout=None) as client:
            hand = (bare(session, url, "simulated", params), bare_httpx(client, url, params))
            asks = dict(zip(pieces, (ours(engine, params), read_only(session, url, params), *hand), strict=True))
            for repeat in range(repeats + 1):
                for name, ask in list(asks.items())[:: 1 if repeat % 2 else -1]:
                    begun = time.thread_time()
                    await rate(ask, 16)
                    pieces[name].append((time.thread_time() - begun) / 16 / 64 * 1e6)
            short = SamplingParams(max_tokens=1, ignore_eos=True)
            quick = {"ours": ours(engine, short), "bare": bare(session, url, "simulated", short)}
            for number in range(400 * repeats):  # one after the other, so that both find the machine the same
                name = ("ours", "bare")[number % 2]
                begun = time.perf_counter()
                await quick[name](number)
                alone[name].append((time.perf_counter() - begun) * 1e3)
    for name in pieces:
        print(f"| event loop's time a piece of {PIECE} tokens, us: {name} | {spread(pieces[name][1:], 0)} |")
    middle = {name: statistics.median(times[50:]) for name, times in alone.items()}
    print(f"| latency of a request for one token, p50, ms: ours and bare | {middle['ours']:.2f} and {middle['bare']:.2f} |")


def one_piece(rounds: int) -> None:
    """What is ours of a piece, without the HTTP library: cutting events out of bytes, reading and checking one, and adding its tokens."""
    entries = [{"token_id": token, "logprob": -1.2345678, "rank": 3} for token in range(PIECE)]
    content = [entry | {"top_logprobs": [entry]} for entry in entries]
    choice = {"index": 0, "token_ids": list(range(PIECE)), "logprobs": {"content": content}, "finish_reason": None}
    event = b"data: " + json.dumps({"request_id": "generate-tokens-0", "choices": [choice]}).encode() + b"\n\n"
    events, flight, times = Events(), Flight(np.array(PROMPT), SamplingParams(max_tokens=1 << 30), None, None), list[float]()
    for _ in range(rounds):
        begun = time.thread_time()
        for _ in range(1000):
            for data in events.feed(event):
                flight.take(read_piece(data, 64), 0, 0.0)
        times.append((time.thread_time() - begun) * 1e3)
    print(f"| of which ours alone, without the HTTP library, us | {spread(times, 0)} |")


class Begun:
    """An `on_tokens` that is shown as many tokens at once as checkpoints are, and tells when the first came."""

    piece_tokens = PIECE

    def __init__(self) -> None:
        self.came = asyncio.Event()

    def __call__(self, piece: object) -> None:
        self.came.set()


async def interrupted(engine: Engine, params: SamplingParams) -> tuple[float, float]:
    """Milliseconds from `interrupt` to the last of 256 partial results, and those of them that this thread computed."""
    begun = [Begun() for _ in range(256)]
    async with asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(engine.generate(PROMPT, params, request_id=str(number), on_tokens=one)) for number, one in enumerate(begun)
        ]
        for one in begun:
            await one.came.wait()
        start, computed = time.perf_counter(), time.thread_time()
        await engine.interrupt()
        await asyncio.wait(calls)
        taken = (time.perf_counter() - start) * 1e3, (time.thread_time() - computed) * 1e3
    assert all(call.result().finish_reason == "abort" for call in calls)
    return taken


async def interrupts(repeats: int) -> None:
    """Over a server, and of the same engine in this process, which is the engine's own share."""
    params, times = SamplingParams(max_tokens=2000, ignore_eos=True), dict[str, list[tuple[float, float]]]()

    def make() -> SimulatedEngine:
        return SimulatedEngine(slots=256, tokens_per_second=20.0)

    with simulated(make, 1) as (url,):
        async with VLLMServerEngine(url) as engine, make() as alone:
            for _ in range(repeats):
                for name, one in (("over a server", engine), ("of the engine itself", alone)):
                    times.setdefault(name, []).append(await interrupted(one, params))
    for name, taken in times.items():
        whole, computed = (spread([one[which] for one in taken], 0) for which in (0, 1))
        print(f"| interrupt, 256 in flight, to the last result, ms: {name} | {whole}, of which this thread computed {computed} |")


async def real(repeats: int, requests: int, tokens: int) -> None:
    """One vLLM server: ours against the bare client, in turns."""
    from tests.tiny_model import make_tiny_model

    params, ratios = SamplingParams(max_tokens=tokens, ignore_eos=True), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model")
        small = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "64")
        with Replica(model, *small, log=Path(folder) / "log") as replica:
            async with VLLMServerEngine(replica.url) as engine, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                asks = {"ours": ours(engine, params), "bare": bare(session, replica.url, str(model), params)}
                for repeat in range(repeats + 1):
                    names = ("ours", "bare") if repeat % 2 else ("bare", "ours")
                    rates = {name: await rate(asks[name], requests) for name in names}
                    if repeat:
                        ratios.append(rates["ours"] / rates["bare"])
    print(f"| one vLLM server, tokens/s of ours against a bare client, {requests} requests of {tokens} tokens | {spread(ratios)} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--real", action="store_true")
    arguments = parser.parse_args()
    print("| | median (least to most) |\n| --- | --- |")
    asyncio.run(scaling(arguments.repeats))
    asyncio.run(client_time(arguments.repeats))
    one_piece(arguments.repeats)
    asyncio.run(interrupts(arguments.repeats))
    if arguments.real:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        asyncio.run(real(arguments.repeats, 128, 64))


if __name__ == "__main__":
    main()
