"""Logits as the trainer has them: in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def float32_logits(hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
    """[.., D] hidden states times the output head's rows: [.., V] float32, float64 for float64.

    In bfloat16 a logit of 20 is off by up to 0.06: the log-probabilities that rollouts carry would be those of other
    logits than the trainer's, which sums and keeps them in float32, and near ties would be decided by rounding.
    """
    if hidden_RD.dtype in (torch.float32, torch.float64):
        return hidden_RD @ weight_VD.t()
    if not hidden_RD.is_cuda:  # a CPU's products have no out_dtype
        return hidden_RD.float() @ weight_VD.float().t()
    logits_RV = torch.mm(hidden_RD.flatten(0, -2), weight_VD.t(), out_dtype=torch.float32)
    return logits_RV.unflatten(0, hidden_RD.shape[:-1])
