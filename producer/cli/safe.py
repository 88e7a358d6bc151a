"""What others wrote (models, datasets, tools, whoever made the file) becomes text that a terminal shows and never obeys."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from rich.text import Text

SHORT = 200
"""Characters shown of what stands on one line."""

ESCAPE_STYLE = "red"
"""What stands for a character that is not shown itself; text from outside has no style, so it cannot look the same."""


def escaped(text: str) -> str:
    r"""`text` with every character that is not printable as an escape: controls, ESC, bidi overrides, surrogates, line breaks."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    named = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
    return named.get(character) or json.dumps(character)[1:-1].replace("\x7f", r"\u007f")


def one_line(value: object, limit: int = SHORT) -> Text:
    """`value` on one line, cut at `limit` characters, escapes marked; rich does not look for markup in a `Text`."""
    text = str(value)
    shown = _marked(text[:limit])
    return shown.append("…", "dim") if len(text) > limit else shown


def _marked(text: str) -> Text:
    marked = Text()
    for printable, characters in groupby(text, str.isprintable):
        part = "".join(characters)
        marked.append(part if printable else escaped(part), None if printable else ESCAPE_STYLE)
    return marked


def clock(at: Any) -> str:
    """Seconds since 1970 as a time of this machine's zone; what is no such number is shown as it is."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OverflowError, ValueError, OSError, TypeError):
        return escaped(str(at))


def lines_of(text: str, most_lines: int, most_characters: int) -> tuple[list[Text], int]:
    """The first lines of `text`, each safe to show, and how many characters are left out."""
    kept = text[:most_characters].split("\n")[:most_lines]
    return [_marked(line) for line in kept], len(text) - len("\n".join(kept))


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Strict JSON in ASCII: controls are escaped in it, and what is not finite is null."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False).replace("\x7f", r"\u007f")


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_strict(item) for item in value]
    return value
