"""B7, one layer's attention of a group over a ring of GPUs: keys to the queries (ours), or queries to the keys.

Both ways the prefix's own rows gather all keys of the prefix, since each needs those before it. They differ in the
responses, which all see the whole prefix:

    keys       the responses read the gathered keys, too; each rank its own responses' rows. What megalong does
               (attention.context)
    queries    the queries of all responses go to every rank, which attends with them to the keys of its own rows alone;
               results travel back and are merged by their log-sum-exp. Backward: gradients and merged results travel
               there, key gradients stay, query gradients are summed on the way back

Heads are those of a rank once the all-to-all has dealt them out: 28 and 4 for a ring of four alone; --heads 7 1 for the
ring of two that eight GPUs have, 4 x 2. Outputs and gradients of both are compared before they are timed, forward +
backward in turns; `exchange` is what the gathered keys alone take.

    python -m torch.distributed.run --standalone --nproc-per-node 4 benchmarks/b7_ring.py
        [--prefix 131072] [--heads 28 4] [--json FILE] [--tiny]
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from b1_attention import largest_gap
from steps import Watch, free, machine, parser_of, peak_gb, reset_peak, save
from torch import Tensor
from torch.distributed import ProcessGroup

from megalong.attention.context import RingPlan, gather_keys, ring_plan
from megalong.attention.kernels import Kernel, choose_kernel
from megalong.attention.pack import merge_into, pack_attention
from megalong.attention.tree import encode_segments
from megalong.parallel.collectives import gather_objects
from megalong.parallel.layout import ContextGroups, ParallelLayout, destroy_layout, make_layout
from megalong.records import Segment

LARGEST_GAP = {torch.float64: 1e-12, torch.bfloat16: 2e-2}
"""Between the two ways, relative to the norm: each rounds its outputs and gradients, a few thousandths each."""
Form = Callable[[Tensor, Tensor, Tensor], Tensor]
"""query [t, Q, d], key, value [t, K, d], this rank's rows of prefix and responses -> [t, Q, d]."""


def segments_of(prefix: int, response: int, count: int) -> list[Segment]:
    starts = range(prefix, prefix + count * response, response)
    return [
        Segment(start=0, length=prefix, parent=-1),
        *(Segment(start=start, length=response, parent=0) for start in starts),
    ]


def heads_first(rows: Tensor) -> Tensor:
    return rows.transpose(0, 1)[None].contiguous()


def attend(query: Tensor, key: Tensor, value: Tensor, plan: RingPlan, context: ContextGroups) -> Tensor:
    """This rank's rows of a pack on the gathered keys, as attention.core does it."""
    key, value = gather_keys(torch.cat((key, value), dim=-1), plan, context).chunk(2, dim=-1)
    parts = [heads_first(part) for part in (query, key, value)]
    out = pack_attention(*parts, plan.calls, scale=query.shape[-1] ** -0.5, kernel="auto")
    return out[0].transpose(0, 1)


def keys_to_queries(segments: Sequence[Segment], context: ContextGroups, device: torch.device) -> Form:
    plan = ring_plan(tuple(encode_segments(segments)), context.ring_rank, context.ring_size, device)
    return lambda query, key, value: attend(query, key, value, plan, context)


def queries_to_keys(segments: Sequence[Segment], context: ContextGroups, device: torch.device) -> Form:
    plan = ring_plan(tuple(encode_segments(segments[:1])), context.ring_rank, context.ring_size, device)
    rows, length = plan.calls.num_rows, segments[1].length

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        prefix = attend(query[:rows], key[:rows], value[:rows], plan, context)
        responses = _Responses.apply(*map(heads_first, (query, key, value)), rows, length, context.ring)
        return torch.cat((prefix, responses[0].transpose(0, 1)))

    return run


