"""How many groups of a batch come from which task? A pure decision: by weight, what is left over carried to the next batch."""

import heapq
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Allotment(NamedTuple):
    """How a batch is shared out.

    Attributes:
        groups: of each task; 0 for some.
        carried: of each task that has a weight: the groups that it is owed after this batch. Below 0, it had them ahead of time.
    """

    groups: Mapping[str, int]
    carried: Mapping[str, float]


def allot(batch_size: int, weights: Mapping[str, float], carried: Mapping[str, float]) -> Allotment:
    """Share a batch out, so that over many batches each task has groups in proportion to its weight.

    While weights stay, every task's groups so far differ from its share of them by less than 1, however small its weight. What a
    change of the weights leaves over is served first. A task of weight 0 has nothing, and nothing is carried for it.

    Args:
        batch_size: groups.
        weights: by task; any scale.
        carried: of the batch before; tasks that are not in it are owed nothing.

    Raises:
        ValueError: a weight that is no finite number of 0 or more, or none above 0.
    """
    owed = _owed(checked_weights(weights), carried)
    shares = {name: weights[name] / math.fsum(weights[name] for name in owed) for name in owed}
    groups = dict.fromkeys(weights, 0)
    # A unit may be given when its share of it has begun by the end of this batch, and is due when its share is whole: the earliest
    # due first is what keeps all within 1. (A unit that has not begun is given only where a change of weights left too few that have.)
    line = [_Unit(_not_begun(owed[name], shares[name], batch_size), (1 - owed[name]) / shares[name], name) for name in owed]
    heapq.heapify(line)
    for _ in range(batch_size):
        name = line[0].name
        groups[name] += 1
        left = owed[name] - groups[name]
        heapq.heapreplace(line, _Unit(_not_begun(left, shares[name], batch_size), (1 - left) / shares[name], name))
    return Allotment(groups, {name: owed[name] + batch_size * shares[name] - groups[name] for name in owed})


def allotments(batch_size: int, weights: Mapping[str, float], carried: Mapping[str, float]) -> Iterator[Allotment]:
    """This batch and those to come, while its size and the weights stay; see `allot`."""
    while True:
        allotment = allot(batch_size, weights, carried)
        yield allotment
        carried = allotment.carried


class _Unit(NamedTuple):
    """The next group of a task; they sort by when they are to be given."""

    not_begun: bool
    due: float
    name: str


_NOISE = 1e-9
"""Sums of fractions differ from whole numbers by less."""


def _not_begun(owed: float, share: float, batch_size: int) -> bool:
    return owed + batch_size * share <= _NOISE


def _owed(weights: Mapping[str, float], carried: Mapping[str, float]) -> dict[str, float]:
    """What the tasks with a weight are owed: together nothing, also where some that were owed have left."""
    owed = {name: carried.get(name, 0.0) for name in sorted(weights) if weights[name] > 0}
    mean = math.fsum(owed.values()) / len(owed)
    return {name: amount - mean for name, amount in owed.items()}


def checked_weights(weights: Mapping[str, float]) -> Mapping[str, float]:
    """`weights`, or `ValueError`."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the weight of task {name!r} is {weight!r:.40}; it must be a number of 0 or more")
    if not any(weights.values()):
        raise ValueError(f"the weights are {dict(weights)}; one of them must be above 0, or there is nothing to produce")
    return weights
