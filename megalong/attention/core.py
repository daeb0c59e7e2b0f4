"""The megatron-core core-attention module every model family uses."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalong.attention.shared_prefix import pack_attention
from megalong.config.errors import ConfigError
from megalong.records import GroupSpan


def encode_spans(spans: tuple[GroupSpan, ...]) -> Tensor:
    """Spans as a flat int64 CPU tensor [start, prefix_len, G, len 1 .. len G, start, ...].

    A tensor, because megatron's activation recomputation saves the arguments of a layer as tensors.
    """
    numbers: list[int] = []
    for span in spans:
        numbers += [span.start, span.prefix_len, len(span.response_lens), *span.response_lens]
    return torch.tensor(numbers, dtype=torch.int64)


def decode_spans(encoded: Tensor) -> list[GroupSpan]:
    """The inverse of encode_spans."""
    numbers, spans, at = encoded.tolist(), [], 0
    while at < len(numbers):
        start, prefix_len, size = numbers[at : at + 3]
        lens = tuple(numbers[at + 3 : at + 3 + size])
        spans.append(GroupSpan(start=start, prefix_len=prefix_len, response_lens=lens))
        at += 3 + size
    return spans


class PackCoreAttention(MegatronModule):
    """Attention over packs of groups; `attention_mask` carries the encoded spans.

    Heads are split over tensor-parallel ranks by the projections around it; the sequence is whole on
    every rank (sequence parallelism gathers before the QKV projection).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        kernel: str = "auto",
        **_: Any,  # dropout, comm type and groups: fixed by the layout here
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ConfigError(
                f"parallel.cp={config.context_parallel_size}: context-parallel attention is not built yet; "
                "set parallel.cp=1"
            )
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: shared-prefix training needs 0")
        self.kernel = kernel  # a name of attention.kernels.KERNELS, or auto
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """query: [T, 1, Q, d], key, value: [T, 1, K, d]. Returns [T, 1, Q * d]."""
        out = pack_attention(
            query[:, 0], key[:, 0], value[:, 0], decode_spans(attention_mask), scale=self.scale, kernel=self.kernel
        )
        return out.reshape(out.shape[0], 1, -1)
