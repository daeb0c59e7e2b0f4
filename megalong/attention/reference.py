"""Attention over a pack of groups in plain PyTorch: the definition every faster back end is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megalong.records import GroupSpan

# Legend of this file: T packed tokens, Q query heads on this rank, K key/value heads on this rank, d head width.


def pack_attention_reference(
    query_TQd: Tensor, key_TKd: Tensor, value_TKd: Tensor, spans: list[GroupSpan], *, scale: float
) -> Tensor:
    """Causal attention inside each group; response i sees its prefix and itself, never another response.

    query_TQd: [T, Q, d], key_TKd and value_TKd: [T, K, d], any float dtype, Q a multiple of K; heads are this
    rank's share, the sequence is whole. Spans cover [0, T) without gaps. Returns [T, Q, d], same dtype.
    Equal to running each [prefix | response i] as a sequence of its own (design contract 5).
    """
    outputs = []
    for span in spans:
        rows = slice(span.start, span.start + span.length)
        outputs.append(_group_attention(query_TQd[rows], key_TKd[rows], value_TKd[rows], span, scale))
    return torch.cat(outputs)


def _group_attention(query: Tensor, key: Tensor, value: Tensor, span: GroupSpan, scale: float) -> Tensor:
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    if len(span.response_lens) <= 1:  # nothing is shared: a plain causal sequence
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    prefix = span.prefix_len
    prefix_out = F.scaled_dot_product_attention(
        query[:, :, :prefix],
        key[:, :, :prefix],
        value[:, :, :prefix],
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    response_out = F.scaled_dot_product_attention(
        query[:, :, prefix:],
        key,
        value,
        attn_mask=response_mask(span, device=query.device),
        scale=scale,
        enable_gqa=True,
    )
    return torch.cat((prefix_out, response_out), dim=2)[0].transpose(0, 1)


def response_mask(span: GroupSpan, *, device: torch.device) -> Tensor:
    """[sum(response_lens), prefix_len + sum(response_lens)] bool: which keys each response row sees."""
    lens = torch.tensor(span.response_lens, device=device)
    response_of = torch.repeat_interleave(torch.arange(len(lens), device=device), lens)
    place = torch.arange(len(response_of), device=device)
    own = (response_of[:, None] == response_of[None, :]) & (place[:, None] >= place[None, :])
    prefix = torch.ones((len(response_of), span.prefix_len), dtype=torch.bool, device=device)
    return torch.cat((prefix, own), dim=1)
