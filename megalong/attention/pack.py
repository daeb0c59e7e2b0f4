"""Attention over a pack by an AttentionPlan: exact, each shared segment computed once.

Forward: the causal calls write output and log-sum-exp of their rows, the unmasked calls are merged into them. The rows
below a shared segment have several calls each where a sequence of its own has one: what theirs give is rounded to
bfloat16 once, merged, as in that one (but for a causal call of more than FINE_KEYS).

Backward: the backward of each call with the merged output and log-sum-exp; gradients of keys and values add up over
calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megalong.attention.kernels import Kernel, choose_kernel
from megalong.attention.tree import AttentionPlan, Call, Range
from megalong.parallel.offload import Offload
from megalong.parallel.split import shard_range

FINE_KEYS = 32768
"""Most keys of a call that is made in float16, which has no probability below 2^-25 of a row's largest: of more keys
the lost ones could outweigh what is gained. Each range of keys has a largest of its own."""
FINE = {"cuda": torch.float16, "cpu": torch.float32}
"""By device: what kernels take whose output is rounded less than bfloat16's, an eighth of it in float16."""


def merge_into(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Attention over the union of two key sets, from the results on each, in place of the first. out, more
    [.., t, d], lse [.., t]; out and more may differ in dtype."""
    whole = torch.logaddexp(lse, more_lse)
    weight, more_weight = ((part - whole).exp()[..., None] for part in (lse, more_lse))
    if out.dtype == lse.dtype:
        out.mul_(weight).addcmul_(more.to(out.dtype), more_weight)
    else:
        out.copy_(weight * out + more_weight * more)
    lse.copy_(whole)


class KeptOutputs:
    """Attention outputs of one layer that activation recomputation finds again instead of computing them twice.

    The first run of a recomputed layer has gradients off and puts its output here; the second, in the backward, has
    them on and takes it. Micro-batches come back in the order they went in.
    """

    def __init__(self) -> None:
        self._park: Callable[[Tensor], Callable[[], Tensor]] | None = None
        self._items: deque[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = deque()

    def put(self, out: Tensor, lse: Tensor) -> None:
        if self._park is not None and not torch.is_grad_enabled():
            self._items.append((self._park(out), self._park(lse)))

    def take(self) -> tuple[Tensor, Tensor] | None:
        if not torch.is_grad_enabled() or not self._items:
            return None
        out, lse = self._items.popleft()
        return out(), lse()

    @contextmanager
    def record(self, offload: Offload | None = None) -> Iterator[None]:
        """Keep the outputs of recomputed layers inside this context; what is left at its end is dropped.

        offload: where they wait; None: where they are.
        """
        self._park = _stay if offload is None else offload.put
        try:
            yield
        finally:
            self._park = None
            self._items.clear()


def _stay(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


class _Batch:
    """Ragged ranges of rows <-> a batch padded to the longest. Padding rows come last: causal rows never see them."""

    def __init__(self, ranges: tuple[Range, ...], device: torch.device) -> None:
        lengths = [last - first for first, last in ranges]
        self.count, self.longest = len(ranges), max(lengths)
        self.even = min(lengths) == self.longest
        self.first, self.last = ranges[0][0], ranges[-1][1]
        side_by_side = all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        self.rows = None if side_by_side else _rows_of(ranges, device)
        self.places = None if self.even else _places_of(tuple(lengths), device)

    def take(self, rows: Tensor) -> Tensor:
        """[1, H, t, ...] -> [count, H, longest, ...] of the ranges, zeros in the padding."""
        side_by_side = self.rows is None
        picked = rows[:, :, self.first : self.last] if side_by_side else rows.index_select(2, self.rows)
        if self.count == 1:
            return picked  # a view: the kernels take any strides between rows
        if not self.even:
            padded = picked.new_zeros((1, picked.shape[1], self.count * self.longest, *picked.shape[3:]))
            picked = padded.index_copy(2, self.places, picked)
        return picked[0].unflatten(1, (self.count, self.longest)).transpose(0, 1).contiguous()

    def give(self, batch: Tensor) -> Tensor:
        """The rows of the ranges one after another, [1, H, sum of lengths, ...]; padding is left out."""
        rows = batch.transpose(0, 1).flatten(1, 2)[None]
        return rows if self.even else rows.index_select(2, self.places)

    def write(self, target: Tensor, batch: Tensor) -> None:
        """target[ranges] = batch."""
        if self.rows is None:
            target[:, :, self.first : self.last] = self.give(batch)
        else:
            target.index_copy_(2, self.rows, self.give(batch).to(target.dtype))

    def add(self, target: Tensor, batch: Tensor) -> None:
        """target[ranges] += batch. Ranges do not overlap."""
        if self.rows is None:
            target[:, :, self.first : self.last] += self.give(batch)
        else:
            target.index_add_(2, self.rows, self.give(batch).to(target.dtype))


# The layers of a pass ask for the same ones: few are kept, since they lie on the device.
@lru_cache(maxsize=32)
def _rows_of(ranges: tuple[Range, ...], device: torch.device) -> Tensor:
    """Rows of the ranges one after another."""
    return torch.cat([torch.arange(first, last) for first, last in ranges]).to(device)


@lru_cache(maxsize=32)
def _places_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the rows of ranges of these lengths are in the padded batch."""
    places = [torch.arange(length) + index * max(lengths) for index, length in enumerate(lengths)]
    return torch.cat(places).to(device)


def _cut(part: Tensor, span: Range) -> Tensor:
    return part[:, :, span[0] : span[1]]


class _PackAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor,
        plan: AttentionPlan, kernel: str, scale: float, known: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = known or _forward(query, key, value, plan, kernel, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.kernel, ctx.scale = plan, kernel, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad_out, *ctx.saved_tensors, ctx.plan, ctx.kernel, ctx.scale), None, None, None, None)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, kernel: str, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    # A row has seen nothing yet; padding rows never will. Every row that is not merged is in a causal call.
    out, lse = torch.empty_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=wide)
    out[:, :, plan.num_rows :] = lse[:, :, plan.num_rows :] = 0
    sums = {span: torch.zeros_like(_cut(query, span), dtype=wide) for span in _merged_spans(plan)}

    def target_of(rows: Range) -> tuple[Tensor, int]:
        """Where the output of these rows goes, and the row that it starts at."""
        for (first, last), part in sums.items():
            if first <= rows[0] < last:
                return part, first
        return out, 0

    for call in plan.causal:
        queries, keys = _batches(call, query.device)
        target, start = target_of(call.queries[0])
        batch = queries.take(query), keys.take(key), keys.take(value)
        if target is not out and keys.longest <= FINE_KEYS:
            batch = _finer(*batch)
        out_b, lse_b = _kernel_of(kernel, call, batch[0], plan).forward(*batch, causal=True, scale=scale)
        places = _Batch(tuple((first - start, last - start) for first, last in call.queries), query.device)
        places.write(target, out_b)
        queries.write(lse, lse_b)
    for call in plan.unmasked:
        (rows,) = call.queries
        target, start = target_of(rows)
        fine = target is not out
        out_r, lse_r = _cut(target, (rows[0] - start, rows[1] - start)), _cut(lse, rows)
        for keys in _key_ranges(call, query) if fine else call.keys:
            batch = _cut(query, rows), _cut(key, keys), _cut(value, keys)
            batch = _finer(*batch) if fine else batch
            part = Call(call.queries, (keys,))
            out_c, lse_c = _kernel_of(kernel, part, batch[0], plan).forward(*batch, causal=False, scale=scale)
            merge_into(out_r, lse_r, out_c, lse_c)
    for span, part in sums.items():
        _cut(out, span).copy_(part)
    return out, lse


