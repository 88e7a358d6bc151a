"""Shows that packing keeps every sequence once and whole within the budget, that unpacking is the identity, and that O36 is met."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.experience.packing import Layout, first_fit_decreasing

all_lengths = st.lists(st.integers(1, 20), min_size=1, max_size=40)


def test_o36_three_sequences_in_one_row() -> None:
    layout = Layout.packed([3, 2, 4], budget=9)
    ids = layout.place([[1, 2, 3], [4, 5], [6, 7, 8, 9]], fill=0, dtype=np.int64)
    assert layout.cu_seqlens(0).tolist() == [0, 3, 5, 9]
    assert layout.cu_seqlens(0).dtype == np.int32
    assert layout.max_seqlen(0) == 4
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert layout.seq_idx.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert layout.shift(ids, -100).tolist() == [[2, 3, -100, 5, -100, 7, 8, 9, -100]]


def test_rows_are_padded_to_the_fullest() -> None:
    layout = Layout.packed([3, 2, 4], budget=6)
    assert layout.rows == ((0,), (1, 2))
    assert layout.width == 6
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 0, 1, 2, 3]]
    assert layout.seq_idx.tolist() == [[0, 0, 0, -1, -1, -1], [0, 0, 1, 1, 1, 1]]
    assert layout.sequence.tolist() == [[0, 0, 0, -1, -1, -1], [1, 1, 2, 2, 2, 2]]
    assert layout.cu_seqlens(0).tolist() == [0, 3]
    assert layout.shift(layout.position_ids, -100).tolist() == [[1, 2, *[-100] * 4], [1, -100, 1, 2, 3, -100]]


def test_padded_rows_hold_one_sequence_each_in_their_order() -> None:
    layout = Layout.padded([1, 3])
    assert layout.place([[5], [6, 7, 8]], fill=0, dtype=np.int64).tolist() == [[5, 0, 0], [6, 7, 8]]


@given(lengths=all_lengths, extra=st.integers(0, 30))
def test_every_sequence_is_packed_once_and_whole_within_the_budget(lengths: list[int], extra: int) -> None:
    budget = max(lengths) + extra
    rows = first_fit_decreasing(lengths, budget)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(1 <= sum(lengths[number] for number in row) <= budget for row in rows)
    # First fit leaves no two rows that would fit in one.
    fullness = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(rows) == 1 or fullness[0] + fullness[1] > budget


@given(lengths=all_lengths, extra=st.integers(0, 30), packed=st.booleans())
def test_unplacing_is_the_inverse_of_placing(lengths: list[int], extra: int, packed: bool) -> None:
    layout = Layout.packed(lengths, max(lengths) + extra) if packed else Layout.padded(lengths)
    sequences = [np.arange(length) + 1000 * number for number, length in enumerate(lengths)]
    placed = layout.place(sequences, fill=-1, dtype=np.int64)
    assert (placed >= 0).sum() == sum(lengths)
    for given_values, found in zip(sequences, layout.unplace(placed), strict=True):
        np.testing.assert_array_equal(given_values, found)
    for row in range(len(layout.rows)):
        bounds = layout.cu_seqlens(row)
        assert [layout.seq_idx[row, start] for start in bounds[:-1]] == list(range(len(bounds) - 1))
        assert np.diff(bounds).max() == layout.max_seqlen(row)


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, over the budget of 8"):
        Layout.packed([3, 9], budget=8)
    with pytest.raises(ValueError, match="at least one sequence"):
        Layout.packed([], budget=8)
    with pytest.raises(ValueError, match="at least one token"):
        Layout.padded([3, 0])
    with pytest.raises(ValueError, match=r"lengths \(2,\) do not fit"):
        Layout.padded([3]).place([[1, 2]], fill=0, dtype=np.int64)
