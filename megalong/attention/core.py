"""The megatron-core core-attention module every model family uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalong.attention.context import collect_rows, gather_keys, ring_plan, spread_rows
from megalong.attention.pack import KeptOutputs, pack_attention
from megalong.attention.tree import encode_segments
from megalong.parallel.layout import ContextGroups
from megalong.records import Segment


def encode_mask(segments: Sequence[Segment], *, sharded: bool) -> Tensor:
    """What the layers are given as attention mask: int64 CPU tensor [sharded, start, length, parent, start, ...].

    A tensor, because megatron's activation recomputation saves the arguments of a layer as tensors. sharded: the rows
    are this rank's of attention.context.shard_pack; otherwise the whole pack, on this rank alone.
    """
    return torch.tensor([int(sharded), *encode_segments(segments)], dtype=torch.int64)


class PackCoreAttention(MegatronModule):
    """Attention over packs; `attention_mask` carries the segments (encode_mask).

    Heads are split over tensor-parallel ranks by the projections around it (sequence parallelism gathers the rows
    before the QKV projection); rows are split over context-parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        context: ContextGroups,
        kernel: str = "auto",
        **_: Any,  # dropout, comm type and groups: fixed by the layout here
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout:
            raise ValueError(f"attention_dropout={config.attention_dropout}: shared-prefix training needs 0")
        kv_heads = max(1, config.num_query_groups // config.tensor_model_parallel_size)
        if kv_heads % context.a2a_size:
            raise ValueError(
                f"{kv_heads} key/value heads per tensor-parallel rank cannot be dealt to an all-to-all group of "
                f"{context.a2a_size}; set parallel.cp_a2a to a divisor of both"
            )
        self.context = context
        self.kernel = kernel  # a name of attention.kernels.KERNELS, or auto
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        self.kept = KeptOutputs()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """query: [t, 1, Q, d], key, value: [t, 1, K, d], this rank's rows. Returns [t, 1, Q * d]."""
        sharded, *encoded = attention_mask.tolist()
        context = self.context if sharded else self.context.alone
        plan = ring_plan(tuple(encoded), context.ring_rank, context.ring_size, query.device)
        query, key, value = (spread_rows(part[:, 0], context) for part in (query, key, value))
        key, value = gather_keys(torch.cat((key, value), dim=-1), plan, context).chunk(2, dim=-1)
        heads_first = [part.transpose(0, 1)[None].contiguous() for part in (query, key, value)]
        out = pack_attention(*heads_first, plan.calls, scale=self.scale, kernel=self.kernel, kept=self.kept)
        rows = collect_rows(out[0].transpose(0, 1), context)
        return rows.reshape(rows.shape[0], 1, -1)
