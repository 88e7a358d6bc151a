"""A plain discrete-event model of what order and bounds make of batches: `python -m benchmarks.scheduling_model`.

It knows no event loop, no buffer and no strategy: responses of given lengths in slots of constant speed, and the rules. What the
strategies reach is compared with it (`tests/simulate/test_plain_model.py`), and docs/explanation/scheduling.md tells what it found.

Time is counted while the engine decodes; a pause of the whole engine at each update of the weights adds to it afterwards.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from producer.simulate.lengths import LognormalLengths, Table

SLOTS, BATCH, MEMBERS, STEPS = 256, 64, 16, 50
MEDIAN = 1000


@dataclass
class Outcome:
    """What came of a run: seconds, the groups of each batch, the staleness of each group at hand-out, and wasted tokens."""

    seconds: float = 0.0
    trained: list[int] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    wasted: float = 0.0


def sync(lengths: Table, order: Sequence[int] | None = None, steps: int = STEPS) -> Outcome:
    """Batch after batch, each to its end; `order`: of the groups, by default as they come."""
    outcome, groups = Outcome(), list(order if order is not None else range(steps * BATCH))
    for step in range(steps):
        batch = groups[step * BATCH : (step + 1) * BATCH]
        outcome.seconds += max(_ends(lengths, batch).values())
        outcome.trained += batch
        outcome.staleness += [0] * BATCH
    return outcome


def _ends(lengths: Table, groups: Sequence[int]) -> dict[int, float]:
    """When each group ends, if they get free slots in this order."""
    slots = [0.0] * SLOTS
    ends = dict.fromkeys(groups, 0.0)
    for group in groups:
        for tokens in lengths[group].tolist():
            end = slots[0] + tokens
            heapq.heapreplace(slots, end)
            ends[group] = max(ends[group], end)
    return ends


def bounded(
    lengths: Table, max_staleness: int, order: Sequence[int] | None = None, steps: int = STEPS, over_issue: float | None = None
) -> Outcome:
    """Continuous production with a hard bound, waiting in place of dropping.

    A group starts when a slot is free and fewer than the limit are started and not handed out: `(max_staleness + 1) * BATCH`, or with
    `over_issue` at most `(1 + over_issue) * BATCH`. Its version is that at its start. A batch is the stalest `BATCH` completed groups,
    and waits while a group in flight has the last version that may still be handed out.
    """
    limit = (max_staleness + 1) * BATCH if over_issue is None else min(int((1 + over_issue) * BATCH), (max_staleness + 1) * BATCH)
    groups = iter(order if order is not None else range(len(lengths)))
    outcome, now, version, unconsumed = Outcome(), 0.0, 0, 0
    left, versions = dict[int, int](), dict[int, int]()
    queue, running, completed = list[tuple[int, float]](), list[tuple[float, int]](), list[int]()
    while version < steps:
        while len(running) < SLOTS and (queue or unconsumed < limit):
            if not queue:
                if (group := next(groups, None)) is None:
                    break
                left[group], versions[group], unconsumed = lengths.shape[1], version, unconsumed + 1
                queue = [(group, tokens) for tokens in reversed(lengths[group].tolist())]
            group, tokens = queue.pop()
            heapq.heappush(running, (now + tokens, group))
        if len(completed) >= BATCH and all(versions[group] > version - max_staleness for group in left):
            completed.sort(key=versions.__getitem__)
            batch, completed = completed[:BATCH], completed[BATCH:]
            outcome.trained += batch
            outcome.staleness += [version - versions[group] for group in batch]
            version, unconsumed = version + 1, unconsumed - BATCH
            continue
        now, group = heapq.heappop(running)
        left[group] -= 1
        if left[group] == 0:
            del left[group]
            completed.append(group)
    outcome.seconds = now
    return outcome


def tail_batches(
    lengths: Table, extra: float, predicted: NDArray[np.float64] | None = None, window: int = 1, steps: int = STEPS
) -> Outcome:
    """On-policy: `(1 + extra) * BATCH` groups start, the first `BATCH` to end are the batch, the others begin anew in a batch of
    their own as soon as there are `BATCH` of them. With `predicted`, prompts come in sorted windows."""
    outcome, left_behind = Outcome(), list[int]()
    fresh = iter(range(len(lengths)) if predicted is None else windows(predicted, window))
    for _ in range(steps):
        is_tail = len(left_behind) >= BATCH
        if is_tail:
            groups, left_behind = left_behind[:BATCH], left_behind[BATCH:]
        else:
            groups = [next(fresh) for _ in range(int((1 + extra) * BATCH))]
        ends = _ends(lengths, groups)
        by_end = sorted(groups, key=ends.__getitem__)
        seconds = ends[by_end[BATCH - 1]]
        outcome.seconds += seconds
        outcome.trained += by_end[:BATCH]
        outcome.wasted += _decoded(lengths, groups, seconds, set(by_end[BATCH:]))
        left_behind += by_end[BATCH:]
    outcome.staleness = [0] * len(outcome.trained)
    return outcome


def _decoded(lengths: Table, groups: Sequence[int], until: float, of: set[int]) -> float:
    """Tokens that these groups had when the others' batch was whole."""
    slots, tokens_of = [0.0] * SLOTS, 0.0
    for group in groups:
        for tokens in lengths[group].tolist():
            begin = heapq.heapreplace(slots, slots[0] + tokens)
            tokens_of += min(tokens, max(0.0, until - begin)) if group in of else 0.0
    return tokens_of


