"""Writes safetensors files whose tensors arrive one at a time, in any order.

The safetensors library writes a file from tensors that are all in memory; here the header is written first, from
names, dtypes and shapes, and each tensor goes to its place in the file when it comes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoints_tools.direct_files import DirectWriter, tensor_bytes
from checkpoints_tools.errors import ConvertError
from checkpoints_tools.hf_folder import DTYPE_NAMES, INDEX, SINGLE

_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsFile:
    """One file. Raises ConvertError for a tensor that differs from its slot, comes twice, or never came."""

    def __init__(self, path: Path, slots: Sequence[Slot]) -> None:
        self.path = path
        self._slot: dict[str, Slot] = {}
        self._start: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        # Wide dtypes first, so that every tensor starts at a multiple of its element size.
        for slot in sorted(slots, key=lambda slot: -slot.dtype.itemsize):
            end = position + slot.num_bytes
            header[slot.name] = {
                "dtype": _NAME_OF_DTYPE[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [position, end],
            }
            self._slot[slot.name], self._start[slot.name] = slot, position
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._base = 8 + len(encoded)
        self._pending = set(self._slot)
        self._file = DirectWriter(path, num_bytes=self._base + position)
        self._file.write(np.frombuffer(struct.pack("<Q", len(encoded)) + encoded, dtype=np.uint8), start=0)

    def put(self, name: str, tensor: Tensor) -> None:
        slot = self._slot[name]
        if name not in self._pending:
            raise ConvertError(f"{self.path}: tensor {name!r} was written twice")
        if tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype:
            raise ConvertError(
                f"{self.path}: tensor {name!r} is {list(tensor.shape)} {tensor.dtype}, "
                f"expected {list(slot.shape)} {slot.dtype}"
            )
        self._pending.remove(name)
        self._file.write(tensor_bytes(tensor), start=self._base + self._start[name])

    def close(self) -> None:
        """Raises ConvertError when a tensor is still to come."""
        self._file.close()
        if self._pending:
            raise ConvertError(f"{self.path}: never written: {sorted(self._pending)[:5]}")

    def abandon(self) -> None:
        self._file.close()


def reshard(slots: Sequence[Slot], *, shard_bytes: int) -> dict[str, list[Slot]]:
    """File name -> slots, in order, each file at most shard_bytes unless one tensor is larger."""
    shards: list[list[Slot]] = [[]]
    held = 0
    for slot in slots:
        if shards[-1] and held + slot.num_bytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(slot)
        held += slot.num_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{at:05d}-of-{len(shards):05d}.safetensors": shard for at, shard in enumerate(shards, start=1)}


def write_index(folder: Path, files: dict[str, list[Slot]], *, metadata: dict[str, object]) -> None:
    """The index of several files; a single model.safetensors needs none."""
    if list(files) == [SINGLE]:
        return
    total = sum(slot.num_bytes for slots in files.values() for slot in slots)
    weight_map = {slot.name: file for file, slots in files.items() for slot in slots}
    content = {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with (folder / INDEX).open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write(os.linesep)