class _Responses(torch.autograd.Function):
    """Output of this rank's response rows: query [1, Q, t, d], the first `rows` of which are of the prefix."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: int, length: int, group: ProcessGroup
    ) -> Tensor:
        ctx.rows, ctx.length, ctx.group = rows, length, group
        shards = [part[:, :, :rows] for part in (key, value)]
        mine = [part[:, :, rows:] for part in (query, key, value)]
        everyone = gather(mine[0], group)
        how = {"causal": False, "scale": query.shape[-1] ** -0.5}
        there, lse_there = kernel_for(everyone, shards[0]).forward(everyone, *shards, **how)
        own = [per_response(part, length) for part in mine]
        out, lse = kernel_for(own[0], own[1]).forward(*own, causal=True, scale=how["scale"])
        out, lse = together(out), together(lse)
        for part, lse_part in zip(deal(there, group), deal(lse_there, group), strict=True):
            merge_into(out, lse, part, lse_part)
        ctx.save_for_backward(everyone, *shards, *own, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        everyone, *parts, out, lse = ctx.saved_tensors
        shards, own = parts[:2], parts[2:]
        how = {"causal": False, "scale": out.shape[-1] ** -0.5}
        given = [gather(part, ctx.group) for part in (grad_out.contiguous(), out, lse)]
        there, *of_shard = kernel_for(everyone, shards[0]).backward(
            given[0], everyone, *shards, given[1], given[2], **how
        )
        grad, out_own, lse_own = (per_response(part, ctx.length) for part in (grad_out, out, lse))
        of_query, *of_own = kernel_for(own[0], own[1]).backward(
            grad, *own, out_own, lse_own, causal=True, scale=how["scale"]
        )
        # In full precision, as key gradients are summed where keys travel.
        grad_query = sum(part.to(lse.dtype) for part in deal(there, ctx.group)) + together(of_query)
        whole = torch.cat((grad_query.new_zeros((1, out.shape[1], ctx.rows, out.shape[-1])), grad_query), dim=2)
        of_keys = [torch.cat((a, together(b)), dim=2) for a, b in zip(of_shard, of_own, strict=True)]
        return whole.to(out.dtype), *of_keys, None, None, None


def kernel_for(query: Tensor, key: Tensor) -> Kernel:
    return choose_kernel(
        "auto", device=query.device, dtype=query.dtype, num_rows=query.shape[2], num_tokens=key.shape[2],
        head_dim=query.shape[-1], merged=True,
    )  # fmt: skip


def per_response(part: Tensor, length: int) -> Tensor:
    """[1, H, n * length, ..] -> [n, H, length, ..]."""
    return part[0].unflatten(1, (-1, length)).transpose(0, 1).contiguous()


def together(batch: Tensor) -> Tensor:
    """The inverse of per_response."""
    return batch.transpose(0, 1).flatten(1, 2)[None]


def gather(part: Tensor, group: ProcessGroup) -> Tensor:
    """[1, H, t, ..] of every rank -> [1, H, ranks * t, ..]."""
    found = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, part.contiguous(), group=group)
    return torch.cat(found, dim=2)


def deal(part: Tensor, group: ProcessGroup) -> Tensor:
    """[1, H, ranks * t, ..] of every rank -> [ranks, 1, H, t, ..]: what each has for this rank's rows."""
    send = part.unflatten(2, (dist.get_world_size(group), -1)).movedim(2, 0).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received


