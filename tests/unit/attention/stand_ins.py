"""The functions of flash-attn 2.8.3 (2.7.4 has the same), flash-attn-3, flash-attn-4 (4.0.0b19) and Transformer Engine
2.20 that we call: their signatures, layouts and conditions, computed by the definition. The packages need a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megalong.attention.kernels import PlainKernel


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[b, t, heads, d] in and out, lse [b, heads, t]."""
    check_rows(q, k, v)
    query, key, value = (part.transpose(1, 2) for part in (q, k, v))
    out, lse = PlainKernel().forward(query, key, value, causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous(), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> list[Tensor]:
    check_rows(dout, q, k, v, out)
    if lse.shape != (len(q), q.shape[2], q.shape[1]) or not lse.is_contiguous() or lse.dtype != torch.float32:
        raise RuntimeError(f"softmax_lse: {lse.shape}, {lse.stride()}, {lse.dtype}")
    given = [part.transpose(1, 2) for part in (dout, q, k, v, out)]
    grads = PlainKernel().backward(*given, lse, causal=causal, scale=scale)
    return [grad.transpose(1, 2) for grad in grads]


def check_rows(*parts: Tensor) -> None:
    for part in parts:
        if part.dim() != 4 or part.stride(-1) != 1:
            raise RuntimeError(f"Input tensor must have contiguous last dimension: {part.shape}, {part.stride()}")


def must_be(given: dict[str, Any], **expected: Any) -> None:
    """What would change the result may only have the value that leaves it alone."""
    wrong = {name: given[name] for name, value in expected.items() if given[name] != value}
    if wrong:
        raise RuntimeError(f"the definition has no {wrong}")


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
    return_softmax,
):  # fmt: skip
    must_be(locals(), dropout_p=0.0, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
    out, lse = forward(q, k, v, causal=causal, scale=softmax_scale)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    must_be(locals(), dropout_p=0.0, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
    grads = backward(dout, q, k, v, out, softmax_lse, causal=causal, scale=softmax_scale)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)
    return softmax_lse


FA3_FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new, Tensor(v_new!)? v_new, Tensor? q_v, Tensor(out!)? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, "
    "int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
    "Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left = -1, int window_size_right = -1, "
    "int attention_chunk = 0, float softcap = 0.0, bool is_rotary_interleaved = False, "
    "Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
FA3_BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq, Tensor(dk!)? dk, "
    "Tensor(dv!)? dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, bool is_causal, int window_size_left = -1, "
    "int window_size_right = -1, float softcap = 0.0, bool deterministic = False, int sm_margin = 0) -> Tensor"
)
"""Later releases give more arguments defaults and return more; the places are the same."""


def fa3_fwd(q, k, v, *rest):
    unused, scale, causal, settings = rest[:20], rest[20], rest[21], rest[22:]
    # Windows, chunks, softcap and rotation as by default, and one split: log-sum-exps are of all keys.
    if any(given is not None for given in unused) or settings != (-1, -1, 0, 0.0, False, None, 1):
        raise RuntimeError(f"the definition has no {unused}, {settings}")
    out, lse = forward(q, k, v, causal=causal, scale=scale)
    return out, lse, torch.empty(0), torch.empty(0)


def fa3_bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, *rest):
    unused, scale, causal, settings = rest[:6], rest[6], rest[7], rest[8:]
    if any(given is not None for given in unused) or settings:  # trailing defaults are not handed on
        raise RuntimeError(f"the definition has no {unused}, {settings}")
    grads = backward(dout, q, k, v, out, softmax_lse, causal=causal, scale=scale)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)
    return torch.empty(0)


@cache
def register_flash_attn_3() -> torch.library.Library:
    """Once per process: operators cannot be taken back while something holds them."""
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(FA3_FWD)
    library.define(FA3_BWD)
    library.impl("fwd", fa3_fwd, "CPU")
    library.impl("bwd", fa3_bwd, "CPU")
    return library


def _flash_attn_fwd(q, k, v, qv=None, *, softmax_scale=None, causal=False, return_lse=False):
    """Of its arguments those that we give; without return_lse there is none."""
    out, lse = forward(q, k, v, causal=causal, scale=softmax_scale)
    return out, lse if return_lse else None


def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False):
    return tuple(backward(dout, q, k, v, out, lse, causal=causal, scale=softmax_scale))


class FusedAttnBackend(IntEnum):
    No_Backend = -1
    F16_arbitrary_seqlen = 1
    FP8 = 2


