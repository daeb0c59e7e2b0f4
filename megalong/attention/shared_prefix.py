"""Attention of a group that shares its prefix: the prefix is computed once, exactly as in G separate sequences.

Forward, three kernel calls: the prefix on itself (causal); all response rows on the prefix keys (no mask); each
response on itself (causal). The two results of a response row are merged by their log-sum-exp. Backward: the
backward of each call with the merged output and log-sum-exp; gradients of the prefix's keys and values add up.
The video prefix of G rollouts costs one pass instead of G.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalong.attention.kernels import Kernel, choose_kernel
from megalong.records import GroupSpan


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two key sets from the results on each. out [.., t, d], lse [.., t]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp()[..., None] for part in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


class _Responses:
    """Ragged response rows <-> a batch padded to the longest. Padding rows come last, so causal rows never see them."""

    def __init__(self, lens: tuple[int, ...], device: torch.device) -> None:
        self.count, self.longest = len(lens), max(lens)
        self.even = all(length == self.longest for length in lens)
        if not self.even:
            places = [torch.arange(length) + index * self.longest for index, length in enumerate(lens)]
            self.places = torch.cat(places).to(device)

    def spread(self, rows: Tensor) -> Tensor:
        """[1, H, sum(lens), ...] -> [G, H, longest, ...], zeros in the padding."""
        if not self.even:
            padded = rows.new_zeros((1, rows.shape[1], self.count * self.longest, *rows.shape[3:]))
            rows = padded.index_copy(2, self.places, rows)
        return rows[0].unflatten(1, (self.count, self.longest)).transpose(0, 1).contiguous()

    def collect(self, batch: Tensor) -> Tensor:
        """The inverse of spread; padding is left out."""
        rows = batch.transpose(0, 1).flatten(1, 2)[None]
        return rows if self.even else rows.index_select(2, self.places)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor,
        prefix: int, lens: tuple[int, ...], kernel: Kernel, scale: float,
    ) -> Tensor:  # fmt: skip
        own = _Responses(lens, query.device)
        query_r, key_r, value_r = (own.spread(part[:, :, prefix:]) for part in (query, key, value))
        key_p, value_p = (part[:, :, :prefix] for part in (key, value))
        out_p, lse_p = kernel.forward(query[:, :, :prefix], key_p, value_p, causal=True, scale=scale)
        cross = kernel.forward(query[:, :, prefix:], key_p, value_p, causal=False, scale=scale)
        out_r, lse_r = kernel.forward(query_r, key_r, value_r, causal=True, scale=scale)
        out_r, lse_r = merge(*cross, own.collect(out_r), own.collect(lse_r))
        out = torch.cat((out_p, out_r), dim=2)
        ctx.save_for_backward(query, key, value, out, torch.cat((lse_p, lse_r), dim=2))
        ctx.prefix, ctx.own, ctx.kernel, ctx.scale = prefix, own, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        own, prefix, kernel = ctx.own, ctx.prefix, ctx.kernel
        head = [part[:, :, :prefix] for part in (grad_out, query, key, value, out, lse)]
        tail = [part[:, :, prefix:] for part in (grad_out, query, key, value, out, lse)]
        query_p, key_p, value_p = kernel.backward(*head, causal=True, scale=ctx.scale)
        query_c, key_c, value_c = kernel.backward(
            tail[0], tail[1], head[2], head[3], tail[4], tail[5], causal=False, scale=ctx.scale
        )
        grads_r = kernel.backward(*(own.spread(part) for part in tail), causal=True, scale=ctx.scale)
        query_r, key_r, value_r = (own.collect(part) for part in grads_r)
        return (
            torch.cat((query_p, query_c + query_r), dim=2),
            torch.cat((key_p + key_c, key_r), dim=2),
            torch.cat((value_p + value_c, value_r), dim=2),
            None, None, None, None,
        )  # fmt: skip


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float) -> Tensor:
        out, lse = kernel.forward(query, key, value, causal=True, scale=scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernel, ctx.scale = kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.kernel.backward(grad_out, *ctx.saved_tensors, causal=True, scale=ctx.scale), None, None)


def pack_attention(
    query_TQd: Tensor, key_TKd: Tensor, value_TKd: Tensor, spans: list[GroupSpan], *, scale: float, kernel: str
) -> Tensor:
    """Same contract as attention.reference.pack_attention_reference, with the named kernel (or `auto`)."""
    outputs = []
    for span in spans:
        rows = slice(span.start, span.start + span.length)
        parts = [part[rows].transpose(0, 1)[None].contiguous() for part in (query_TQd, key_TKd, value_TKd)]
        chosen = choose_kernel(kernel, device=query_TQd.device, dtype=query_TQd.dtype, num_tokens=span.length)
        if len(span.response_lens) > 1:
            out = _GroupAttention.apply(*parts, span.prefix_len, span.response_lens, chosen, scale)
        else:
            out = _CausalAttention.apply(*parts, chosen, scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
