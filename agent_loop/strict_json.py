"""JSON that a model or a dataset wrote, read as strictly as its meaning needs: no key twice, no NaN, nothing too deep."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

DEEPEST = 32
"""Levels of lists and mappings; what is deeper was not meant, and other readers of it might not bear it."""


def read_object(text: str) -> dict[str, Any]:
    """The mapping that `text` holds.

    Raises:
        ValueError: it is no JSON, or no mapping; a key stands twice, a number is not finite, a text holds half a surrogate pair, or
            it is nested deeper than `DEEPEST`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not a mapping")
    check_plain(value)
    return value


def check_plain(value: Any) -> None:
    """Raise `ValueError` where `value` is nested too deep, or a text in it cannot be written as UTF-8."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        for text in (one for one in level if isinstance(one, str)):
            _check_text(text)
        level, depth = [inner for one in level for inner in _within(one)], depth + 1


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return value if isinstance(value, list | tuple) else ()


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{ascii(text)[:40]} holds half a surrogate pair")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.60} stands twice")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number:.40} is no finite number")
    return value
