"""Byte-bounded store of what is made once per video: decoded frames and vision embeddings."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import nn

from megalong.data.video_index import DecodeError
from megalong.records import FrameSelection

Item = TypeVar("Item")
GIB = 1 << 30
_SAMPLE_BYTES = 1 << 20


class StoreFullError(RuntimeError):
    """What a step needs at a time is more than a store may hold; the message names the setting."""


class ByteStore(Generic[Item]):
    """Least-recently-used store bounded by bytes; an item larger than the budget is refused, loudly.

    Pinned keys, those of the step in progress, are never evicted: a step that does not fit is an error, no slow loop.
    """

    def __init__(
        self, *, what: str, budget_bytes: int, setting: str, evicted: Callable[[str, Item], None] | None = None
    ) -> None:
        """what: is stored, in words. setting: the configuration key of the budget. evicted: called with what has just
        made room for another."""
        self.what = what
        self.budget_bytes = budget_bytes
        self.setting = setting
        self.evicted = evicted
        self.bytes_used = 0
        self.num_evicted = 0
        self._items: OrderedDict[str, tuple[Item, int]] = OrderedDict()
        self._pinned: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def pin(self, keys: Iterable[str]) -> None:
        """Keep these keys, too, until release()."""
        self._pinned.update(keys)

    def release(self, *, keep: Iterable[str] = ()) -> None:
        """Pinned keys but those in `keep` may be evicted from now on."""
        self._pinned.intersection_update(keep)

    def fits(self, num_bytes: int, *, beside: Container[str] = ()) -> bool:
        """Whether this many bytes have room beside the pinned items, and those of the keys."""
        return self._bytes_of(beside) + num_bytes <= self.budget_bytes

    def make_room(self, num_bytes: int, *, beside: Container[str] = ()) -> None:
        """Evict until this many bytes are free. Raises StoreFullError when pinned items, and those of the keys, leave
        no room."""
        if not self.fits(num_bytes, beside=beside):
            held = self._bytes_of(beside)
            raise StoreFullError(
                f"{num_bytes / GIB:.3f} GiB of {self.what} do not fit beside the {held / GIB:.3f} GiB that the step in "
                f"progress needs: raise {self.setting} (now {self.budget_bytes / GIB:.3f}) or lower the batch size"
            )
        evictable = iter([key for key in self._items if key not in self._pinned and key not in beside])
        while self.bytes_used + num_bytes > self.budget_bytes:
            key = next(evictable)
            item = self.drop(key)
            self.num_evicted += 1
            if self.evicted is not None:
                self.evicted(key, item)

    def put(self, key: str, item: Item, *, num_bytes: int) -> None:
        """Store an item under a key that is not there yet. Raises StoreFullError when pinned items leave no room."""
        if key in self._items:
            raise ValueError(f"{key} is in the store already; an entry is never replaced")
        self.make_room(num_bytes)
        self._items[key] = (item, num_bytes)
        self.bytes_used += num_bytes

    def get(self, key: str) -> Item:
        """The item of a key. Raises KeyError when it is not there: nothing else is ever handed out."""
        self._items.move_to_end(key)
        return self._items[key][0]

    def drop(self, key: str) -> Item:
        """Remove an item, and hand it back."""
        item, freed = self._items.pop(key)
        self.bytes_used -= freed
        return item

    def clear(self) -> None:
        self._items.clear()
        self.bytes_used = 0

    def _bytes_of(self, keys: Container[str]) -> int:
        """Of the pinned items and those of the keys."""
        return sum(size for key, (_, size) in self._items.items() if key in self._pinned or key in keys)


class FileContents(dict[str, str]):
    """Digest of each file as it was when it was first asked for: it is not looked at again, and may be gone."""

    def __missing__(self, path: str) -> str:
        self[path] = digest = file_digest(path)
        return digest


def selection_key(selection: FrameSelection, content: str) -> str:
    """Content key of decoded frames: the file, by its digest, the frames and the resolution."""
    return _digest((content, selection.frames, selection.height, selection.width))


def file_digest(path: str) -> str:
    """Digest of a file as it is now. Raises DecodeError where it cannot be read."""
    try:
        stat = os.stat(path)
        return _file_digest(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DecodeError(path, f"cannot be read: {error.strerror}") from error


def encoder_digest(encoder: nn.Module) -> str:
    """Of all that makes frames into embeddings: weights, their names, shapes and dtypes, and the encoder's settings."""
    digest = hashlib.sha256(encoder.settings.encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _digest(parts: tuple) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@lru_cache(maxsize=65536)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    """Digest of size and of the first, middle and last MiB: hour-long files are not read whole for a key."""
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in sorted({0, max(0, size // 2 - _SAMPLE_BYTES // 2), max(0, size - _SAMPLE_BYTES)}):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
