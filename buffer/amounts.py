"""`Amount`: how much was sampled, in the three numbers that the database keeps wherever it counts groups."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Amount:
    """Tokens of responses (those of the environment included), and of these responses the whole ones.

    Attributes:
        tokens: of all responses, whole or not.
        finished: responses that are whole.
        finished_tokens: the tokens of these.
    """

    tokens: int = 0
    finished: int = 0
    finished_tokens: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.tokens + other.tokens, self.finished + other.finished, self.finished_tokens + other.finished_tokens)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.tokens - other.tokens, self.finished - other.finished, self.finished_tokens - other.finished_tokens)

    def __bool__(self) -> bool:
        return bool(self.tokens or self.finished or self.finished_tokens)

    def __str__(self) -> str:
        return f"{self.tokens} tokens ({self.finished_tokens} of them in {self.finished} whole responses)"

    @property
    def mean_length(self) -> float | None:
        """Tokens a whole response; None where there is none."""
        return self.finished_tokens / self.finished if self.finished else None

    @classmethod
    def total(cls, amounts: Iterable["Amount"]) -> Self:
        """All of them together."""
        parts = list(amounts)
        return cls(sum(a.tokens for a in parts), sum(a.finished for a in parts), sum(a.finished_tokens for a in parts))


NOTHING = Amount()
