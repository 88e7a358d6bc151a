"""Which sequence goes to which rank and micro-batch: whole, within a token budget, and at about the same cost everywhere.

Everything here is a function of lengths. `balance` first makes as many parts of like cost as there are micro-batches on all ranks together,
then deals them out: in rounds, the costliest first, each to the rank that has least so far. So the ranks' totals are alike, and so are
the micro-batches that run at the same time, for which sharded training waits.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import at_least, within
from producer.experience.packing import first_fit_decreasing

Costs = NDArray[np.float64]
Parts = list[list[int]]
Plan = tuple[tuple[tuple[int, ...], ...], ...]
"""`plan[rank][micro_batch]`: numbers of sequences, ascending."""


@dataclass(frozen=True)
class Cost:
    """What a sequence of n tokens costs: linear * n + quadratic * n * n, in any unit.

    The default counts tokens. `Cost.transformer(hidden_size)` counts the work of a model's layers, where attention makes
    a long sequence dearer than short ones with as many tokens.
    """

    linear: float = 1.0
    quadratic: float = 0.0

    def __post_init__(self) -> None:
        if within("linear", self.linear, 0, float("inf")) + within("quadratic", self.quadratic, 0, float("inf")) == 0:
            raise ValueError(f"{self!r}: give numbers that are not both 0")

    @classmethod
    def transformer(cls, hidden_size: int) -> "Cost":
        """Of a decoder with causal attention: 24 h^2 operations a token in the matrices, 2 h n^2 in attention, each divided by 2 h."""
        return cls(12.0 * at_least("hidden_size", hidden_size, 1), 1.0)

    def of(self, lengths: ArrayLike) -> Costs:
        """(S,) the cost of each sequence."""
        sizes = np.asarray(lengths, np.float64)
        return self.linear * sizes + self.quadratic * sizes * sizes


_TOKENS = Cost()


def balance(
    lengths: Sequence[int],
    ranks: int = 1,
    *,
    token_budget: int | None = None,
    micro_batches: int | None = None,
    cost: Cost = _TOKENS,
    padded: bool = False,
) -> Plan:
    """Sequences dealt out to ranks and their micro-batches; each whole, and in one place.

    Every rank has the same number of micro-batches, since ranks that train together take each step together: as few as the budget
    allows, or `micro_batches`. No rank is empty. A micro-batch is empty only where there are fewer sequences than micro-batches; it is
    a rank's last, and `Experience.split` makes of it one that changes no gradient.

    Args:
        lengths: of the sequences, in tokens.
        ranks: processes that train together.
        token_budget: the most tokens of a micro-batch; None sets no bound. With `padded` each of its sequences counts as the longest does.
        micro_batches: of each rank; None takes as few as the budget allows: one without a budget.
        cost: what is to be alike.
        padded: whether a micro-batch is padded to its longest sequence; those of like length are then put together.

    Raises:
        ValueError: fewer sequences than ranks, a sequence over the budget, or a number of micro-batches that the budget does not allow.
    """
    sizes = _checked(lengths, ranks, token_budget, micro_batches)
    costs = cost.of(sizes)
    full = _fullest(sizes, token_budget, padded)
    enough = -(-len(full) // ranks)
    if micro_batches is None:
        least = 1 if token_budget is None else -(-int(sizes.sum()) // (token_budget * ranks))
        tried = range(max(least, 1), enough + 1)
    else:
        tried = range(micro_batches, micro_batches + 1)
    for number in tried:
        wanted = min(number * ranks, sizes.size)
        parts = None if padded and token_budget else _parts(costs, sizes, wanted, token_budget)
        if parts is None and len(full) <= wanted:
            parts = _divided(full, wanted, costs)
        if parts is not None:
            return _dealt(parts, costs, ranks, number)
    raise ValueError(
        f"micro_batches={micro_batches} on {ranks} ranks do not hold {int(sizes.sum())} tokens within token_budget={token_budget}; "
        f"{enough} do"
    )


def _checked(lengths: Sequence[int], ranks: int, token_budget: int | None, micro_batches: int | None) -> NDArray[np.int64]:
    sizes = np.asarray(lengths, np.int64).reshape(-1)
    if sizes.size and sizes.min() < 1:
        raise ValueError(f"a sequence of length {sizes.min()}; each has one token or more")
    for name, value in (("ranks", ranks), ("micro_batches", micro_batches), ("token_budget", token_budget)):
        if value is not None:
            at_least(name, value, 1)
    if sizes.size < ranks:
        raise ValueError(
            f"{sizes.size} sequences for {ranks} ranks: none is split, and a rank without any would wait for ever where ranks train "
            "together; take larger batches, or fewer ranks"
        )
    if token_budget is not None and sizes.max() > token_budget:
        at = int(np.argmax(sizes))
        raise ValueError(f"sequence {at} has {sizes[at]} tokens, over the budget of {token_budget}; raise the budget or allow fewer tokens")
    return sizes


def _fullest(sizes: NDArray[np.int64], budget: int | None, padded: bool) -> Parts:
    """Few micro-batches that hold everything within the budget."""
    if budget is None:
        return [list(range(sizes.size))]
    if not padded:
        return first_fit_decreasing(sizes.tolist(), budget)
    rows: Parts = []
    for number in np.argsort(-sizes, kind="stable").tolist():
        if not rows or int(sizes[rows[-1][0]]) * (len(rows[-1]) + 1) > budget:
            rows.append([])
        rows[-1].append(number)
    return rows


def _parts(costs: Costs, sizes: NDArray[np.int64], wanted: int, budget: int | None) -> Parts | None:
    """The better of two heuristics that keeps within the budget; None where neither does."""
    found = [karmarkar_karp(costs, wanted), longest_first(costs, wanted, sizes, budget)]
    within = [parts for parts in found if parts is not None and _fits(parts, sizes, budget)]
    return min(within, key=lambda parts: max(costs[part].sum() for part in parts), default=None)


def _fits(parts: Parts, sizes: NDArray[np.int64], budget: int | None) -> bool:
    return budget is None or all(int(sizes[part].sum()) <= budget for part in parts)


def longest_first(costs: ArrayLike, parts: int, sizes: ArrayLike | None = None, budget: int | None = None) -> Parts | None:
    """Each into the part with the least so far that has room, the largest first (Graham 1969: at most 4/3 - 1/(3 parts) of the best).

    None where one finds no room. With as many numbers as parts or more, no part is empty.
    """
    values = np.asarray(costs, np.float64)
    tokens = np.zeros(values.size, np.int64) if sizes is None or budget is None else np.asarray(sizes, np.int64)
    totals, room = np.zeros(parts), np.full(parts, budget or 0, np.int64)
    filled: Parts = [[] for _ in range(parts)]
    for number in np.argsort(-values, kind="stable").tolist():
        at = int(np.argmin(np.where(room >= tokens[number], totals, np.inf)))
        if room[at] < tokens[number]:
            return None
        filled[at].append(number)
        totals[at] += values[number]
        room[at] -= tokens[number]
    return filled


_Sum = tuple[float, list[int]]
"""The negative sum of some numbers, and which they are. Ascending, so that the largest sum comes first."""


def karmarkar_karp(costs: ArrayLike, parts: int) -> Parts:
    """Numbers into parts of like sums, by largest differences (Karmarkar and Karp 1982).

    Each number begins as a division of its own, with one sum that is not 0. The two divisions whose sums differ most are joined, the
    largest sum of one with the smallest of the other, until one is left. With as many numbers as parts or more, no part is empty.
    """
    values = np.asarray(costs, np.float64)
    heap: list[tuple[float, int, list[_Sum]]] = [
        (-float(value), number, [(-float(value), [number])]) for number, value in enumerate(values)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, one = heapq.heappop(heap)
        _, order, other = heapq.heappop(heap)
        joined = _joined(one, other, parts)
        least = -joined[-1][0] if len(joined) == parts else 0.0
        heapq.heappush(heap, (joined[0][0] + least, order, joined))
    sums = heap[0][2] if heap else []
    return [sorted(numbers) for _, numbers in sums] + [[] for _ in range(parts - len(sums))]


def _joined(one: list[_Sum], other: list[_Sum], parts: int) -> list[_Sum]:
    """The largest of one with the smallest of the other, of which those that are not there are 0."""
    if len(one) + len(other) <= parts:
        return sorted(one + other)
    alone = parts - len(other)  # so many of `one`, the largest, meet a 0
    pairs = [(a + b, first + second) for (a, first), (b, second) in zip(one[alone:], reversed(other[parts - len(one) :]), strict=True)]
    return sorted(one[:alone] + pairs + other[: parts - len(one)])


def _divided(rows: Parts, wanted: int, costs: Costs) -> Parts:
    """As many parts as wanted from fewer that are within the budget: the costliest of two sequences or more in two, again and again."""
    parts = [list(row) for row in rows]
    while len(parts) < wanted:
        at = max((number for number, part in enumerate(parts) if len(part) > 1), key=lambda number: float(costs[parts[number]].sum()))
        part = np.array(parts.pop(at))
        parts += [part[half].tolist() for half in karmarkar_karp(costs[part], 2)]
    return parts


def _dealt(parts: Parts, costs: Costs, ranks: int, number: int) -> Plan:
    """In rounds of one part a rank, the costliest round first; of each round the costliest part to the rank with the least so far."""
    ordered = sorted(parts, key=lambda part: (-float(costs[part].sum()), part))
    ordered += [[] for _ in range(ranks * number - len(ordered))]
    totals, dealt = [0.0] * ranks, [list[tuple[int, ...]]() for _ in range(ranks)]
    for start in range(0, len(ordered), ranks):
        waiting = sorted(range(ranks), key=lambda rank: totals[rank])
        for rank, part in zip(waiting, ordered[start : start + ranks], strict=True):
            dealt[rank].append(tuple(sorted(part)))
            totals[rank] += float(costs[part].sum())
    return tuple(map(tuple, dealt))