def windows(predicted: NDArray[np.float64], batches: int, *, alternating: bool = True) -> list[int]:
    """The groups in the order of starting: windows of so many batches, each from the longest prediction to the shortest, every other
    one the other way round, so that neighbours are alike where two windows meet."""
    order: list[int] = []
    for n, begin in enumerate(range(0, len(predicted), batches * BATCH)):
        window = range(begin, min(begin + batches * BATCH, len(predicted)))
        order += sorted(window, key=lambda group: predicted[group], reverse=not (alternating and n % 2))
    return order


def recorded(lengths: Table, prompts: int) -> NDArray[np.float64]:
    """What is known of each group when it is drawn: the mean logarithm of its prompt's earlier lengths. In the first epoch that of all."""
    logs = np.log(lengths).mean(1)
    known = np.full(len(lengths), logs[:prompts].mean())
    for begin in range(prompts, len(lengths), prompts):
        earlier = logs[:begin].reshape(-1, prompts).mean(0)
        known[begin : begin + prompts] = earlier[: len(lengths) - begin]
    return known


@dataclass(frozen=True)
class Figures:
    """A run beside sync: see the issue of this benchmark. Lengths and shares are relative."""

    speed_up: float
    share_of_bound: float
    staleness: int
    wasted: float
    length_bias: float

    @classmethod
    def of(cls, outcome: Outcome, plain: Outcome, lengths: Table, steps: int = STEPS) -> "Figures":
        """Pauses of 5 % of a third of sync's mean step are added to both."""
        pauses = steps * 0.05 / 3 * plain.seconds / steps
        work = lengths[outcome.trained].sum() / SLOTS
        bias = lengths[outcome.trained].mean() / lengths[: steps * BATCH].mean() - 1
        return cls(
            (plain.seconds + pauses) / (outcome.seconds + pauses),
            (work + pauses) / (outcome.seconds + pauses),
            max(outcome.staleness),
            outcome.wasted / lengths[outcome.trained].sum(),
            float(bias),
        )


def bench_lengths(seed: int, *, longest: float = np.inf, prompts: int = 5 * 2 * BATCH, steps: int = STEPS) -> Table:
    """The lengths of the issue, in thousandths of the median, with some groups more than the steps train."""
    limit = int(min(longest * MEDIAN, 1e9))
    return LognormalLengths(prompts, median=MEDIAN, longest=limit, seed=seed).drawn((steps + 20) * BATCH, MEMBERS)


def cases(lengths: Table, prompts: int) -> dict[str, Outcome]:
    """Every rule that docs/explanation/scheduling.md speaks of."""
    known = recorded(lengths, prompts)
    found = {"sync": sync(lengths)}
    for n in (1, 5, 10):
        found[f"on-policy, windows of {n}"] = sync(lengths, windows(known, n))
    for extra in (0.125, 0.25, 0.5):
        found[f"on-policy, tail batches, {extra:g} over"] = tail_batches(lengths, extra)
    found["on-policy, tail batches, 0.125 over, windows of 5"] = tail_batches(lengths, 0.125, known, 5)
    for bound in (1, 2, 4):
        found[f"bound {bound}, 1.0 over"] = bounded(lengths, bound, over_issue=1.0)
        found[f"bound {bound}"] = bounded(lengths, bound)
        for n in (1, 5, 10):
            found[f"bound {bound}, windows of {n}"] = bounded(lengths, bound, windows(known, n))
    return found


def main(seeds: int = 8, prompts: int = 640) -> None:
    """Print the mean over seeds, with and without a limit on responses."""
    for longest in (np.inf, 32.0):
        by_case: dict[str, list[Figures]] = {}
        used: list[float] = []
        for seed in range(seeds):
            lengths = bench_lengths(seed, longest=longest, prompts=prompts)
            found = cases(lengths, prompts)
            plain = found["sync"]
            used.append(lengths[plain.trained].sum() / SLOTS / plain.seconds)
            for name, outcome in found.items():
                by_case.setdefault(name, []).append(Figures.of(outcome, plain, lengths))
        used_by = f"sync uses {np.mean(used):.2f} of the slots ({min(used):.2f} to {max(used):.2f})"
        print(f"\nresponses of at most {longest:g} medians: {used_by}\n")
        print("| rule | speed-up over sync | share of the bound | largest staleness | wasted | length bias |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, figures in by_case.items():
            rows = np.array([[one.speed_up, one.share_of_bound, one.staleness, one.wasted, one.length_bias] for one in figures])
            speed, share, _, wasted, bias = rows.mean(0)
            print(f"| {name} | {speed:.2f} | {share:.2f} | {rows[:, 2].max():.0f} | {wasted:.1%} | {bias:+.1%} |")


if __name__ == "__main__":
    main()
