"""Where each sequence of a batch lies: one to a row with padding, or several to a row within a token budget.

A `Layout` knows only lengths. `place` puts per-token values of the sequences into rows and `unplace` takes them out again, the same
for every kind of value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

IGNORED_LABEL = -100
"""The label that cross entropy leaves out, in torch and in transformers."""


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of sequence numbers, each row's lengths together at most `budget`; every sequence once and whole.

    The longest sequence first, into the first row that has room (Johnson 1973: at most 11/9 of the fewest rows possible, plus
    6/9). Within a row, sequences stand in their own order; rows are in order of their first sequence.

    Raises:
        ValueError: a sequence is longer than the budget.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > budget:
        at = int(np.argmax(sizes))
        raise ValueError(f"sequence {at} has {sizes[at]} tokens, over the budget of {budget}; raise the budget or allow fewer tokens")
    room = np.empty(sizes.size, np.int64)
    rows: list[list[int]] = []
    for number in np.argsort(-sizes, kind="stable").tolist():
        fits = room[: len(rows)] >= sizes[number]
        row = int(np.argmax(fits)) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = budget
        rows[row].append(number)
        room[row] -= sizes[number]
    return sorted(sorted(row) for row in rows)


@dataclass(frozen=True)
class Layout:
    """The place of each sequence. `rows` holds sequence numbers, `lengths` the length of each sequence, `width` that of all rows."""

    lengths: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    width: int

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths {self.lengths}: a layout needs at least one sequence, and each of at least one token")

    @classmethod
    def padded(cls, lengths: Sequence[int]) -> "Layout":
        """One sequence a row, as wide as the longest."""
        return cls(tuple(lengths), tuple((number,) for number in range(len(lengths))), max(lengths, default=0))

    @classmethod
    def packed(cls, lengths: Sequence[int], budget: int) -> "Layout":
        """Rows of at most `budget` tokens, as wide as the fullest."""
        rows = first_fit_decreasing(lengths, budget)
        return cls(tuple(lengths), tuple(map(tuple, rows)), max((sum(lengths[number] for number in row) for row in rows), default=0))

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(row, start, end) of each sequence, by sequence number."""
        spans = {}
        for row, numbers in enumerate(self.rows):
            start = 0
            for number in numbers:
                spans[number] = (row, start, start + self.lengths[number])
                start += self.lengths[number]
        return tuple(spans[number] for number in range(len(self.lengths)))

    def place(self, sequences: Sequence[ArrayLike], *, fill: float, dtype: type[np.generic]) -> NDArray[Any]:
        """(rows, width): the values of each sequence at its place, `fill` at the end of the rows."""
        if (given := tuple(np.size(values) for values in sequences)) != self.lengths:
            raise ValueError(f"values of lengths {given} do not fit sequences of lengths {self.lengths}")
        placed = np.full((len(self.rows), self.width), fill, dtype)
        for values, (row, start, end) in zip(sequences, self.spans, strict=True):
            placed[row, start:end] = values
        return placed

    def unplace(self, placed: NDArray[Any]) -> list[NDArray[Any]]:
        """The inverse of `place`: one array a sequence, in their order."""
        return [placed[row, start:end] for row, start, end in self.spans]

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """(rows, width): 0, 1, 2, ... from each sequence's start; 0 where padded."""
        return self.place([np.arange(length) for length in self.lengths], fill=0, dtype=np.int64)

    @property
    def seq_idx(self) -> NDArray[np.int32]:
        """(rows, width): which sequence of its row a token belongs to, counted from 0; -1 where padded."""
        place_in_row = {number: place for row in self.rows for place, number in enumerate(row)}
        return self.place([np.full(length, place_in_row[number]) for number, length in enumerate(self.lengths)], fill=-1, dtype=np.int32)

    @property
    def sequence(self) -> NDArray[np.int32]:
        """(rows, width): the number of each token's sequence in the batch; -1 where padded."""
        return self.place([np.full(length, number) for number, length in enumerate(self.lengths)], fill=-1, dtype=np.int32)

    def cu_seqlens(self, row: int) -> NDArray[np.int32]:
        """(sequences of the row + 1,): where they start and end, as flash-attention's varlen functions take it; padding is left out."""
        return np.cumsum([0, *(self.lengths[number] for number in self.rows[row])], dtype=np.int32)

    def max_seqlen(self, row: int) -> int:
        """The longest sequence of the row."""
        return max(self.lengths[number] for number in self.rows[row])

    def shift(self, placed: NDArray[Any], fill: float) -> NDArray[Any]:
        """(rows, width): at each position the value of the *next* token of the same sequence; `fill` at each sequence's end.

        The logits at position t predict token t + 1, so this lines up what is known of a token with the logits it came from.
        """
        shifted = np.full_like(placed, fill)
        for row, start, end in self.spans:
            shifted[row, start : end - 1] = placed[row, start + 1 : end]
        return shifted
