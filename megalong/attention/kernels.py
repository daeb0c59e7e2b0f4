"""Attention kernels behind one interface: forward with log-sum-exp, backward with any output and log-sum-exp.

The backward of a flash kernel recomputes probabilities as exp(score - lse). Handed the output and LSE that were
merged over several calls, it returns this call's exact part of the merged gradient: that is what lets the shared
prefix, the responses and context-parallel shards be separate calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Legend: b batch, Q query heads, K key/value heads (Q a multiple of K), t query rows, s key rows, d head width.
Saved = tuple[Tensor | int | None, ...]


class Kernel(Protocol):
    """query [b, Q, t, d], key and value [b, K, s, d], one dtype and device; causal needs t == s."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns out [b, Q, t, d] in the input dtype and lse [b, Q, t] float32 (float64 for float64 input)."""

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of query, key and value for probabilities exp(score - lse) and delta = rowsum(grad_out * out)."""


class PlainKernel:
    """The definition in plain PyTorch: whole [t, s] score matrices, any float dtype, any device."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(query, key, causal=causal, scale=scale)
        lse = scores.logsumexp(dim=-1)
        probs = (scores - lse[..., None]).exp()
        return (probs @ _repeat(value, query).to(probs.dtype)).to(query.dtype), lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        probs = (self._scores(query, key, causal=causal, scale=scale) - lse[..., None]).exp()
        wide = probs.dtype
        grad = grad_out.to(wide)
        delta = (grad * out.to(wide)).sum(dim=-1, keepdim=True)
        grad_scores = probs * (grad @ _repeat(value, query).to(wide).transpose(-1, -2) - delta) * scale
        grad_query = grad_scores @ _repeat(key, query).to(wide)
        grad_key = _sum_groups(grad_scores.transpose(-1, -2) @ query.to(wide), key)
        grad_value = _sum_groups(probs.transpose(-1, -2) @ grad, value)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)

    @staticmethod
    def _scores(query: Tensor, key: Tensor, *, causal: bool, scale: float) -> Tensor:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = query.to(wide) @ _repeat(key, query).to(wide).transpose(-1, -2) * scale
        if causal:
            size = scores.shape[-1]
            above = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(above, -torch.inf)
        return scores


class CpuFlashKernel:
    """torch's blocked CPU kernel (float32, float64, bfloat16)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, _repeat(key, query), _repeat(value, query), 0.0, causal, scale=scale
        )
        return out, lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, _repeat(key, query), _repeat(value, query), out, lse, 0.0, causal, scale=scale
        )
        return grad_query, _sum_groups(grad_key, key), _sum_groups(grad_value, value)


class CudaFlashKernel:
    """FlashAttention-2 as torch ships it (float16, bfloat16; grouped heads taken as they are)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return result[0], result[1]

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        unused = torch.zeros((), dtype=torch.int64, device="cpu")  # dropout state: there is no dropout
        # The kernel reads lse as if contiguous; a slice of a longer one gives wrong gradients without an error.
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal,
            unused, unused, scale=scale,
        )  # fmt: skip


class CudnnKernel:
    """cuDNN's fused attention through torch (float16, bfloat16): the fastest of these on Hopper for long sequences."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return result[0], result[1].reshape(query.shape[:3])

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        unused = torch.zeros((), dtype=torch.int64, device=query.device)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, query, key, value, out, lse[..., None], unused, unused, None, None, None,
            query.shape[2], key.shape[2], 0.0, causal, scale=scale,
        )  # fmt: skip


def _repeat(heads: Tensor, query: Tensor) -> Tensor:
    """Key/value heads repeated to the number of query heads."""
    times = query.shape[1] // heads.shape[1]
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def _sum_groups(grad: Tensor, heads: Tensor) -> Tensor:
    """The backward of _repeat."""
    times = grad.shape[1] // heads.shape[1]
    return grad if times == 1 else grad.unflatten(1, (-1, times)).sum(dim=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelEntry:
    make: Callable[[], Kernel]
    device: str
    dtypes: tuple[torch.dtype, ...]


_HALF = (torch.float16, torch.bfloat16)
KERNELS: dict[str, KernelEntry] = {
    "plain": KernelEntry(make=PlainKernel, device="any", dtypes=(torch.float64, torch.float32, *_HALF)),
    "cpu_flash": KernelEntry(make=CpuFlashKernel, device="cpu", dtypes=(torch.float64, torch.float32, torch.bfloat16)),
    "flash": KernelEntry(make=CudaFlashKernel, device="cuda", dtypes=_HALF),
    "cudnn": KernelEntry(make=CudnnKernel, device="cuda", dtypes=_HALF),
}
CUDNN_FROM_TOKENS = 16384
"""cuDNN builds a plan per shape: worth it for long sequences, not for many short ones of different lengths."""


def choose_kernel(name: str, *, device: torch.device, dtype: torch.dtype, num_tokens: int) -> Kernel:
    """The kernel of that name, or for `auto` the fastest that takes the input. Raises ValueError if it does not."""
    if name == "auto":
        if device.type == "cpu":
            name = "cpu_flash"
        elif dtype in _HALF:
            name = "cudnn" if num_tokens >= CUDNN_FROM_TOKENS else "flash"
        else:
            name = "plain"
    entry = KERNELS[name]
    if entry.device not in ("any", device.type) or dtype not in entry.dtypes:
        raise ValueError(
            f"model.attention={name} runs on {entry.device} with {[str(kind) for kind in entry.dtypes]}, "
            f"not on {device.type} with {dtype}; set model.attention=auto"
        )
    return entry.make()
