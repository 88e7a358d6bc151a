"""`Judgement`: what a reward says of one rollout, and the check that any answer is one."""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from agent_loop.errors import RewardError
from buffer.rollout import RolloutState


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a reward may give in place of a number.

    Attributes:
        score: the raw score, which filters see.
        reward: what trains, where that is another number than the score.
        metrics: numbers to keep with the rollout, in its `metrics`.
    """

    score: float
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.metrics, Mapping):
            raise TypeError(f"metrics={self.metrics!r:.80} must map names to numbers")

    def apply_to(self, state: RolloutState) -> None:
        """Write it into the rollout."""
        state.score = self.score
        state.reward = self.score if self.reward is None else self.reward
        state.metrics.update(self.metrics)


def judgement_of(value: Any, name: str) -> Judgement:
    """A reward's answer as a judgement of finite numbers.

    Raises:
        RewardError: it is none.
    """
    if not isinstance(value, Judgement):
        return Judgement(_finite(value, name))
    reward = None if value.reward is None else _finite(value.reward, name)
    metrics = {str(key): _finite(number, f"{name}, of its metric {key!r:.60},") for key, number in value.metrics.items()}
    return replace(value, score=_finite(value.score, name), reward=reward, metrics=metrics)


def answers_of(value: Any, n: int, name: str) -> list[Any]:
    """A group reward's answer as a list of `n`, one for each rollout.

    Raises:
        RewardError: it has another length, or no order.
    """
    wanted = f"it must give {n} finite numbers, one for each finished rollout of the group, in order"
    if isinstance(value, str | bytes | Mapping | Set | Judgement):  # these are iterated over too, and say nothing of an order
        raise RewardError(f"reward {name} gave {value!r:.100}; {wanted}")
    try:
        given = list(value)
    except Exception as error:
        raise RewardError(f"reward {name} gave {value!r:.100}; {wanted}") from error
    if len(given) != n:
        raise RewardError(f"reward {name} gave {len(given)} scores; {wanted}")
    return given


def _finite(value: Any, name: str) -> float:
    try:
        score = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is a tensor's, of more than one element
        score = math.nan
    if not math.isfinite(score):
        raise RewardError(f"reward {name} gave {value!r:.100}; it must give a finite number")
    return score
