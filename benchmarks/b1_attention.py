"""B1: attention of a group that shares its prefix, against the same kernel on G repeated sequences and against other
ways to share it. One GPU.

Checks the error against float64 first (B13: no larger than the repeated form's), then, before a baseline is timed, its
output and gradients against ours. Forward + backward of one layer: 28 query and 4 key/value heads of width 128, bf16.

    shared          ours: the prefix and each response by the kernel, the responses on the prefix by the kernel, merged
    repeated        each response behind its own copy of the prefix, one call of the kernel for each
    repeated_fa2    the same by torch's FlashAttention-2, which the paper's system runs
    prefix_grouper  the package prefix-grouper: the prefix by the kernel, then the responses against the prefix's keys,
                    repeated and concatenated with their own, by FlashAttention-2 (the one with a mask aligned there)
    flex            FlexAttention, compiled, the whole pack in one call; its block mask is made before the clock starts

Prints a table; --json FILE keeps the numbers, --plot FILE.png draws them. prefix_grouper needs that package (pip
install prefix-grouper).

--calls also times the kernel's calls one by one: the prefix, the responses on the prefix, and the responses' own.

    python benchmarks/b1_attention.py [--prefix 32768 131072] [--responses 8] [--length 1024] [--kernels cudnn]
        [--baselines repeated repeated_fa2 prefix_grouper flex] [--repeats 1] [--json FILE] [--plot FILE.png] [--tiny]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from plots import bars
from steps import machine, save
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megalong.attention.kernels import KERNELS
from megalong.attention.pack import pack_attention
from megalong.attention.tree import plan_calls

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 128
"""Rows and keys of a block of FlexAttention's mask."""
LARGEST_GAP = 2e-2
"""Of an output or gradient of a baseline to ours, relative to its norm: beyond, it is not timed."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prefix, its responses behind it, and the heads of a layer."""

    prefix: int
    lens: tuple[int, ...]
    heads: int = 28
    kv_heads: int = 4
    width: int = 128

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.lens)

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def tensors(self, *, dtype: torch.dtype) -> list[Tensor]:
        """Query, key and value, [tokens, heads, width]."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        shapes = [(self.tokens, heads, self.width) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        return [
            torch.randn(shape, dtype=dtype, device=DEVICE, generator=generator, requires_grad=True) for shape in shapes
        ]

    def flops(self) -> float:
        """Forward + backward of the shared form: 3.5 times 4 * heads * width per (query, key) pair."""
        pairs = self.prefix * (self.prefix + 1) / 2 + sum(r * self.prefix + r * (r + 1) / 2 for r in self.lens)
        return 3.5 * 4 * self.heads * self.width * pairs


def attend(parts: list[Tensor], encoded: tuple[int, ...], group: Group, kernel: str) -> Tensor:
    plan = plan_calls(encoded, ring_rank=0, ring_size=1)
    return pack_attention(*heads_first(parts), plan, scale=group.scale, kernel=kernel)[0].transpose(0, 1)


def heads_first(parts: list[Tensor]) -> list[Tensor]:
    """[t, H, d] -> [1, H, t, d]."""
    return [part.transpose(0, 1)[None].contiguous() for part in parts]


def shared(parts: list[Tensor], group: Group, kernel: str) -> list[Tensor]:
    starts = [group.prefix + sum(group.lens[:index]) for index in range(len(group.lens))]
    responses = [number for start, length in zip(starts, group.lens, strict=True) for number in (start, length, 0)]
    return [attend(parts, (0, group.prefix, -1, *responses), group, kernel)]


def repeated(parts: list[Tensor], group: Group, kernel: str) -> list[Tensor]:
    """Each response behind its own copy of the prefix: one output per sequence."""
    outputs, at = [], group.prefix
    for length in group.lens:
        rows = [torch.cat((part[: group.prefix], part[at : at + length])) for part in parts]
        outputs.append(attend(rows, (0, group.prefix + length, -1), group, kernel))
        at += length
    return outputs


def repeated_fa2(parts: list[Tensor], group: Group, _: str) -> list[Tensor]:
    return repeated(parts, group, "flash" if DEVICE.type == "cuda" else "cpu_flash")


def prefix_grouper(parts: list[Tensor], group: Group, kernel: str) -> list[Tensor]:
    """Responses of one length only: the package pads them, and then its calls need masks that no fast kernel takes."""

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """[b, H, t, d] -> [b, t, H, d]; rows are the last t of s, as the package's callers pass it to flash-attn."""
        rows, keys = query.shape[2], key.shape[2]
        if rows == keys:
            plan = plan_calls((0, rows, -1), ring_rank=0, ring_size=1)
            return pack_attention(query, key, value, plan, scale=group.scale, kernel=kernel).transpose(1, 2)
        bias = causal_lower_right(rows, keys)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=group.scale, enable_gqa=True)
        return out.transpose(1, 2)

    return [grouper(group).forward(attention, *heads_first(parts))[0]]


