"""What strategies give in simulation: `python -m benchmarks.bench_simulate` prints tables, and saves the plot with `--plot PATH`.

256 slots of constant speed, 50 steps of 64 groups x 16 responses, the same log-normal lengths for all: the 99th percentile is 10
medians, none is longer than 32, half of the logarithm's variance belongs to the prompt; 640 prompts, so five epochs of which the
first is without recorded lengths. A weight update pauses everything for 5 % of a third of the mean synchronous step. Beside each row
stands what the plain model (`benchmarks.scheduling_model`) says of the same rules.
"""

import argparse
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agent_loop.engines.simulated_costs import CostModel
from benchmarks import scheduling_model as model
from producer.simulate.choices import Choice
from producer.simulate.lengths import LognormalLengths
from producer.simulate.plot import plot
from producer.simulate.run import simulate
from producer.simulate.scenario import Scenario
from producer.simulate.sweep import Compared, compared

MEDIAN, LONGEST, PROMPTS = 50, 32, 640
WINDOW = 10 * model.BATCH
IN_FLIGHT = model.SLOTS + model.MEMBERS
ON_POLICY = {"max_staleness": 0, "on_stale": "expire", "tail_batch_trigger_size": model.BATCH, "staleness_threshold": 0.125}


def waiting(bound: int) -> dict[str, bool | int | float | str | None]:
    """Options of a strategy that keeps the bound by waiting."""
    return {"in_flight": "keep", "max_staleness": bound, "staleness_threshold": bound, "max_in_flight": IN_FLIGHT}


def cases(lengths: model.Table) -> Iterator[tuple[str, Choice, model.Outcome | None]]:
    """Name, strategy, and what the plain model says of its rules, where it knows them."""
    known = model.recorded(lengths, PROMPTS)
    windows = {"order": "windows", "order_size": WINDOW}
    ten, five = model.windows(known, 10), {"order": "windows", "order_size": 5 * model.BATCH}
    yield "on-policy, windows of 10 batches", Choice("sync", windows), model.sync(lengths, ten)
    yield "on-policy, tail batches", Choice("async", ON_POLICY), model.tail_batches(lengths, 0.125)
    yield "on-policy, tail batches, windows of 5", Choice("async", {**ON_POLICY, **five}), model.tail_batches(lengths, 0.125, known, 5)
    for bound in (1, 2, 4):
        yield f"bound {bound}", Choice("async", waiting(bound)), model.bounded(lengths, bound)
        order = model.bounded(lengths, bound, ten)
        yield f"bound {bound}, windows of 10 batches", Choice("async", {**waiting(bound), **windows}), order
    dropping = {**waiting(1), "on_stale": "expire", "staleness_threshold": 1.0}
    yield "bound 1, expire in place of wait", Choice("async", dropping), None
    yield "over-issue 1.0, no bound, interrupt", Choice("async", {"staleness_threshold": 1.0}), None


def main() -> None:
    """Print the tables."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--plot", type=Path)
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    lengths = LognormalLengths(PROMPTS, median=MEDIAN, longest=LONGEST * MEDIAN, seed=given.seed)
    scenario = Scenario(lengths, CostModel(slots=model.SLOTS, tokens_per_second=1.0), model.BATCH, model.MEMBERS, model.STEPS)
    table = lengths.drawn((model.STEPS + 20) * model.BATCH, model.MEMBERS)
    plain = model.sync(table)
    named = list(cases(table))
    rows: list[Compared] = []
    print(
        "| strategy | faster than sync | plain model | slots used | of the bound | staleness, mean and most | wasted | length bias |",
        end="",
    )
    print(" coverage bias | us of one core a rollout |\n" + "| --- " * 10 + "|", flush=True)
    choices = [choice for _, choice, _ in named]
    expected = {"sync": 1.0} | {name: model.Figures.of(outcome, plain, table).speed_up for name, _, outcome in named if outcome is not None}
    for name, row in zip(["sync", *(name for name, _, _ in named)], compared(scenario, choices, update_share=0.05 / 3), strict=True):
        rows.append(row)
        print(_line(name, row, expected.get(name)), flush=True)
    if given.plot is not None:
        plot(rows, given.plot, ["sync", *(name for name, _, _ in named)])
    _memory(scenario)


def _line(name: str, row: Compared, expected: float | None) -> str:
    outcome = row.outcome
    cells = [
        name,
        f"{row.speed_up:.2f}",
        "" if expected is None else f"{expected:.2f}",
        f"{outcome.utilisation:.2f}",
        f"{outcome.share_of_bound:.2f}",
        f"{outcome.mean_staleness:.2f}, {outcome.largest_staleness}",
        f"{outcome.wasted:.1%}",
        "" if outcome.length_bias is None else f"{outcome.length_bias:+.1%}",
        "" if outcome.coverage_bias is None else f"{outcome.coverage_bias:.1%}",
        f"{outcome.computed / outcome.rollouts * 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _memory(scenario: Scenario) -> None:
    """What the process has after so many rollouts of one long run."""
    short = LognormalLengths(PROMPTS, median=10, longest=10 * LONGEST)
    run = Scenario(short, scenario.costs, scenario.batch_size, scenario.group_size, 100)
    seen: dict[int, float] = {}

    def look(step: int) -> None:
        if step % 20 == 0:
            gc.collect()
            seen[step * model.BATCH * model.MEMBERS] = _resident()

    outcome = simulate(run, Choice("async", waiting(4)).strategy_of, on_batch=look)
    rate = outcome.rollouts / outcome.computed
    print(f"\none run of {outcome.rollouts} rollouts: {rate:.0f} a second of one core, so 1 000 000 in {1e6 / rate / 60:.1f} minutes")
    print("memory after rollouts: " + ", ".join(f"{n}: {mib:.0f} MiB" for n, mib in seen.items()))
    print(f"most at any time: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def _resident() -> float:
    pages = int(np.int64(Path("/proc/self/statm").read_text().split()[1]))
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
