"""Which numbers from outside can be computed with: finite is not enough, since their squares and products must be so too."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LARGEST = 1e15
"""Of rewards, values and log-probabilities. Float32, in which training computes, keeps room for their squares."""


def usable(values: ArrayLike) -> NDArray[np.bool_]:
    """Of each number whether it is finite and within `LARGEST` of 0."""
    given: NDArray[Any] = np.asarray(values, np.float64)
    return np.asarray(np.abs(given) <= LARGEST)
