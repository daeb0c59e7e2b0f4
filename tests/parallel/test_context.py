"""Rows sharded over processes: attention and row exchange equal the whole pack on one process, gradients included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_world

from megalong.attention.context import PADDING, deal_rows, shard_pack
from megalong.attention.core import PackCoreAttention, encode_mask
from megalong.attention.reference import pack_attention_reference
from megalong.parallel.exchange import exchange_rows, plan_exchange
from megalong.parallel.layout import make_layout
from megalong.records import Segment

HEADS, KV_HEADS, WIDTH = 28, 4, 6  # heads of a 7B
CASES = {
    "a group": [(41, -1), (7, 0), (1, 0), (12, 0)],
    "one response": [(5, -1), (3, 0)],
    "responses longer than the prefix": [(3, -1), (17, 0), (9, 0)],
    "fewer rows than ranks": [(1, -1), (1, 0)],
    "two groups and a lone sequence": [(11, -1), (2, 0), (4, 0), (6, -1), (3, 3), (5, 3), (9, -1)],
    "two questions about one video": [(30, -1), (3, 0), (4, 1), (6, 1), (2, 0), (5, 4), (1, 4)],
}


def segments_of(case: list[tuple[int, int]]) -> list[Segment]:
    segments: list[Segment] = []
    for length, parent in case:
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start=start, length=length, parent=parent))
    return segments


class Config:
    """What the core attention reads of a TransformerConfig."""

    attention_dropout = 0.0
    num_query_groups = KV_HEADS
    tensor_model_parallel_size = 1
    kv_channels = WIDTH


def compare_attention(world: int, a2a: int) -> dict[str, float]:
    """Largest difference to the reference over output and gradients, for each case, of all rows and of some."""
    context = make_layout(tp=1, cp=world, pp=1, seed=1, cp_a2a=a2a).context
    attend = PackCoreAttention(Config(), 1, None, "self", context=context, kernel="cpu_flash")
    done = {name: compare_case(segments_of(case), attend) for name, case in CASES.items()}
    attend.needed_only = True
    return done | {f"{name}, some rows": compare_some(segments_of(case), attend) for name, case in CASES.items()}


def compare_case(segments: list[Segment], attend: PackCoreAttention) -> float:
    context = attend.context
    generator = torch.Generator().manual_seed(3)
    total = segments[-1].stop
    whole = [
        torch.randn(total, heads, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    upstream = torch.randn(total, HEADS, WIDTH, dtype=torch.float64, generator=generator)
    want = pack_attention_reference(*whole, segments, scale=attend.scale)
    want_grads = torch.autograd.grad((want * upstream).sum(), whole)
    shards = shard_pack(segments, context, multiple=2)
    held = torch.cat(shards)
    if sorted(held[held != PADDING].tolist()) != list(range(total)) or len({len(rows) % 2 for rows in shards}) != 1:
        raise AssertionError(f"the shards {shards} are no cut of {total} rows")
    for at in range(0, context.size, context.a2a_size):
        of_ring = torch.cat(shards[at : at + context.a2a_size])
        padding = int((of_ring == PADDING).sum())
        if padding >= 2 * context.a2a_size and padding < len(of_ring):
            raise AssertionError(f"{padding} rows of {of_ring} are padding: more than one multiple for each rank")
    rows = shards[context.rank]
    real = rows != PADDING
    # Padding rows hold anything at all: nothing may depend on them.
    local = [torch.where(real[:, None, None], part[rows.clamp_min(0)], 7.0)[:, None].detach() for part in whole]
    local = [part.requires_grad_() for part in local]
    mask = encode_mask(segments, sharded=True, needed_U=torch.arange(total), multiple=2)
    out = attend(*local, mask)[:, 0].unflatten(-1, (HEADS, WIDTH))
    mine = torch.where(real[:, None, None], upstream[rows.clamp_min(0)], 0.0)
    grads = torch.autograd.grad((out * mine).sum(), local)
    pairs = [(out, want), *((grad[:, 0], theirs) for grad, theirs in zip(grads, want_grads, strict=True))]
    if any(grad[~real].any() for grad in grads):
        raise AssertionError("padding rows got a gradient")
    return max((ours[real] - theirs[rows[real]]).abs().max().item() if real.any() else 0.0 for ours, theirs in pairs)


def predicting(segments: list[Segment]) -> torch.Tensor:
    """Each parent's last row, and all but the last row of what has no children."""
    parents = {segment.parent for segment in segments}
    spans = [
        (segment.stop - 1, segment.stop) if index in parents else (segment.start, segment.stop - 1)
        for index, segment in enumerate(segments)
    ]
    return torch.cat([torch.arange(*span) for span in spans])


