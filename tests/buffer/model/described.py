"""Answers of the buffer as values that == compares bit by bit."""

from dataclasses import fields
from typing import Any

import numpy as np

from buffer import RolloutGroup, RolloutState

_FIELDS = tuple(f.name for f in fields(RolloutState))


def contents(rollout: RolloutState) -> dict[str, Any]:
    """All that a rollout holds, but for the timeline on which it was handed out, and for what it was reset from."""
    return {name: plain(getattr(rollout, name)) for name in _FIELDS if name not in ("timeline", "dropped")}


def described(value: Any) -> Any:
    """Groups field by field, their arrays with types and bits; all else as it is."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], RolloutGroup):
        return [described(group) for group in value]
    if isinstance(value, dict):
        return {key: described(of_key) for key, of_key in value.items()}
    if not isinstance(value, RolloutGroup):
        return value
    group = {"id": value.group_id, "task": value.task_name, "status": value.status, "step": value.consumed_step}
    group |= {"position": value.position, "filter_reason": value.filter_reason}
    return group | {"rollouts": [contents(rollout) | {"forks": rollout.timeline.forks} for rollout in value.rollouts]}


def of_file(group: RolloutGroup) -> Any:
    """As `described`, without the timeline of whoever reads it."""
    return described(group) | {"rollouts": [contents(rollout) for rollout in group.rollouts]}


def plain(value: Any) -> Any:
    return (value.dtype.str, value.tobytes()) if isinstance(value, np.ndarray) else value


def same(found: Any, expected: Any, where: str = "the answer") -> None:
    """Raise `AssertionError` at the first place where they differ."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        for key in found:
            same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for index, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{where}[{index}]")
    else:
        assert found == expected, f"{where}: the buffer has {found!r}, its model {expected!r}"
