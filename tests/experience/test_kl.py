"""Shows that estimates of the divergence meet the published numbers, unclamped and with their gradients, and how a coefficient follows."""

import numpy as np
import pytest

from producer.experience.kl import AdaptiveKL, KLEstimator, kl_estimate

LOGPROBS, REFERENCE = np.array([-1, -2, -0.5, -0.1]), np.array([-1.2, -1.5, -0.5, -3.1])
O1: list[tuple[KLEstimator, list[float]]] = [
    ("k1", [0.2, -0.5, 0, 3]),
    ("k2", [0.02, 0.125, 0, 4.5]),
    ("k3", [0.0187308, 0.1487213, 0, 2.0497871]),
]


@pytest.mark.parametrize(("estimator", "expected"), O1)
def test_o1_the_three_estimators(estimator: KLEstimator, expected: list[float]) -> None:
    np.testing.assert_allclose(kl_estimate(LOGPROBS, REFERENCE, estimator), expected, atol=1e-7)


def test_o2_nothing_is_clamped() -> None:
    np.testing.assert_allclose(kl_estimate(np.array([0.0, -20]), np.array([-20.0, 0]), "k3"), [19.0, 485165174.41], rtol=1e-9)
    assert kl_estimate(np.array([1e-9]), np.array([0.0]), "k3")[0] == pytest.approx(5e-19, abs=1e-24)


def test_o3_expectations_over_a_whole_vocabulary() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    found = [float(p @ kl_estimate(np.log(p), np.log(q), estimator)) for estimator in ("k1", "k2", "k3")]
    np.testing.assert_allclose(found, [0.2748872, 0.293856, 0.2748872], atol=1e-7)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_as_a_loss_term_only_k2_has_the_gradient_of_the_divergence(estimator: KLEstimator) -> None:
    torch = pytest.importorskip("torch")
    logits = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.9, 0.1, -0.7], dtype=torch.float64), -1)
    logprobs = torch.log_softmax(logits, -1)
    p = logprobs.exp()
    (exact,) = torch.autograd.grad((p * (logprobs - reference)).sum(), logits, retain_graph=True)
    # The policy has sampled the tokens, so their chances are numbers; the gradient passes through the log-probabilities only.
    (sampled,) = torch.autograd.grad((p.detach() * kl_estimate(logprobs, reference, estimator)).sum(), logits)
    assert torch.allclose(sampled, exact) == (estimator == "k2")
    assert torch.allclose(sampled, torch.zeros(3, dtype=torch.float64)) == (estimator == "k1")


def test_o30_a_coefficient_that_follows_its_target() -> None:
    start = AdaptiveKL(coef=0.1, target=6)
    assert start.updated(12, 256).coef == pytest.approx(0.100512)
    assert start.updated(3, 256).coef == pytest.approx(0.099488)
    assert start.updated(6, 256) == start


def test_bad_arguments_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="estimator='k4' must be one of"):
        kl_estimate(LOGPROBS, REFERENCE, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target=0 must be above 0"):
        AdaptiveKL(0.1, 0)
    with pytest.raises(ValueError, match="kl=nan must be a finite number"):
        AdaptiveKL(0.1, 6).updated(float("nan"), 3)
