"""Shows that the clipped loss and the mask of uncertain tokens meet the published numbers, for numpy and torch."""

import numpy as np
import pytest

from producer.experience.policy_loss import clipped, high_entropy, policy_loss

LOGPROBS, OLD, ADVANTAGES = [-1.0] * 4, [-1.3, -1.3, -0.7, -0.7], [1.0, -1.0, 1.0, -1.0]
LOSS = [-1.28, 1.3498588, -0.7408182, 0.8]


def test_o29_in_numpy() -> None:
    given = [np.array(values) for values in (LOGPROBS, OLD, ADVANTAGES)]
    np.testing.assert_allclose(np.exp(given[0] - given[1]), [1.3498588, 1.3498588, 0.7408182, 0.7408182], rtol=1e-6)
    np.testing.assert_allclose(policy_loss(*given), LOSS, rtol=1e-6)
    assert clipped(*given).tolist() == [True, False, False, True]
    # The fraction is that of the ratio before it is clipped: wider bounds, none.
    assert not clipped(*given, clip_low=0.3, clip_high=0.4).any()


def test_o29_in_torch_where_a_bounded_token_has_no_gradient() -> None:
    torch = pytest.importorskip("torch")
    logprobs = torch.tensor(LOGPROBS, dtype=torch.float64, requires_grad=True)
    old, advantages = (torch.tensor(values, dtype=torch.float64) for values in (OLD, ADVANTAGES))
    loss = policy_loss(logprobs, old, advantages)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), LOSS, rtol=1e-6)
    np.testing.assert_allclose(logprobs.grad.numpy(), [0, 1.3498588, -0.7408182, 0], rtol=1e-6)
    assert ((logprobs.grad == 0) == clipped(logprobs, old, advantages)).all()
    within = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    policy_loss(within, within.detach(), advantages[:1]).backward()
    assert within.grad.tolist() == [-1.0]  # the gradient of the advantage itself, whole, where nothing is bounded


def test_a_ratio_beyond_all_bounds_is_no_nan() -> None:
    torch = pytest.importorskip("torch")
    old, advantages = torch.full((3,), -1000.0), torch.tensor([0.0, 1.0, -1.0])
    logprobs = torch.zeros(3, requires_grad=True)
    loss = policy_loss(logprobs, old, advantages)
    loss.sum().backward()
    assert loss[:2].tolist() == pytest.approx([0.0, -1.28])
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logprobs.grad).all()
    assert np.isfinite(policy_loss(np.zeros(3, np.float32), old.numpy(), advantages.numpy())).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_o44_the_most_uncertain_fifth_of_the_masked_tokens(kind: str) -> None:
    entropies, mask = np.arange(1, 13).reshape(2, 6) / 10, np.array([[1] * 6, [1] * 4 + [0] * 2])
    if kind == "torch":
        torch = pytest.importorskip("torch")
        entropies, mask = torch.tensor(entropies, dtype=torch.bfloat16), torch.tensor(mask)
    kept = high_entropy(entropies, mask, top=0.2)
    assert kept.tolist() == [[False] * 6, [False, False, True, True, False, False]]
    assert high_entropy(entropies, mask, top=1.0).tolist() == (mask == 1).tolist()


def test_bad_arguments_are_refused_with_their_value() -> None:
    one = np.ones(1)
    with pytest.raises(ValueError, match=r"clip_low=1.5 must be 0 to 1"):
        policy_loss(one, one, one, clip_low=1.5)
    with pytest.raises(ValueError, match=r"clip_high=-0.1"):
        clipped(one, one, one, clip_high=-0.1)
    with pytest.raises(ValueError, match=r"top=0 is the share"):
        high_entropy(one, one, top=0)
    with pytest.raises(ValueError, match="no token is masked"):
        high_entropy(one, np.zeros(1))
