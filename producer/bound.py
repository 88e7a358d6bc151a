"""When is a batch handed out, so that no group ever exceeds the bound on staleness and none is dropped? Pure decisions.

Every group has a deadline: sampled from version v on, it is handed out at v + `max_staleness` or never. A batch is handed
out at each version, the stalest groups first, and at most `bounded_limit` groups are on their way (`producer.issue`). One
rule remains: a batch waits for a group in flight where, handed out without it, the batches left until some deadline would
be too few for the groups that have to be in them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence


def due(oldest: Mapping[int, int], version: int, max_staleness: int) -> list[int]:
    """The groups that have to be in the batch of this version, the stalest first.

    Args:
        oldest: of each group not handed out the oldest version among its tokens (that of now where it has none yet).
        version: of the policy now.
        max_staleness: the bound.
    """
    return sorted((group for group, oldest_version in oldest.items() if oldest_version <= version - max_staleness), key=oldest.__getitem__)


Versions = Iterable[int] | Mapping[int, int]
"""Oldest versions of groups: one a group, or how many groups have which (a `Counter`)."""


def is_ready(
    batch_size: int, completed: Versions, in_flight: Versions, version: int, max_staleness: int, later: Sequence[int] | None = None
) -> bool:
    """Whether to hand the batch of this version out now, the stalest first. Waiting ends: at the latest when nothing is in flight.

    With at most twice the batch on its way it comes to this: enough are completed, and none in flight is due. With more,
    groups that are due at later versions may need room in this one.

    Args:
        batch_size: groups in a batch.
        completed: of each group that waits to be handed out its oldest version.
        in_flight: of each group that is not completed but will be: that runs, or was left behind and is continued.
        version: of the policy now.
        max_staleness: the bound.
        later: sizes of the batches after this one, where they differ; None: all are of its size.
    """
    waiting, unfinished = Counter(completed), Counter(in_flight)
    if waiting.total() < batch_size:
        return False
    newest, left = _handed_out(waiting, batch_size)
    if all(oldest >= newest for oldest in unfinished):
        return True  # waiting cannot make the batch any staler
    return _can_be_met(left + unfinished, [batch_size] * max_staleness if later is None else later, version, max_staleness)


def _handed_out(waiting: Counter[int], n: int) -> tuple[int, Counter[int]]:
    """The newest oldest version among the `n` stalest, and what is left without them."""
    left, newest = Counter(waiting), 0
    for newest in sorted(waiting):
        taken = min(n, waiting[newest])
        left[newest] -= taken
        n -= taken
        if n == 0:
            break
    return newest, left


def _can_be_met(left: Counter[int], later: Sequence[int], version: int, max_staleness: int) -> bool:
    """Whether, after the batch of `version`, the later ones have room for all before their deadlines."""
    demand = 0
    for oldest in sorted(left):
        demand += left[oldest]
        batches = max(0, oldest + max_staleness - version)
        if demand > sum(later[:batches]):
            return False
    return True
