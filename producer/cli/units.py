"""Sizes and durations, as they are typed on a command line and as they are shown."""

import math
import re

import typer

_BYTES = (
    {"": 1, "b": 1} | {f"{letter}b": 1000**n for n, letter in enumerate("kmgt", 1)} | {f"{c}ib": 1024**n for n, c in enumerate("kmgt", 1)}
)
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str) -> int:
    """A number of bytes: "10GB" (10**10), "10GiB" (10 * 2**30), "4096"."""
    return int(_parse(text, _BYTES, "like 500MB, 10GB or 2GiB"))


def parse_seconds(text: str) -> float:
    """A number of seconds: "90", "90s", "10m", "2h", "1.5d"."""
    return _parse(text, _SECONDS, "like 90, 10m, 2h or 1d")


def _parse(text: str, units: dict[str, int], examples: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower(), re.ASCII)
    if found is None or found[2] not in units or not math.isfinite(value := float(found[1]) * units[found[2]]):
        raise typer.BadParameter(f"{text!r} is none; give one {examples}")
    return value


def shown_bytes(n: int) -> str:
    """Three digits and a unit."""
    size, units = float(n), iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"


def shown_seconds(seconds: float) -> str:
    """A duration in the largest unit of which it has two or more."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def shown_groups(n: int, which: str = "") -> str:
    """So many groups."""
    return f"1 {which}group" if n == 1 else f"{n:,} {which}groups"
