"""Attention over a pack in plain PyTorch with a mask: the definition that everything faster is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalong.records import Segment

# Legend of this file: T packed tokens, Q query heads on this rank, K key/value heads on this rank, d head width.


def pack_attention_reference(
    query_TQd: Tensor, key_TKd: Tensor, value_TKd: Tensor, segments: Sequence[Segment], *, scale: float
) -> Tensor:
    """Every row sees its segment causally and all rows of its segment's ancestors.

    query_TQd: [T, Q, d], key_TKd and value_TKd: [T, K, d], any float dtype, Q a multiple of K. Returns [T, Q, d], same
    dtype. Equal to running each path from a root to a leaf as a sequence of its own.
    """
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_TQd, key_TKd, value_TKd))
    mask = visible(segments, device=query_TQd.device)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def visible(segments: Sequence[Segment], *, device: torch.device) -> Tensor:
    """[T, T] bool: which keys (columns) each row sees."""
    total = segments[-1].stop
    mask = torch.zeros((total, total), dtype=torch.bool, device=device)
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        mask[rows, rows] = torch.ones((segment.length, segment.length), dtype=torch.bool, device=device).tril()
        above = segment.parent
        while above >= 0:
            mask[rows, segments[above].start : segments[above].stop] = True
            above = segments[above].parent
    return mask
