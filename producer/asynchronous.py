"""`AsyncProduceStrategy`: start more than the batch needs, so that no slow prompt holds it up."""

from typing import Any

from agent_loop.sampling import number
from buffer import ReplayBuffer
from producer.issue import Load, over_issue
from producer.strategy import ProduceStrategy


class AsyncProduceStrategy(ProduceStrategy):
    """Over-issues, and interrupts what is unfinished when the batch is whole; nothing is dropped.

    Args:
        buffer: where everything is kept.
        staleness_threshold: at most `ceil((1 + staleness_threshold) * batch_size)` groups are completed or in flight.
        options: of `ProduceStrategy`.
    """

    def __init__(self, buffer: ReplayBuffer, *, staleness_threshold: float = 0.5, **options: Any) -> None:
        if number("staleness_threshold", staleness_threshold) < 0:
            raise ValueError(f"staleness_threshold={staleness_threshold} must be 0 or more; 0 issues no more than a batch needs")
        super().__init__(buffer, **options)
        self.staleness_threshold = staleness_threshold

    def to_issue(self, load: Load) -> int:
        """Up to the limit, until the batch is whole."""
        return over_issue(load, self.staleness_threshold)
