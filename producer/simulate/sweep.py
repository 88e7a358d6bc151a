"""The same run with one strategy after the other, each compared with plain synchronous batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from producer.simulate.choices import Choice, Value
from producer.simulate.run import simulate
from producer.simulate.scenario import Outcome, Scenario

SYNC = Choice("sync")


@dataclass(frozen=True, slots=True)
class Compared:
    """A choice, what came of it, and how many times faster than plain synchronous batches it was."""

    choice: Choice
    outcome: Outcome
    speed_up: float


def swept(strategy: str, options: Mapping[str, Value], sweeps: Mapping[str, Sequence[Value]]) -> list[Choice]:
    """The strategy with these options and every combination of the swept ones."""
    return [Choice(strategy, {**options, **dict(zip(sweeps, values, strict=True))}) for values in product(*sweeps.values())]


def compared(
    scenario: Scenario, choices: Sequence[Choice], *, update_share: float | None = None, told: Callable[[Choice], object] = lambda _: None
) -> Iterator[Compared]:
    """Plain synchronous batches first, then each choice, as they are done.

    Args:
        scenario: of all.
        choices: strategies.
        update_share: a weight update takes this share of the mean synchronous batch, which is known when the first run is done; None:
            it takes what the scenario's costs say.
        told: called before each run.
    """
    told(SYNC)
    if update_share is not None:
        scenario = replace(scenario, costs=replace(scenario.costs, update_seconds=0.0))
    plain = simulate(scenario, SYNC.strategy_of, SYNC.sampler_of)
    if update_share is not None:
        update = update_share * plain.seconds / scenario.steps
        # Nothing runs when a synchronous batch is whole, so an update adds its time and changes nothing else.
        scenario = replace(scenario, costs=replace(scenario.costs, update_seconds=update))
        plain = _longer(plain, scenario)
    yield Compared(SYNC, plain, 1.0)
    for choice in choices:
        told(choice)
        outcome = simulate(scenario, choice.strategy_of, choice.sampler_of)
        yield Compared(choice, outcome, plain.seconds / outcome.seconds)


def _longer(plain: Outcome, scenario: Scenario) -> Outcome:
    updates = scenario.steps * scenario.costs.update_seconds
    seconds = plain.seconds + updates
    return replace(
        plain,
        seconds=seconds,
        utilisation=plain.utilisation * plain.seconds / seconds,
        share_of_bound=(plain.share_of_bound * plain.seconds + updates) / seconds,
    )
