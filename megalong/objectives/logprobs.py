"""Vocabulary-parallel log-probability and entropy of chosen tokens, from hidden states, in chunks of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_ELEMENTS = 1 << 26
"""Logits held at a time, in elements of float32 (256 MiB), whatever the number of rows."""


class _VocabParallelLogprobs(torch.autograd.Function):
    """Logits of a chunk of rows are made, used and dropped; the backward makes them again from the kept LSE."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor,
        group: ProcessGroup, valid_vocab: int, inverse_temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        first = dist.get_rank(group) * weight_VD.shape[0]
        rows = hidden_RD.shape[0]
        dtype = torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32
        # One all-reduce each for the whole of R, after all chunks: maximum, then the three sums.
        chosen_R, lse_R, mean_R = (hidden_RD.new_zeros(rows, dtype=dtype) for _ in range(3))
        local_max_R, local_sum_R = (hidden_RD.new_zeros(rows, dtype=dtype) for _ in range(2))
        for chunk in _chunks(rows, weight_VD.shape[0]):
            logits = _local_logits(hidden_RD[chunk], weight_VD, valid_vocab, inverse_temperature, dtype)
            local_max_R[chunk] = logits.amax(dim=-1)
            probs = (logits - local_max_R[chunk, None]).exp()
            local_sum_R[chunk] = probs.sum(dim=-1)
            mean_R[chunk] = (probs * logits.masked_fill(probs == 0, 0)).sum(dim=-1)
            local, mine = _local_targets(targets_R[chunk], first, weight_VD.shape[0])
            chosen_R[chunk] = logits.gather(1, local[:, None])[:, 0].masked_fill(~mine, 0)
        max_R = local_max_R.clone()
        dist.all_reduce(max_R, op=dist.ReduceOp.MAX, group=group)
        rescale_R = (local_max_R - max_R).exp()
        sums_3R = torch.stack((local_sum_R * rescale_R, mean_R * rescale_R, chosen_R))
        dist.all_reduce(sums_3R, group=group)
        lse_R = max_R + sums_3R[0].log()
        entropy_R = lse_R - sums_3R[1] / sums_3R[0]
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R, lse_R)
        ctx.first, ctx.valid_vocab, ctx.inverse_temperature = first, valid_vocab, inverse_temperature
        ctx.mark_non_differentiable(entropy_R)
        return sums_3R[2] - lse_R, entropy_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, targets_R, lse_R = ctx.saved_tensors
        grad_hidden_RD = torch.zeros_like(hidden_RD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=lse_R.dtype) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(hidden_RD.shape[0], weight_VD.shape[0]):
            logits = _local_logits(hidden_RD[chunk], weight_VD, ctx.valid_vocab, ctx.inverse_temperature, lse_R.dtype)
            # d logprob / d logits = onehot - softmax
            grad_logits = logits.sub_(lse_R[chunk, None]).exp_().neg_()
            local, mine = _local_targets(targets_R[chunk], ctx.first, weight_VD.shape[0])
            grad_logits.scatter_add_(1, local[:, None], mine[:, None].to(grad_logits.dtype))
            grad_logits.mul_((grad_R[chunk] * ctx.inverse_temperature)[:, None])
            grad_logits = grad_logits.to(weight_VD.dtype)
            grad_hidden_RD[chunk] = grad_logits @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_logits.t() @ hidden_RD[chunk]
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_RD, grad_weight_VD, None, None, None, None


def _chunks(rows: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def _local_logits(
    hidden_RD: Tensor, weight_VD: Tensor, valid_vocab: int, inverse_temperature: float, dtype: torch.dtype
) -> Tensor:
    logits = (hidden_RD @ weight_VD.t()).to(dtype) * inverse_temperature
    # Rows that pad the vocabulary to a multiple of TP are not tokens.
    logits[:, valid_vocab:] = -torch.inf
    return logits


def _local_targets(targets_R: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    local = targets_R - first
    mine = (local >= 0) & (local < size)
    return local.clamp(0, size - 1), mine


def vocab_parallel_logprobs(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *,
    group: ProcessGroup, real_vocab: int, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature) over the whole vocabulary.

    hidden_RD: [R, D], replicated over `group`; weight_VD: [V / tp, D], this rank's rows of the head;
    targets_R: [R] int64, replicated. Rows at and beyond real_vocab (padding for TP) have probability 0.
    Returns logprobs_R and entropy_R, [R] float32 (float64 for float64 input), equal over the group.
    The gradient of hidden is this rank's part: the caller sums it over the group. Entropy has none.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0 to score tokens, got {temperature}")
    first = dist.get_rank(group) * weight_VD.shape[0]
    valid_vocab = min(max(real_vocab - first, 0), weight_VD.shape[0])
    if valid_vocab == 0:
        raise ValueError(
            f"a vocabulary shard holds only padding (vocabulary {real_vocab}, shard of {weight_VD.shape[0]} rows "
            f"from {first}); lower parallel.tp"
        )
    return _VocabParallelLogprobs.apply(hidden_RD, weight_VD, targets_R, group, valid_vocab, 1.0 / temperature)


def logprobs_reference(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The serial twin: same result from the whole [V, D] head with a [R, V] log-softmax."""
    logprobs_RV = ((hidden_RD @ weight_VD.t()).float() / temperature).log_softmax(-1)
    if hidden_RD.dtype == torch.float64:
        logprobs_RV = ((hidden_RD @ weight_VD.t()) / temperature).log_softmax(-1)
    chosen_R = logprobs_RV.gather(1, targets_R[:, None])[:, 0]
    return chosen_R, -(logprobs_RV.exp() * logprobs_RV).sum(-1)
