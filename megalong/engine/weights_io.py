"""Weights between a Hugging Face folder, the Megatron model and a sampler, all through the family's weight table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from megalong.models.weights import Entry, Replicated
from megalong.parallel.layout import ParallelLayout
from megalong.records import WeightBucket, bucket_checksum


class CheckpointReader:
    """Reads tensors by `<folder>/<name>` from safetensors files, one at a time; nothing else stays in memory.

    Raises ValueError for a missing folder, an index that points outside its folder or at a missing file, and a
    missing tensor.
    """

    def __init__(self, path: Path, folders: Sequence[str]) -> None:
        self.path = path
        self._file_of: dict[str, Path] = {}
        for folder in folders:
            for name, file in _tensor_files(path / folder).items():
                # transformers before and after 5.20 name SigLIP's tensors with and without this prefix.
                plain = name.removeprefix("vision_model.") if folder == "vision_tower" else name
                self._file_of[f"{folder}/{plain}"] = file
                self._file_of.setdefault(f"{folder}/{name}", file)

    def read(self, name: str) -> Tensor:
        folder, _, inner = name.partition("/")
        plain = inner.removeprefix("vision_model.")
        for candidate in (inner, plain, f"vision_model.{plain}"):
            file = self._file_of.get(f"{folder}/{candidate}")
            if file is None:
                continue
            with safe_open(file, framework="pt") as shard:
                if candidate in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    return shard.get_tensor(candidate)
        raise ValueError(f"{self.path}: tensor {name!r} is in none of the safetensors files")


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {}
        for name, file_name in weight_map.items():
            file = folder / file_name
            if file.parent != folder or not file.is_file():
                raise ValueError(f"{index}: tensor {name!r} points at {file_name!r}, which is not a file of the folder")
            files[name] = file
        return files
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    with safe_open(single, framework="pt") as shard:
        return dict.fromkeys(shard.keys(), single)


@torch.no_grad()
def load_hf_weights(model: nn.Module, table: Sequence[Entry], reader: CheckpointReader, layout: ParallelLayout) -> None:
    """Fill the local shards of `model` (replicated where the table says so). Raises ValueError on a wrong shape or
    a model parameter that the table does not name."""
    parameters = dict(model.named_parameters())
    for entry in table:
        shard = entry.cut([reader.read(name) for name in entry.hf], rank=layout.tp_rank, size=layout.tp_size)
        target = parameters.pop(entry.megatron)
        if target.shape != shard.shape:
            raise ValueError(
                f"{entry.hf}: the checkpoint gives a {tuple(shard.shape)} shard for {entry.megatron}, "
                f"the model (tp={layout.tp_size}) has {tuple(target.shape)}"
            )
        target.copy_(shard)
    if parameters:
        raise ValueError(f"the weight table does not fill {sorted(parameters)}")


@torch.no_grad()
def export_weights(
    model: nn.Module, table: Sequence[Entry], layout: ParallelLayout, *, bucket_bytes: int = 1 << 30
) -> Iterator[WeightBucket]:
    """Stream the model in Hugging Face names and shapes, at most about bucket_bytes at a time (a larger tensor gets
    a bucket of its own). Every rank of the tensor-parallel group must iterate; every rank receives every bucket."""
    parameters = dict(model.named_parameters())
    bucket: dict[str, Tensor] = {}
    held = 0
    for entry in table:
        local = parameters[entry.megatron].detach()
        if isinstance(entry, Replicated) or layout.tp_size == 1:
            shards = [local]
        else:
            shards = [torch.empty_like(local) for _ in range(layout.tp_size)]
            dist.all_gather(shards, local.contiguous(), group=layout.tp)
        for name, tensor in zip(entry.hf, entry.join(shards), strict=True):
            size = tensor.numel() * tensor.element_size()
            if bucket and held + size > bucket_bytes:
                yield WeightBucket(tensors=bucket, checksum=bucket_checksum(bucket))
                bucket, held = {}, 0
            bucket[name] = tensor
            held += size
    if bucket:
        yield WeightBucket(tensors=bucket, checksum=bucket_checksum(bucket))
