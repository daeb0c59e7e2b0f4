"""Vocabulary-parallel log-probability and entropy of chosen tokens, from hidden states, in chunks."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 26
"""Logits the plain back end holds at a time, in elements of float32 (256 MiB), whatever the number of rows."""


class LogprobBackend(Protocol):
    """This rank's share of the work, over its real vocabulary rows. Logits carry inverse_temperature.

    hidden_RD: [R, D]; weight_VD: [V, D], no padding; targets_R: [R] int64, counted from this rank's first row, below 0
    where the target is elsewhere or the row is left out.
    """

    def fold(self, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, inverse_temperature: float) -> Tensor:
        """[4, R] float32 (float64 for float64 input): the largest logit m, the sum of exp(logit - m), the sum of
        exp(logit - m) * (logit - m), and the target's logit, 0 where the target is below 0."""

    def gradients(
        self, coef_R: Tensor, lse_R: Tensor, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *,
        inverse_temperature: float, grad_weight_VD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Gradient of hidden_RD, [R, D], for logits' gradient coef_R * (one-hot of the target - softmax); rows of
        coefficient 0 add nothing, whatever they hold. lse_R: over the whole vocabulary. Fills grad_weight_VD."""


class PlainLogprobs:
    """The definition in plain PyTorch, in chunks of rows: any float dtype, any device."""

    def fold(self, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, inverse_temperature: float) -> Tensor:
        rows = hidden_RD.shape[0]
        parts_4R = hidden_RD.new_zeros(4, rows, dtype=_sum_dtype(hidden_RD))
        for chunk in _chunks(rows, weight_VD.shape[0]):
            logits = (hidden_RD[chunk] @ weight_VD.t()).to(parts_4R.dtype) * inverse_temperature
            largest = logits.amax(dim=-1)
            local, mine = _local(targets_R[chunk])
            chosen = logits.gather(1, local[:, None])[:, 0].masked_fill(~mine, 0)
            below = logits.sub_(largest[:, None])
            probs = below.exp()
            tilt = (probs * below.masked_fill(probs == 0, 0)).sum(dim=-1)
            parts_4R[:, chunk] = torch.stack((largest, probs.sum(dim=-1), tilt, chosen))
        return parts_4R

    def gradients(
        self, coef_R: Tensor, lse_R: Tensor, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *,
        inverse_temperature: float, grad_weight_VD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        grad_hidden_RD = torch.zeros_like(hidden_RD)
        weight_sum_VD = None if grad_weight_VD is None else torch.zeros_like(weight_VD, dtype=lse_R.dtype)
        for chunk in _chunks(hidden_RD.shape[0], weight_VD.shape[0]):
            logits = (hidden_RD[chunk] @ weight_VD.t()).to(lse_R.dtype) * inverse_temperature
            # d logprob / d logits = onehot - softmax
            grad_logits = logits.sub_(lse_R[chunk, None]).exp_().neg_()
            local, mine = _local(targets_R[chunk])
            grad_logits.scatter_add_(1, local[:, None], mine[:, None].to(grad_logits.dtype))
            grad_logits.mul_(coef_R[chunk, None]).masked_fill_(coef_R[chunk, None] == 0, 0)
            grad_logits = grad_logits.to(weight_VD.dtype)
            grad_hidden_RD[chunk] = grad_logits @ weight_VD
            if weight_sum_VD is not None:
                weight_sum_VD += grad_logits.t() @ hidden_RD[chunk]
        if weight_sum_VD is not None:
            grad_weight_VD.copy_(weight_sum_VD)
        return grad_hidden_RD


class TritonLogprobs:
    """Chunks of the vocabulary through cuBLAS and two Triton kernels: float16 and bfloat16, logits kept in float32."""

    def __init__(self) -> None:
        # Here, not at the top: a machine without Triton has the plain back end.
        from megalong_kernels import logprob

        self._ops = logprob

    def fold(self, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, inverse_temperature: float) -> Tensor:
        return self._ops.fold_logits(hidden_RD, weight_VD, targets_R, scale=inverse_temperature)

    def gradients(
        self, coef_R: Tensor, lse_R: Tensor, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *,
        inverse_temperature: float, grad_weight_VD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return self._ops.grads_of_logits(
            coef_R, lse_R, hidden_RD, weight_VD, targets_R, scale=inverse_temperature, grad_weight_VD=grad_weight_VD
        )


BACKENDS: dict[str, type[LogprobBackend]] = {"plain": PlainLogprobs, "triton": TritonLogprobs}


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> LogprobBackend:
    """The back end of that name; `auto`: Triton for half precision on a GPU, plain PyTorch for everything else."""
    half = dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        name = "triton" if device.type == "cuda" and half else "plain"
    if name == "triton" and not half:
        raise ValueError(f"the triton logprobs take float16 and bfloat16, got {dtype}; use backend='plain'")
    _log_choice(name, str(device), str(dtype))
    return BACKENDS[name]()


@cache
def _log_choice(name: str, device: str, dtype: str) -> None:
    logger.info("log-probabilities of %s on %s: %s", dtype, device, name)


class _VocabParallelLogprobs(torch.autograd.Function):
    """Logits of a chunk are made, used and dropped; the backward makes them again from the kept LSE."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor,
        group: ProcessGroup, valid_vocab: int, inverse_temperature: float, backend: LogprobBackend,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        first = dist.get_rank(group) * weight_VD.shape[0]
        mine_R = (targets_R >= first) & (targets_R < first + valid_vocab)
        local_R = torch.where(mine_R, targets_R - first, -1)
        parts_4R = backend.fold(hidden_RD, weight_VD[:valid_vocab], local_R, inverse_temperature=inverse_temperature)
        lse_R, entropy_R, chosen_R = _merge_ranks(parts_4R, group=group)
        # Rows that pad the vocabulary to a multiple of TP are not tokens, and a target below 0 is no target.
        ignored_R = targets_R < 0
        ctx.save_for_backward(hidden_RD, weight_VD, local_R, lse_R, ignored_R)
        ctx.valid_vocab, ctx.inverse_temperature, ctx.backend = valid_vocab, inverse_temperature, backend
        entropy_R = entropy_R.masked_fill(ignored_R, 0)
        ctx.mark_non_differentiable(entropy_R)
        return (chosen_R - lse_R).masked_fill(ignored_R, 0), entropy_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, local_R, lse_R, ignored_R = ctx.saved_tensors
        coef_R = (grad_R * ctx.inverse_temperature).masked_fill(ignored_R, 0).contiguous()
        grad_weight_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_hidden_RD = ctx.backend.gradients(
            coef_R, lse_R, hidden_RD, weight_VD[: ctx.valid_vocab], local_R,
            inverse_temperature=ctx.inverse_temperature,
            grad_weight_VD=None if grad_weight_VD is None else grad_weight_VD[: ctx.valid_vocab],
        )  # fmt: skip
        if grad_weight_VD is not None:
            grad_weight_VD[ctx.valid_vocab :] = 0
        return grad_hidden_RD, grad_weight_VD, None, None, None, None, None


def _merge_ranks(parts_4R: Tensor, *, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """lse_R, entropy_R and the chosen logit of the whole vocabulary, equal over the group: one maximum, one sum."""
    largest_R = parts_4R[0].clone()
    dist.all_reduce(largest_R, op=dist.ReduceOp.MAX, group=group)
    drop_R = parts_4R[0] - largest_R
    mass_R = parts_4R[1] * drop_R.exp()
    tilt_R = parts_4R[2] * drop_R.exp() + mass_R * drop_R
    sums_3R = torch.stack((mass_R, tilt_R, parts_4R[3]))
    dist.all_reduce(sums_3R, group=group)
    log_mass_R = sums_3R[0].log()
    return largest_R + log_mass_R, log_mass_R - sums_3R[1] / sums_3R[0], sums_3R[2]


def _sum_dtype(hidden_RD: Tensor) -> torch.dtype:
    return torch.float64 if hidden_RD.dtype == torch.float64 else torch.float32


def _chunks(rows: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def _local(targets_R: Tensor) -> tuple[Tensor, Tensor]:
    return targets_R.clamp_min(0), targets_R >= 0


def vocab_parallel_logprobs(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *,
    group: ProcessGroup, real_vocab: int, temperature: float = 1.0, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log p(target) and entropy of softmax(hidden @ weight.T / temperature) over the whole vocabulary.

    hidden_RD: [R, D], replicated over `group`; weight_VD: [V / tp, D], this rank's rows of the head;
    targets_R: [R] int64, replicated; a row whose target is below 0 is left out: logprob 0, entropy 0, no gradient.
    Vocabulary rows at and beyond real_vocab (padding for TP) have probability 0.
    Returns logprobs_R and entropy_R, [R] float32 (float64 for float64 input), equal over the group.
    The gradient of hidden is this rank's part: the caller sums it over the group. Entropy has none.
    backend: a name of BACKENDS; `auto` picks by device and dtype.
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
    chosen = choose_backend(backend, device=hidden_RD.device, dtype=hidden_RD.dtype)
    logprobs_R, entropy_R = _VocabParallelLogprobs.apply(
        hidden_RD, weight_VD, targets_R, group, valid_vocab, 1.0 / temperature, chosen
    )
    return logprobs_R.masked_fill(targets_R >= real_vocab, -torch.inf), entropy_R


def logprobs_reference(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The serial twin: same result from the whole [V, D] head with a [R, V] log-softmax."""
    logprobs_RV = ((hidden_RD @ weight_VD.t()).float() / temperature).log_softmax(-1)
    if hidden_RD.dtype == torch.float64:
        logprobs_RV = ((hidden_RD @ weight_VD.t()) / temperature).log_softmax(-1)
    chosen_R = logprobs_RV.gather(1, targets_R[:, None])[:, 0]
    return chosen_R, -(logprobs_RV.exp() * logprobs_RV).sum(-1)
