"""`millrace simulate`: what another strategy would make of a run, on a clock that does not wait."""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from buffer import ReplayBuffer
from producer.cli.asking import AsJson, console, look, print_json, refuse
from producer.cli.keeping import app
from producer.simulate.choices import Choice, parse_option
from producer.simulate.lengths import LognormalLengths, RecordedLengths, ResponseLengths
from producer.simulate.scenario import Scenario
from producer.simulate.sweep import Compared, compared, swept

__all__ = ["app"]

_SIMULATED_MEDIAN = 50
"""Tokens of a simulated response in the median: each stands for as many of the run's as that takes."""

_UPDATE_SHARE = 0.05 / 3

_DEFAULT_PLOT = Path("simulation.png")


@dataclass(frozen=True)
class _Recorded:
    """What a simulation begins with: lengths by prompt, the responses of a group, the groups of a batch."""

    lengths: dict[str, list[int]]
    group_size: int
    batch_size: int | None


@app.command()
def simulate(
    recorded_in: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="Lengths, group and batch size of this run; else log-normal lengths.")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="Of that run; needed where it has several.")] = None,
    strategy: Annotated[str, typer.Option(metavar="NAME", help="async or sync.")] = "async",
    given: Annotated[list[str] | None, typer.Option("--set", metavar="OPTION", help="NAME=VALUE of the strategy; may be repeated.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="NAME=VALUE,VALUE: each value in turn; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, max=10**6, help="Batches.")] = 20,
    batch_size: Annotated[int | None, typer.Option(metavar="N", min=1, max=10**6, help="Groups in a batch.")] = None,
    group_size: Annotated[int | None, typer.Option(metavar="N", min=1, max=10**5, help="Responses in a group.")] = None,
    slots: Annotated[int, typer.Option(metavar="N", min=1, max=10**6, help="Requests that the engine decodes at once.")] = 256,
    rate: Annotated[float, typer.Option(metavar="TOKENS", min=1e-3, max=1e9, help="A second, of each request.")] = 50.0,
    update: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, max=1e9, help="Of a weight update; else 1/60 of the mean sync batch.")
    ] = None,
    prompts: Annotated[int, typer.Option(metavar="N", min=1, max=10**8, help="In the dataset, without --from.")] = 640,
    typical: Annotated[float, typer.Option("--median", metavar="TOKENS", min=1, max=1e9, help="Of responses, without --from.")] = 1000.0,
    tail: Annotated[float, typer.Option(metavar="RATIO", min=1, max=1e6, help="99th percentile by median, without --from.")] = 10.0,
    prompt_share: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Of the variance, the prompt's, without --from.")
    ] = 0.5,
    longest: Annotated[float, typer.Option(metavar="TOKENS", min=1, max=1e9, help="Of a response, without --from.")] = 32_000.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**31, help="Of all that is drawn.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Where to save the plot; simulation.png if not given.")] = None,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Save none.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a strategy would give: speed-up, utilisation, staleness, waste, bias."""
    try:
        path = _plot_path(plot, no_plot)
        choices = _choices(strategy, given or [], sweep or [])
        if recorded_in is None:
            scale = max(1.0, typical / _SIMULATED_MEDIAN)
            lengths: ResponseLengths = LognormalLengths(
                prompts, median=typical / scale, tail=tail, prompt_share=prompt_share, longest=max(1, round(longest / scale)), seed=seed
            )
        else:
            run = _recorded(recorded_in, task)
            scale = max(1.0, median(tokens for of in run.lengths.values() for tokens in of) / _SIMULATED_MEDIAN)
            lengths = RecordedLengths(run.lengths, scale=scale, seed=seed)
            batch_size, group_size = batch_size or run.batch_size, group_size or run.group_size
        scenario = _scenario(lengths, slots, rate / scale, update, batch_size or 64, group_size or 16, steps)
        rows = _compared(scenario, choices, None if update is not None else _UPDATE_SHARE)
    except (ValueError, TypeError, ImportError) as error:
        refuse(error)
    _show(rows, path, as_json)


def _plot_path(given: Path | None, no_plot: bool) -> Path | None:
    """Where the plot goes; None where there is to be none. One that was asked for needs what makes it, before anything is simulated."""
    from producer.simulate.plot import check_plotting

    if no_plot:
        return None
    try:
        check_plotting(given or _DEFAULT_PLOT)
    except ImportError as error:
        if given is not None:
            raise
        print(f"millrace: no plot is saved: {error}", file=sys.stderr)
        return None
    return given or _DEFAULT_PLOT


def _choices(strategy: str, given: Sequence[str], sweep: Sequence[str]) -> list[Choice]:
    options, sweeps = [parse_option(text) for text in given], [parse_option(text) for text in sweep]
    if several := [name for name, values in options if len(values) > 1]:
        raise ValueError(f"--set {several[0]} has several values; use --sweep to try each")
    if again := [name for name, times in Counter(name for name, _ in options + sweeps).items() if times > 1]:
        raise ValueError(f"{again[0]} is given more than once; write --sweep {again[0]}=VALUE,VALUE to try several")
    return swept(strategy, {name: values[0] for name, values in options}, dict(sweeps))


def _scenario(
    lengths: ResponseLengths, slots: int, rate: float, update: float | None, batch_size: int, group_size: int, steps: int
) -> Scenario:
    from agent_loop.engines.simulated_costs import CostModel

    return Scenario(lengths, CostModel(slots=slots, tokens_per_second=rate, update_seconds=update or 0.0), batch_size, group_size, steps)


def _recorded(url: str, task: str | None) -> _Recorded:
    async def ask(buffer: ReplayBuffer) -> _Recorded:
        names = [task] if task is not None else await buffer.task_names()
        if len(names) != 1:
            raise ValueError(
                f"the run has {len(names)} tasks ({', '.join(names[:5])}); say which with --task" if names else "it has no task"
            )
        lengths = await buffer.lengths_by_prompt(names[0])
        if not lengths:
            raise ValueError(f"task {names[0]!r} has no finished response whose length could be simulated")
        (group,) = await buffer.query(task_name=names[0], status=(), limit=1)
        steps = await buffer.recorded_steps(names[0])
        return _Recorded(lengths, len(group.rollouts), round(median(step.groups for step in steps)) if steps else None)

    return look(url, ask)


def _compared(scenario: Scenario, choices: Sequence[Choice], update_share: float | None) -> list[Compared]:
    from rich.console import Console

    errors = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with errors.status("simulating") if errors.is_terminal else nullcontext() as status:

        def told(choice: Choice) -> None:
            if status is not None:
                status.update(f"simulating {choice}")

        try:
            return list(compared(scenario, choices, update_share=update_share, told=told))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _show(rows: Sequence[Compared], path: Path | None, as_json: bool) -> None:
    from producer.cli.simulating_view import simulation_view

    if as_json:
        print_json({"plot": None if path is None else str(path), "runs": [record_of(row) for row in rows]})
    else:
        screen = console()
        screen.print(simulation_view(rows))
    if path is not None:
        _save_plot(rows, path)
        if not as_json:
            screen.print(f"plot saved to {path}")


def _save_plot(rows: Sequence[Compared], path: Path) -> None:
    """After the table: it took long, and a full disk is no reason to throw it away."""
    from producer.simulate.plot import plot

    try:
        plot(rows, path)
    except (ValueError, OSError) as error:
        refuse(error)


def record_of(row: Compared) -> dict[str, Any]:
    """One run as JSON has it."""
    outcome = row.outcome
    return {
        "strategy": row.choice.strategy,
        "options": dict(row.choice.options),
        "speed_up": row.speed_up,
        "seconds": outcome.seconds,
        "rollouts": outcome.rollouts,
        "utilisation": outcome.utilisation,
        "share_of_bound": outcome.share_of_bound,
        "staleness": {str(age): n for age, n in outcome.staleness.items()},
        "wasted": outcome.wasted,
        "length_bias": outcome.length_bias,
        "coverage_bias": outcome.coverage_bias,
        "preemptions": outcome.preemptions,
    }
