"""KL estimators: values, gradients, and what both are on average over the policy's own samples."""

import math

import pytest
import torch

from megalong.config.tree import KlEstimator
from megalong.objectives.kl import KL_ESTIMATORS, kl_estimate

POLICY_R = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
REF_R = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)  # d = 0.5, -1, 0


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [
        (KlEstimator.k1, [0.5, -1.0, 0.0], [1.0, 1.0, 1.0]),
        (KlEstimator.k2, [0.125, 0.5, 0.0], [0.5, -1.0, 0.0]),
        (
            KlEstimator.k3,
            [math.exp(-0.5) - 0.5, math.exp(1) - 2, 0.0],
            [1 - math.exp(-0.5), 1 - math.exp(1), 0.0],
        ),
    ],
)
def test_values_and_gradients(estimator, values, gradients) -> None:
    policy_R, ref_R = POLICY_R.clone().requires_grad_(), REF_R.clone().requires_grad_()
    kl_R = kl_estimate(policy_R, ref_R, estimator=estimator)
    kl_R.sum().backward()
    torch.testing.assert_close(kl_R.detach(), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(policy_R.grad, torch.tensor(gradients, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert ref_R.grad is None


def test_every_estimator_is_listed() -> None:
    assert set(KL_ESTIMATORS) == set(KlEstimator)


def test_expected_values_and_gradients_over_the_policys_own_samples() -> None:
    logits_V = torch.tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    ref_V = torch.tensor([0.9, 0.2, -0.4, 0.1], dtype=torch.float64).log_softmax(0)
    policy_V = logits_V.log_softmax(0)
    reverse = (policy_V.exp() * (policy_V - ref_V)).sum()  # KL(policy || ref)
    forward = (ref_V.exp() * (ref_V - policy_V)).sum()  # KL(ref || policy)

    def expected(estimator: KlEstimator) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean over the vocabulary, the probabilities being those of sampling (no gradient)."""
        mean = (policy_V.exp().detach() * kl_estimate(policy_V, ref_V, estimator=estimator)).sum()
        (gradient_V,) = torch.autograd.grad(mean, logits_V, retain_graph=True)
        return mean.detach(), gradient_V

    (reverse_grad_V,) = torch.autograd.grad(reverse, logits_V, retain_graph=True)
    (forward_grad_V,) = torch.autograd.grad(forward, logits_V, retain_graph=True)
    assert reverse_grad_V.abs().max() > 0.1
    value, gradient_V = expected(KlEstimator.k1)
    torch.testing.assert_close(value, reverse.detach())
    torch.testing.assert_close(gradient_V, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)
    value, gradient_V = expected(KlEstimator.k2)
    torch.testing.assert_close(gradient_V, reverse_grad_V)
    value, gradient_V = expected(KlEstimator.k3)
    torch.testing.assert_close(value, reverse.detach())
    torch.testing.assert_close(gradient_V, forward_grad_V)


def test_k3_is_finite_and_flat_beyond_20_nats() -> None:
    policy_R = torch.tensor([-200.0, -19.0, 0.0], requires_grad=True)
    kl_R = kl_estimate(policy_R, torch.tensor([0.0, 0.0, -200.0]), estimator=KlEstimator.k3)
    kl_R.sum().backward()
    want_R = torch.tensor([math.exp(20) - 21, math.exp(19) - 20, math.exp(-20) + 19])
    torch.testing.assert_close(kl_R.detach(), want_R)
    torch.testing.assert_close(policy_R.grad, torch.tensor([0.0, 1 - math.exp(19), 0.0]))


def test_k3_keeps_its_precision_near_zero() -> None:
    kl = kl_estimate(torch.tensor([1e-3]), torch.tensor([0.0]), estimator=KlEstimator.k3)
    assert kl.item() == pytest.approx(5e-7, rel=0.2)
    assert kl.item() >= 0
