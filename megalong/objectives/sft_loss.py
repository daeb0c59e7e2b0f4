"""The supervised loss: cross-entropy of the response tokens."""

from __future__ import annotations

from torch import Tensor


def sft_loss(logprobs_R: Tensor, *, weights_R: Tensor) -> Tensor:
    """logprobs_R, weights_R: [R] float, weights of row_weights. Returns [], to be added up over the global batch.

    Raises ValueError when the shapes differ.
    """
    if logprobs_R.shape != weights_R.shape:
        raise ValueError(f"weights_R must be {tuple(logprobs_R.shape)} like logprobs_R, got {tuple(weights_R.shape)}")
    return -(weights_R * logprobs_R).sum()
