"""Attention kernels behind one interface: forward with log-sum-exp, backward with any output and log-sum-exp.

The backward of a flash kernel recomputes probabilities as exp(score - lse). Handed the output and LSE that were
merged over several calls, it returns this call's exact part of the merged gradient: that is what lets the shared
prefix, the responses and context-parallel shards be separate calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from megalong.attention.package_kernels import (
    FlashAttn2Kernel,
    FlashAttn3Kernel,
    FlashAttn4Kernel,
    TransformerEngineKernel,
)

logger = logging.getLogger(__name__)

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
    module: str = ""  # of the package it is from, when that is not torch
    merges: bool = True  # used where the outputs of several calls are merged, and not only where a call is all there is


_HALF = (torch.float16, torch.bfloat16)
KERNELS: dict[str, KernelEntry] = {
    "plain": KernelEntry(make=PlainKernel, device="any", dtypes=(torch.float64, torch.float32, *_HALF)),
    "cpu_flash": KernelEntry(make=CpuFlashKernel, device="cpu", dtypes=(torch.float64, torch.float32, torch.bfloat16)),
    "flash": KernelEntry(make=CudaFlashKernel, device="cuda", dtypes=_HALF),
    "cudnn": KernelEntry(make=CudnnKernel, device="cuda", dtypes=_HALF),
    "flash_attn_2": KernelEntry(
        make=FlashAttn2Kernel, device="cuda", dtypes=_HALF, module="flash_attn.flash_attn_interface"
    ),
    "flash_attn_3": KernelEntry(make=FlashAttn3Kernel, device="cuda", dtypes=_HALF, module="flash_attn_3"),
    "flash_attn_4": KernelEntry(make=FlashAttn4Kernel, device="cuda", dtypes=_HALF, module="flash_attn.cute"),
    "te": KernelEntry(
        make=TransformerEngineKernel, device="cuda", dtypes=_HALF, module="transformer_engine", merges=False
    ),
}
FASTEST_FIRST = {
    "cpu": ("cpu_flash",),
    "cuda": ("flash_attn_3", "flash", "flash_attn_2", "flash_attn_4", "cudnn", "te"),
    "cuda, long": ("flash_attn_4", "cudnn", "te", "flash_attn_3", "flash", "flash_attn_2"),
}
"""What `auto` tries, in this order. Of two that run the same algorithm torch's own is first: it takes our layout."""
LONG_FROM_TOKENS = 16384
"""cuDNN builds a plan per shape, and flash-attn-4 compiles a kernel for each kind of call: worth it for long sequences,
not for many short ones of different lengths."""
LONG_FROM_ROWS = 128
"""Nor for a few queries on many keys, less than one of its tiles: in the last layer, those of a short answer."""
LARGEST_ERROR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Of an output or gradient, relative to its norm, in the comparison that `auto` makes with the definition."""


def choose_kernel(
    name: str, *, device: torch.device, dtype: torch.dtype, num_rows: int, num_tokens: int, head_dim: int, merged: bool
) -> Kernel:
    """The kernel of that name, or for `auto` the fastest that takes the input and is correct on this very device.

    num_rows, num_tokens: queries and keys of the call. merged: the call's output is merged with those of other calls.
    `auto` tries each candidate once per device, dtype and head width against the definition; the choice and its reason
    are logged once. Raises ValueError if a named kernel does not take the input.
    """
    if name == "auto":
        long = num_tokens >= LONG_FROM_TOKENS and num_rows >= LONG_FROM_ROWS
        return KERNELS[_fastest(device=device, dtype=dtype, head_dim=head_dim, long=long, merged=merged)].make()
    problem = kernel_problem(name, device=device, dtype=dtype)
    if not problem and merged and not KERNELS[name].merges:
        problem = (
            f"model.attention={name} computes sequences that stand alone, but a shared prefix and sequences cut over a "
            "ring are calls whose outputs are merged; set model.attention=auto, or mr_sp.mode=stage1+2 and "
            "parallel.cp_a2a to parallel.cp"
        )
    if problem:
        raise ValueError(problem)
    _log_once(logging.INFO, f"attention of {dtype} on {device}: {name}, as model.attention says")
    if num_rows == num_tokens == 1 and name in ("cudnn", "te"):
        return PlainKernel()  # cuDNN has no backward of one query on one key, where the output is the value
    return KERNELS[name].make()


@cache
def kernel_problem(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Why a kernel cannot run there; "" when it can, or for `auto`."""
    if name == "auto":
        return ""
    entry = KERNELS[name]
    if not _takes(entry, device=device, dtype=dtype):
        return (
            f"model.attention={name} runs on {entry.device} with {[str(kind) for kind in entry.dtypes]}, "
            f"not on {device.type} with {dtype}; set model.attention=auto"
        )
    if not is_installed(entry):
        return (
            f"model.attention={name} needs the Python module {entry.module}, which is not installed; install it or set "
            "model.attention=auto"
        )
    return ""


