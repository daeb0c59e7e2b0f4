"""A rank's embeddings: on its device, in host memory and, where a folder is given, on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalong.vision.disk import DiskStore
from megalong.vision.store import ByteStore


@dataclass(frozen=True, slots=True)
class EmbeddingPart:
    """Rows [first, first + n) of a video's embeddings."""

    first: int
    embeds_nD: Tensor


class EmbeddingStore:
    """Embeddings by key, each in one of two memory tiers: on the device as far as they fit, else in host memory.

    What makes room for others moves down a tier, least recently used first, and out of host memory onto disk; without
    a disk store it is lost. What get() finds in host memory moves up when the device has room for it beside what is
    pinned. Pinned keys do not leave memory. On a GPU host memory is pinned (page-locked), which torch hands out in
    powers of two: an entry counts as what it takes.
    """

    def __init__(self, *, device: torch.device, gpu_bytes: int, host_bytes: int, disk: DiskStore | None) -> None:
        self.device = device
        self.disk = disk
        self.gpu: ByteStore[EmbeddingPart] = ByteStore(
            what="embeddings", budget_bytes=gpu_bytes, setting="video.cache_gpu_gib", evicted=self._from_gpu
        )
        self.host: ByteStore[EmbeddingPart] = ByteStore(
            what="embeddings", budget_bytes=host_bytes, setting="video.cache_gib", evicted=self._to_disk
        )

    def __contains__(self, key: str) -> bool:
        """Whether get() has it: in memory."""
        return key in self.gpu or key in self.host

    def __len__(self) -> int:
        return len(self.gpu) + len(self.host)

    def pin(self, keys: Iterable[str]) -> None:
        """Keep these keys in memory, too, until release()."""
        keys = list(keys)
        self.gpu.pin(keys)
        self.host.pin(keys)

    def release(self, *, keep: Iterable[str] = ()) -> None:
        keep = list(keep)
        self.gpu.release(keep=keep)
        self.host.release(keep=keep)

    def put(self, key: str, part: EmbeddingPart) -> None:
        """Keep a copy of a part under a key that is not in memory. Raises StoreFullError, naming the setting, when
        pinned entries leave no room for it."""
        if key in self:
            raise ValueError(f"{key} is in the store already; an entry is never replaced")
        tier = self.gpu if self.gpu.fits(part.embeds_nD.nbytes) else self.host
        self._put(tier, key, part)

    def get(self, key: str) -> Tensor:
        """[n, D'] on the device. Raises KeyError when the key is not in memory."""
        if key in self.gpu:
            return self.gpu.get(key).embeds_nD
        part = self.host.get(key)
        if not self.gpu.fits(part.embeds_nD.nbytes):
            return part.embeds_nD.to(self.device, non_blocking=True)
        self.host.drop(key)
        self._put(self.gpu, key, part)
        return self.gpu.get(key).embeds_nD

    def save(self, key: str) -> None:
        """Write an entry in memory to disk, where it stays in memory too. Raises KeyError when it is not there."""
        self._to_disk(key, self.gpu.get(key) if key in self.gpu else self.host.get(key))

    def clear(self) -> None:
        """Forget what is in memory."""
        self.gpu.clear()
        self.host.clear()

    def _put(self, tier: ByteStore[EmbeddingPart], key: str, part: EmbeddingPart) -> None:
        """Room is made first, then the copy: a tier is never over its budget."""
        num_bytes = part.embeds_nD.nbytes
        if tier is self.gpu:
            tier.make_room(num_bytes)
            copy_nD = part.embeds_nD.to(self.device, copy=True)
        else:
            num_bytes = self._host_bytes(num_bytes)
            tier.make_room(num_bytes)
            copy_nD = torch.empty_like(part.embeds_nD, device="cpu", pin_memory=self.device.type == "cuda")
            copy_nD.copy_(part.embeds_nD)
        tier.put(key, EmbeddingPart(part.first, copy_nD), num_bytes=num_bytes)

    def _host_bytes(self, num_bytes: int) -> int:
        return 1 << (num_bytes - 1).bit_length() if num_bytes and self.device.type == "cuda" else num_bytes

    def _from_gpu(self, key: str, part: EmbeddingPart) -> None:
        if self.host.fits(self._host_bytes(part.embeds_nD.nbytes)):
            self._put(self.host, key, part)
        else:
            self._to_disk(key, part)

    def _to_disk(self, key: str, part: EmbeddingPart) -> None:
        if self.disk is not None and len(part.embeds_nD):
            self.disk.write(key, part.first, part.embeds_nD)