@cache
def grouper(group: Group) -> Any:
    from prefix_grouper import PrefixGrouper

    if len(set(group.lens)) > 1:
        raise ValueError(f"responses of {sorted(set(group.lens))} tokens: this form is for one length")
    return PrefixGrouper([[group.prefix, *group.lens]], device=DEVICE)


def flex(parts: list[Tensor], group: Group, _: str) -> list[Tensor]:
    out = flex_call()(*heads_first(parts), block_mask=block_mask(group), scale=group.scale, enable_gqa=True)
    return [out[0].transpose(0, 1)]


@cache
def flex_call() -> Callable[..., Tensor]:
    # One set of kernels for each shape: with symbolic sizes they are slower.
    return torch.compile(flex_attention, dynamic=False) if DEVICE.type == "cuda" else flex_attention


@cache
def block_mask(group: Group) -> BlockMask:
    """Counted block row by block row: FlexAttention's own function writes out the whole mask, 20 GB at 139k tokens."""
    lens = torch.tensor([group.prefix, *group.lens], device=DEVICE)
    prefix = group.prefix
    owner = torch.repeat_interleave(torch.arange(len(lens), device=DEVICE, dtype=torch.int32), lens)

    def sees(_b: Tensor, _h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & ((key < prefix) | (owner[key] == owner[row]))

    blocks = -(-group.tokens // BLOCK)
    keys = torch.arange(group.tokens, device=DEVICE)
    counts = torch.zeros(blocks, blocks, dtype=torch.int64, device=DEVICE)
    for block in range(blocks):
        rows = keys[block * BLOCK : (block + 1) * BLOCK]
        seen = sees(rows, rows, rows[:, None], keys[None]).sum(0)
        counts[block] = F.pad(seen, (0, blocks * BLOCK - group.tokens)).view(blocks, BLOCK).sum(-1)
    kinds = []
    for which in ((counts > 0) & (counts < BLOCK * BLOCK), counts == BLOCK * BLOCK):
        order = which.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        kinds += [which.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]]
    return BlockMask.from_kv_blocks(*kinds, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(group.tokens, group.tokens))


BASELINES: dict[str, Callable[[list[Tensor], Group, str], list[Tensor]]] = {
    "repeated": repeated,
    "repeated_fa2": repeated_fa2,
    "prefix_grouper": prefix_grouper,
    "flex": flex,
}
FORMS = {"shared": shared, **BASELINES}


def upstream(name: str, grad: Tensor, group: Group) -> list[Tensor]:
    """The gradient of each output. Every copy of the prefix gets its share of the shared prefix's, as in training: with
    zeros in all copies but one the chip needs less power and runs faster than it ever does."""
    if not name.startswith("repeated"):
        return [grad]
    copies = grad[: group.prefix] / len(group.lens)
    return [torch.cat((copies, rows)) for rows in grad[group.prefix :].split(group.lens)]


def gradients(name: str, parts: list[Tensor], grads: list[Tensor], group: Group, kernel: str) -> list[Tensor]:
    return list(torch.autograd.grad(FORMS[name](parts, group, kernel), parts, grads))


def results(name: str, parts: list[Tensor], grad: Tensor, group: Group, kernel: str) -> list[Tensor]:
    """Output of every row of the group once, dQ, dK, dV."""
    outputs = FORMS[name](parts, group, kernel)
    grads = torch.autograd.grad(outputs, parts, upstream(name, grad, group))
    if name.startswith("repeated"):
        outputs = [torch.cat((outputs[0][: group.prefix], *(rows[group.prefix :] for rows in outputs)))]
    return [outputs[0].detach(), *grads]


def largest_gap(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """In parts of the norm; NaN where one is."""
    gaps = [(g.double() - w.double()).norm() / w.double().norm() for g, w in zip(got, want, strict=True)]
    return torch.stack(gaps).max().item()


def check(group: Group, kernel: str, *, dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative error (output, dQ, dK, dV) against float64 of the shared and of the repeated form."""
    parts = group.tensors(dtype=dtype)
    generator = torch.Generator(DEVICE).manual_seed(1)  # every run compares the same numbers
    grad = torch.randn(parts[0].shape, dtype=dtype, device=DEVICE, generator=generator)
    exact = [part.detach().double().requires_grad_() for part in parts]
    want = results("shared", exact, grad.double(), group, "plain")
    ours, theirs = (largest_gap(results(name, parts, grad, group, kernel), want) for name in ("shared", "repeated"))
    return ours, theirs


def seconds(run: Callable[[], object], *, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def allocated(*, peak: bool) -> float:
    """GB; 0 on a CPU, which keeps no such book."""
    if DEVICE.type == "cpu":
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9


def measure(
    group: Group, kernel: str, baselines: Sequence[str], *, dtype: torch.dtype, most: int
) -> dict[str, Any]:  # fmt: skip
    """Our form and each baseline: gap to ours (which also warms it up), then median, spread and temporary memory.

    most: passes of a form that are timed at most.
    """
    parts = group.tensors(dtype=dtype)
    grad = torch.randn_like(parts[0])
    ours = results("shared", parts, grad, group, kernel)
    row: dict[str, Any] = {
        "kernel": kernel,
        "prefix": group.prefix,
        "responses": len(group.lens),
        "length": group.lens[0],
    }
    for name in ("shared", *baselines):
        start = time.perf_counter()
        gap = 0.0 if name == "shared" else largest_gap(results(name, parts, grad, group, kernel), ours)
        synchronize()
        row[f"{name}_first_s"] = time.perf_counter() - start  # plans, compilation, and the comparison
        if not gap <= LARGEST_GAP:
            raise SystemExit(
                f"{name} is {gap:.1e} of the norm away from the shared form at P={group.prefix}; not timed"
            )
        row[f"{name}_gap"] = gap
        grads = upstream(name, grad, group)
        held = allocated(peak=False)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        repeats = min(most, 5 if row[f"{name}_first_s"] < 3 else 3)
        times = seconds(partial(gradients, name, parts, grads, group, kernel), repeats=repeats)
        row[f"{name}_ms"] = 1e3 * statistics.median(times)
        row[f"{name}_spread"] = (1e3 * min(times), 1e3 * max(times))
        row[f"{name}_temp_gb"] = allocated(peak=True) - held
        row[f"{name}_tflops"] = group.flops() / statistics.median(times) / 1e12  # of the pairs that ours computes
        print(line(row, name), flush=True)
    return row


def measure_calls(group: Group, kernel: str, *, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Forward and backward of each kind of call that the shared form makes, alone: median milliseconds, TFLOP/s."""
    made, generator = KERNELS[kernel].make(), torch.Generator(DEVICE).manual_seed(0)
    count, own = len(group.lens), group.lens[0]

    def random(batch: int, rows: int, heads: int) -> Tensor:
        """[batch, heads, rows, width], rows side by side in memory as in a pack."""
        return torch.randn(
            (batch, rows, heads, group.width), dtype=dtype, device=DEVICE, generator=generator
        ).transpose(1, 2)

    done = []
    for call, batch, rows, keys, causal in (
        ("prefix", 1, group.prefix, group.prefix, True),
        ("responses on the prefix", 1, sum(group.lens), group.prefix, False),
        ("responses", count, own, own, True),
    ):
        query, grad = random(batch, rows, group.heads), random(batch, rows, group.heads)
        key, value = random(batch, keys, group.kv_heads), random(batch, keys, group.kv_heads)
        how = {"causal": causal, "scale": group.scale}
        out, lse = made.forward(query, key, value, **how)
        backward = partial(made.backward, grad, query, key, value, out, lse, **how)
        backward()
        flops = 4 * group.heads * group.width * batch * (rows * (rows + 1) / 2 if causal else rows * keys)
        row: dict[str, Any] = {"call": call}
        for name, run, work in (
            ("forward", partial(made.forward, query, key, value, **how), flops),
            ("backward", backward, 2.5 * flops),
        ):
            median = statistics.median(seconds(run, repeats=5))
            row |= {f"{name}_ms": 1e3 * median, f"{name}_tflops": work / median / 1e12}
        print(
            f"{kernel:12} P={group.prefix:7} {call:23} forward {row['forward_ms']:8.2f} ms, "
            f"{row['forward_tflops']:4.0f} TFLOP/s, backward {row['backward_ms']:8.2f} ms, "
            f"{row['backward_tflops']:4.0f} TFLOP/s",
            flush=True,
        )
        done.append(row)
    return done


def line(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_spread"]
    text = (
        f"{row['kernel']:9} P={row['prefix']:7} G={row['responses']} R={row['length']} {name:15} "
        f"{row[f'{name}_ms']:9.1f} ms ({low:.1f} to {high:.1f}), {row[f'{name}_temp_gb']:5.1f} GB"
    )
    if name == "shared":
        return f"{text}, {row['shared_tflops']:.0f} TFLOP/s"
    return (
        f"{text}, {row[f'{name}_ms'] / row['shared_ms']:.2f} times ours; gap {row[f'{name}_gap']:.1e}, "
        f"first call and comparison {row[f'{name}_first_s']:.1f} s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", help="32768 131072; 40 with --tiny")
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--length", type=int, help="1024; 8 with --tiny")
    parser.add_argument("--kernels", nargs="+", choices=sorted(KERNELS), help="cudnn; cpu_flash with --tiny")
    parser.add_argument("--baselines", nargs="*", default=list(BASELINES), choices=list(BASELINES))
    parser.add_argument("--repeats", type=int, default=5, help="most timed passes of a form; slow ones have 3")
    parser.add_argument("--calls", action="store_true", help="also time the kernel's calls one by one")
    parser.add_argument("--tiny", action="store_true", help="4 and 2 heads of width 8 in float32, for a CPU")
    parser.add_argument("--json")
    parser.add_argument("--plot", help="file for the plot")
    args = parser.parse_args(argv)
    if "prefix_grouper" in args.baselines and find_spec("prefix_grouper") is None:
        parser.error("--baselines prefix_grouper: pip install prefix-grouper, or leave it out")
    heads = {"heads": 4, "kv_heads": 2, "width": 8} if args.tiny else {}
    dtype = torch.float32 if args.tiny else torch.bfloat16
    lens = (args.length or (8 if args.tiny else 1024),) * args.responses
    ragged = Group(prefix=96, lens=(24, 1, 31, 7), **heads) if args.tiny else Group(prefix=1024, lens=(256, 1, 300, 77))
    rows = []
    for kernel in args.kernels or (["cpu_flash"] if args.tiny else ["cudnn"]):
        ours, theirs = check(ragged, kernel, dtype=dtype)
        if not ours <= 1.1 * theirs:
            raise SystemExit(f"{kernel}: the shared form's error {ours:.2e} is above the repeated form's {theirs:.2e}")
        print(f"{kernel}: error against float64: shared {ours:.2e}, repeated {theirs:.2e}", flush=True)
        for prefix in args.prefix or ([40] if args.tiny else [32768, 131072]):
            group = Group(prefix=prefix, lens=lens, **heads)
            row = measure(group, kernel, args.baselines, dtype=dtype, most=args.repeats)
            calls = measure_calls(group, kernel, dtype=dtype) if args.calls else []
            rows.append({**row, "calls": calls, "shared_error": ours, "repeated_error": theirs})
    save(args.json, rows)
    if args.plot:
        forms = ("shared", *args.baselines)
        bars(
            {f"{row['kernel']}\nP={row['prefix']:,}": {name: row[f"{name}_ms"] for name in forms} for row in rows},
            path=args.plot, unit="ms, forward + backward of one layer",
            title=f"Attention of G={args.responses} responses of {lens[0]} on a prefix, {machine()['device']}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
