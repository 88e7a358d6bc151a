"""What is simulated, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from agent_loop.engines.simulated_costs import CostModel
from agent_loop.sampling import whole
from producer.simulate.lengths import ResponseLengths


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run, but for its strategy.

    Attributes:
        lengths: of responses; one simulated token may stand for many.
        costs: of the engine, the pause of a weight update included.
        batch_size: groups in a batch.
        group_size: responses in a group.
        steps: batches.

    Raises:
        ValueError: a number is below 1, or the engine has no rate.
    """

    lengths: ResponseLengths
    costs: CostModel
    batch_size: int
    group_size: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "group_size", "steps"):
            if whole(name, getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)} simulates nothing; it must be 1 or more")
        if self.costs.tokens_per_second is None:
            raise ValueError("the engine needs costs with tokens_per_second: without, there is no time to simulate")

    def full_engine_seconds(self, tokens: int) -> float:
        """What so many tokens and the updates of all steps take at least: every slot decodes whenever nothing is paused."""
        return tokens / (self.costs.slots * self.costs.rate(self.costs.slots)) + self.steps * self.costs.update_seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a simulated run.

    Attributes:
        seconds: of virtual time, from the first draw to the end of the last update.
        rollouts: handed out.
        utilisation: of the slots; paused time counts as idle.
        share_of_bound: time of an engine that is always full, by `seconds`.
        staleness: how many groups were handed out at which staleness.
        wasted: of the tokens that were sampled, the share that is never trained on.
        length_bias: see `buffer.Account`.
        coverage_bias: likewise, over prompts drawn `window` steps before the end or earlier; None in short runs.
        preemptions: how often the engine took a slot away for want of memory.
        computed: seconds that this thread worked.
    """

    seconds: float
    rollouts: int
    utilisation: float
    share_of_bound: float
    staleness: Mapping[int, int]
    wasted: float
    length_bias: float | None
    coverage_bias: float | None
    preemptions: int
    computed: float

    @property
    def largest_staleness(self) -> int:
        """Of any group that was handed out."""
        return max(self.staleness, default=0)

    @property
    def mean_staleness(self) -> float:
        """Of the groups that were handed out."""
        return sum(age * n for age, n in self.staleness.items()) / max(1, sum(self.staleness.values()))
