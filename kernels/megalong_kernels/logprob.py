"""Log-probability and entropy of chosen tokens from hidden states, and its backward, without an [R, V] tensor.

The vocabulary is walked in steps: cuBLAS makes the float32 logits of one step, and one kernel reads them once. Forward:
`fold_chunk` folds them into a running maximum and sums. Backward: `grad_chunk` turns them into the gradient of the
logits in the weights' dtype, from which the step's rows of the weight gradient are one product, never accumulated over
steps, and the gradient of hidden is accumulated in float32.

Legend: R rows, D hidden width, V vocabulary rows of this rank (real ones), C columns of a step; `parts_4R` is float32:
maximum m of the logits, sum of exp(logit - m), sum of exp(logit - m) * (logit - m), and the target's logit or 0.
`targets_R` counts from this rank's first row; a target that is elsewhere, or none, is below 0. Logits carry `scale`,
1 / temperature. Addresses are 64-bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_STEP = 8192
"""Rows of a step at most."""
VOCAB_STEP = 6912
"""Columns of a step for ROW_STEP rows: 64 x 27 tiles of 128 x 256, 13.1 waves on 132 multiprocessors. 8,448 columns are
16 whole waves and a little faster, but their float32 logits take 277 MB, these 226."""
LOWEST = -1e30
"""Stands for 'no logit yet': finite, so that no difference of maxima is a NaN."""
STRIDE = 16
"""Rows of logits start at a multiple of this many elements, as cuBLAS and vector loads want."""
BLOCK = 2048
WARPS = 8


@triton.jit(do_not_specialize=["first"])
def _fold_kernel(
    logits_ptr, parts_ptr, targets_ptr, width, logits_stride, parts_stride, first, scale,
    LOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    # Every lane keeps its own maximum and sums: no exchange between lanes until the row is through.
    peak = tl.full([COLUMNS], LOW, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    tilt = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        logit = tl.load(logits_ptr + columns, mask=columns < width, other=float("-inf")) * scale
        top = tl.maximum(peak, logit)
        drop = peak - top
        shrink = tl.exp(drop)
        prob = tl.exp(logit - top)
        # Beyond the columns logit - top is -inf, and 0 * -inf is a NaN.
        tilt = (tilt + drop * mass) * shrink + prob * tl.maximum(logit - top, LOW)
        mass = mass * shrink + prob
        peak = top

    parts_ptr += row
    before = tl.load(parts_ptr)
    mass_before = tl.load(parts_ptr + parts_stride)
    tilt_before = tl.load(parts_ptr + 2 * parts_stride)
    top = tl.maximum(tl.max(peak, axis=0), before)
    drop = peak - top
    shrink = tl.exp(drop)
    drop_before = before - top
    shrink_before = tl.exp(drop_before)
    tilt_now = tl.sum((tilt + drop * mass) * shrink, axis=0)
    tl.store(parts_ptr, top)
    tl.store(parts_ptr + parts_stride, tl.sum(mass * shrink, axis=0) + mass_before * shrink_before)
    tl.store(parts_ptr + 2 * parts_stride, tilt_now + (tilt_before + drop_before * mass_before) * shrink_before)

    target = tl.load(targets_ptr + row) - first
    here = (target >= 0) & (target < width)
    chosen = tl.load(logits_ptr + target, mask=here, other=0.0) * scale
    tl.store(parts_ptr + 3 * parts_stride, chosen, mask=here)


@triton.jit(do_not_specialize=["first"])
def _grad_kernel(
    logits_ptr, grad_ptr, coef_ptr, lse_ptr, targets_ptr, width, logits_stride, grad_stride, first, scale,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    coef = tl.load(coef_ptr + row)
    lse = tl.load(lse_ptr + row)
    target = tl.load(targets_ptr + row) - first
    logit = tl.load(logits_ptr + row * logits_stride + columns, mask=inside, other=0.0) * scale
    grad = coef * ((columns == target).to(tl.float32) - tl.exp(logit - lse))
    # A row without a gradient stays out whatever it holds: 0 * NaN is a NaN.
    grad = tl.where(coef == 0.0, 0.0, grad)
    tl.store(grad_ptr + row * grad_stride + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def fold_chunk(logits_RC: Tensor, parts_4R: Tensor, targets_R: Tensor, *, first: int, scale: float) -> None:
    """Adds the logits of columns first..first+C to parts_4R, in place.

    logits_RC: [R, C] float32, unscaled, rows contiguous; parts_4R: [4, R] float32; targets_R: [R] int64.
    """
    rows, width = logits_RC.shape
    _fold_kernel[(rows,)](
        logits_RC, parts_4R, targets_R, width, logits_RC.stride(0), parts_4R.stride(0), first, scale,
        LOW=LOWEST, COLUMNS=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def fold_chunk_reference(logits_RC: Tensor, parts_4R: Tensor, targets_R: Tensor, *, first: int, scale: float) -> None:
    """fold_chunk in plain PyTorch."""
    logits_RC = logits_RC * scale
    before_R, mass_R, tilt_R, _ = parts_4R.clone()
    top_R = torch.maximum(logits_RC.amax(dim=1), before_R)
    drop_R, drop_RC = before_R - top_R, logits_RC - top_R[:, None]
    probs_RC = drop_RC.exp()
    parts_4R[0] = top_R
    parts_4R[1] = probs_RC.sum(dim=1) + mass_R * drop_R.exp()
    tilts_RC = (probs_RC * drop_RC).masked_fill(probs_RC == 0, 0)
    parts_4R[2] = tilts_RC.sum(dim=1) + (tilt_R + drop_R * mass_R) * drop_R.exp()
    here_R = (targets_R >= first) & (targets_R < first + logits_RC.shape[1])
    parts_4R[3, here_R] = logits_RC[here_R, targets_R[here_R] - first]


def grad_chunk(
    logits_RC: Tensor, grad_RC: Tensor, coef_R: Tensor, lse_R: Tensor, targets_R: Tensor, *, first: int, scale: float
) -> None:
    """Writes grad_RC = coef_R * (one-hot of the target - softmax), rows with coefficient 0 being 0.

    logits_RC: [R, C] float32, unscaled; grad_RC: [R, C], any float dtype; both with contiguous rows.
    coef_R, lse_R: [R] float32, lse over the whole vocabulary, of scaled logits; targets_R: [R] int64.
    """
    rows, width = logits_RC.shape
    _grad_kernel[(rows, triton.cdiv(width, BLOCK))](
        logits_RC, grad_RC, coef_R, lse_R, targets_R, width, logits_RC.stride(0), grad_RC.stride(0), first, scale,
        COLUMNS=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def grad_chunk_reference(
    logits_RC: Tensor, grad_RC: Tensor, coef_R: Tensor, lse_R: Tensor, targets_R: Tensor, *, first: int, scale: float
) -> None:
    """grad_chunk in plain PyTorch."""
    grads_RC = (logits_RC * scale - lse_R[:, None]).exp().neg()
    here_R = (targets_R >= first) & (targets_R < first + logits_RC.shape[1])
    grads_RC[here_R, targets_R[here_R] - first] += 1
    grad_RC.copy_((grads_RC * coef_R[:, None]).masked_fill((coef_R == 0)[:, None], 0))


def fold_logits(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, scale: float) -> Tensor:
    """parts_4R of logits = hidden @ weight.T. hidden_RD, weight_VD: bfloat16 or float16, V at least 1."""
    rows = hidden_RD.shape[0]
    parts_4R = torch.zeros(4, rows, dtype=torch.float32, device=hidden_RD.device)
    parts_4R[0] = LOWEST
    logits = _step_buffer(rows, weight_VD.shape[0], hidden_RD.device, torch.float32)
    for columns in _column_steps(rows, weight_VD.shape[0]):
        for span in _steps(rows, ROW_STEP):
            logits_RC = _corner(logits, span, columns)
            _product(hidden_RD[span], weight_VD[columns].t(), out=logits_RC)
            fold_chunk(logits_RC, parts_4R[:, span], targets_R[span], first=columns.start, scale=scale)
    return parts_4R


def grads_of_logits(
    coef_R: Tensor, lse_R: Tensor, hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *,
    scale: float, grad_weight_VD: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gradient of hidden, [R, D] in its dtype, for coef_R * d logprob / d logits; fills grad_weight_VD unless None.

    coef_R: [R] float32, the gradient of the log-probability times scale, 0 for rows that are left out;
    lse_R: [R] float32 over the whole vocabulary (all ranks). Deterministic.
    """
    (rows, width), vocab, device = hidden_RD.shape, weight_VD.shape[0], hidden_RD.device
    grad_hidden_RD = torch.zeros(rows, width, dtype=torch.float32, device=device)
    logits = _step_buffer(rows, vocab, device, torch.float32)
    grads = _step_buffer(rows, vocab, device, weight_VD.dtype)
    for columns in _column_steps(rows, vocab):
        weight_CD = weight_VD[columns]
        sum_CD = _weight_sum(weight_CD, rows, grad_weight_VD)
        for span in _steps(rows, ROW_STEP):
            logits_RC, grad_RC = _corner(logits, span, columns), _corner(grads, span, columns)
            _product(hidden_RD[span], weight_CD.t(), out=logits_RC)
            grad_chunk(logits_RC, grad_RC, coef_R[span], lse_R[span], targets_R[span], first=columns.start, scale=scale)
            _product(grad_RC, weight_CD, out=grad_hidden_RD[span], accumulate=True)
            if sum_CD is not None:
                _product(grad_RC.t(), hidden_RD[span], out=sum_CD, accumulate=True)
            elif grad_weight_VD is not None:
                torch.mm(grad_RC.t(), hidden_RD[span], out=grad_weight_VD[columns])
        if sum_CD is not None:
            grad_weight_VD[columns] = sum_CD
    return grad_hidden_RD.to(hidden_RD.dtype)


