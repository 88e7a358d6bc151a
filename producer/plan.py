"""What a strategy decides, as values; what is counted of a batch; and the batch that comes of it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from buffer import RolloutGroup, Status, TakePolicy
from producer.adaptive import AdaptiveLimit
from producer.errors import FailureBudgetError
from producer.flight import Rules
from producer.issue import Load
from producer.metrics import Metrics
from producer.prompts import Tail
from producer.running import Outcome
from producer.watchdog import Watchdog

OnStale = Literal["wait", "expire", "mask"]
OnStall = Literal["warn", "raise"]


@dataclass(frozen=True, slots=True)
class ProducedBatch:
    """A batch for training: its groups in the order they were drawn, the step they are consumed at, and metrics."""

    groups: Sequence[RolloutGroup]
    step: int
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Plan:
    """What a strategy decides, as values and pure functions.

    Attributes:
        name: of the strategy, for messages.
        to_issue: how many more groups to start now.
        rules: how they are run.
        budget: by status how many groups of a batch may end so; None is as many times the batch size as `_DEFAULT_BUDGET` says.
        max_staleness: of what is handed out.
        on_stale: what becomes of groups that would exceed it.
        tail: `tail_batch_trigger_size` and `tail_batch_candidate_step`.
        max_in_flight: the most rollouts in flight; None sets no bound.
        watchdog: says when nothing ends any more; None never does.
        on_stall: what is done then.
        policy: which completed groups are taken first.
    """

    name: str
    to_issue: Callable[[Load], int]
    rules: Rules
    budget: Mapping[Status, int | None]
    max_staleness: int | None
    on_stale: OnStale
    tail: tuple[int, int]
    max_in_flight: int | AdaptiveLimit | None
    watchdog: Watchdog | None
    on_stall: OnStall
    policy: TakePolicy

    @property
    def waits(self) -> bool:
        """Whether a batch waits for what would get too stale without it."""
        return self.max_staleness is not None and self.on_stale == "wait"


_DEFAULT_BUDGET = {Status.FAILED: 1, Status.FILTERED: 8, Status.INTERRUPTED: 16}
"""Times the batch size. An engine that ends every request early would else use up the dataset, for ever."""


@dataclass(slots=True)
class Batch:
    """What is counted of a batch from the moment the one before it was handed out.

    Attributes:
        size: groups.
        wanted: whether somebody waits for it.
        tail: whether it is for what was left behind; None where it is not known yet, or there are no tail batches.
        ended: how groups that ended did.
        resting: groups that ended early by themselves: they wait for the next batch, or they could come round for ever.
    """

    size: int
    wanted: bool = False
    tail: Tail | None = None
    ended: Counter[Status] = field(default_factory=Counter)
    unasked: int = 0
    resting: set[int] = field(default_factory=set)
    last_reason: dict[Status, str | None] = field(default_factory=dict)

    def record(self, outcome: Outcome) -> None:
        """Count what came of a group."""
        self.ended[outcome.status] += 1
        self.last_reason[outcome.status] = outcome.reason
        if outcome.status is Status.INTERRUPTED and not outcome.asked:
            self.unasked += 1
            self.resting.add(outcome.group_id)

    def check_budget(self, budget: Mapping[Status, int | None], task_name: str) -> None:
        """Raise `FailureBudgetError` if too many groups ended in vain."""
        ended = {**self.ended, Status.INTERRUPTED: self.unasked}
        for status, given in budget.items():
            bound = _DEFAULT_BUDGET[status] * self.size if given is None else given
            if ended.get(status, 0) > bound:
                raise FailureBudgetError(
                    f"{ended[status]} groups of this batch of task {task_name!r} were {status} (max_{status}={bound}), the last because: "
                    f"{self.last_reason[status]}; completed ones are in the buffer"
                )
