"""Arrays of one value a token, shared: most responses are of one policy's version, of one timeline and trainable throughout."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MANY = 2**15
_INT32 = np.dtype(np.int32)


def repeated(value: int, n: int, dtype: np.dtype[Any] = _INT32) -> NDArray[Any]:
    """`value` n times, read-only; where n is not large, a part of an array that others have parts of too."""
    if n <= _MANY:
        return _shared(value, dtype)[:n]
    values = np.full(n, value, dtype)
    values.flags.writeable = False
    return values


def repeats(array: NDArray[Any], value: int) -> bool:
    """Whether it is such a shared part of this value, told without a look at what it holds; False of any other, whatever it holds."""
    base = array.base
    # The size first, or a value that no array has in common would get one.
    return isinstance(base, np.ndarray) and base.size == _MANY and base is _shared(value, array.dtype)


@lru_cache(maxsize=32)
def _shared(value: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    values = np.full(_MANY, value, dtype)
    values.flags.writeable = False
    return values
