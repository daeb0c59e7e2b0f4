"""Weights between a Hugging Face folder, the Megatron model and a sampler, all through the family's weight table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megalong.config.costs import WEIGHT_BUCKET_BYTES
from megalong.models.errors import CheckpointError
from megalong.models.names import canonical
from megalong.models.weights import Entry, Replicated
from megalong.parallel.collectives import broadcast_object
from megalong.parallel.layout import ParallelLayout
from megalong.records import WeightBucket


class CheckpointReader:
    """Reads tensors by `<folder>/<name>` (`<name>` for folder "") from safetensors files; one at a time is in memory.

    Raises CheckpointError for a missing folder, a bad index (no JSON, a file outside its folder, a missing file), a
    file that is not whole, and a missing tensor.
    """

    def __init__(self, path: Path, folders: Sequence[str]) -> None:
        self.path = path
        self._places: dict[str, tuple[Path, tuple[str, ...]]] = {}  # canonical name -> file, names it may have there
        for folder in folders:
            prefix = f"{folder}/" if folder else ""
            for listed, file in _tensor_files(path / folder).items():
                names = _spellings(listed) if folder == "vision_tower" else (listed,)
                self._places[canonical(prefix + listed)] = (file, names)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        if canonical(name) not in self._places:
            folder, slash, _ = name.partition("/")
            where = f"{folder}/" if slash else "the folder"
            raise CheckpointError(f"{self.path}: tensor {name!r} is in none of the safetensors files of {where}")
        return self._places[canonical(name)][0]

    def read(self, name: str) -> Tensor:
        file = self.file_of(name)
        with _opened(file) as shard:
            for stored in self._places[canonical(name)][1]:
                if stored in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    return shard.get_tensor(stored)
        raise CheckpointError(f"{file}: the index says that tensor {name!r} is in this file, and it is not")


def _spellings(name: str) -> tuple[str, str]:
    """transformers before and after 5.20 name SigLIP's tensors with and without a prefix."""
    plain = name.removeprefix("vision_model.")
    return plain, f"vision_model.{plain}"


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); copy or download it again") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: _listed_file(index, name, file_name) for name, file_name in _weight_map(index).items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    with _opened(single) as shard:
        return dict.fromkeys(shard.keys(), single)


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index}: not valid JSON ({error})") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: key 'weight_map' is missing or no mapping of tensor names to files")
    return weight_map


def _listed_file(index: Path, name: str, file_name: Any) -> Path:
    # A plain name only: an index must not make us read outside its folder.
    if not isinstance(file_name, str) or Path(file_name).name != file_name or not (index.parent / file_name).is_file():
        raise CheckpointError(f"{index}: tensor {name!r} points at {file_name!r}, which is not a file of the folder")
    return index.parent / file_name


@torch.no_grad()
def load_hf_weights(model: nn.Module, table: Sequence[Entry], reader: CheckpointReader, layout: ParallelLayout) -> None:
    """Fill the local shards of `model` (replicated where the table says so). `table`: what this pipeline stage holds.

    Raises CheckpointError for a missing tensor or one of the wrong shape, and ValueError for a model parameter that the
    table does not name.
    """
    parameters = dict(model.named_parameters())
    for entry in table:
        target = parameters.pop(entry.megatron)
        # What joining shards like the local one gives is what the checkpoint must hold.
        expected = entry.join([torch.empty(target.shape, device="meta")] * layout.tp_size)
        tensors = [reader.read(name) for name in entry.hf]
        for name, tensor, like in zip(entry.hf, tensors, expected, strict=True):
            if tensor.shape != like.shape:
                raise CheckpointError(
                    f"{reader.file_of(name)}: tensor {name!r} is {list(tensor.shape)}, but the sizes in "
                    f"config.json ask for {list(like.shape)}"
                )
        target.copy_(entry.cut(tensors, rank=layout.tp_rank, size=layout.tp_size))
    if parameters:
        raise ValueError(f"the weight table does not fill {sorted(parameters)}")