def both_ways(form: Form, parts: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    out = form(*parts)
    return [out.detach(), *torch.autograd.grad(out, parts, upstream)]


def measure(prefix: int, heads: Sequence[int], width: int, args: Any, layout: ParallelLayout) -> dict[str, Any]:
    context, device = layout.context, layout.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float64
    length = args.length or (8 if args.tiny else 1024)
    if args.responses % context.ring_size:
        raise SystemExit(f"--responses {args.responses} on a ring of {context.ring_size}: whole responses on each rank")
    segments = segments_of(prefix, length, args.responses)
    plan = ring_plan(tuple(encode_segments(segments)), context.ring_rank, context.ring_size, device)
    generator = torch.Generator(device).manual_seed(context.ring_rank)
    draw = lambda count: torch.randn(  # noqa: E731
        plan.calls.num_rows, count, width, device=device, dtype=torch.float32, generator=generator
    ).to(dtype)
    parts, upstream = [draw(count).requires_grad_() for count in (heads[0], heads[1], heads[1])], draw(heads[0])
    forms = {name: make(segments, context, device) for name, make in WAYS.items()}
    gap = compare(*(both_ways(form, parts, upstream) for form in forms.values()), group=context.ring)
    if not gap < LARGEST_GAP[dtype]:
        raise SystemExit(f"the two ways differ by {gap:.1e} of the norm, above {LARGEST_GAP[dtype]:.0e}")
    works = {name: lambda form=form: both_ways(form, parts, upstream) for name, form in forms.items()}
    works["exchange"] = lambda: exchange(parts[1:], plan, context)
    peaks = {}
    for name, work in works.items():
        free(device)
        reset_peak(device)
        work()
        peaks[name] = max(gather_objects(peak_gb(device), group=context.ring))
    times = {name: [] for name in works}
    for _ in range(5):
        for name, work in works.items():
            times[name].append(seconds(work, layout))
    return {
        "name": f"{context.ring_size} GPUs, {heads[0]}/{heads[1]} heads, P={prefix:,}",
        "prefix": prefix, "heads": list(heads), "world": context.ring_size, "gap": gap,
        **{f"{name}_ms": 1e3 * statistics.median(found) for name, found in times.items()},
        **{f"{name}_spread_ms": [1e3 * min(found), 1e3 * max(found)] for name, found in times.items()},
        **{f"{name}_peak_gb": peak for name, peak in peaks.items()},
    }  # fmt: skip


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor], *, group: ProcessGroup) -> float:
    """Largest difference of output or a gradient relative to its norm, over the ranks; NaN where one is."""
    return float(torch.tensor(gather_objects(largest_gap(ours, theirs), group=group)).max())


def exchange(keys: Sequence[Tensor], plan: RingPlan, context: ContextGroups) -> None:
    """Keys and values gathered, and the sums of their gradients."""
    whole = gather_keys(torch.cat(tuple(keys), dim=-1), plan, context)
    torch.autograd.grad(whole, keys, whole.detach())


def seconds(work: Callable[[], object], layout: ParallelLayout) -> float:
    """Of the slowest rank."""
    watch = Watch(layout.device)
    dist.barrier()
    watch.enter("work")
    work()
    watch.enter("")
    return max(gather_objects(watch.seconds["work"], group=layout.context.ring))


WAYS = {"keys": keys_to_queries, "queries": queries_to_keys}


def line(row: dict[str, Any]) -> str:
    ratio = row["queries_ms"] / row["keys_ms"]
    ways = "; ".join(
        f"{name} {row[f'{name}_ms']:.2f} ms ({low:.2f} to {high:.2f}), peak {row[f'{name}_peak_gb']:.2f} GB"
        for name in (*WAYS, "exchange")
        for low, high in [row[f"{name}_spread_ms"]]
    )
    return f"{row['name']}: {ways}; queries take {ratio:.3f} times as long, {row['gap']:.1e} of the norm apart"


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prefix", type=int, nargs="+", help="131072; 96 with --tiny")
    parser.add_argument("--heads", type=int, nargs=2, default=[28, 4], help="query and key heads of a rank")
    args = parser.parse_args(argv)
    layout = make_layout(tp=1, cp=int(os.environ.get("WORLD_SIZE", "1")), pp=1, seed=1)
    rows = []
    for prefix in args.prefix or ([96] if args.tiny else [131072]):
        rows.append(measure(prefix, args.heads, 16 if args.tiny else 128, args, layout))
        if layout.is_main:
            print(line(rows[-1]), flush=True)
            save(args.json, rows)
    if layout.is_main:
        print(machine()["device"], flush=True)
    destroy_layout()


if __name__ == "__main__":
    main()