def check_te(given: dict[str, Any], *parts: Tensor) -> dict[str, Any]:
    """Transformer Engine derives all strides from the layout."""
    if not all(part.is_contiguous() for part in parts):
        raise RuntimeError(f"not contiguous: {[part.stride() for part in parts]}")
    must_be(
        given, dropout=0.0, qkv_layout="bshd_bshd_bshd", o_format="bshd", attn_bias_type="no_bias",
        softmax_type="vanilla", fused_attention_backend=FusedAttnBackend.F16_arbitrary_seqlen,
        fake_dtype=given["q"].dtype,
    )  # fmt: skip
    for name, longest, starts in (("q", "max_seqlen_q", "cu_seqlens_q"), ("k", "max_seqlen_kv", "cu_seqlens_kv")):
        batch, length = given[name].shape[:2]
        if given[longest] != length or given[starts].tolist() != [row * length for row in range(batch + 1)]:
            raise RuntimeError(f"{longest}={given[longest]}, {starts}={given[starts]} for {given[name].shape}")
        if given[starts].dtype != torch.int32:
            raise RuntimeError(f"{starts} is {given[starts].dtype}")
    causal = {"causal": True, "no_mask": False}[given["attn_mask_type"]]
    must_be(given, window_size=(-1, 0) if causal else (-1, -1))
    return {"causal": causal, "scale": given["attn_scale"]}


def fused_attn_fwd(
    is_training, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype,
    fused_attention_backend, attn_bias=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, page_table_k=None,
    page_table_v=None, s_quantizer=None, o_quantizer=None, attn_scale=None, dropout=0.0, fast_zero_fill=True,
    qkv_layout="sbh3d", o_format="sbhd", qkv_scale_inv_format=None, attn_bias_type="no_bias",
    attn_mask_type="padding", softmax_type="vanilla", window_size=(-1, -1), bottom_right_diagonal=None, rng_gen=None,
    softmax_offset=None, return_max_logit=False, cuda_graph=False,
):  # fmt: skip
    out, lse = forward(q, k, v, **check_te(locals(), q, k, v))
    return out, [lse[..., None], torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
    fused_attention_backend, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, s_quantizer=None, dp_quantizer=None,
    dqkv_quantizer=None, attn_scale=None, dropout=0.0, fast_zero_fill=True, qkv_layout="sbh3d", o_format="sbhd",
    do_format="sbhd", dqkv_layout="sbh3d", qkv_scale_inv_format=None, do_scale_inv_format=None,
    attn_bias_type="no_bias", attn_mask_type="padding", softmax_type="vanilla", window_size=(-1, -1),
    bottom_right_diagonal=None, deterministic=False, cuda_graph=False,
):  # fmt: skip
    must_be(locals(), do_format="bshd", dqkv_layout="bshd_bshd_bshd")
    how = check_te(locals(), q, k, v, o, d_o)
    lse, state = aux_ctx_tensors
    if lse.shape[-1] != 1 or state.shape != (2,):
        raise RuntimeError(f"aux_ctx_tensors: {lse.shape}, {state.shape}")
    grads = backward(d_o, q, k, v, o, lse[..., 0], **how)
    return [*(grad.contiguous() for grad in grads), None]


def module(name: str, **members: object) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__path__ = []
    for member, value in members.items():
        setattr(made, member, value)
    return made


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Makes the kernels of those names find their packages."""
    fused = {"fused_attn_fwd": fused_attn_fwd, "fused_attn_bwd": fused_attn_bwd, "FusedAttnBackend": FusedAttnBackend}
    flash = {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}
    contents: dict[str, list[tuple[str, dict[str, Callable[..., Any] | type]]]] = {
        "flash_attn_2": [("flash_attn", {}), ("flash_attn.flash_attn_interface", flash)],
        "flash_attn_3": [("flash_attn_3", {}), ("flash_attn_3._C", {})],
        "flash_attn_4": [
            ("flash_attn", {}),
            ("flash_attn.cute", {}),
            ("flash_attn.cute.interface", {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}),
        ],
        "te": [
            ("transformer_engine", {}),
            ("transformer_engine.pytorch", {}),
            ("transformer_engine.pytorch.cpp_extensions", {}),
            ("transformer_engine.pytorch.cpp_extensions.fused_attn", fused),
        ],
    }
    for name in names:
        for path, members in contents[name]:
            if path == "flash_attn" and path in sys.modules:
                continue  # two packages share the name
            made = module(path, **members)
            monkeypatch.setitem(sys.modules, path, made)
            parent, _, last = path.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, made)
        if name == "flash_attn_3":
            register_flash_attn_3()