def export_weights(
    model: nn.Module, table: Sequence[Entry], layout: ParallelLayout, *, bucket_bytes: int = WEIGHT_BUCKET_BYTES
) -> Iterator[WeightBucket]:
    """Stream the model in Hugging Face names and shapes, at most about bucket_bytes at a time (a larger tensor gets
    a bucket of its own). `table` names what this pipeline stage holds. Every rank of the replica must iterate; every
    rank receives every bucket: first those of the first stage, then those of the next one. Tensors may be the
    parameters themselves: who keeps one copies it.
    """
    sent: set[str] = set()
    for stage in range(layout.pp_size):
        # What several stages hold, the vision side and a tied head, is sent by the first of them.
        entries = [entry for entry in table if entry.hf[0] not in sent] if stage == layout.pp_rank else []
        buckets = _buckets(model, entries, layout, bucket_bytes)
        if layout.pp_size > 1:
            buckets = _from_stage(buckets, stage, layout)
        for bucket in buckets:
            sent.update(bucket.tensors)
            yield bucket
            del bucket  # its memory is the next one's


def _buckets(
    model: nn.Module, table: Sequence[Entry], layout: ParallelLayout, bucket_bytes: int
) -> Iterator[WeightBucket]:
    # No torch.no_grad() on a generator: its wrapper keeps what was yielded while the next is made.
    parameters = dict(model.named_parameters())
    bucket: dict[str, Tensor] = {}
    held = 0
    for entry in table:
        local = parameters[entry.megatron].detach()
        # Before it is gathered: its memory is that of the bucket that has no room for it.
        if bucket and held + local.nbytes * _num_shards(entry, layout) > bucket_bytes:
            yield WeightBucket.of(bucket)
            bucket, held = {}, 0
        whole = gather_entry(entry, local, layout)
        for name, tensor in zip(entry.hf, whole, strict=True):
            if bucket and held + tensor.nbytes > bucket_bytes:
                yield WeightBucket.of(bucket)
                bucket, held = {}, 0
            bucket[name] = tensor
            held += tensor.nbytes
        del whole, tensor
    if bucket:
        yield WeightBucket.of(bucket)


def gather_entry(entry: Entry, local: Tensor, layout: ParallelLayout) -> tuple[Tensor, ...]:
    """Whole tensors of an entry, of which this rank has `local` (collective over the tensor-parallel group)."""
    shards = local[None]
    if _num_shards(entry, layout) > 1:
        shards = local.new_empty((layout.tp_size, *local.shape))
        dist.all_gather_into_tensor(shards.flatten(0, 1), local.contiguous(), group=layout.tp)
    return entry.join(shards)


def _num_shards(entry: Entry, layout: ParallelLayout) -> int:
    return 1 if isinstance(entry, Replicated) else layout.tp_size


def _from_stage(buckets: Iterator[WeightBucket], stage: int, layout: ParallelLayout) -> Iterator[WeightBucket]:
    """The buckets of a pipeline stage on every stage, with the checksums that the sending one made."""
    while True:
        mine = next(buckets, None) if stage == layout.pp_rank else None
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in mine.tensors.items()} if mine else None
        announced = broadcast_object((shapes, mine and mine.checksums_n.tolist()), source=stage, group=layout.pp)
        shapes, checksums = announced
        if shapes is None:
            return
        if mine:
            tensors = {name: tensor.contiguous() for name, tensor in mine.tensors.items()}
        else:
            tensors = {
                name: torch.empty(shape, dtype=dtype, device=layout.device) for name, (shape, dtype) in shapes.items()
            }
        for tensor in tensors.values():
            dist.broadcast(tensor, group_src=stage, group=layout.pp)
            del tensor
        yield WeightBucket(tensors=tensors, checksums_n=torch.tensor(checksums, device=layout.device))
        del mine, tensors  # their memory is the next one's
