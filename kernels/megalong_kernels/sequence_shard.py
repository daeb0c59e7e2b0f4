"""A rank's rows of the packed, padded sequence, taken straight from the rows a replica holds; and the way back.

`shard_rows` copies each place of a sequence shard from a row of vision embeddings, a row of text embeddings, or leaves
it zero; no concatenation of the two is ever made. `unshard_rows` is its adjoint: rows go back to given places. The
backward of each is the other's forward. Sums over rows are in float32 and in the order of the sequence, so they are
deterministic. Addresses are 64-bit: a shard may have more than 2^31 elements.

Legend: N vision rows, M text rows, T places of the shard, D width, S rows of a result of unshard_rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PADDING = -1
"""Index of a place that takes no row."""
MAX_BLOCK = 4096
"""Columns a program holds at a time."""


@triton.jit(do_not_specialize=["num_frames"])
def _take_kernel(frames_ptr, text_ptr, index_ptr, out_ptr, num_frames, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    source = tl.load(index_ptr + place)
    # How many columns come from either: a scalar condition in a mask is an integer to the interpreter.
    text_columns = tl.where(source >= num_frames, width, 0)
    frame_columns = tl.where((source >= 0) & (source < num_frames), width, 0)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        frame = tl.load(frames_ptr + source * width + columns, mask=columns < frame_columns, other=0.0)
        text = tl.load(text_ptr + (source - num_frames) * width + columns, mask=columns < text_columns, other=0.0)
        tl.store(out_ptr + place * width + columns, tl.where(columns < text_columns, text, frame), mask=columns < width)


@triton.jit
def _sum_kernel(rows_ptr, order_ptr, offsets_ptr, out_ptr, width, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + target)
    end = tl.load(offsets_ptr + target + 1)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        total = tl.zeros([BLOCK], tl.float32)
        for at in range(begin, end):
            place = tl.load(order_ptr + at)
            total += tl.load(rows_ptr + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + target * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


class Backend(Protocol):
    def take(self, frames_ND: Tensor, text_MD: Tensor, index_T: Tensor) -> Tensor:
        """[T, D]: row index_T of frames_ND followed by text_MD, zeros where it is PADDING."""

    def place(self, rows_TD: Tensor, index_T: Tensor, *, first: int, count: int) -> Tensor:
        """[count, D]: row s is the sum of the rows whose index is first + s."""


class PlainBackend:
    """The definition in plain PyTorch, float64 too. On a GPU its sums use atomics: their order is not fixed."""

    def take(self, frames_ND: Tensor, text_MD: Tensor, index_T: Tensor) -> Tensor:
        out_TD = frames_ND.new_zeros(len(index_T), frames_ND.shape[1])
        is_text_T = index_T >= len(frames_ND)
        is_frame_T = (index_T >= 0) & ~is_text_T
        out_TD[is_frame_T] = frames_ND[index_T[is_frame_T]]
        out_TD[is_text_T] = text_MD[index_T[is_text_T] - len(frames_ND)]
        return out_TD

    def place(self, rows_TD: Tensor, index_T: Tensor, *, first: int, count: int) -> Tensor:
        dtype = torch.float64 if rows_TD.dtype == torch.float64 else torch.float32
        kept_T = (index_T >= first) & (index_T < first + count)
        sums_SD = torch.zeros(count, rows_TD.shape[1], dtype=dtype, device=rows_TD.device)
        return sums_SD.index_add_(0, index_T[kept_T] - first, rows_TD[kept_T].to(dtype)).to(rows_TD.dtype)


class TritonBackend:
    """One pass over the rows: float32, bfloat16, float16."""

    def take(self, frames_ND: Tensor, text_MD: Tensor, index_T: Tensor) -> Tensor:
        places, width = len(index_T), frames_ND.shape[1]
        out_TD = frames_ND.new_empty(places, width)
        if places and width:
            _take_kernel[(places,)](
                frames_ND.contiguous(), text_MD.contiguous(), index_T.contiguous(), out_TD, len(frames_ND), width,
                BLOCK=_block(width),
            )  # fmt: skip
        return out_TD

    def place(self, rows_TD: Tensor, index_T: Tensor, *, first: int, count: int) -> Tensor:
        width = rows_TD.shape[1]
        out_SD = rows_TD.new_empty(count, width)
        if count and width:
            # Stable, so that a row's addends come in the order of the sequence.
            sorted_T, order_T = torch.sort(index_T, stable=True)
            bounds = torch.arange(first, first + count + 1, device=index_T.device)
            offsets = torch.searchsorted(sorted_T, bounds)
            _sum_kernel[(count,)](rows_TD.contiguous(), order_T, offsets, out_SD, width, BLOCK=_block(width))
        return out_SD


BACKENDS: dict[str, type[Backend]] = {"plain": PlainBackend, "triton": TritonBackend}


class _ShardRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, frames_ND: Tensor, text_MD: Tensor, index_T: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.backend, ctx.sizes = backend, (len(frames_ND), len(text_MD))
        return backend.take(frames_ND, text_MD, index_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (index_T,) = ctx.saved_tensors
        num_frames, num_text = ctx.sizes
        spans = ((0, num_frames), (num_frames, num_text))
        grads = [
            ctx.backend.place(grad_TD, index_T, first=first, count=count) if needed else None
            for (first, count), needed in zip(spans, ctx.needs_input_grad[:2], strict=True)
        ]
        return (*grads, None, None)


class _UnshardRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_TD: Tensor, index_T: Tensor, num_rows: int, backend: Backend) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.backend = backend
        return backend.place(rows_TD, index_T, first=0, count=num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        (index_T,) = ctx.saved_tensors
        return ctx.backend.take(grad_SD, grad_SD[:0], index_T), None, None, None


def shard_rows(frames_ND: Tensor, text_MD: Tensor, index_T: Tensor, *, backend: str = "auto") -> Tensor:
    """The rows of a sequence shard, [T, D] in the inputs' dtype.

    frames_ND: [N, D] and text_MD: [M, D], one dtype and device, either may be empty; index_T: [T] int64: i < N takes
    frames_ND[i], N <= i < N + M takes text_MD[i - N], PADDING gives zeros. A row may be taken several times: its
    gradient is the sum over the places that took it, in float32 (float64 for float64), zero when none did.
    backend: a name of BACKENDS; `auto`: Triton on a GPU except for float64. Raises ValueError for an index outside
    the rows (which waits for the device once).
    """
    if frames_ND.shape[1:] != text_MD.shape[1:] or frames_ND.ndim != 2 or frames_ND.dtype != text_MD.dtype:
        raise ValueError(
            f"frames and text must be [N, D] and [M, D] of one dtype, got {tuple(frames_ND.shape)} {frames_ND.dtype} "
            f"and {tuple(text_MD.shape)} {text_MD.dtype}"
        )
    _check_index(index_T, len(frames_ND) + len(text_MD))
    return _ShardRows.apply(frames_ND, text_MD, index_T, _choose(backend, frames_ND))


def unshard_rows(rows_TD: Tensor, index_T: Tensor, num_rows: int, *, backend: str = "auto") -> Tensor:
    """Rows put at their places: [num_rows, D] with rows_TD[k] at index_T[k] and zeros where nothing goes.

    rows_TD: [T, D]; index_T: [T] int64 in 0..num_rows, or PADDING for a row that goes nowhere (its gradient is zero).
    Rows that go to one place are summed, as in the gradient of shard_rows. backend and errors: as shard_rows.
    """
    if rows_TD.ndim != 2 or len(rows_TD) != len(index_T):
        raise ValueError(
            f"rows must be [T, D] with one index each, got {tuple(rows_TD.shape)} and {len(index_T)} indices"
        )
    _check_index(index_T, num_rows)
    return _UnshardRows.apply(rows_TD, index_T, num_rows, _choose(backend, rows_TD))


def _check_index(index_T: Tensor, num_rows: int) -> None:
    if index_T.ndim != 1 or index_T.dtype != torch.int64:
        raise ValueError(f"index must be [T] int64, got {tuple(index_T.shape)} {index_T.dtype}")
    if not len(index_T):
        return
    low, high = torch.stack(index_T.aminmax()).tolist()
    if low < PADDING or high >= num_rows:
        raise ValueError(f"index must be in 0..{num_rows - 1}, or {PADDING} for padding; got {low}..{high}")


def _choose(name: str, rows: Tensor) -> Backend:
    if name == "auto":
        name = "triton" if rows.is_cuda and rows.dtype != torch.float64 else "plain"
    if name == "triton" and rows.dtype == torch.float64:
        raise ValueError("the triton back end sums in float32; use backend='plain' for float64")
    return BACKENDS[name]()


def _block(width: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(width))
