"""How to sample: `SamplingParams`, the same for every engine."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are drawn; names and meanings are vLLM's.

    Attributes:
        max_tokens: the most tokens of one response, continuations included; the engine is given what is left.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: 0 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        stop: strings that end the response (found in the decoded text).
        stop_token_ids: tokens that end the response, beside the model's EOS; the ending token is kept.
        ignore_eos: go on after EOS until `max_tokens`.
        seed: of this request; None draws from the engine's own generator.

    `logprobs` that engines return are always those of the sampling distribution (after temperature and truncation).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        given: object = self.stop
        if isinstance(given, str):
            raise ValueError(f"stop={self.stop!r} is one string; pass a tuple of strings")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in self.stop_token_ids))
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        _require(self.temperature >= 0.0, "temperature", self.temperature, "0 (greedy) or more")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 (off) to 1")
        _require(self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0; 1 is off")
        _require(all(self.stop), "stop", self.stop, "non-empty strings")

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    def overridden(self, overrides: Mapping[str, Any]) -> "SamplingParams":
        """A copy with a prompt's own overrides; an unknown name is refused with the names that exist."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := set(overrides) - known:
            raise ValueError(f"unknown sampling parameters {sorted(unknown)}; known are {sorted(known)}")
        return self.replace(**overrides)


def _require(holds: bool, name: str, value: object, bound: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} is out of bounds; it must be {bound}")
