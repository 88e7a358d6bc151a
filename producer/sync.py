"""`SyncProduceStrategy`: start what is missing, wait for all of it."""

from producer.issue import Load, exact
from producer.strategy import ProduceStrategy


class SyncProduceStrategy(ProduceStrategy):
    """Starts exactly as many groups as the batch lacks, and replaces those that do not complete.

    Every response is sampled by the policy that the batch is for, unless the buffer held older ones.
    """

    def to_issue(self, load: Load) -> int:
        """As many as are missing."""
        return exact(load)
