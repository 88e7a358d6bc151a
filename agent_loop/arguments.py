"""Arguments as constructors need them: each check gives the value, or raises `ValueError` with its name, what it is and the bound.

Python would take much that is none of it: "no" for a flag, True for a number, a text for a list of its letters.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from agent_loop.sampling import number, whole

T = TypeVar("T")


def at_least(name: str, value: object, least: int) -> int:
    """A whole number, `least` or more."""
    checked = whole(name, value)
    if checked < least:
        raise ValueError(f"{name}={value} must be {least} or more")
    return checked


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    checked = number(name, value)
    if checked <= 0:
        raise ValueError(f"{name}={value} must be above 0 and finite")
    return checked


def within(name: str, value: object, low: float, high: float) -> float:
    """A finite number from `low` to `high`, both included."""
    checked = number(name, value)
    if not low <= checked <= high:
        bound = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
        raise ValueError(f"{name}={value} must be {bound}")
    return checked


def flag(name: str, value: object) -> bool:
    """True or False: "False" and None are neither."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={value!r:.80} must be True or False")
    return bool(value)


def one_of(name: str, value: T, known: Collection[Any]) -> T:
    """One of those known: names, or None."""
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(f"{name}={value!r:.80} must be one of {tuple(known)}")
    return value


def text(name: str, value: object, what: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={value!r:.80} must be {what}, as text")
    return value


def function(name: str, value: Callable[..., T], what: str) -> Callable[..., T]:
    """Something to call."""
    if not callable(value):
        raise ValueError(f"{name}={value!r:.80} is no function; give {what}")
    return value


def mapping(name: str, value: Mapping[Any, T], what: str) -> Mapping[Any, T]:
    """A mapping such as a dict."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r:.80} must map {what}")
    return value


def instance(name: str, value: T, kinds: Any, what: str) -> T:
    """A value of these classes."""
    if not isinstance(value, kinds):
        raise ValueError(f"{name}={value!r:.80} must be {what}")
    return value