def compare_some(segments: list[Segment], attend: PackCoreAttention) -> float:
    """As compare_case, for the rows that predict, which the last layer deals out anew."""
    context, needed = attend.context, predicting(segments)
    generator = torch.Generator().manual_seed(4)
    whole = [
        torch.randn(segments[-1].stop, heads, WIDTH, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    upstream = torch.randn(segments[-1].stop, HEADS, WIDTH, dtype=torch.float64, generator=generator)
    want = pack_attention_reference(*whole, segments, scale=attend.scale)
    want_grads = torch.autograd.grad((want * upstream)[needed].sum(), whole)
    rows = shard_pack(segments, context, multiple=2)[context.rank]
    dealt = deal_rows(needed, context, multiple=2)
    counts = [int((share != PADDING).sum()) for share in dealt]
    of_rings = [sum(counts[at : at + context.a2a_size]) for at in range(0, context.size, context.a2a_size)]
    if torch.cat(dealt)[torch.cat(dealt) != PADDING].tolist() != needed.tolist() or max(of_rings) - min(of_rings) > 1:
        raise AssertionError(f"{dealt} is no even deal of {needed}")
    if max(map(len, dealt)) > -(-max(of_rings) // (2 * context.a2a_size)) * 2 + 2 * (not max(of_rings)):
        raise AssertionError(f"{dealt} has more padding than it needs")
    mine, real = dealt[context.rank], rows != PADDING
    local = [torch.where(real[:, None, None], part[rows.clamp_min(0)], 7.0)[:, None].detach() for part in whole]
    local = [part.requires_grad_() for part in local]
    out = attend(*local, encode_mask(segments, sharded=True, needed_U=needed, multiple=2))
    out = out[:, 0].unflatten(-1, (HEADS, WIDTH))
    kept = mine != PADDING
    if len(out) != len(mine) or out[~kept].any():
        raise AssertionError(f"{len(out)} rows for {len(mine)}, or padding that is not zero")
    grads = torch.autograd.grad((out * torch.where(kept[:, None, None], upstream[mine.clamp_min(0)], 0.0)).sum(), local)
    if any(grad[~real].any() for grad in grads):
        raise AssertionError("padding rows got a gradient")
    gaps = [(out[kept] - want[mine[kept]]).abs()]
    gaps += [(grad[real, 0] - theirs[rows[real]]).abs() for grad, theirs in zip(grads, want_grads, strict=True)]
    return max(float(gap.max()) if gap.numel() else 0.0 for gap in gaps)


@pytest.mark.parametrize(("world", "a2a"), [(2, 2), (2, 1), (4, 4), (4, 2), (3, 1), (8, 4)], ids=str)
def test_sharded_attention_equals_the_reference(world: int, a2a: int, tmp_path: Path) -> None:
    for errors in run_world(world, compare_attention, world, a2a, folder=tmp_path):
        assert errors.keys() == {*CASES, *(f"{name}, some rows" for name in CASES)}
        for name, error in errors.items():
            assert error < 1e-12, name


def exchange_case() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 0..9 live on ranks 2, 0, 1; everybody asks for some, twice for some; rank 1 returns no gradient."""
    make_layout(tp=1, cp=1, pp=1, seed=1)
    rank = dist.get_rank()
    owner = torch.tensor([2, 2, 0, 0, 0, 1, 2, 1, 0, 2])
    place = torch.tensor([0, 1, 0, 1, 2, 0, 2, 1, 3, 3])
    local = (100 * owner + torch.arange(10))[owner == rank][:, None].double().requires_grad_()
    wanted = [torch.tensor([9, 0, 5, 5]), torch.tensor([3, 9, 2, 1]), torch.empty(0, dtype=torch.int64)]
    plan = plan_exchange(owner, place, wanted, rank=rank, returns=[True, False, True])
    got = exchange_rows(local, plan, group=dist.group.WORLD)
    (got * (10.0 ** torch.arange(len(got)))[:, None]).sum().backward()
    return got.detach()[:, 0], local.grad[:, 0]


def test_rows_go_where_they_are_asked_for_and_gradients_come_back(tmp_path: Path) -> None:
    results = run_world(3, exchange_case, folder=tmp_path)
    assert [got.tolist() for got, _ in results] == [[209, 200, 105, 105], [3, 209, 2, 201], []]
    # Rank 0's weights 1, 10, 100, 1000 for rows 9, 0, 5, 5; rank 1's do not count.
    assert [grad.tolist() for _, grad in results] == [[0, 0, 0, 0], [1100, 0], [10, 0, 0, 1]]
