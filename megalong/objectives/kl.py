"""Per-token estimates of KL(policy || ref) from the log-probabilities of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalong.config.tree import KlEstimator

MAX_LOG_RATIO = 20.0
"""exp(20) = 4.9e8 is far outside any useful ratio and far inside float32."""


def k1(log_ratio_R: Tensor) -> Tensor:
    """d. Unbiased value, large variance. Gradient: grad logp, whose mean over the policy's own samples is
    zero whatever the reference is: as a loss term it adds noise and regularises nothing; use it to measure."""
    return log_ratio_R


def k2(log_ratio_R: Tensor) -> Tensor:
    """d^2 / 2. Biased value, small variance. Gradient: d * grad logp, whose mean over the policy's own
    samples is the gradient of KL(policy || ref)."""
    return 0.5 * log_ratio_R.square()


def k3(log_ratio_R: Tensor) -> Tensor:
    """exp(-d) - 1 + d. Unbiased, never negative, small variance. Gradient: (1 - exp(-d)) * grad logp, whose
    mean over the policy's own samples is the gradient of KL(ref || policy), which has the same minimum.

    d is clamped to +-20 as a whole, so that value and gradient belong to the same function: beyond, the value
    is constant and the gradient zero, where it would otherwise outweigh the whole batch.
    """
    clamped_R = log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-clamped_R) + clamped_R


KL_ESTIMATORS: dict[KlEstimator, Callable[[Tensor], Tensor]] = {
    KlEstimator.k1: k1,
    KlEstimator.k2: k2,
    KlEstimator.k3: k3,
}


def kl_estimate(logprobs_R: Tensor, ref_logprobs_R: Tensor, *, estimator: KlEstimator) -> Tensor:
    """Estimate KL(policy || ref) at each row, with d = logprobs_R - ref_logprobs_R.

    Both [R], same float dtype and device; returns [R]. The gradient flows through logprobs_R as the estimator
    says and through ref_logprobs_R not at all.
    """
    return KL_ESTIMATORS[estimator](logprobs_R - ref_logprobs_R.detach())
