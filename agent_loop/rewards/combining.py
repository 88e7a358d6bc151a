"""From parts and weights to one number: pure, and told which parts are missing."""

import math
from collections.abc import Collection, Mapping

from agent_loop.errors import RewardError


def combined(weights: Mapping[str, float], parts: Mapping[str, float], skipped: Collection[str] = ()) -> float:
    """The sum of weight times part.

    The weights of `skipped` functions, which failed, are shared out among the others in proportion, by absolute value: equal
    parts under positive weights give the same sum with and without. A function in neither had no say, and its weight counts
    for nothing, as in TRL.

    Args:
        weights: of the functions that count.
        parts: what they gave, where they gave something; others are not looked at.
        skipped: those whose weights go to the others.

    Raises:
        RewardError: nothing is left that has a weight, or the sum is not finite.
    """
    given = {name: parts[name] for name in weights if name in parts}
    present, lost = _total(weights, given), _total(weights, [name for name in skipped if name not in given])
    if present == 0:  # a sum of nothing would be a silent 0
        raise RewardError(f"no function gave a part that counts: of {sorted(weights)}, {sorted(skipped)} failed and the others had no say")
    scale = (present + lost) / present if lost > 0 else 1.0
    total = sum(weights[name] * part for name, part in given.items()) * scale
    if not math.isfinite(total):
        raise RewardError(f"weights {dict(weights)} times parts {given} give {total}; keep them within what a float holds")
    return total


def _total(weights: Mapping[str, float], names: Collection[str]) -> float:
    return sum(abs(weights[name]) for name in names if name in weights)
