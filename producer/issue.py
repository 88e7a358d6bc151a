"""How many more groups to start? Pure decisions: no tasks, no storage."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """Where a batch stands: groups wanted, completed (those found in the buffer included), and in flight."""

    batch_size: int
    completed: int
    in_flight: int


def exact(load: Load) -> int:
    """As many as are missing if everything in flight completes."""
    return max(0, load.batch_size - load.completed - load.in_flight)


def over_issue(load: Load, staleness_threshold: float) -> int:
    """Up to `ceil((1 + staleness_threshold) * batch_size)` groups completed or in flight; none once the batch is whole."""
    if load.completed >= load.batch_size:
        return 0
    return max(0, issue_limit(load.batch_size, staleness_threshold) - load.completed - load.in_flight)


def issue_limit(batch_size: int, staleness_threshold: float) -> int:
    """`ceil((1 + staleness_threshold) * batch_size)`, safe against 1.1 * 10 = 11.000000000000002."""
    return math.ceil((1 + staleness_threshold) * batch_size * (1 - 1e-12))
