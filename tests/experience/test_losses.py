"""Shows that loss reductions meet the published numbers, for numpy and torch, and that weights give them for any split of the batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.experience.losses import Reduction, Totals, reduce_loss, token_weights
from producer.experience.packing import Layout

LOSS = [[1.0, 2, 0], [3, 4, 5]]
MASK = [[1, 1, 0], [1, 1, 1]]
O28: list[tuple[Reduction, int | None, float]] = [
    ("token-mean", None, 3.0),
    ("seq-mean-token-mean", None, 2.75),
    ("seq-mean-token-sum", None, 7.5),
    ("dr_grpo", 10, 0.75),
    ("seq-sum-norm", 10, 1.5),
]


@pytest.mark.parametrize(("reduction", "max_length", "expected"), O28)
@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.float32])
def test_o28_in_numpy(reduction: Reduction, max_length: int | None, expected: float, dtype: type[np.generic]) -> None:
    loss, mask = np.array(LOSS), np.array(MASK, dtype)
    assert reduce_loss(loss, mask, reduction, max_length=max_length) == pytest.approx(expected)
    weights = token_weights(mask, [[0] * 3, [1] * 3], reduction, max_length=max_length)
    assert (loss * weights).sum() == pytest.approx(expected)


@pytest.mark.parametrize(("reduction", "max_length", "expected"), O28)
def test_o28_in_torch_with_the_gradient_that_the_weights_say(reduction: Reduction, max_length: int | None, expected: float) -> None:
    torch = pytest.importorskip("torch")
    loss, mask = torch.tensor(LOSS, requires_grad=True), torch.tensor(MASK, dtype=torch.bool)
    reduced = reduce_loss(loss, mask, reduction, max_length=max_length)
    reduced.backward()
    assert reduced.item() == pytest.approx(expected)
    np.testing.assert_allclose(loss.grad.numpy(), token_weights(MASK, [[0] * 3, [1] * 3], reduction, max_length=max_length), rtol=1e-6)


@pytest.mark.parametrize(("reduction", "max_length", "expected"), O28)
def test_rows_without_a_trained_token_do_not_count(reduction: Reduction, max_length: int | None, expected: float) -> None:
    loss, mask = np.array([*LOSS, [9.0, 9, 9]]), np.array([*MASK, [0, 0, 0]])
    assert reduce_loss(loss, mask, reduction, max_length=max_length) == pytest.approx(expected)
    assert reduce_loss(loss, np.zeros_like(mask), reduction, max_length=max_length) == 0.0
    assert token_weights(np.zeros_like(mask), mask, reduction, max_length=max_length).sum() == 0.0


@pytest.mark.parametrize(("reduction", "max_length"), [(reduction, length) for reduction, length, _ in O28])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_packing_does_not_change_the_reduction(reduction: Reduction, max_length: int | None, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses, masks = [rng.normal(size=n) for n in lengths], [rng.integers(0, 2, n) for n in lengths]
    padded, packed = Layout.padded(lengths), Layout.packed(lengths, budget=12)
    expected = reduce_loss(
        padded.place(losses, fill=0, dtype=np.float64), padded.place(masks, fill=0, dtype=np.int64), reduction, max_length=max_length
    )
    weights = token_weights(packed.place(masks, fill=0, dtype=np.int64), packed.sequence, reduction, max_length=max_length)
    by_row = (packed.place(losses, fill=7, dtype=np.float64) * weights).sum(-1)
    assert by_row.sum() == pytest.approx(expected)


@pytest.mark.parametrize(("reduction", "max_length"), [(reduction, length) for reduction, length, _ in O28])
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), ranks=st.integers(1, 3), micro=st.integers(1, 3), seed=st.integers(0, 999)
)
def test_neither_ranks_nor_micro_batches_change_the_gradient(
    reduction: Reduction, max_length: int | None, lengths: list[int], ranks: int, micro: int, seed: int
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    features, masks = [rng.normal(size=(n, 3)) for n in lengths], [rng.integers(0, 2, n) for n in lengths]
    model = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64, requires_grad=True)

    def gradient(numbers: list[int], totals: Totals | None, rows_at_once: int) -> np.ndarray:
        """Of a rank's sequences, one row each, accumulated over micro-batches of so many rows."""
        layout = Layout.padded([lengths[number] for number in numbers])
        mask = layout.place([masks[number] for number in numbers], fill=0, dtype=np.int64)
        inputs = np.stack([layout.place([features[number][:, at] for number in numbers], fill=9, dtype=np.float64) for at in range(3)], -1)
        weights = token_weights(mask, layout.sequence, reduction, max_length=max_length, totals=totals)
        model.grad = torch.zeros_like(model)
        for start in range(0, len(numbers), rows_at_once):
            at = slice(start, start + rows_at_once)
            loss = torch.tanh(torch.from_numpy(inputs[at]) @ model) ** 2
            (loss * torch.from_numpy(weights[at])).sum().backward()
        accumulated: np.ndarray = model.grad.numpy().copy()
        return accumulated

    everything = list(range(len(lengths)))
    parts = [part for rank in range(ranks) if (part := everything[rank::ranks])]
    totals = Totals(0, 0)
    for part in parts:
        totals += Totals.of(np.concatenate([masks[at] for at in part]), np.concatenate([np.full(lengths[at], at) for at in part]))
    found = sum(gradient(part, totals, micro) for part in parts)
    np.testing.assert_allclose(found, gradient(everything, None, len(everything)), atol=1e-12)


@pytest.mark.parametrize(("reduction", "max_length", "expected"), O28)
def test_what_lies_outside_the_mask_may_be_anything(reduction: Reduction, max_length: int | None, expected: float) -> None:
    torch = pytest.importorskip("torch")
    loss = np.where(np.array(MASK) == 1, LOSS, np.nan)
    assert reduce_loss(loss, np.array(MASK), reduction, max_length=max_length) == pytest.approx(expected)
    tensor = torch.tensor(loss, requires_grad=True)
    reduced = reduce_loss(tensor, torch.tensor(MASK), reduction, max_length=max_length)
    reduced.backward()
    assert reduced.item() == pytest.approx(expected)
    np.testing.assert_allclose(tensor.grad.numpy(), token_weights(MASK, [[0] * 3, [1] * 3], reduction, max_length=max_length), rtol=1e-6)


def test_totals_below_those_of_a_part_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Totals\(tokens=4, sequences=2\) is less than this part alone"):
        token_weights(MASK, [[0] * 3, [1] * 3], totals=Totals(4, 2))
    with pytest.raises(ValueError, match="tokens=1 and sequences=2"):
        Totals(1, 2)


def test_bad_arguments_are_refused_with_their_value() -> None:
    loss, mask = np.array(LOSS), np.array(MASK)
    with pytest.raises(ValueError, match="reduction='mean' must be one of"):
        reduce_loss(loss, mask, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'dr_grpo' and 'seq-sum-norm' need"):
        reduce_loss(loss, mask, "dr_grpo")
    with pytest.raises(ValueError, match="max_length=5 with 'token-mean'"):
        token_weights(mask, mask, "token-mean", max_length=5)
    with pytest.raises(ValueError, match="max_length=nan must be a whole number"):
        token_weights(mask, mask, "dr_grpo", max_length=float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in shape"):
        token_weights(mask, [0, 1])