def _takes(entry: KernelEntry, *, device: torch.device, dtype: torch.dtype) -> bool:
    return entry.device in ("any", device.type) and dtype in entry.dtypes


def is_installed(entry: KernelEntry) -> bool:
    """Whether the package that the kernel is from can be imported, as far as can be told without its module."""
    try:
        return not entry.module or find_spec(entry.module) is not None
    except ModuleNotFoundError:
        return False  # nor is the package that it would be part of
    except Exception:  # noqa: BLE001 - installed, and broken in any way: running it says how
        return True


@cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, "%s", message)


@cache
def _fastest(*, device: torch.device, dtype: torch.dtype, head_dim: int, long: bool, merged: bool) -> str:
    """The name that `auto` stands for; long: for calls of at least LONG_FROM_ROWS on LONG_FROM_TOKENS keys."""
    candidates = [
        name
        for name in FASTEST_FIRST["cuda, long" if long and device.type == "cuda" else device.type]
        if _takes(KERNELS[name], device=device, dtype=dtype)
        and is_installed(KERNELS[name])
        and (KERNELS[name].merges or not merged)
    ]
    where = f"attention of {dtype}, heads {head_dim} wide, on {device}"
    if device.type == "cuda":
        where += f", {'at least' if long else 'below'} {LONG_FROM_TOKENS:,} keys and {LONG_FROM_ROWS} queries"
    for name in candidates:
        defect = _defect(name, device=device, dtype=dtype, head_dim=head_dim)
        if not defect:
            alone = "" if KERNELS[name].merges else " of sequences that stand alone"
            text = f"{where}{alone}: {name}, the fastest that takes them; equal to the definition here"
            _log_once(logging.INFO, text)
            return name
        _log_once(logging.WARNING, f"{where}: not {name}, {defect}")
    message = f"{where}: plain, whole score matrices, since no fast kernel"
    if candidates:
        _log_once(logging.WARNING, f"{message} is correct here")
    elif device.type == "cuda":
        _log_once(logging.WARNING, f"{message} takes them; set model.dtype=bfloat16")
    else:
        _log_once(logging.INFO, f"{message} takes them")
    return "plain"


@cache
def _defect(name: str, *, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What is wrong with a kernel on a small problem: "" when output, log-sum-exp and gradients are those of `plain`.

    Causal and unmasked, grouped heads, and in the backward the output and log-sum-exp of another call merged in; for
    a kernel that is not used with merged outputs, causal and alone.
    """
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, rows: int) -> Tensor:
        return torch.randn(1, heads, rows, head_dim, generator=generator).to(device, dtype)

    merges, plain = KERNELS[name].merges, PlainKernel()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for causal, rows, keys in ((True, 128, 128), (False, 64, 192)) if merges else ((True, 128, 128),):
        parts = query, *_ = random(4, rows), random(2, keys), random(2, keys)
        how = {"causal": causal, "scale": head_dim**-0.5}
        exact = [part.to(wide) for part in parts]
        out, lse = plain.forward(*exact, **how)
        # Half of every row's probability lies on keys of another call, whose values are zero.
        whole = ((out / 2).to(dtype), lse + 0.6931471805599453) if merges else (out.to(dtype), lse)
        grad = torch.randn(query.shape, generator=generator).to(device, dtype)
        try:
            kernel = KERNELS[name].make()
            got = [*kernel.forward(*parts, **how), *kernel.backward(grad, *parts, *whole, **how)]
        except torch.OutOfMemoryError:
            raise  # says nothing about the kernel
        except Exception as error:  # a package of another version, or built for another torch or GPU, fails in any way
            return f"which fails: {(str(error).splitlines() or [type(error).__name__])[0]}"
        backward = plain.backward(grad.to(wide), *exact, whole[0].to(wide), whole[1], **how)
        for what, ours, want in zip(
            ("output", "log-sum-exp", "dQ", "dK", "dV"), got, (out, lse, *backward), strict=True
        ):
            gap = float((ours.to(wide) - want).norm() / want.norm())
            if not gap <= LARGEST_ERROR[dtype]:
                return f"whose {what} is off by {gap:.1e} of its norm ({'causal' if causal else 'unmasked'})"
    return ""
