"""Rows from the ranks that have them straight to the ranks that need them, and gradients the same way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangePlan:
    """One rank's part of an exchange. Built from what all ranks know, so no sizes are sent around."""

    send_rows: Tensor  # int64: local rows to send, destination after destination
    send_counts: tuple[int, ...]  # rows to each rank
    recv_counts: tuple[int, ...]  # rows from each rank
    order: Tensor  # int64: received[order] are the wanted rows in the order they were asked for
    returns: tuple[bool, ...]  # whether each rank sends gradients back


def plan_exchange(
    owner_N: Tensor, place_N: Tensor, wanted: Sequence[Tensor], *, rank: int, returns: Sequence[bool] | None = None
) -> ExchangePlan:
    """owner_N, place_N: [N] int64, the rank that has row n and where among its local rows; wanted[r]: the rows n that
    rank r asks for, in its order, repeats allowed. returns[r]: rank r's gradients count (default: everyone's do); of
    ranks that compute the same from the same rows only one may return."""
    needs = []  # of each rank: rows sorted by owner, as they arrive
    for rows in wanted:
        arrival = torch.argsort(owner_N[rows], stable=True)
        needs.append(rows[arrival])
        if len(needs) - 1 == rank:
            order = torch.argsort(arrival)
    size = len(wanted)
    mine = [rows[owner_N[rows] == rank] for rows in needs]
    received = torch.bincount(owner_N[wanted[rank]], minlength=size)
    return ExchangePlan(
        send_rows=place_N[torch.cat(mine)],
        send_counts=tuple(len(rows) for rows in mine),
        recv_counts=tuple(received.tolist()),
        order=order,
        returns=tuple(returns) if returns is not None else (True,) * size,
    )


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, plan: ExchangePlan, group: ProcessGroup) -> Tensor:
        send_rows, order = plan.send_rows.to(local.device), plan.order.to(local.device)
        ctx.save_for_backward(send_rows, order)
        ctx.plan, ctx.group, ctx.num_rows = plan, group, len(local)
        received = _all_to_all(local.index_select(0, send_rows), plan.send_counts, plan.recv_counts, group)
        return received.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        send_rows, order = ctx.saved_tensors
        plan, me = ctx.plan, dist.get_rank(ctx.group)
        arrived = torch.empty_like(grad).index_copy_(0, order, grad)
        counts_back = plan.recv_counts if plan.returns[me] else (0,) * len(plan.recv_counts)
        if not plan.returns[me]:
            arrived = arrived[:0]
        expected = tuple(n if back else 0 for n, back in zip(plan.send_counts, plan.returns, strict=True))
        returned = _all_to_all(arrived, counts_back, expected, ctx.group)
        ends = torch.tensor(plan.send_counts).cumsum(0).tolist()
        kept = [
            send_rows[end - n : end] for end, n, back in zip(ends, plan.send_counts, plan.returns, strict=True) if back
        ]
        local = grad.new_zeros((ctx.num_rows, *grad.shape[1:]), dtype=torch.promote_types(grad.dtype, torch.float32))
        if kept:
            local.index_add_(0, torch.cat(kept), returned.to(local.dtype))
        return local.to(grad.dtype), None, None


def _all_to_all(send: Tensor, counts: Sequence[int], expected: Sequence[int], group: ProcessGroup) -> Tensor:
    received = send.new_empty((sum(expected), *send.shape[1:]))
    dist.all_to_all_single(received, send.contiguous(), list(expected), list(counts), group=group)
    return received


def exchange_rows(local: Tensor, plan: ExchangePlan, *, group: ProcessGroup) -> Tensor:
    """local: [M, ...] this rank's rows. Returns [len(wanted[rank]), ...], the rows it asked for.

    Collective over the group, forward and backward: on every rank the result must take part in the backward, or on
    none. The gradient of a row is the sum over the ranks that asked for it and return gradients.
    """
    return _ExchangeRows.apply(local, plan, group)
