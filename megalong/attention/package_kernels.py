"""Attention kernels of packages that may be installed: flash-attn 2, 3 and 4 and Transformer Engine.

Their layout is [b, t, heads, d], and they read log-sum-exps as contiguous [b, Q, t] whatever the strides say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _FlashAttnKernel:
    """What the releases share: layouts and, but for 4, gradients that the package writes into tensors it is given."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        parts = [_rows_first(part) for part in (query, key, value)]
        out, lse, *_ = self._forward(parts, causal=causal, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = [_rows_first(part) for part in (grad_out, query, key, value, out)]
        grads = _empty_grads(query, key, value)
        self._backward([*given, lse.contiguous(), *grads], causal=causal, scale=scale)
        return tuple(grad.transpose(1, 2) for grad in grads)


class FlashAttn2Kernel(_FlashAttnKernel):
    """FlashAttention-2 of the package flash-attn, 2.7 and 2.8."""

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface

        self._package = flash_attn_interface

    def _forward(self, parts: Sequence[Tensor], *, causal: bool, scale: float) -> Sequence[Tensor]:
        return self._package._flash_attn_forward(*parts, return_softmax=False, **self._how(causal, scale))

    def _backward(self, parts: Sequence[Tensor], *, causal: bool, scale: float) -> None:
        self._package._flash_attn_backward(*parts, deterministic=False, **self._how(causal, scale))

    @staticmethod
    def _how(causal: bool, scale: float) -> dict[str, bool | float | int | None]:
        return {
            "dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size_left": -1,
            "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
        }  # fmt: skip


class FlashAttn3Kernel(_FlashAttnKernel):
    """FlashAttention-3 of the package flash-attn-3 (Hopper), by the operators that it registers.

    Its Python functions differ from release to release, the operators' arguments keep their places.
    """

    def __init__(self) -> None:
        import flash_attn_3._C  # noqa: F401 - registers them

        self._ops = torch.ops.flash_attn_3

    def _forward(self, parts: Sequence[Tensor], *, causal: bool, scale: float) -> Sequence[Tensor]:
        unused = [None] * 20  # new keys, output, ragged lengths, pages, rotation, 8-bit scales
        return self._ops.fwd(*parts, *unused, softmax_scale=scale, is_causal=causal, num_splits=1)

    def _backward(self, parts: Sequence[Tensor], *, causal: bool, scale: float) -> None:
        unused = [None] * 6  # ragged lengths
        self._ops.bwd(*parts, *unused, softmax_scale=scale, is_causal=causal)


class FlashAttn4Kernel(_FlashAttnKernel):
    """FlashAttention-4 of the package flash-attn-4 (Hopper and newer), compiled when a kind of call is first made."""

    def __init__(self) -> None:
        from flash_attn.cute import interface

        self._package = interface

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = [_rows_first(part) for part in (query, key, value, out, grad_out)]
        grads = self._package._flash_attn_bwd(*given, lse.contiguous(), softmax_scale=scale, causal=causal)
        return tuple(grad.transpose(1, 2) for grad in grads)

    def _forward(self, parts: Sequence[Tensor], *, causal: bool, scale: float) -> Sequence[Tensor]:
        return self._package._flash_attn_fwd(*parts, softmax_scale=scale, causal=causal, return_lse=True)


class TransformerEngineKernel:
    """The fused (cuDNN) attention of Transformer Engine, as of 2.20."""

    LAYOUT = "bshd_bshd_bshd"

    def __init__(self) -> None:
        from transformer_engine.pytorch.cpp_extensions import fused_attn

        self._package = fused_attn

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        parts = [_rows_first(part).contiguous() for part in (query, key, value)]
        out, (lse, *_) = self._package.fused_attn_fwd(
            True, *_lengths(query, key), *parts, query.dtype, self._backend, **self._how(causal, scale)
        )
        return out.transpose(1, 2), lse.reshape(query.shape[:3])

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = [_rows_first(part).contiguous() for part in (query, key, value, out, grad_out)]
        unused = torch.zeros(2, dtype=torch.int64, device=query.device)  # dropout state: there is no dropout
        grad_query, grad_key, grad_value, *_ = self._package.fused_attn_bwd(
            *_lengths(query, key), *given, query.dtype, [lse[..., None].contiguous(), unused], self._backend,
            do_format="bshd", dqkv_layout=self.LAYOUT, **self._how(causal, scale),
        )  # fmt: skip
        return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2)

    @property
    def _backend(self) -> object:
        return self._package.FusedAttnBackend["F16_arbitrary_seqlen"]

    def _how(self, causal: bool, scale: float) -> dict[str, object]:
        return {
            "attn_scale": scale, "qkv_layout": self.LAYOUT, "o_format": "bshd",
            "attn_mask_type": "causal" if causal else "no_mask", "window_size": (-1, 0) if causal else (-1, -1),
        }  # fmt: skip


def _rows_first(heads: Tensor) -> Tensor:
    """[b, H, t, d] -> [b, t, H, d]; a view unless the numbers of a row are apart, which no kernel reads."""
    rows = heads.transpose(1, 2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _empty_grads(*parts: Tensor) -> list[Tensor]:
    return [torch.empty_like(part.transpose(1, 2), memory_format=torch.contiguous_format) for part in parts]


def _lengths(query: Tensor, key: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Rows of a query and of a key sequence, and where each sequence of the batch starts and the last one ends."""
    lengths = query.shape[2], key.shape[2]
    starts = (
        torch.arange(0, (len(query) + 1) * length, length, dtype=torch.int32, device=query.device) for length in lengths
    )
    return *lengths, *starts
