"""Simulated lengths are those that were asked for: percentiles, the prompt's share, recorded responses; the same each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.simulate.lengths import LognormalLengths, RecordedLengths


def test_log_normal_lengths_have_the_median_the_tail_and_the_prompts_share() -> None:
    lengths = LognormalLengths(4000, median=1000, tail=10, prompt_share=0.5, longest=10**9).epoch(0, 16)
    assert np.median(lengths) == pytest.approx(1000, rel=0.05)
    assert np.quantile(lengths, 0.99) == pytest.approx(10_000, rel=0.1)
    logs = np.log(lengths)
    between = logs.mean(1).var() - logs.var(1, ddof=1).mean() / 16
    assert between / (between + logs.var(1, ddof=1).mean()) == pytest.approx(0.5, abs=0.05)


def test_a_prompt_is_as_long_in_the_next_epoch_and_its_responses_are_others() -> None:
    lengths = LognormalLengths(2000, median=1000, prompt_share=0.8, longest=10**9)
    one, two = np.log(lengths.epoch(0, 4)), np.log(lengths.epoch(1, 4))
    assert np.corrcoef(one.mean(1), two.mean(1))[0, 1] > 0.8
    assert (one != two).mean() > 0.99
    assert (lengths.drawn(3000, 4) == np.concatenate([lengths.epoch(0, 4), lengths.epoch(1, 4)[:1000]])).all()


@given(st.integers(1, 50), st.integers(1, 8), st.integers(0, 5))
def test_lengths_are_whole_and_in_bounds_and_the_same_each_time(prompts: int, members: int, seed: int) -> None:
    def lengths() -> LognormalLengths:
        return LognormalLengths(prompts, median=5, longest=20, seed=seed)

    drawn = lengths().drawn(2 * prompts + 1, members)
    assert drawn.shape == (2 * prompts + 1, members)
    assert drawn.min() >= 1
    assert drawn.max() <= 20
    assert (drawn == lengths().drawn(2 * prompts + 1, members)).all()


@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers(1, 500), min_size=1, max_size=6), min_size=1), st.integers(1, 8))
def test_recorded_lengths_are_the_prompts_own(recorded: dict[str, list[int]], members: int) -> None:
    drawn = RecordedLengths(recorded).epoch(0, members)
    for row, own in zip(drawn.tolist(), recorded.values(), strict=True):
        assert set(row) <= set(own)
        if len(own) == members:
            assert sorted(row) == sorted(own)


def test_recorded_lengths_are_scaled_and_never_nothing() -> None:
    assert RecordedLengths({"a": [1, 100]}, scale=50).epoch(0, 2).tolist() in ([[1, 2]], [[2, 1]])


@pytest.mark.parametrize("options", [{"prompts": 0}, {"median": 0}, {"longest": 3}, {"tail": 0.5}, {"prompt_share": 1.5}])
def test_lengths_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    arguments = {"prompts": 3, "median": 5, "longest": 20, **options}
    with pytest.raises(ValueError, match=next(iter(options))):
        LognormalLengths(**arguments)
    with pytest.raises(ValueError, match="one recorded response"):
        RecordedLengths({"a": []})
