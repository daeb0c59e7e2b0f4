"""The clipped policy-gradient loss of the GRPO family (GRPO, Dr.GRPO, RLOO, REINFORCE++, DAPO, GSPO)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megalong.config.tree import KlEstimator, RatioLevel
from megalong.objectives.kl import MAX_LOG_RATIO, kl_estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossSettings:
    """Plain values of the loss. Raises ValueError for values outside the stated ranges."""

    clip_low: float
    """0 to 1. The ratio of a response with a negative advantage earns nothing more below 1 - clip_low."""
    clip_high: float
    """From 0. The ratio of a response with a positive advantage earns nothing more above 1 + clip_high."""
    ratio: RatioLevel
    kl_coef: float
    """From 0. Weight of the KL term; 0: none, and reference log-probabilities are only measured."""
    kl_estimator: KlEstimator
    tis_cap: float
    """From 0. Cap of the importance weight between sampler and old policy; 0: off."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.clip_low <= 1.0:
            raise ValueError(f"grpo.clip_low is {self.clip_low}; expected 0 to 1")
        for name in ("clip_high", "kl_coef", "tis_cap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"grpo.{name} is {value}; expected a finite number, 0 or more")


def sequence_log_ratio(log_ratio_R: Tensor, response_R: Tensor, num_responses: int) -> Tensor:
    """GSPO: every row gets the mean log ratio of its response. The gradient reaches all rows of the response.

    log_ratio_R: [R] float. response_R: [R] int64 in 0..num_responses-1. Returns [R].
    """
    zeros_S = log_ratio_R.new_zeros(num_responses)
    sums_S = zeros_S.index_add(0, response_R, log_ratio_R)
    counts_S = zeros_S.index_add(0, response_R, torch.ones_like(log_ratio_R))
    return (sums_S / counts_S.clamp_min(1.0))[response_R]


def check_rows(rows: dict[str, Tensor | None], *, num_rows: int) -> None:
    """Raises ValueError naming the tensor that is not [num_rows]; None entries are left out."""
    for name, tensor in rows.items():
        if tensor is not None and tuple(tensor.shape) != (num_rows,):
            raise ValueError(f"{name} must be [{num_rows}] like logprobs_R, got {tuple(tensor.shape)}")


def policy_loss(
    logprobs_R: Tensor,
    *,
    old_logprobs_R: Tensor | None,
    ref_logprobs_R: Tensor | None,
    sampler_logprobs_R: Tensor,
    advantages_S: Tensor,
    response_R: Tensor,
    weights_R: Tensor,
    settings: PolicyLossSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the rows of one micro-batch, and what to log about them.

    All on one device; row tensors [R] float, response_R [R] int64 (which of the S responses), advantages_S [S].
    All rows of a response must be in the same call. Only logprobs_R carries a gradient. old_logprobs_R None:
    old = stop-gradient of logprobs_R, so the ratio is 1 and the gradient exactly advantage * grad logp.

    loss = sum_r w_r * (-tis_r * A * clipped ratio_r + kl_coef * kl_r), with A's ratio clipped from above at
    1 + clip_high where A > 0 and from below at 1 - clip_low where A < 0. Log ratios are clamped to +-20 before
    exp; beyond, a row gives no gradient.

    Second result, all [] and detached. Sums weighted by weights_R (row_weights): added up over micro-batches
    and replicas they are means over the global batch, of the kind the aggregation defines:
    policy_loss and kl_loss (they add up to loss), ratio, clip_fraction_low, clip_fraction_high,
    sampler_gap_sum (|old - sampler|, which includes what the policy changed since it sampled), kl (k3, when ref is
    given), tis_weight (when tis_cap > 0).
    sampler_gap_max alone is a maximum, 0 without rows: reduce it with max.
    Raises ValueError for shapes that differ, or kl_coef > 0 without ref_logprobs_R.
    """
    rows = {
        "old_logprobs_R": old_logprobs_R,
        "ref_logprobs_R": ref_logprobs_R,
        "sampler_logprobs_R": sampler_logprobs_R,
        "response_R": response_R,
        "weights_R": weights_R,
    }
    check_rows(rows, num_rows=logprobs_R.numel())
    if settings.kl_coef > 0 and ref_logprobs_R is None:
        raise ValueError(f"grpo.kl_coef={settings.kl_coef} needs reference log-probabilities, got none")

    old_R = (logprobs_R if old_logprobs_R is None else old_logprobs_R).detach()
    log_ratio_R = logprobs_R - old_R
    if settings.ratio is RatioLevel.sequence:
        log_ratio_R = sequence_log_ratio(log_ratio_R, response_R, len(advantages_S))
    ratio_R = log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages_R = advantages_S[response_R]
    low_R = (advantages_R < 0) & (ratio_R < 1.0 - settings.clip_low)
    high_R = (advantages_R > 0) & (ratio_R > 1.0 + settings.clip_high)
    clipped_R = ratio_R.masked_fill(low_R, 1.0 - settings.clip_low)
    clipped_R = clipped_R.masked_fill(high_R, 1.0 + settings.clip_high)

    gap_R = old_R - sampler_logprobs_R
    metrics = {
        "ratio": ratio_R,
        "clip_fraction_low": low_R.to(ratio_R.dtype),
        "clip_fraction_high": high_R.to(ratio_R.dtype),
        "sampler_gap_sum": gap_R.abs(),
    }
    objective_R = clipped_R * advantages_R
    if settings.tis_cap > 0:
        tis_R = gap_R.clamp_max(math.log(settings.tis_cap)).exp()
        objective_R = tis_R * objective_R
        metrics["tis_weight"] = tis_R
    loss = surrogate = -(weights_R * objective_R).sum()
    kl_loss = torch.zeros_like(loss)
    if ref_logprobs_R is not None:
        metrics["kl"] = kl_estimate(logprobs_R.detach(), ref_logprobs_R, estimator=KlEstimator.k3)
        if settings.kl_coef > 0:
            kl_R = kl_estimate(logprobs_R, ref_logprobs_R, estimator=settings.kl_estimator)
            kl_loss = settings.kl_coef * (weights_R * kl_R).sum()
            loss = surrogate + kl_loss

    sums = {name: (weights_R * values_R.detach()).sum() for name, values_R in metrics.items()}
    sums["policy_loss"], sums["kl_loss"] = surrogate.detach(), kl_loss.detach()
    sums["sampler_gap_max"] = torch.cat((gap_R.abs(), gap_R.new_zeros(1))).max()
    return loss, sums
