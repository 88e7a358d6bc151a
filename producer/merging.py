"""The metrics of a batch of several tasks, from those of its parts."""

from collections.abc import Mapping, Sequence

from buffer import RolloutGroup, Share, Status
from producer.metrics import Metrics, batch_statistics

SUMS = (
    *("started", "tokens", "tokens_per_second", "groups_per_second"),
    *("completed", "interrupted", "filtered", "failed", "wasted"),
)
"""What the batch as a whole has of `produce/`, beside the seconds: these are those of its parts together."""


def merged_metrics(
    parts: Mapping[str, Metrics],
    groups: Sequence[RolloutGroup],
    shares: Sequence[Share],
    counts: Mapping[str, Mapping[Status, int]],
    seconds: float,
    version: int | None,
) -> Metrics:
    """One flat mapping: each task's metrics as `task/<name>/...`, and beside them those of the batch as a whole.

    Args:
        parts: metrics by task, of those that have a part.
        groups: of all.
        shares: how the batch was shared out, over all tasks.
        counts: by task its groups in the buffer.
        seconds: that producing the batch took.
        version: of the policy now; None where the tasks have several.
    """
    merged: Metrics = {
        "produce/seconds": seconds,
        **{name: sum(part.get(name, 0.0) for part in parts.values()) for name in (f"produce/{what}" for what in SUMS)},
        **{f"buffer/{status}": sum(of_task[status] for of_task in counts.values()) for status in Status},
        **batch_statistics(groups, version),
    }
    for share in shares:
        own: Metrics = {f"buffer/{status}": n for status, n in counts[share.task_name].items()}
        own |= {"share/weight": share.weight, "share/groups": share.groups, "share/carried": share.carried}
        merged |= {f"task/{share.task_name}/{name}": value for name, value in {**own, **parts.get(share.task_name, {})}.items()}
    return merged