def _weight_sum(weight_CD: Tensor, rows: int, grad_weight_VD: Tensor | None) -> Tensor | None:
    """A float32 sum for the weight gradient of a step, where more than one step of rows adds to it."""
    if grad_weight_VD is None or 0 < rows <= ROW_STEP:
        return None
    return torch.zeros_like(weight_CD, dtype=torch.float32)


def _product(left: Tensor, right: Tensor, *, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= left @ right, in float32 from half-precision factors."""
    if not left.is_cuda:  # the interpreter's tests; torch has float32 output of half factors on CUDA alone
        out.addmm_(left.float(), right.float(), beta=int(accumulate))
    elif accumulate:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def _steps(size: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, size)) for at in range(0, size, step))


def _column_steps(rows: int, vocab: int) -> Iterator[slice]:
    return _steps(vocab, _columns_per_step(rows))


def _columns_per_step(rows: int) -> int:
    """Fewer rows, more columns: as many logits a step as ROW_STEP rows have."""
    return VOCAB_STEP * max(1, ROW_STEP // max(rows, 1))


def _step_buffer(rows: int, vocab: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    columns = min(vocab, _columns_per_step(rows))
    return torch.empty(min(rows, ROW_STEP), triton.cdiv(columns, STRIDE) * STRIDE, dtype=dtype, device=device)


def _corner(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    return buffer[: rows.stop - rows.start, : columns.stop - columns.start]
