"""The tiers of the embedding store: what goes where, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalong.vision.disk import DiskStore
from megalong.vision.store import StoreFullError
from megalong.vision.tiers import EmbeddingPart, EmbeddingStore

ROW = 4  # bytes: one float32
NAMES = "abcdefg"


def rows(name: str, count: int = 2) -> Tensor:
    return torch.full((count, 1), float(NAMES.index(name)))


def make(tmp_path: Path, *, gpu: int = 0, host: int = 4, disk: bool = False) -> EmbeddingStore:
    """Budgets in rows; the device is the CPU."""
    return EmbeddingStore(
        device=torch.device("cpu"),
        gpu_bytes=gpu * ROW,
        host_bytes=host * ROW,
        disk=DiskStore(tmp_path, dtype=torch.float32, budget_bytes=1 << 20) if disk else None,
    )


def put(kept: EmbeddingStore, names: str, count: int = 2) -> None:
    for name in names:
        kept.put(name, EmbeddingPart(10, rows(name, count)))


def where(kept: EmbeddingStore) -> tuple[str, str, str]:
    """Names on the device, in host memory, and whole on disk."""
    on_disk = [name for name in NAMES if kept.disk is not None and kept.disk.holds(name, 10, 12)]
    in_memory = ["".join(name for name in NAMES if name in tier) for tier in (kept.gpu, kept.host)]
    return (*in_memory, "".join(on_disk))


def test_the_device_first_then_host_memory_then_disk_and_least_recently_used_first(tmp_path: Path) -> None:
    kept = make(tmp_path, gpu=4, host=4, disk=True)
    put(kept, "ab")
    assert where(kept) == ("ab", "", "")
    assert torch.equal(kept.get("a"), rows("a"))
    put(kept, "c")
    assert where(kept) == ("ac", "b", "")
    put(kept, "d")
    assert where(kept) == ("cd", "ab", "")
    put(kept, "e")  # c moves down, and pushes b, which has been there longest, on
    assert where(kept) == ("de", "ac", "b")
    assert torch.equal(kept.get("a"), rows("a"))  # moves up, d down, nothing out
    assert where(kept) == ("ae", "cd", "b")
    for name in "acde":
        assert torch.equal(kept.get(name), rows(name))
    with pytest.raises(KeyError):
        kept.get("b")
    assert torch.equal(kept.disk.read("b", 10, 12), rows("b"))
    assert kept.gpu.bytes_used == kept.host.bytes_used == 4 * ROW


def test_without_a_disk_what_leaves_host_memory_is_gone(tmp_path: Path) -> None:
    kept = make(tmp_path)
    put(kept, "abc")
    assert where(kept) == ("", "bc", "")
    assert "a" not in kept
    assert list(tmp_path.iterdir()) == []


def test_without_room_on_the_device_host_memory_is_used(tmp_path: Path) -> None:
    kept = make(tmp_path, gpu=1)
    put(kept, "a")
    assert where(kept) == ("", "a", "")
    kept.get("a")
    assert where(kept) == ("", "a", "")
    put(kept, "b", 1)
    assert where(kept) == ("b", "a", "")


def test_pinned_entries_stay_in_memory_and_an_entry_without_room_names_the_setting(tmp_path: Path) -> None:
    kept = make(tmp_path, gpu=2, host=4, disk=True)
    kept.pin("abcd")
    put(kept, "abc")
    assert where(kept) == ("a", "bc", "")
    with pytest.raises(StoreFullError, match=r"the step in progress needs: raise video\.cache_gib \(now 0\.000\)"):
        put(kept, "d")
    assert where(kept) == ("a", "bc", "")
    kept.get("b")  # the device is full of what is pinned: stays where it is
    assert where(kept) == ("a", "bc", "")
    kept.release(keep="b")
    put(kept, "d")  # takes the device; a goes down, and c out
    assert where(kept) == ("d", "ab", "c")


def test_what_leaves_the_device_goes_to_disk_when_host_memory_is_pinned(tmp_path: Path) -> None:
    kept = make(tmp_path, gpu=2, host=2, disk=True)
    put(kept, "a")
    kept.pin("bc")
    kept.gpu.pin("a")
    put(kept, "b")
    assert where(kept) == ("a", "b", "")
    kept.release(keep="bc")
    put(kept, "c")
    assert where(kept) == ("c", "b", "a")


def test_save_writes_from_either_tier_and_keeps_the_entry(tmp_path: Path) -> None:
    kept = make(tmp_path, gpu=2, disk=True)
    put(kept, "ab")
    kept.save("a")
    kept.save("b")
    assert where(kept) == ("b", "a", "ab")
    with pytest.raises(KeyError):
        kept.save("c")


def test_entries_are_copies_and_are_never_replaced(tmp_path: Path) -> None:
    kept = make(tmp_path)
    whole = torch.arange(100.0)[:, None]
    kept.put("a", EmbeddingPart(0, whole[3:5]))
    whole.zero_()
    assert kept.get("a").tolist() == [[3.0], [4.0]]
    assert kept.get("a").untyped_storage().nbytes() == 2 * ROW, "a view would keep all of the batch in memory"
    with pytest.raises(ValueError, match="a is in the store already"):
        put(kept, "a")
    kept.clear()
    assert (len(kept), kept.host.bytes_used) == (0, 0)


def test_an_empty_share_takes_nothing_and_is_never_written(tmp_path: Path) -> None:
    kept = make(tmp_path, disk=True)
    kept.put("a", EmbeddingPart(7, torch.empty(0, 1)))
    assert kept.get("a").shape == (0, 1)
    kept.save("a")
    assert list(tmp_path.iterdir()) == []
