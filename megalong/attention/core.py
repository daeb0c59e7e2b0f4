"""The megatron-core core-attention module every model family uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megalong.attention.context import collect_rows, gather_keys, ring_plan, spread_rows
from megalong.attention.kernels import KERNELS
from megalong.attention.last_layer import NeededRows, needed_rows, row_spans
from megalong.attention.pack import KeptOutputs, pack_attention
from megalong.attention.tree import Range, encode_segments
from megalong.parallel.layout import ContextGroups
from megalong.records import Segment


def encode_mask(segments: Sequence[Segment], *, sharded: bool, needed_U: Tensor, multiple: int) -> Tensor:
    """What the layers are given as attention mask: int64 CPU tensor.

    [sharded, multiple, number of spans, first, last, first, ..., start, length, parent, start, ...]. A tensor, because
    megatron's activation recomputation saves the arguments of a layer as tensors. sharded: the rows are this rank's of
    attention.context.shard_pack with that multiple; otherwise the whole pack, on this rank alone. needed_U: the pack
    rows that the last layer computes, ascending.
    """
    spans = row_spans(needed_U)
    numbers = [int(sharded), multiple, len(spans), *(end for span in spans for end in span)]
    return torch.tensor([*numbers, *encode_segments(segments)], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mask:
    """What encode_mask was given."""

    context: ContextGroups  # that the rows are dealt to
    multiple: int
    spans: tuple[Range, ...]
    segments: tuple[int, ...]  # encode_segments

    @classmethod
    def decode(cls, mask: Tensor, context: ContextGroups) -> _Mask:
        sharded, multiple, count, *numbers = mask.tolist()
        ends, segments = numbers[: 2 * count], numbers[2 * count :]
        spans = tuple(zip(ends[::2], ends[1::2], strict=True))
        return cls(
            context=context if sharded else context.alone, multiple=multiple, spans=spans, segments=tuple(segments)
        )

    def needed(self) -> NeededRows:
        return needed_rows(self.segments, self.spans, self.context, self.multiple)


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
        self.needed_only = False  # the model's last layer: attention.last_layer
        # A row without those before it takes two calls; a kernel that stands alone attends with all rows there.
        self._splits = kernel == "auto" or KERNELS[kernel].merges

    def needed(self, attention_mask: Tensor) -> NeededRows | None:
        """The rows that the output is of; None: of all."""
        return _Mask.decode(attention_mask, self.context).needed() if self.needed_only else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """query: [t, 1, Q, d], key, value: [t, 1, K, d], this rank's rows.

        Returns [t, 1, Q * d]; in the last layer [n, 1, Q * d], of the rows that needed() names.
        """
        mask = _Mask.decode(attention_mask, self.context)
        needed = mask.needed() if self.needed_only else None
        context = mask.context
        plan = ring_plan(mask.segments, context.ring_rank, context.ring_size, query.device)
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        calls = plan.calls
        if needed is not None and self._splits:
            query, calls = needed.take(query), needed.calls
        query, key, value = (spread_rows(part, context) for part in (query, key, value))
        key, value = gather_keys(torch.cat((key, value), dim=-1), plan, context).chunk(2, dim=-1)
        heads_first = [part.transpose(0, 1)[None].contiguous() for part in (query, key, value)]
        out = pack_attention(*heads_first, calls, scale=self.scale, kernel=self.kernel, kept=self.kept)
        rows = collect_rows(out[0].transpose(0, 1), context)
        if needed is not None and not self._splits:
            rows = needed.take(rows)
        return rows.reshape(rows.shape[0], 1, -1)
