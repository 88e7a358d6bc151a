"""Mean and deviation of all rewards of a run so far, to bring those of a batch to one scale."""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import at_least, within
from agent_loop.sampling import number


@dataclass(frozen=True)
class RunningMoments:
    """Moments of the values seen so far. A value: `updated` gives the next, `to_json` what to keep with the run's checkpoint.

    A batch is added once and whole, before it is normalised; in which parts it is added makes no difference.

    Attributes:
        count: of values seen.
        mean: their mean.
        squares: the sum of their squared differences from it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        at_least("count", self.count, 0)
        number("mean", self.mean)
        within("squares", self.squares, 0, float("inf"))

    @property
    def std(self) -> float:
        """The population's deviation; 0 before there are two different values."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    def updated(self, values: ArrayLike) -> "RunningMoments":
        """The moments with these values too, NaN left out (Chan, Golub and LeVeque 1979)."""
        given = np.asarray(values, np.float64)
        known = given[~np.isnan(given)]
        if known.size == 0:
            return self
        offsets = known - known[0]  # so that the mean of equal values is that value, and their deviation 0
        mean = float(known[0] + offsets.mean())
        squares = float(((known - mean) ** 2).sum())
        count = self.count + known.size
        apart = mean - self.mean if self.count else 0.0
        return RunningMoments(
            count,
            self.mean + apart * known.size / count if self.count else mean,
            self.squares + squares + apart * apart * self.count * known.size / count,
        )

    def normalised(self, values: ArrayLike) -> NDArray[np.float64]:
        """(values - mean) / std; only the mean is taken off while the deviation is 0."""
        centred: NDArray[np.float64] = np.asarray(values, np.float64) - self.mean
        return centred / self.std if self.std > 0 else centred

    def to_json(self) -> str:
        """The state as JSON, to the last digit."""
        return json.dumps({"count": self.count, "mean": self.mean, "squares": self.squares})

    @classmethod
    def from_json(cls, text: str) -> "RunningMoments":
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            state = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{text!r:.100} is not the state of running moments: {error}") from error
        if not isinstance(state, dict) or set(state) != {"count", "mean", "squares"}:
            raise ValueError(f"{text!r:.100} is not the state of running moments; it has count, mean and squares")
        return cls(state["count"], state["mean"], state["squares"])
