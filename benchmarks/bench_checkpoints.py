"""What checkpoints of running groups cost: `python -m benchmarks.bench_checkpoints` prints a table of tokens a second.

    python -m benchmarks.bench_checkpoints [--repeats 3] [--rate 60] [--groups 32] [--tokens 1024]

A batch of groups of 8 is produced over a simulated engine that decodes at a realistic rate, with the default checkpoints,
without, and without again as a control: in random order, so that a busy machine is unfair to none. The wall clock says what
throughput it costs. The CPU time, of the event loop's thread and of all threads, as a share of the time that sampling takes by
itself, says what it costs where the processor is the bottleneck; it is steadier than the clock on a busy machine.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from buffer import ReplayBuffer, RolloutGroup, RolloutState
from producer import ReplayPromptSampler, SyncProduceStrategy

GROUP_SIZE = 8
OFF: dict[str, Any] = {"checkpoint_tokens": None, "checkpoint_seconds": None}
CASES: dict[str, dict[str, Any]] = {"without": OFF, "without, again": OFF, "with checkpoints": {}}


@dataclass(frozen=True)
class Run:
    """What one batch took."""

    tokens_per_second: float
    loop: float  # CPU seconds a second of sampling
    threads: float
    checkpoints: int


class Counting(ReplayBuffer):
    """Counts checkpoints."""

    checkpoints = 0

    async def checkpoint(self, group: RolloutGroup) -> None:
        self.checkpoints += 1
        await super().checkpoint(group)


async def reward(state: RolloutState) -> float:
    """A judgement that costs nothing."""
    return float(state.index % 2)


async def batch(url: str, groups: int, tokens: int, rate: float, options: dict[str, Any]) -> Run:
    """Produce one batch; responses are of equal length, so that the batch takes as long as one of them at least."""
    rows = [{"prompt_ids": [10 + n % 40] * 64} for n in range(groups)]
    engine = SimulatedEngine(lengths=tokens, tokens_per_second=rate, slots=groups * GROUP_SIZE)
    async with Counting(url) as buffer, engine:
        loop = SingleTurnAgentLoop(engine, reward=reward, sampling=SamplingParams(max_tokens=tokens))
        sampler = ReplayPromptSampler(rows, buffer, group_size=GROUP_SIZE)
        strategy = SyncProduceStrategy(buffer, progress=False, **options)
        began, on_loop, on_all = time.perf_counter(), time.thread_time(), time.process_time()
        made = await strategy.produce_batch(loop, sampler, groups, "bench")
        seconds = time.perf_counter() - began
        total = sum(state.response_ids.size for group in made.groups for state in group.rollouts)
        on_loop, on_all = time.thread_time() - on_loop, time.process_time() - on_all
        sampling = tokens / rate
        return Run(total / seconds, on_loop / sampling, on_all / sampling, buffer.checkpoints)


def spread(values: list[float], form: str) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=float, default=60.0, help="tokens a second of each rollout")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    given = parser.parse_args()
    runs: dict[str, list[Run]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(given.repeats):
            for number, name in enumerate(random.sample(list(CASES), len(CASES))):
                url = f"sqlite:///{Path(folder) / f'{repeat}-{number}.db'}"
                runs[name].append(asyncio.run(batch(url, given.groups, given.tokens, given.rate, CASES[name])))
    print(f"{given.groups} groups of {GROUP_SIZE} x {given.tokens} tokens, {given.rate:g} tokens/s each, {given.repeats} repeats.\n")
    print("| | tokens/s | of without | CPU of the event loop | of all threads | checkpoints |\n| --- | --- | --- | --- | --- | ---: |")
    for name, own in runs.items():
        ratios = [run.tokens_per_second / base.tokens_per_second for run, base in zip(own, runs["without"], strict=True)]
        cells = [
            spread([run.tokens_per_second for run in own], ",.0f"),
            spread(ratios, ".3f"),
            spread([run.loop for run in own], ".1%"),
            spread([run.threads for run in own], ".1%"),
            str(own[0].checkpoints),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
