"""Numbers and names as columns hold them."""

import operator
from typing import SupportsIndex

TOO_LARGE = 2**62
"""Columns hold 64 bits, and one more than a number has to fit too."""


def plain_number(name: str, value: SupportsIndex) -> int:
    """A plain int: drivers take numpy's for bytes, or not at all."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number") from None
    if not -TOO_LARGE < number < TOO_LARGE:
        raise ValueError(f"{name}={value!r} must lie between -2**62 and 2**62")
    return number


def refuse_text(name: str, text: str) -> None:
    """Raise `ValueError` for a name that not every database holds: with half a surrogate pair, or the character 0."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}={text!r} is no text that a database holds (half a surrogate pair); give another name") from None
    if "\0" in text:
        raise ValueError(f"{name}={text!r} holds a null character, which not every database does; give another name")