def _merged_spans(plan: AttentionPlan) -> list[Range]:
    """The rows below shared segments: ranges that do not overlap."""
    spans: list[Range] = []
    for call in plan.unmasked:
        (rows,) = call.queries
        # A segment comes before those below it, whose rows are among the rows below it.
        if call.shared and not any(first <= rows[0] < last for first, last in spans):
            spans.append(rows)
    return spans


def _finer(*batch: Tensor) -> tuple[Tensor, ...]:
    """A call's bfloat16 inputs in FINE.

    float16 holds them exactly from 6e-5 to 65,504; smaller ones are off by 3e-8 at most, a larger one becomes infinite,
    and its step one that is skipped and counted.
    """
    if batch[0].dtype != torch.bfloat16:
        return batch
    return tuple(part.to(FINE[part.device.type]) for part in batch)


def _key_ranges(call: Call, query: Tensor) -> list[Range]:
    """The keys of a call in as few equal ranges as it is made in, finer."""
    ((first, last),) = call.keys
    count = -(-(last - first) // FINE_KEYS) if query.dtype == torch.bfloat16 else 1
    ranges = (shard_range(last - first, index, count) for index in range(count))
    return [(first + low, first + high) for low, high in ranges]


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    plan: AttentionPlan, kernel: str, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_query = torch.zeros_like(query)
    # A key gets a part from every call that reads it: add them up in full precision.
    grad_key, grad_value = (torch.zeros_like(part, dtype=lse.dtype) for part in (key, value))
    for call in plan.causal:
        queries, keys = _batches(call, query.device)
        grad_q, grad_k, grad_v = _kernel_of(kernel, call, query, plan).backward(
            queries.take(grad_out), queries.take(query), keys.take(key), keys.take(value),
            queries.take(out), queries.take(lse), causal=True, scale=scale,
        )  # fmt: skip
        queries.write(grad_query, grad_q)
        keys.add(grad_key, grad_k)
        keys.add(grad_value, grad_v)
    for call in plan.unmasked:
        (rows,), (keys,) = call.queries, call.keys
        grad_q, grad_k, grad_v = _kernel_of(kernel, call, query, plan).backward(
            _cut(grad_out, rows), _cut(query, rows), _cut(key, keys), _cut(value, keys),
            _cut(out, rows), _cut(lse, rows), causal=False, scale=scale,
        )  # fmt: skip
        _cut(grad_query, rows).add_(grad_q)
        _cut(grad_key, keys).add_(grad_k)
        _cut(grad_value, keys).add_(grad_v)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _batches(call: Call, device: torch.device) -> tuple[_Batch, _Batch]:
    return _Batch(call.queries, device), _Batch(call.keys, device)


def _kernel_of(name: str, call: Call, query: Tensor, plan: AttentionPlan) -> Kernel:
    rows, tokens = (max(last - first for first, last in part) for part in (call.queries, call.keys))
    return choose_kernel(
        name,
        device=query.device,
        dtype=query.dtype,
        num_rows=rows,
        num_tokens=tokens,
        head_dim=query.shape[-1],
        merged=bool(plan.unmasked),
    )


def pack_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, *,
    scale: float, kernel: str, kept: KeptOutputs | None = None,
) -> Tensor:  # fmt: skip
    """Attention of this rank's rows over the pack's keys, as the plan says.

    query: [1, Q, t, d], the plan's rows and then any padding (whose output and gradients are zero); key, value:
    [1, K, T, d], whole pack; Q a multiple of K; heads are this rank's share. kernel: a name of
    attention.kernels.KERNELS or `auto`. Returns [1, Q, t, d]. Equal to running each path from a root to a leaf as a
    sequence of its own, with gradients added up.
    """
    if key.shape[2] != plan.num_keys or query.shape[2] < plan.num_rows:
        raise ValueError(
            f"{query.shape[2]} query rows and {key.shape[2]} keys, the plan has {plan.num_rows} and {plan.num_keys}"
        )
    known = kept.take() if kept is not None else None
    out, lse = _PackAttention.apply(query, key, value, plan, kernel, scale, known)
    if kept is not None:
        kept.put(out, lse)
    return out
