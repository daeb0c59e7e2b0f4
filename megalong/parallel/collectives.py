"""Collectives with their group as an argument; each says who holds what afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_over(values: dict[str, float], *, group: ProcessGroup, device: torch.device) -> dict[str, float]:
    """Sum each value over the group; every rank must pass the same keys in the same order. Equal on all ranks."""
    return _reduce(values, dist.ReduceOp.SUM, group, device)


def max_over(values: dict[str, float], *, group: ProcessGroup, device: torch.device) -> dict[str, float]:
    """Maximum of each value over the group; same keys on every rank. Equal on all ranks."""
    return _reduce(values, dist.ReduceOp.MAX, group, device)


def _reduce(
    values: dict[str, float], op: dist.ReduceOp.RedOpType, group: ProcessGroup, device: torch.device
) -> dict[str, float]:
    totals = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    if totals.numel():
        dist.all_reduce(totals, op=op, group=group)
    return dict(zip(values, totals.tolist(), strict=True))


def gather_objects(item: Any, *, group: ProcessGroup) -> list[Any]:
    """One picklable item per rank; every rank receives the list in rank order. For paths, texts, ids: not pixels."""
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def broadcast_object(item: Any, *, source: int, group: ProcessGroup) -> Any:
    """The picklable item of rank `source` of the group, on every rank; what the others pass is not looked at."""
    items = [item]
    dist.broadcast_object_list(items, group_src=source, group=group)
    return items[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: tuple[int, ...], group: ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.first, ctx.count = sum(counts[:rank]), counts[rank]
        padded = local.new_zeros((max(counts), *local.shape[1:]))
        padded[: counts[rank]] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous(), group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.first : ctx.first + ctx.count], None, None


def gather_rows(local: Tensor, *, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """local: [counts[rank], ...] this rank's rows. Returns [sum(counts), ...] on every rank, in rank order.

    Uneven and zero counts are allowed. Backward hands each rank the gradient of its own rows and
    sums nothing: right when every rank of the group computes the same loss from the gathered rows,
    as tensor-parallel ranks do. Raises ValueError when `local` does not have counts[rank] rows.
    """
    rank = dist.get_rank(group)
    if local.shape[0] != counts[rank]:
        raise ValueError(f"rank {rank} holds {local.shape[0]} rows, counts say {counts[rank]} (counts={counts})")
    return _GatherRows.apply(local, tuple(counts), group)
