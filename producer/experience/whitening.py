"""Bringing advantages of a whole batch to one scale, once; and bounding them, with the fraction that this changed."""

from numbers import Real
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Whiten = Literal["none", "scale", "full"]
"""What is done to advantages over the batch: nothing, division by the root mean square, or the mean off and division by the deviation."""


def whiten(
    values: ArrayLike, mask: ArrayLike | None = None, *, centre: bool = True, ddof: int = 0, eps: float = 1e-8
) -> NDArray[np.float64]:
    """(values - mean) / sqrt(variance + eps), over all values whose mask is 1, and 0 elsewhere; as verl's `masked_whiten`.

    It is done once, over the whole batch: whitening each micro-batch, or twice, changes signs. Equal values give exactly 0.

    Args:
        mask: same shape; all values if not given. What lies outside may be anything, NaN too.
        centre: whether the mean is taken off. Without it, values are divided by their root mean square: what is 0 stays 0, signs stay.
        ddof: 1 for the sample's variance, 0 for the population's.
    """
    if ddof not in (0, 1) or not eps >= 0:
        raise ValueError(f"ddof={ddof} must be 0 or 1, and eps={eps} 0 or more")
    every = np.asarray(values, np.float64)
    inside = np.ones(every.shape, np.bool_) if mask is None else np.asarray(mask) != 0
    if inside.shape != every.shape:
        raise ValueError(f"mask {inside.shape} and values {every.shape} differ in shape")
    whole = bool(inside.all())  # mostly so, where tokens are flat: then none are picked out and put back
    known = every.flatten() if whole else every[inside]
    if known.size == 0:
        return np.zeros(every.shape)
    if centre:
        known -= known[0]  # so that equal values are 0 exactly, whatever their mean rounds to
        known -= known.mean()
    deviation = np.sqrt(np.dot(known, known) / max(known.size - ddof, 1) + eps)
    if not deviation > 0:
        return np.zeros(every.shape)
    known /= deviation
    whitened: NDArray[np.float64] = known.reshape(every.shape) if whole else np.zeros(every.shape)
    if not whole:
        whitened[inside] = known
    return whitened


def clip(values: ArrayLike, bounds: tuple[float, float]) -> tuple[NDArray[np.float64], float]:
    """The values within bounds, and the fraction of them that was outside, counted before. NaN stays, and counts as neither."""
    check_bounds("bounds", bounds)
    every = np.asarray(values, np.float64)
    known = ~np.isnan(every)
    outside = (every < bounds[0]) | (every > bounds[1])
    return np.clip(every, *bounds), float(outside.sum() / known.sum()) if known.any() else 0.0


def check_bounds(name: str, bounds: tuple[float, float]) -> None:
    """Raises ValueError unless the first is below the second."""
    if not (
        isinstance(bounds, tuple | list) and len(bounds) == 2 and all(isinstance(one, Real) for one in bounds) and bounds[0] < bounds[1]
    ):
        raise ValueError(f"{name}={bounds!r:.80}; give (low, high) with low below high")
