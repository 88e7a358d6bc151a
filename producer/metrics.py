"""What is reported of a batch: one flat dict of numbers, ready for any logger."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from buffer import RolloutGroup, Status

Metrics = dict[str, float]


def batch_metrics(
    groups: Sequence[RolloutGroup],
    outcomes: Mapping[Status, int],
    counts: Mapping[Status, int],
    *,
    started: int,
    tokens: int,
    seconds: float,
    version: int,
) -> Metrics:
    """Metrics of a batch handed out.

    Args:
        groups: the batch.
        outcomes: what came of the groups that this call started.
        counts: of the task's groups in the buffer, after handing out.
        started: groups that this call started.
        tokens: sampled by this call, trained on now or later.
        seconds: that producing the batch took.
        version: of the policy now; staleness is counted from it.
    """
    metrics: Metrics = {
        "produce/seconds": seconds,
        "produce/started": started,
        "produce/tokens": tokens,
        "produce/tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
    }
    ended = (Status.COMPLETED, Status.INTERRUPTED, Status.FILTERED, Status.FAILED)
    metrics |= {f"produce/{status}": outcomes.get(status, 0) for status in ended}
    metrics |= {f"buffer/{status}": n for status, n in counts.items()}
    return metrics | batch_statistics(groups, version)


def batch_statistics(groups: Sequence[RolloutGroup], version: int | None) -> Metrics:
    """The metrics that tell of the groups alone; of their staleness only where the policy's version is known."""
    rollouts = [state for group in groups for state in group.rollouts]
    stale = [] if version is None else [staleness for group in groups if (staleness := group.staleness(version)) is not None]
    reasons = Counter(state.finish_reason for state in rollouts)
    return {
        **_spread("batch/reward", [state.reward for state in rollouts if state.reward is not None]),
        **_spread("batch/score", [state.score for state in rollouts if state.score is not None]),
        **_spread("batch/response_tokens", [state.response_ids.size for state in rollouts]),
        **_spread("batch/staleness", stale),
        "batch/groups": len(groups),
        "batch/rollouts": len(rollouts),
        "batch/truncated": reasons["length"] / max(1, len(rollouts)),
    }


def _spread(name: str, values: Sequence[float]) -> Metrics:
    if not values:
        return {}
    array = np.asarray(values, np.float64)
    return {f"{name}_mean": float(array.mean()), f"{name}_std": float(array.std()), f"{name}_max": float(array.max())}
