"""Which prompts first? By the lengths that their responses had in earlier epochs. Pure decisions: no tasks, no storage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from agent_loop.sampling import whole
from buffer import RolloutGroup


class Waiting(NamedTuple):
    """A drawn prompt that waits to be started.

    Attributes:
        group_id: of its group.
        predicted: tokens of a response; None where nothing is known.
        overtaken: groups drawn after it that were started before it.
    """

    group_id: int
    predicted: float | None
    overtaken: int = 0


@runtime_checkable
class PromptOrder(Protocol):
    """In which order drawn prompts are started."""

    @property
    def window(self) -> int:
        """Prompts to choose among, in multiples of the most that were wanted at once."""

    def choose(self, waiting: Sequence[Waiting], n: int) -> list[int]:
        """The groups to start, in order: `n` of those that wait, which come in the order of their draw; all if there are fewer."""


def known_lengths(predicted: Sequence[float | None]) -> list[float] | None:
    """Predictions with the mean of the known in place of the unknown; None where nothing is known."""
    known = [length for length in predicted if length is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    return [mean if length is None else length for length in predicted]


def remaining(predicted: float, group: RolloutGroup) -> float:
    """Tokens that a continued group has still to decode, in all its unfinished members, if each becomes as long as predicted."""
    return sum(max(0.0, predicted - state.response_ids.size) for state in group.rollouts if not state.finished)


def _check_window(window: int) -> None:
    if whole("window", window) < 1:
        raise ValueError(f"window={window} leaves nothing to choose among; it must be 1 or more")


@dataclass(frozen=True, slots=True)
class LongestPredictedFirst:
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
        _check_window(self.window)
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
class SimilarPredictedTogether:
    """Starts the prompt that waits longest and those nearest to it in predicted length, the longest of them first.

    For on-policy batches, each of which lasts as long as its longest response: the long ones share a batch. Give it no more
    than you can bear of batches that differ: prompts of like length are often of like difficulty.

    Args:
        window: prompts to choose among, in multiples of the most that were wanted at once.

    Raises:
        ValueError: a bound is crossed.
    """

    window: int = 4

    def __post_init__(self) -> None:
        _check_window(self.window)

    def choose(self, waiting: Sequence[Waiting], n: int) -> list[int]:
        """The groups to start, the oldest of those that wait among them."""
        lengths = known_lengths([group.predicted for group in waiting])
        if lengths is None:
            return [group.group_id for group in waiting[:n]]
        nearest = sorted(range(len(waiting)), key=lambda at: (abs(lengths[at] - lengths[0]), at))[:n]
        return [waiting[at].group_id for at in sorted(nearest, key=lambda at: (-lengths[at], at))]
