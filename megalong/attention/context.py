"""Context parallelism: which rows of a pack a rank holds, and how its attention comes to see the rest.

The ranks of a context-parallel group form `ring` rings' worth of shares, each cut again over `a2a` ranks. Around the
attention, an all-to-all inside the a2a group trades rows for heads (as many ranks as there are key/value heads to
give); over the ring, every rank keeps its query rows and gathers the keys and values of all rows, which with grouped
queries are a few MB where the queries are many (35 MB a layer for 135k tokens on two rings of four), and the backward
sums the key gradients over the ring. Response queries never travel: the prefix's own rows need all keys before them,
and with those here the responses need nothing else. What it costs is the memory of all keys (docs/memory.md). Work is
balanced by the cut itself (attention.tree).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megalong_kernels.sequence_shard import PADDING
from torch import Tensor
from torch.distributed import ProcessGroup

from megalong.attention.tree import AttentionPlan, encode_segments, plan_calls
from megalong.parallel.layout import ContextGroups
from megalong.parallel.split import shard_range
from megalong.records import Segment


def shard_pack(segments: Sequence[Segment], context: ContextGroups, *, multiple: int) -> list[Tensor]:
    """Pack rows of every context-parallel rank, in rank order: [t] int64 each, PADDING where a row is padding.

    multiple: what t must be divisible by (tensor-parallel size under sequence parallelism). Ranks of one all-to-all
    group get equally many rows. Nowhere is there more padding than one all-to-all group's worth of multiples.
    """
    encoded = tuple(encode_segments(segments))
    shares = []
    for ring_rank in range(context.ring_size):
        plan = plan_calls(encoded, ring_rank=ring_rank, ring_size=context.ring_size)
        shares += _over_a2a(_rows_of(plan), context, multiple=multiple)
    return shares


def deal_rows(rows_U: Tensor, context: ContextGroups, *, multiple: int) -> list[Tensor]:
    """Any pack rows, ascending, over the context-parallel ranks in turn: as shard_pack, but as many rows on each."""
    shares = []
    for ring_rank in range(context.ring_size):
        first, last = shard_range(len(rows_U), ring_rank, context.ring_size)
        shares += _over_a2a(rows_U[first:last], context, multiple=multiple)
    return shares


def _over_a2a(rows: Tensor, context: ContextGroups, *, multiple: int) -> tuple[Tensor, ...]:
    """A ring rank's rows, padded, over its all-to-all group."""
    # At least one row everywhere: a rank without any would miss the collectives of the layers.
    padded = max(-(-len(rows) // (multiple * context.a2a_size)), 1) * multiple * context.a2a_size
    return torch.cat((rows, rows.new_full((padded - len(rows),), PADDING))).chunk(context.a2a_size)


def places_of(shares: Sequence[Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
    """(rank, local row) of each of the pack's rows, [T] int64 each; PADDING for rows that no share has."""
    owner_T, local_T = (torch.full((num_rows,), PADDING) for _ in range(2))
    for rank, rows in enumerate(shares):
        real = rows[rows != PADDING]
        owner_T[real], local_T[real] = rank, torch.arange(len(real))
    return owner_T, local_T


class _RowsToHeads(torch.autograd.Function):
    """[t, H, d] of every rank -> [t * a2a, H / a2a, d]: rows of the group in rank order, this rank's heads."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _rows_to_heads(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _heads_to_rows(grad, ctx.group), None


class _HeadsToRows(torch.autograd.Function):
    """The inverse of _RowsToHeads."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _heads_to_rows(heads, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rows_to_heads(grad, ctx.group), None


def _rows_to_heads(rows: Tensor, group: ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    send = rows.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # [a2a, t, H / a2a, d]
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.flatten(0, 1)


def _heads_to_rows(heads: Tensor, group: ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    send = heads.unflatten(0, (size, -1)).contiguous()  # [a2a, t, H / a2a, d]
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.transpose(0, 1).flatten(1, 2)


class _GatherKeys(torch.autograd.Function):
    """[t, K, d] of every ring rank -> [T, K, d] in pack order, padding left out; gradients are summed over the ring."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: tuple[Tensor, ...], group: ProcessGroup) -> Tensor:
        longest = max(len(place) for place in places)
        rank = dist.get_rank(group)
        ctx.place, ctx.group, ctx.shape = places[rank], group, rows.shape
        send = rows.new_zeros((longest, *rows.shape[1:]))
        send[: len(places[rank])] = rows[: len(places[rank])]
        parts = [torch.empty_like(send) for _ in places]
        dist.all_gather(parts, send, group=group)
        whole = rows.new_empty((sum(len(place) for place in places), *rows.shape[1:]))
        for place, part in zip(places, parts, strict=True):
            whole.index_copy_(0, place, part[: len(place)])
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        summed = grad.to(wide)
        dist.all_reduce(summed, group=ctx.group)
        mine = grad.new_zeros(ctx.shape)
        mine[: len(ctx.place)] = summed.index_select(0, ctx.place).to(grad.dtype)
        return mine, None, None


@dataclass(frozen=True, slots=True)
class RingPlan:
    """This rank's calls, and the pack rows of every rank of its ring."""

    calls: AttentionPlan
    places: tuple[Tensor, ...]


@lru_cache(maxsize=16)
def ring_plan(encoded: tuple[int, ...], rank: int, size: int, device: torch.device) -> RingPlan:
    """Plan of ring rank `rank`, tensors on `device`."""
    plans = [plan_calls(encoded, ring_rank=index, ring_size=size) for index in range(size)]
    # A ring of one gathers nothing.
    return RingPlan(plans[rank], tuple(_rows_of(plan).to(device) for plan in plans) if size > 1 else ())


def _rows_of(plan: AttentionPlan) -> Tensor:
    return torch.cat([torch.arange(*span) for span in plan.rows] or [torch.empty(0, dtype=torch.int64)])


def spread_rows(rows: Tensor, context: ContextGroups) -> Tensor:
    """[t, H, d] -> [t * a2a, H / a2a, d]; differentiable, like its inverse collect_rows."""
    return _RowsToHeads.apply(rows, context.a2a) if context.a2a_size > 1 else rows


def collect_rows(heads: Tensor, context: ContextGroups) -> Tensor:
    return _HeadsToRows.apply(heads, context.a2a) if context.a2a_size > 1 else heads


def gather_keys(rows: Tensor, plan: RingPlan, context: ContextGroups) -> Tensor:
    """[t, K, d] -> [T, K, d], the keys (or values) of the whole pack in order."""
    if context.ring_size == 1:
        return rows[: plan.calls.num_keys]
    return _GatherKeys.apply(rows, plan.places, context.ring)


def response_share(num_rows: int, context: ContextGroups) -> list[tuple[int, int]]:
    """[first, last) of the pack's response rows whose logits each context-parallel rank computes."""
    return [shard_range(num_rows, rank, context.size) for rank in range(context.size)]
