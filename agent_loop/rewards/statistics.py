"""`RewardStatistics`: what a function of a `RewardSet` gave, how long it took and how it failed, for one source of data."""

import math
from dataclasses import dataclass


@dataclass(slots=True)
class RewardStatistics:
    """Counts of calls and parts, and moments of the parts.

    Attributes:
        calls: how often it was asked; once for a whole group where it judges groups, and again for each retry.
        parts: numbers it gave.
        no_say: rollouts of which it said None.
        failures: calls that raised, took too long, or gave no finite number.
        timeouts: of these, those that took too long.
        retries: calls that were repetitions.
        skipped: rollouts that went on without its part.
        filled: rollouts that were given the value for failures.
        seconds: of all calls together, without the wait for a free slot.
        longest: seconds of the longest call.
    """

    calls: int = 0
    parts: int = 0
    no_say: int = 0
    failures: int = 0
    timeouts: int = 0
    retries: int = 0
    skipped: int = 0
    filled: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    _mean: float = 0.0
    _squares: float = 0.0

    @property
    def mean(self) -> float | None:
        """Of the parts; None where there is none."""
        return self._mean if self.parts else None

    @property
    def std(self) -> float | None:
        """Of the parts, of the population; None where there is none."""
        return math.sqrt(max(0.0, self._squares / self.parts)) if self.parts else None

    def called(self, seconds: float) -> None:
        """One call ended after so long."""
        self.calls += 1
        self.seconds += seconds
        self.longest = max(self.longest, seconds)

    def gave(self, part: float) -> None:
        """One rollout's part."""
        self.parts += 1
        off = part - self._mean
        self._mean += off / self.parts
        self._squares += off * (part - self._mean)

    def __add__(self, other: "RewardStatistics") -> "RewardStatistics":
        """Of both together."""
        both = RewardStatistics(*(getattr(self, name) + getattr(other, name) for name in _COUNTS))
        both.longest = max(self.longest, other.longest)
        if both.parts:
            apart = other._mean - self._mean
            both._mean = self._mean + apart * other.parts / both.parts
            both._squares = self._squares + other._squares + apart * apart * self.parts * other.parts / both.parts
        return both

    def metrics(self) -> dict[str, float]:
        """Its numbers by name; those that do not exist are left out."""
        numbers = {
            "mean": self.mean,
            "std": self.std,
            "seconds_mean": self.seconds / self.calls if self.calls else None,
            "seconds_max": self.longest if self.calls else None,
        }
        counts = {name: float(getattr(self, name)) for name in _COUNTS if name != "seconds"}
        return {name: value for name, value in numbers.items() if value is not None} | counts


_COUNTS = ("calls", "parts", "no_say", "failures", "timeouts", "retries", "skipped", "filled", "seconds")
