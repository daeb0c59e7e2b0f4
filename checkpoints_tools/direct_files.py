"""Bytes of large files, read and written past the page cache (O_DIRECT) where the file system lets us.

A conversion touches every byte once, so nothing is gained from the cache, and making pages for it costs the kernel
several times the time of a copy. Direct I/O wants addresses, places and lengths that are multiples of a block: whole
blocks go through an aligned buffer, the ends of a piece, and small pieces, through the cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096
CHUNK_BYTES = 16 << 20
SMALL_BYTES = 64 << 10
"""Pieces below this size take the page cache."""


class _Aligned(threading.local):
    """One buffer per thread; memory of mmap starts at a page."""

    def __init__(self) -> None:
        self.buffer = np.frombuffer(mmap.mmap(-1, CHUNK_BYTES), dtype=np.uint8)


_aligned = _Aligned()


class DirectReader:
    """Reads pieces of a file. Not for two threads at a time."""

    def __init__(self, path: Path) -> None:
        self._cached, self._direct = os.open(path, os.O_RDONLY), _open_direct(path, os.O_RDONLY)
        # Small pieces lie between large ones that are read directly: reading ahead would read those twice.
        os.posix_fadvise(self._cached, 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, target: np.ndarray, *, start: int) -> int:
        """Fill `target`, uint8, with the bytes from `start`. Returns their number, smaller where the file ends."""
        end, done = start + len(target), 0
        while done < len(target):
            at = start + done
            if self._direct is None or len(target) < SMALL_BYTES:
                count = os.preadv(self._cached, [target[done:]], at)
            else:
                first = at // BLOCK * BLOCK
                chunk = _aligned.buffer[: min(CHUNK_BYTES, -(-(end - first) // BLOCK) * BLOCK)]
                try:
                    count = min(first + os.preadv(self._direct, [chunk], first), end) - at
                except OSError as error:
                    self._direct = _without_direct(error, self._direct)
                    continue
                if count > 0:
                    target[done : done + count] = chunk[at - first : at - first + count]
            if count <= 0:
                break
            done += count
        return done

    def close(self) -> None:
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DirectWriter:
    """Writes pieces of a new file, at any place and in any order. Raises FileExistsError for one that is there."""

    def __init__(self, path: Path, *, num_bytes: int = 0) -> None:
        """num_bytes: its size when nothing is written; it grows with what is written behind."""
        self._cached: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.ftruncate(self._cached, num_bytes)
        self._direct = _open_direct(path, os.O_WRONLY)

    def write(self, data: np.ndarray, *, start: int) -> None:
        """data: uint8."""
        end = start + len(data)
        first, last = -(-start // BLOCK) * BLOCK, end // BLOCK * BLOCK
        if self._direct is None or last - first < SMALL_BYTES:
            first = last = end
        _write_all(self._cached, data[: first - start], start)
        for at in range(first, last, CHUNK_BYTES):
            piece = data[at - start : min(at + CHUNK_BYTES, last) - start]
            chunk = _aligned.buffer[: len(piece)]
            chunk[:] = piece
            if self._direct is not None:
                try:
                    _write_all(self._direct, chunk, at)
                    continue
                except OSError as error:
                    self._direct = _without_direct(error, self._direct)
            _write_all(self._cached, chunk, at)
        _write_all(self._cached, data[last - start :], last)

    def close(self) -> None:
        """Once or more often."""
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._cached = self._direct = None


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes as a flat uint8 array, without a copy when it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _open_direct(path: Path, flags: int) -> int | None:
    """None on a file system without direct I/O, a memory disk for example."""
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _without_direct(error: OSError, descriptor: int) -> None:
    """Some file systems and devices say only at the first block that they cannot, or not at this block size."""
    if error.errno != errno.EINVAL:
        raise error
    os.close(descriptor)


def _write_all(descriptor: int, data: np.ndarray, start: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, start)
        data, start = data[count:], start + count
