"""Which prompts first? By the lengths that their responses had in earlier epochs. Pure decisions: no tasks, no storage."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol, runtime_checkable

from agent_loop.sampling import whole
from buffer import RolloutGroup


class Waiting(NamedTuple):
    """A drawn prompt that waits to be started.

    Attributes:
        group_id: of its group.
        predicted: tokens of a response; None where nothing is known.
        overtaken: groups drawn after it that were started before it.
        number: of the prompts drawn before it, since this sampler began.
    """

    group_id: int
    predicted: float | None
    overtaken: int = 0
    number: int = 0


@runtime_checkable
class PromptOrder(Protocol):
    """In which order drawn prompts are started."""

    def least(self, started: int, n: int, most_wanted: int) -> int:
        """The fewest prompts that are to wait when `n` are chosen, `started` having been chosen before, at most `most_wanted` at once."""

    def ahead(self, started: int, n: int, most_wanted: int) -> int:
        """So many are to wait where there are fewer than `least`: the difference is drawn."""

    def choose(self, waiting: Sequence[Waiting], n: int) -> list[int]:
        """The groups to start, in order: `n` of those that wait, which come in the order of their draw; all if there are fewer."""


def known_lengths(predicted: Sequence[float | None]) -> list[float] | None:
    """Predictions with the mean of the known in place of the unknown; None where nothing is known."""
    known = [length for length in predicted if length is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    return [mean if length is None else length for length in predicted]


def predicted_length(earlier: Sequence[float]) -> float | None:
    """From the lengths of earlier epochs their geometric mean: lengths vary by factors. None where there is none."""
    if not earlier:
        return None
    return math.exp(sum(math.log(max(1.0, length)) for length in earlier) / len(earlier))


def remaining(predicted: float, group: RolloutGroup) -> float:
    """Tokens that a continued group has still to decode, in all its unfinished members, if each becomes as long as predicted."""
    return sum(max(0.0, predicted - state.response_ids.size) for state in group.rollouts if not state.finished)


class _Sliding:
    """A choice among `window` times as many prompts as were ever wanted at once; what was chosen is replaced."""

    __slots__ = ()
    window: int

    def __post_init__(self) -> None:
        if whole("window", self.window) < 1:
            raise ValueError(f"window={self.window} leaves nothing to choose among; it must be 1 or more")

    def least(self, started: int, n: int, most_wanted: int) -> int:
        """See `PromptOrder`. Not replaced for each that is chosen, but for as many as are wanted at once."""
        return max(n, (self.window - 1) * most_wanted + 1)

    def ahead(self, started: int, n: int, most_wanted: int) -> int:
        """See `PromptOrder`."""
        return max(n, self.window * most_wanted)


@dataclass(frozen=True, slots=True)
class LongestPredictedFirst(_Sliding):
    """Starts first what is predicted to take longest, so that no long response is left alone at the end.

    A prompt of unknown length counts as one of mean length; while nothing is known, prompts come as they were drawn.

    Args:
        window: prompts to choose among, in multiples of the most that were wanted at once.
        most_overtaken: a prompt that so many later ones went ahead of is next. None: as many as the window has.

    Raises:
        ValueError: a bound is crossed.
    """

    window: int = 4
    most_overtaken: int | None = None

    def __post_init__(self) -> None:
        _Sliding.__post_init__(self)
        if self.most_overtaken is not None and whole("most_overtaken", self.most_overtaken) < 0:
            raise ValueError(f"most_overtaken={self.most_overtaken} is negative; 0 lets no prompt go ahead of another")

    def choose(self, waiting: Sequence[Waiting], n: int) -> list[int]:
        """The groups to start: those overtaken too often, then the longest predicted; ties as they were drawn."""
        bound = len(waiting) if self.most_overtaken is None else self.most_overtaken
        late = [group.group_id for group in waiting if group.overtaken >= bound]
        lengths = known_lengths([group.predicted for group in waiting]) or [0.0] * len(waiting)
        longest = sorted(range(len(waiting)), key=lambda at: -lengths[at])  # stable: ties as they were drawn
        return list(dict.fromkeys([*late, *(waiting[at].group_id for at in longest)]))[:n]


@dataclass(frozen=True, slots=True)
class SimilarPredictedTogether(_Sliding):
    """Starts the prompt that waits longest and those nearest to it in predicted length, the longest of them first.

    For on-policy batches, each of which lasts as long as its longest response: the long ones share a batch. Give it no more
    than you can bear of batches that differ: prompts of like length are often of like difficulty.

    Args:
        window: prompts to choose among, in multiples of the most that were wanted at once.

    Raises:
        ValueError: a bound is crossed.
    """

    window: int = 4

    def choose(self, waiting: Sequence[Waiting], n: int) -> list[int]:
        """The groups to start, the oldest of those that wait among them."""
        lengths = known_lengths([group.predicted for group in waiting])
        if lengths is None:
            return [group.group_id for group in waiting[:n]]
        nearest = sorted(range(len(waiting)), key=lambda at: (abs(lengths[at] - lengths[0]), at))[:n]
        return [waiting[at].group_id for at in sorted(nearest, key=lambda at: (-lengths[at], at))]


@dataclass(frozen=True, slots=True)
class SortedWindows:
    """Starts whole windows of prompts, each sorted by predicted length: the first from the longest down, the next from the shortest up.

    What runs at a time is then of like length, whatever is wanted at a time, so few wait for one that is much longer. A window is
    used up before the next: no prompt is overtaken by more than those of its own. This is the fastest order that there
    is here, on-policy and with a bound on staleness: see docs/explanation/scheduling.md.

    Args:
        prompts: in a window. Some batches: 5 to 10 times the batch size. Half of the dataset at most, or what was learnt in an epoch is
            known too late for the next.

    Raises:
        ValueError: `prompts` is below 1.
    """

    prompts: int = 320

    def __post_init__(self) -> None:
        if whole("prompts", self.prompts) < 1:
            raise ValueError(f"prompts={self.prompts} makes no window; it must be 1 or more")

    def least(self, started: int, n: int, most_wanted: int) -> int:
        """See `PromptOrder`: what is left of the windows that are begun."""
        return -(-(started + n) // self.prompts) * self.prompts - started

    ahead = least

    def choose(self, waiting: Sequence[Waiting], n: int) -> list[int]:
        """The groups to start, in order: what is left of a window before any of the next."""
        chosen: list[int] = []
        for window, members in groupby(waiting, key=lambda group: group.number // self.prompts):
            if len(chosen) == n:
                break
            chosen += _by_length(list(members), n - len(chosen), longest_first=window % 2 == 0)
        return chosen


def _by_length(waiting: Sequence[Waiting], n: int, *, longest_first: bool) -> list[int]:
    """The first `n` by predicted length; ties, and all where nothing is known, as they were drawn."""
    lengths = known_lengths([group.predicted for group in waiting]) or [0.0] * len(waiting)
    sign = -1 if longest_first else 1
    order = heapq.nsmallest(n, range(len(waiting)), key=lambda at: (sign * lengths[at], at))
    return [waiting[at].group_id for at in order]
