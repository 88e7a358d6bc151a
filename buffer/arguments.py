"""Arguments as the buffer needs them: checked, with errors that name the value, the bound and the remedy."""

import math
import operator
import time
from collections.abc import Iterable
from typing import SupportsIndex, TypeVar

from buffer.codec import storable_text
from buffer.numbers import TOO_LARGE, plain_number, refuse_text
from buffer.policies import TakePolicy
from buffer.staleness import Level


def require_task(task_name: str) -> None:
    if not task_name or not isinstance(task_name, str):
        raise ValueError(f"task_name={task_name!r} names no task; give the name of one, as text")
    refuse_text("task_name", task_name)


def task_or_none(task_name: str | None) -> str | None:
    """Of one task, or of all."""
    if task_name is not None:
        require_task(task_name)
    return task_name


def check_policy(policy: object) -> None:
    if policy is not None and not isinstance(policy, TakePolicy):
        raise TypeError(f"policy={policy!r} is none; give Fifo(), StalestFirst() or FreshestFirst()")


def parse_level(level: Level | str) -> Level:
    try:
        return Level(level)
    except ValueError:
        raise ValueError(f"level={level!r} is unknown; choose among {[str(known) for known in Level]}") from None


def step_number(step: SupportsIndex) -> int:
    return whole_number("step", step, at_least=1, hint="steps count from 1, 0 is the state before training")


def whole_number(name: str, value: SupportsIndex, *, at_least: int, hint: str = "") -> int:
    """`value` as a plain int: drivers do not know numpy's."""
    try:
        number = operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least:
        raise ValueError(f"{name}={value!r} must be a whole number, {at_least} or more" + (f"; {hint}" if hint else ""))
    if number >= TOO_LARGE:
        raise ValueError(f"{name}={value!r} must be less than 2**62")
    return number


def whole_or_none(name: str, value: SupportsIndex | None, *, at_least: int = 0) -> int | None:
    return None if value is None else whole_number(name, value, at_least=at_least)


def bound_or_none(name: str, value: SupportsIndex | None) -> int | None:
    """A version that others are compared with: one before the first is fine."""
    return whole_or_none(name, value, at_least=-(2**31))


def number_or_none(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{name}={value!r:.100} is no number to compare with; give one, or None for no bound")
    return number


def text_or_none(name: str, value: str | None) -> str | None:
    """A part of a stored text, as it is stored."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be text; give a part of what you look for")
    return None if value is None else storable_text(value)


N = TypeVar("N", int, float)


def checked_range(name: str, low: N | None, high: N | None) -> tuple[N | None, N | None]:
    """Both bounds; refused where nothing can lie between them."""
    if low is not None and high is not None and low > high:
        raise ValueError(f"min_{name}={low} lies above max_{name}={high}, so nothing can be found; swap them")
    return low, high


def plain_ids(group_ids: Iterable[SupportsIndex]) -> list[int]:
    """Each id once, as a plain int."""
    return list(dict.fromkeys(plain_number("group_id", group_id) for group_id in group_ids))


def seconds(name: str, value: float) -> float:
    """A duration: a finite number above 0."""
    number = number_or_none(name, value)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"{name}={value!r} must be a number of seconds above 0")
    return number


def future_is_expired(future: object) -> bool:
    """What is to become of rollouts whose weights a rewind undoes."""
    if future not in ("keep", "expire"):
        raise ValueError(f"future={future!r} is unknown; choose 'keep' or 'expire'")
    return future == "expire"


def drawn_between(min_age: float | None, max_age: float | None) -> tuple[float | None, float | None]:
    """Ages in seconds as the latest and the earliest time (since 1970) at which a group may have been drawn."""
    low, high = checked_range("age", number_or_none("min_age", min_age), number_or_none("max_age", max_age))
    now = time.time()
    return None if low is None else now - low, None if high is None else now - high


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """`value`, if it is one of those known."""
    if value not in (choices := list(known)):
        raise ValueError(f"{name}={value!r} is unknown; choose among {choices}")
    return value
