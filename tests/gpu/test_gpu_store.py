"""The embedding store's tiers on a GPU: what moves keeps its bits, budgets are kept, and what a move costs (`-s`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalong.vision.disk import DiskStore
from megalong.vision.store import StoreFullError
from megalong.vision.tiers import EmbeddingPart, EmbeddingStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GIB = 1 << 30
ROWS, WIDTH = 450 * 256, 3584
"""An hour at 3,600 frames on 8 ranks: 0.77 GiB in bfloat16, 1 GiB page-locked."""


def embeddings(seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16, generator=generator)


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def test_entries_move_between_the_tiers_unchanged(tmp_path: Path) -> None:
    """Room for one entry on the GPU, two in host memory; four are put."""
    disk = DiskStore(tmp_path, dtype=torch.bfloat16, budget_bytes=1 << 30)
    device = torch.device("cuda", torch.cuda.current_device())
    kept = EmbeddingStore(device=device, gpu_bytes=GIB, host_bytes=2 * GIB, disk=disk)
    num_bytes = embeddings(0).nbytes
    table = []
    before = torch.cuda.memory_allocated()
    for seed in range(4):
        part = EmbeddingPart(7, embeddings(seed))
        table.append((f"put entry {seed}", seconds(lambda seed=seed, part=part: kept.put(str(seed), part))))
        del part
    assert ["3" in kept.gpu, "2" in kept.host, "1" in kept.host, "0" in kept] == [True, True, True, False]
    assert kept.gpu.bytes_used == num_bytes
    # The allocator hands out pieces of 2 MiB.
    assert torch.cuda.memory_allocated() - before == pytest.approx(num_bytes, abs=2 << 20)
    assert kept.host.bytes_used == 2 * GIB
    assert kept.host.get("1").embeds_nD.is_pinned()
    table.append(("read entry 0 from disk", seconds(lambda: disk.read("0", 7, 7 + ROWS))))
    assert torch.equal(disk.read("0", 7, 7 + ROWS), embeddings(0).cpu())
    assert torch.equal(disk.read("0", 1007, 2007), embeddings(0)[1000:2000].cpu())
    table.append(("get entry 3 from the GPU", seconds(lambda: kept.get("3"))))
    table.append(("get entry 1 from host memory: up, and 3 down", seconds(lambda: kept.get("1"))))
    for seed in (1, 2, 3):
        got = kept.get(str(seed))
        assert got.device == device
        assert torch.equal(got, embeddings(seed))
    small = EmbeddingStore(device=device, gpu_bytes=0, host_bytes=GIB, disk=None)
    small.put("5", EmbeddingPart(0, embeddings(5)))
    table.append(("get from host memory, no GPU tier", seconds(lambda: small.get("5"))))
    assert torch.equal(small.get("5"), embeddings(5))
    small.pin(["5", "6"])
    with pytest.raises(StoreFullError, match=r"raise video\.cache_gib"):
        small.put("6", EmbeddingPart(0, embeddings(6)))
    for name, taken in table:
        print(f"{name:<46} {taken * 1e3:9.1f} ms {num_bytes / GIB / taken:8.1f} GiB/s")  # noqa: T201
