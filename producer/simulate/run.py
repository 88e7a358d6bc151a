"""Running a strategy against `SimulatedEngine` in virtual time, with a buffer that works in the event loop."""

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from agent_loop import SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.engines.simulated_policy import Request
from buffer import ReplayBuffer
from buffer.inline import InlineReplayBuffer
from producer.prompts import PromptSampler, ReplayPromptSampler
from producer.simulate import virtual_time
from producer.simulate.scenario import Outcome, Scenario
from producer.strategy import ProduceStrategy

TASK = "simulated"

_FIRST_GROUP = 1
"""The number of the first group of a database."""

MakeStrategy = Callable[[ReplayBuffer], ProduceStrategy]
MakeSampler = Callable[[list[dict[str, list[int]]], ReplayBuffer, int], PromptSampler]
"""(rows, buffer, group size) -> who draws prompts, in the order of the rows."""


def in_order(rows: list[dict[str, list[int]]], buffer: ReplayBuffer, group_size: int) -> PromptSampler:
    """Prompts as they come, and first what was left behind."""
    return ReplayPromptSampler(rows, buffer, group_size, shuffle=False)


def simulate(
    scenario: Scenario,
    make_strategy: MakeStrategy,
    make_sampler: MakeSampler = in_order,
    *,
    folder: Path | None = None,
    on_batch: Callable[[int], object] = lambda step: None,
) -> Outcome:
    """Run a strategy through a scenario; the same arguments give the same outcome, but for `computed`.

    Args:
        scenario: see `Scenario`.
        make_strategy: gives the strategy, the one that production would use, for a buffer.
        make_sampler: who draws prompts.
        folder: where the run's database `run.db` is kept; None: it is thrown away.
        on_batch: called with each step whose batch was handed out.
    """
    with tempfile.TemporaryDirectory(prefix="millrace-") as thrown_away:
        path = (folder or Path(thrown_away)) / "run.db"
        return virtual_time.run(_run(scenario, make_strategy, make_sampler, f"sqlite:///{path.absolute()}", on_batch))


@dataclass(slots=True)
class _Tally:
    rollouts: int = 0
    tokens: int = 0
    staleness: Counter[int] = field(default_factory=Counter)


async def _run(
    scenario: Scenario, make_strategy: MakeStrategy, make_sampler: MakeSampler, url: str, on_batch: Callable[[int], object]
) -> Outcome:
    computed, loop = time.thread_time(), asyncio.get_running_loop()
    rows = [{"prompt_ids": [1 + number]} for number in range(scenario.lengths.prompts)]
    async with InlineReplayBuffer.open(url) as buffer, _engine(scenario) as engine, AsyncExitStack() as entered:
        agent_loop = SingleTurnAgentLoop(engine, None, sampling=SamplingParams(max_tokens=scenario.lengths.longest))
        strategy, sampler = make_strategy(buffer), make_sampler(rows, buffer, scenario.group_size)
        if strategy.in_flight == "keep":
            await entered.enter_async_context(strategy)
        began, tally = loop.time(), _Tally()
        for step in range(1, scenario.steps + 1):
            batch = await strategy.produce_batch(agent_loop, sampler, scenario.batch_size, TASK, step=step)
            for group in batch.groups:
                tally.staleness[group.staleness(engine.version) or 0] += 1
                tally.rollouts += len(group.rollouts)
                tally.tokens += sum(state.response_ids.size for state in group.rollouts)
            await engine.update_weights({"seed": step}, step)
            await buffer.commit(step, version=step)
            on_batch(step)
        seconds, did = loop.time() - began, engine.statistics()
        await entered.aclose()
        account = await buffer.account(TASK)
    return Outcome(
        seconds=seconds,
        rollouts=tally.rollouts,
        utilisation=did.busy_slot_seconds / (scenario.costs.slots * seconds),
        share_of_bound=scenario.full_engine_seconds(tally.tokens) / seconds,
        staleness=dict(sorted(tally.staleness.items())),
        wasted=sum(account.wasted.values()) / max(1, account.generated),
        length_bias=account.length_bias,
        coverage_bias=account.coverage_bias,
        preemptions=did.preemptions,
        computed=time.thread_time() - computed,
    )


def _engine(scenario: Scenario) -> SimulatedEngine:
    lengths = scenario.lengths
    return SimulatedEngine(
        lengths=_LengthOf(scenario),
        costs=scenario.costs,
        pieces=False,
        vocab_size=lengths.prompts + 2,  # 0 ends a response, and the last fills it
        max_length=lengths.longest + 2,
    )


class _LengthOf:
    """The length of a request's response: that of its draw and its place in the group, whatever the strategy does."""

    def __init__(self, scenario: Scenario) -> None:
        self._lengths, self._members = scenario.lengths, scenario.group_size

    def __call__(self, request: Request) -> int:
        _, group_id, member = request.session.rsplit("-", 2)
        prompt = int(request.ids[0]) - 1
        # Prompts are drawn in their order, and groups are numbered as they are drawn.
        epoch = (int(group_id) - _FIRST_GROUP) // self._lengths.prompts
        return int(self._lengths.epoch(epoch, self._members)[prompt, int(member)])
