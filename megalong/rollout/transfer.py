"""What a rollout engine in another process and its client agree on: how a bucket of weights becomes bytes."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

TRANSFER_BACKEND = "megalong"
"""The name that the receiver of buckets has among vLLM's weight transfer engines."""

MEDIA_ITEM_TOKENS = 4096
"""Media places that vLLM takes as one item: what is copied to its GPU at a time."""

_ALIGNMENT = 16  # bytes; what a view of any dtype needs

Manifest = list[tuple[str, tuple[int, ...], str]]
"""Name, shape and dtype of each tensor of a bucket, in order."""


class Transport(Enum):
    """How the bytes of a bucket reach the engine's workers."""

    nccl = "nccl"  # broadcast: the engine has GPUs of its own
    ipc = "ipc"  # CUDA IPC: the engine is on the trainer's GPUs
    file = "file"  # a file in memory: no GPU


def manifest_of(tensors: dict[str, Tensor]) -> Manifest:
    """What pack_bucket writes."""
    return [(name, tuple(item.shape), str(item.dtype).removeprefix("torch.")) for name, item in tensors.items()]


def packed_bytes(manifest: Manifest) -> int:
    """Bytes of a packed bucket."""
    return _places(manifest)[1]


def pack_bucket(tensors: dict[str, Tensor], into: Tensor) -> None:
    """Write the tensors into [packed_bytes] uint8, one after the other; bytes between them are left as they are."""
    starts, _ = _places(manifest_of(tensors))
    for start, tensor in zip(starts, tensors.values(), strict=True):
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        into[start : start + len(data)] = data


def unpack_bucket(packed: Tensor, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of a bucket, views of `packed`. Raises ValueError when the bytes are not those of the manifest."""
    starts, num_bytes = _places(manifest)
    if len(packed) != num_bytes:
        raise ValueError(f"the bucket has {len(packed)} bytes, its manifest says {num_bytes}")
    tensors = {}
    for start, (name, shape, dtype) in zip(starts, manifest, strict=True):
        data = packed[start : start + _num_bytes(shape, dtype)]
        tensors[name] = data.view(getattr(torch, dtype)).view(shape)
    return tensors


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize


def _places(manifest: Manifest) -> tuple[list[int], int]:
    """Where each tensor starts, and the bytes of all."""
    starts, held = [], 0
    for _, shape, dtype in manifest:
        starts.append(held)
        held += -(-_num_bytes(shape, dtype) // _ALIGNMENT) * _ALIGNMENT
    return starts, held
