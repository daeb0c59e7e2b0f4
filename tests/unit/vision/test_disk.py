"""Embeddings on disk: any rows from any files, and nothing that is not what it says."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalong.records import tensor_checksums
from megalong.vision import disk as module
from megalong.vision.disk import DiskStore, EmbeddingCacheError

WIDTH = 3
VIDEO = torch.arange(20 * WIDTH, dtype=torch.float32).reshape(20, WIDTH)


def store(folder: Path, *, budget_bytes: int = 1 << 30) -> DiskStore:
    return DiskStore(folder, dtype=torch.float32, budget_bytes=budget_bytes)


def files(folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    return sorted(folder.rglob(pattern))


@given(
    written=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6),
    wanted=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
@settings(max_examples=60, deadline=None)
def test_any_rows_are_read_from_any_files(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, int]], wanted: tuple[int, int]
) -> None:
    kept, there = store(tmp_path_factory.mktemp("store")), torch.zeros(20, dtype=torch.bool)
    for first, last in map(sorted, written):
        if first < last:
            kept.write("key", first, VIDEO[first:last])
            there[first:last] = True
    first, last = sorted(wanted)
    if first == last:
        return
    got = kept.read("key", first, last)
    assert kept.holds("key", first, last) is bool(there[first:last].all())
    if there[first:last].all():
        assert torch.equal(got, VIDEO[first:last])
    else:
        assert got is None
    assert kept.read("other key", first, last) is None
    assert kept.refused == []


def test_large_entries_are_cut_into_files_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 4 * WIDTH * 4 + 5)
    kept = store(tmp_path)
    kept.write("key", 10, VIDEO[:10])
    assert sorted(path.name for path in files(tmp_path)) == [
        f"{rows}.safetensors" for rows in ("10-14", "14-18", "18-20")
    ]
    before = [path.stat().st_mtime_ns for path in files(tmp_path)]
    kept.write("key", 10, VIDEO[:10])
    kept.write("key", 13, VIDEO[3:8])  # another process's share of what is there
    assert [path.stat().st_mtime_ns for path in files(tmp_path)] == before
    assert kept.bytes_written == 10 * WIDTH * 4
    assert torch.equal(kept.read("key", 13, 19), VIDEO[3:9])


def rewrite(path: Path, tensor: Tensor, **changes: str) -> None:
    """The file with another tensor and a checksum that fits it, or with other metadata."""
    said = module._metadata(path.read_bytes())
    tensors = {"embeds_ND": tensor}
    save_file(tensors, path, metadata={**said, "checksum": str(int(tensor_checksums(tensors.values()))), **changes})


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def of_another_key(path: Path) -> None:
    elsewhere = store(path.parents[3] / "elsewhere")
    elsewhere.write("another key", 0, VIDEO + 1)
    shutil.copy(files(elsewhere.folder)[0], path)


DAMAGE = {
    "cut short": (lambda path: os.truncate(path, path.stat().st_size - 8), "not a whole safetensors file"),
    "empty": (lambda path: os.truncate(path, 0), "not a whole safetensors file"),
    "not safetensors": (lambda path: path.write_text("hello"), "not a whole safetensors file"),
    "a flipped bit": (flip_a_byte, "its checksum is"),
    "another key's": (of_another_key, "its key is 'another key', expected 'key'"),
    "other rows": (lambda path: rewrite(path, VIDEO, rows="20-40"), "its rows is '20-40', expected '0-20'"),
    "another format": (lambda path: rewrite(path, VIDEO, format="0"), "its format is '0'"),
    "no metadata": (lambda path: save_file({"embeds_ND": VIDEO}, path), "its format is None"),
    "too few rows": (lambda path: rewrite(path, VIDEO[:19].clone()), r"is \[19, 3\] torch.float32, expected 20"),
    "another dtype": (lambda path: rewrite(path, VIDEO.double()), "torch.float64, expected 20 rows of torch.float32"),
    "no matrix": (lambda path: rewrite(path, VIDEO[:, 0].clone()), r"its tensor is \[20\]"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_foreign_file_is_refused_counted_and_can_be_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, reason: str
) -> None:
    kept = store(tmp_path / "store")
    kept.write("key", 0, VIDEO)
    (path,) = files(kept.folder)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert kept.read("key", 2, 5) is None
    assert kept.refused == [path]
    (line,) = caplog.messages
    assert line.startswith(f"{path} is refused, and its embeddings are made again: ")
    assert re.search(reason, line)
    assert not kept.holds("key", 2, 5)
    kept.write("key", 0, VIDEO)
    assert torch.equal(kept.read("key", 2, 5), VIDEO[2:5])
    assert len(kept.refused) == 1


def test_another_whole_file_stands_in_for_a_refused_one(tmp_path: Path) -> None:
    kept = store(tmp_path)
    kept.write("key", 4, VIDEO[4:8])
    kept.write("key", 0, VIDEO[0:5])
    kept.write("key", 3, VIDEO[3:12])
    os.truncate(next(path for path in files(tmp_path) if path.name == "3-12.safetensors"), 40)
    assert torch.equal(kept.read("key", 1, 8), VIDEO[1:8])
    assert [path.name for path in kept.refused] == ["3-12.safetensors"]
    assert kept.read("key", 1, 9) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_cache_that_may_only_be_read_is_used_and_its_bad_file_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    kept = store(tmp_path)
    kept.write("key", 0, VIDEO)
    os.truncate(files(tmp_path)[0], 40)

    def denied(self: Path, **_: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "unlink", denied)
    assert kept.read("key", 0, 4) is None
    assert len(kept.refused) == 1


def kill_before_naming(folder: Path) -> None:
    kept = store(folder)
    kept.write("key", 0, VIDEO[:8])
    module.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    kept.write("key", 8, VIDEO[8:])


def test_a_kill_in_the_middle_of_a_write_leaves_whole_files_only(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=kill_before_naming, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = store(tmp_path)
    assert torch.equal(kept.read("key", 0, 8), VIDEO[:8])
    assert kept.read("key", 0, 20) is None
    (leftover,) = files(tmp_path, "*.partial")
    assert torch.equal(load_file(leftover)["embeds_ND"], VIDEO[8:]), "killed when all was written but the name"
    kept.write("key", 8, VIDEO[8:])
    assert torch.equal(kept.read("key", 0, 20), VIDEO)
    kept.sweep()
    assert leftover.exists(), "somebody may be at it"
    long_ago = time.time() - 2 * module.ABANDONED_SECONDS
    os.utime(leftover, (long_ago, long_ago))
    kept.sweep()
    assert files(tmp_path, "*.partial") == []
    assert kept.refused == []


def test_a_folder_that_cannot_be_used_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(EmbeddingCacheError, match=r"cannot be read .*another video\.cache_dir"):
        store(file).read("key", 0, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(EmbeddingCacheError, match=r"0-20\.safetensors cannot be written .*No space left.*make room"):
        store(tmp_path / "store").write("key", 0, VIDEO)


def test_bfloat16_rows_keep_their_bits(tmp_path: Path) -> None:
    kept = DiskStore(tmp_path, dtype=torch.bfloat16, budget_bytes=1 << 30)
    rows = torch.randn(5, 7).bfloat16()
    kept.write("key", 3, rows.T.contiguous().T)  # not contiguous
    assert torch.equal(kept.read("key", 4, 7).view(torch.int16), rows[1:4].view(torch.int16))


# ---- the bound


SIZE = 4096
"""Bytes of the tensor of an entry here: its file is some hundred bytes longer."""


def write_entries(kept: DiskStore, names: str, *, age: int = 0) -> None:
    """One file each; the first is last used `age` + 100 s ago, every further one a second later."""
    for index, name in enumerate(names):
        kept.write(name, 0, torch.full((SIZE // 4, 1), float(ord(name))))
        use(kept, name, time.time() - age - 100 + index)


def use(kept: DiskStore, name: str, when: float) -> None:
    (path,) = files(kept._folder_of(name))
    os.utime(path, (when, when))


def there(folder: Path) -> str:
    """Names of the entries, as another process finds them."""
    return "".join(name for name in "abcdefgh" if store(folder).holds(name, 0, SIZE // 4))


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder, "*.safetensors*"))


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    budget = 4 * (SIZE + 400)
    write_entries(store(tmp_path), "abc")  # by another process
    kept = store(tmp_path, budget_bytes=budget)
    write_entries(kept, "d", age=-50)
    assert there(tmp_path) == "abcd"
    assert kept.read("a", 0, SIZE // 4).unique().tolist() == [ord("a")]  # used now
    for name, left in (("e", "acde"), ("f", "adef")):
        write_entries(kept, name, age=-60)
        assert there(tmp_path) == left
        assert bytes_of(tmp_path) <= budget
    assert kept.num_evicted == 2
    assert kept.read("b", 0, 5) is None, "it is made again"


def test_what_others_write_is_counted_after_a_64th_of_the_budget(tmp_path: Path) -> None:
    budget = 128 * SIZE
    kept, other = store(tmp_path, budget_bytes=budget), store(tmp_path)
    kept.write("a", 0, VIDEO)
    other.write("b", 0, torch.zeros(126 * SIZE // 4, 1))
    write_entries(kept, "cde", age=-200)
    assert bytes_of(tmp_path) <= budget
    assert there(tmp_path) == "cde"


def test_a_writer_that_looks_away_counts_what_it_writes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    looked = DiskStore._files
    monkeypatch.setattr(DiskStore, "_files", lambda self, *args: looks.extend(args or ["all"]) or looked(self, *args))
    kept = store(tmp_path, budget_bytes=640 * SIZE)
    write_entries(kept, "abcdefgh")
    assert looks == ["*.partial", "all"]
    kept.write("more", 0, torch.zeros(4 * SIZE // 4, 1))
    assert looks == ["*.partial", "all"] * 2


def unfinished_file(folder: Path, *, written: float) -> Path:
    """Of SIZE bytes, beside the one entry of the folder, last written at that time."""
    (path,) = files(folder)
    unfinished = path.with_name("0-9.safetensors.1.partial")
    unfinished.write_bytes(bytes(SIZE))
    os.utime(unfinished, (written, written))
    return unfinished


def test_unfinished_files_count_and_abandoned_ones_go_first(tmp_path: Path) -> None:
    kept = store(tmp_path, budget_bytes=3 * SIZE)
    write_entries(kept, "a")
    abandoned = unfinished_file(tmp_path, written=1)
    write_entries(kept, "b")
    assert there(tmp_path) == "ab"
    assert not abandoned.exists()


def test_a_file_that_another_process_is_writing_does_not_make_room(tmp_path: Path) -> None:
    """It would find it gone when it names it."""
    kept = store(tmp_path, budget_bytes=3 * SIZE)
    write_entries(kept, "a")
    unfinished = unfinished_file(tmp_path, written=time.time() - 600)
    write_entries(kept, "b")
    assert there(tmp_path) == "b"
    assert unfinished.exists()


def test_what_was_used_since_a_time_stays_and_no_room_beside_it_is_an_error(tmp_path: Path) -> None:
    kept = store(tmp_path, budget_bytes=2 * (SIZE + 400))
    write_entries(kept, "ab")
    kept.keep_since = time.time() - 50
    use(kept, "b", time.time())
    write_entries(kept, "c", age=-200)  # a goes
    with pytest.raises(EmbeddingCacheError, match=r"may not be deleted, and .* raise video\.cache_dir_gib \(now"):
        write_entries(kept, "d")
    assert there(tmp_path) == "bc"
    with pytest.raises(EmbeddingCacheError, match=r"one video do not fit into .*video\.cache_dir_gib \(now 0\.000\)"):
        kept.write("e", 0, torch.zeros(SIZE, 1))
