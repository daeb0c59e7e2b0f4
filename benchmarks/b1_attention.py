"""B1: attention of a group that shares its prefix, against the same kernel on G repeated sequences. One GPU.

Checks the error against float64 first (B13: no larger than the repeated form's), then times forward + backward of one
layer: 28 query and 4 key/value heads of width 128, bf16. Prints a table; --json FILE keeps the numbers.

    python benchmarks/b1_attention.py [--prefix 32768 131072] [--responses 8] [--length 1024] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megalong.attention.kernels import KERNELS
from megalong.attention.pack import pack_attention
from megalong.attention.tree import plan_calls

HEADS, KV_HEADS, WIDTH = 28, 4, 128
SCALE = WIDTH**-0.5
Form = Callable[..., list[Tensor]]


def tensors(tokens: int, *, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [(tokens, HEADS, WIDTH), (tokens, KV_HEADS, WIDTH), (tokens, KV_HEADS, WIDTH)]
    return [torch.randn(shape, dtype=dtype, device="cuda", generator=generator, requires_grad=True) for shape in shapes]


def attend(parts: list[Tensor], encoded: tuple[int, ...], kernel: str) -> Tensor:
    plan = plan_calls(encoded, ring_rank=0, ring_size=1)
    heads_first = [part.transpose(0, 1)[None].contiguous() for part in parts]
    return pack_attention(*heads_first, plan, scale=SCALE, kernel=kernel)[0].transpose(0, 1)


def shared(parts: list[Tensor], prefix: int, lens: tuple[int, ...], kernel: str) -> list[Tensor]:
    starts = [prefix + sum(lens[:index]) for index in range(len(lens))]
    responses = [number for start, length in zip(starts, lens, strict=True) for number in (start, length, 0)]
    return [attend(parts, (0, prefix, -1, *responses), kernel)]


def repeated(parts: list[Tensor], prefix: int, lens: tuple[int, ...], kernel: str) -> list[Tensor]:
    """Each response behind its own copy of the prefix: one output per sequence."""
    outputs, at = [], prefix
    for length in lens:
        rows = [torch.cat((part[:prefix], part[at : at + length])) for part in parts]
        outputs.append(attend(rows, (0, prefix + length, -1), kernel))
        at += length
    return outputs


def upstream(form: Form, grad: Tensor, prefix: int, lens: tuple[int, ...]) -> list[Tensor]:
    """The gradient of each output. Every copy of the prefix gets its share of the shared prefix's, as in training: with
    zeros in all copies but one the chip needs less power and runs faster than it ever does."""
    if form is shared:
        return [grad]
    return [torch.cat((grad[:prefix] / len(lens), rows)) for rows in grad[prefix:].split(lens)]


def gradients(form: Form, parts: list[Tensor], grads: list[Tensor], *args: object) -> list[Tensor]:
    outputs = form(parts, *args)
    return list(torch.autograd.grad(outputs, parts, grads))


def check(kernel: str) -> tuple[float, float]:
    """Largest relative error (dQ, dK, dV) against float64 of the shared and of the repeated form, ragged."""
    prefix, lens = 1024, (256, 1, 300, 77)
    parts = tensors(prefix + sum(lens), dtype=torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in parts]
    grad = torch.randn(parts[0].shape, dtype=torch.bfloat16, device="cuda")
    want = gradients(shared, exact, [grad.double()], prefix, lens, "plain")
    errors = []
    for form in (shared, repeated):
        got = gradients(form, parts, upstream(form, grad, prefix, lens), prefix, lens, kernel)
        errors.append(max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)))
    return errors[0], errors[1]


def milliseconds(run: Callable[[], object], *, repeats: int) -> list[float]:
    times = []
    for index in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if index:  # the first run builds plans
            times.append(start.elapsed_time(end))
    return times


def flops(prefix: int, lens: tuple[int, ...]) -> float:
    """Forward + backward of the shared form: 3.5 times 4 * heads * width per (query, key) pair."""
    pairs = prefix * (prefix + 1) / 2 + sum(r * prefix + r * (r + 1) / 2 for r in lens)
    return 3.5 * 4 * HEADS * WIDTH * pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--kernels", nargs="+", default=["cudnn", "flash"], choices=sorted(KERNELS))
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = []
    for kernel in args.kernels:
        ours, theirs = check(kernel)
        if ours > 1.1 * theirs:
            raise SystemExit(f"{kernel}: the shared form's error {ours:.2e} is above the repeated form's {theirs:.2e}")
        print(f"{kernel}: error against float64: shared {ours:.2e}, repeated {theirs:.2e}", flush=True)
        for prefix in args.prefix:
            lens = (args.length,) * args.responses
            parts = tensors(prefix + sum(lens), dtype=torch.bfloat16)
            grad = torch.randn_like(parts[0])
            row = {"kernel": kernel, "prefix": prefix, "responses": args.responses, "length": args.length}
            for name, form, repeats in (("shared", shared, 5), ("repeated", repeated, 3)):
                torch.cuda.reset_peak_memory_stats()
                run = partial(gradients, form, parts, upstream(form, grad, prefix, lens), prefix, lens, kernel)
                held = torch.cuda.memory_allocated()
                times = milliseconds(run, repeats=repeats)
                row[f"{name}_ms"] = statistics.median(times)
                row[f"{name}_spread"] = (min(times), max(times))
                row[f"{name}_temp_gb"] = (torch.cuda.max_memory_allocated() - held) / 1e9
            row["ratio"] = row["repeated_ms"] / row["shared_ms"]
            row["tflops"] = flops(prefix, lens) / row["shared_ms"] / 1e9
            rows.append(row)
            print(
                f"{kernel:6} P={prefix:7} G={args.responses} R={args.length}: shared {row['shared_ms']:8.1f} ms "
                f"({row['tflops']:.0f} TFLOP/s, {row['shared_temp_gb']:.1f} GB), repeated {row['repeated_ms']:8.1f} ms "
                f"({row['repeated_temp_gb']:.1f} GB), ratio {row['ratio']:.2f}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
