"""Pieces at any place of a file are read and written as they are, directly or through the cache."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from checkpoints_tools import direct_files
from checkpoints_tools.direct_files import BLOCK, DirectReader, DirectWriter

PIECES = [(0, 1), (1, 70_000), (70_001, 3 * BLOCK), (90_000, 300_001), (390_001, 0), (8 * BLOCK * 16, 200_000)]
"""(start, length): the one after the next in a block of the one before, a hole, whole blocks."""


@pytest.fixture(params=["direct", "no open", "no block"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Direct I/O, and file systems that refuse it when a file is opened or a block is read or written."""
    monkeypatch.setattr(direct_files, "CHUNK_BYTES", 16 * BLOCK)
    preadv, pwrite, opened = os.preadv, os.pwrite, os.open
    direct: set[int] = set()

    def open_(path: Path, flags: int, *mode: int) -> int:
        if request.param == "no open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = opened(path, flags, *mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def moved(descriptor: int, data: object, start: int, *, by: object) -> int:
        if request.param == "no block" and descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return by(descriptor, data, start)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", partial(moved, by=preadv))
    monkeypatch.setattr(os, "pwrite", partial(moved, by=pwrite))
    return request.param


def test_pieces_in_any_order_come_back(tmp_path: Path, way: str) -> None:
    generator = np.random.default_rng(0)
    size = max(start + length for start, length in PIECES) + 5
    want = np.zeros(size, dtype=np.uint8)
    writer = DirectWriter(tmp_path / "file", num_bytes=size)
    for start, length in PIECES[::-1]:
        piece = generator.integers(0, 256, length, dtype=np.uint8)
        want[start : start + length] = piece
        writer.write(piece, start=start)
    writer.close()
    writer.close()
    assert (tmp_path / "file").read_bytes() == want.tobytes()
    with DirectReader(tmp_path / "file") as reader:
        for start, length in [*PIECES, (0, size), (5, size - 5), (size - 100_000, 99_999)]:
            target = np.empty(length, dtype=np.uint8)
            assert reader.read_into(target, start=start) == length
            assert np.array_equal(target, want[start : start + length])


def test_the_end_of_a_file_is_told(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_bytes(bytes(range(250)) * 1000)
    with DirectReader(tmp_path / "file") as reader:
        for start, length, found in [(0, 300_000, 250_000), (249_000, 2_000, 1_000), (250_000, 100_000, 0), (8, 0, 0)]:
            assert reader.read_into(np.empty(length, dtype=np.uint8), start=start) == found


def test_other_errors_are_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        DirectWriter(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        DirectReader(tmp_path / "nothing")
    full = DirectWriter.__new__(DirectWriter)
    full._cached, full._direct = os.open("/dev/full", os.O_WRONLY), None
    with pytest.raises(OSError, match="No space left"):
        full.write(np.zeros(10, dtype=np.uint8), start=0)
    full.close()
