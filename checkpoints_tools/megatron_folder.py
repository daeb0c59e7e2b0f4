"""Reads boxes of tensors from a Megatron checkpoint folder (torch_dist), saved at any parallel layout."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator, Sequence
from enum import Enum, EnumType
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoints_tools.direct_files import DirectReader
from checkpoints_tools.errors import ConvertError, raise_all
from megalong.models.weights import VocabRows

if TYPE_CHECKING:
    from checkpoints_tools.places import Blueprint, Place

CONFIG, METADATA, COMMON = "metadata.json", ".metadata", "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
OPTIMIZER = "optimizer."

_PLAIN_CLASSES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
} | {
    (f"torch.distributed.checkpoint.{module}", name)
    for module, names in {
        "metadata": "Metadata MetadataIndex ChunkStorageMetadata TensorStorageMetadata BytesStorageMetadata "
        "TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
        "planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    }.items()
    for name in names.split()
}


class _MetadataUnpickler(pickle.Unpickler):
    """The metadata file is a pickle, which could run anything: only what such files are made of is let in."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python 3.11.0 to 3.11.3 pickle a member of an enum
        allowed = (module, name) in _PLAIN_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's metadata")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: Any) -> Enum:
    """getattr for members of enums, whose class has come through find_class, and for nothing else."""
    if not (isinstance(owner, EnumType) and isinstance(name, str) and name in owner.__members__):
        raise pickle.UnpicklingError(f"attribute {name!r} of {owner!r} does not belong into a checkpoint's metadata")
    return owner[name]


class _Slice(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file: each shard is a complete torch.save of its own."""

    def __init__(self, file: DirectReader, *, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        target = np.frombuffer(buffer, dtype=np.uint8)[: max(0, self._length - self._at)]
        count = self._file.read_into(target, start=self._start + self._at)
        self._at += count
        return count


def megatron_checkpoint(path: Path) -> Path | None:
    """`path` when it is a Megatron checkpoint, else the newest complete one in it, else None."""
    if (path / CONFIG).is_file():
        return path
    from megalong.engine.checkpoint import complete_checkpoints  # brings megatron-core

    found = complete_checkpoints(path)
    return found[-1] if found else None


class MegatronFolder:
    """The tensors of a checkpoint by storage key. Nothing is read but metadata until `read_box`.

    Raises ConvertError for a folder that is no torch_dist checkpoint, is cut short, or points outside itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_format(path)
        self._metadata = _read_metadata(path / METADATA)
        self.optimizer_keys = 0
        self.tensors: dict[str, TensorStorageMetadata] = {}  # of the model
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue  # bytes: extra states, common state
            if key.startswith(OPTIMIZER):
                self.optimizer_keys += 1
            else:
                self.tensors[key] = entry
        self._check_files()
        self.family = self._read_family()

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def read_box(self, key: str, *, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """The box of `sizes` at `offsets` of the whole tensor, put together from the saved shards."""
        entry = self.tensors[key]
        box = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [box])
        covered = sum(math.prod(item.lengths) for item in items)
        if covered != math.prod(sizes):
            raise ConvertError(
                f"{self.path}: {key} at {list(offsets)}: the shards hold {covered} of {math.prod(sizes)} elements"
            )
        if len(items) == 1 and (shard := self._read_shard(items[0])).shape == torch.Size(sizes):
            return shard
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        for item in items:
            shard = self._read_shard(item)
            _narrow(target, item.dest_offsets, item.lengths).copy_(_narrow(shard, item.storage_offsets, item.lengths))
        return target

    def _read_shard(self, item: ReadItem) -> Tensor:
        """The whole saved shard that the item is in."""
        info = self._metadata.storage_data.get(item.storage_index)
        if info is None:
            raise ConvertError(f"{self.path}: the metadata does not say which file holds {item.storage_index.fqn}")
        try:
            with DirectReader(self.path / info.relative_path) as file:
                shard = torch.load(
                    _Slice(file, start=info.offset, length=info.length), map_location="cpu", weights_only=True
                )
        except Exception as error:  # torch and pickle raise a dozen kinds for bytes that are not a shard
            raise ConvertError(
                f"{self.path}: {item.storage_index.fqn} in {info.relative_path} cannot be read: {error}"
            ) from error
        chunks = self.tensors[item.storage_index.fqn].chunks
        sizes = next(chunk.sizes for chunk in chunks if chunk.offsets == item.storage_index.offset)
        if not isinstance(shard, Tensor) or shard.shape != sizes or shard.dtype != self.dtype(item.storage_index.fqn):
            raise ConvertError(
                f"{self.path}: {item.storage_index.fqn} in {info.relative_path} is not the {list(sizes)} "
                f"{self.dtype(item.storage_index.fqn)} that the metadata says"
            )
        return shard

    def _read_family(self) -> str | None:
        """What the checkpoint says of the model's family; None for one that does not.

        megatron-core 0.16 keeps plain values in common.pt, 0.19 in a list of one, an object beside the tensors.
        """
        file = self.path / COMMON
        inside = [info for index, info in self._metadata.storage_data.items() if index.fqn == COMMON_OBJECT]
        try:
            if inside and not file.is_file():
                file = self.path / inside[0].relative_path
                with DirectReader(file) as stream:
                    part = _Slice(stream, start=inside[0].offset, length=inside[0].length)
                    (common,) = torch.load(part, map_location="cpu", weights_only=True)
            else:
                common = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise a dozen kinds for a file that is not what it should be
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConvertError(f"{file}: the checkpoint's plain values cannot be read ({what})") from error
        family = common.get("family") if isinstance(common, dict) else None
        return family if isinstance(family, str) else None

    def read_place(self, place: Place) -> Tensor:
        """The whole parameter of a place, with tensor parallelism's vocabulary padding cut off."""
        sizes = list(place.sizes)
        if isinstance(place.entry, VocabRows):
            sizes[0] = self.shape(place.key)[0]
        whole = self.read_box(place.key, offsets=place.offsets, sizes=tuple(sizes))
        if sizes[0] > place.sizes[0]:
            if whole[place.sizes[0] :].any():
                raise ConvertError(
                    f"{self.path}: {place.key} has {sizes[0]} vocabulary rows and those from {place.sizes[0]} are not "
                    f"padding: vocabulary mismatch with vocab_size={place.sizes[0]} of the Hugging Face folder"
                )
            whole = whole[: place.sizes[0]]
        return whole.view(place.model_shape)

    def slices(self, key: str, *, num_bytes: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(offsets, sizes) of boxes that together are the whole tensor, in order, cut along dimension 0."""
        shape = self.shape(key)
        if not shape:
            yield (), ()
            return
        row = math.prod(shape[1:]) * self.dtype(key).itemsize
        step = max(1, num_bytes // max(1, row))
        for start in range(0, shape[0], step):
            yield (start, *[0] * (len(shape) - 1)), (min(step, shape[0] - start), *shape[1:])

    def _check_files(self) -> None:
        problems = []
        sizes: dict[str, int] = {}
        for index, info in self._metadata.storage_data.items():
            name = info.relative_path
            if name not in sizes:
                file = self.path / name
                if Path(name).name != name:
                    raise ConvertError(f"{self.path / METADATA}: {index.fqn} points at {name!r}, outside the folder")
                sizes[name] = file.stat().st_size if file.is_file() else -1
            if info.transform_descriptors:
                raise ConvertError(f"{self.path / name}: {index.fqn} is stored transformed, which is not supported")
            if sizes[name] < info.offset + info.length:
                state = "is missing" if sizes[name] < 0 else f"is cut short ({sizes[name]} bytes)"
                problems.append(f"{self.path / name} {state}: it should hold {index.fqn} {list(index.offset or ())}")
        raise_all(problems)


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def check_checkpoint(checkpoint: MegatronFolder, blueprint: Blueprint) -> None:
    """Raise ConvertError for every tensor of the model that the checkpoint lacks, has in another shape, or has more."""
    problems = []
    for place in blueprint.places:
        what = f"{checkpoint.path}: tensor {place.key!r}"
        if place.key not in checkpoint.tensors:
            problems.append(f"{what} is missing (it becomes {', '.join(place.entry.hf)})")
            continue
        shape = checkpoint.shape(place.key)
        if shape == place.global_shape:
            continue
        if not isinstance(place.entry, VocabRows) or shape[1:] != place.global_shape[1:]:
            problems.append(f"{what} has shape {list(shape)}, expected {list(place.global_shape)}")
        elif shape[0] < place.global_shape[0]:
            problems.append(
                f"{what} has {shape[0]} rows: vocabulary mismatch with vocab_size={place.global_shape[0]} "
                "of the Hugging Face folder"
            )
    known = {place.key for place in blueprint.places}
    problems += [
        f"{checkpoint.path}: unexpected tensor {key!r}; the Hugging Face folder's config leaves no place for it"
        for key in checkpoint.tensors
        if key not in known
    ]
    raise_all(list(dict.fromkeys(problems)))


def _check_format(path: Path) -> None:
    config = path / CONFIG
    if not config.is_file():
        raise ConvertError(f"{path}: not a Megatron checkpoint (no {CONFIG}), or one cut short")
    try:
        backend = json.loads(config.read_text()).get("sharded_backend")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConvertError(f"{config}: not a valid checkpoint description ({error})") from error
    if backend != "torch_dist":
        raise ConvertError(f"{config}: sharded_backend is {backend!r}; only 'torch_dist' can be read")


def _read_metadata(file: Path) -> Metadata:
    if not file.is_file():
        raise ConvertError(f"{file}: file not found; the checkpoint is cut short")
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except Exception as error:  # a pickle with a wrong byte in it can raise nearly anything
        raise ConvertError(f"{file}: cannot be read ({error})") from error
    if not isinstance(metadata, Metadata):
        raise ConvertError(f"{file}: holds a {type(metadata).__name__}, expected torch's checkpoint Metadata")
    if not _well_formed(metadata):
        raise ConvertError(f"{file}: is torch's checkpoint Metadata, but not everything in it is what it should be")
    return metadata


def _well_formed(metadata: Metadata) -> bool:
    """Whether everything that is read later has its type: a pickle can hold anything in any place."""
    try:
        keys = all(
            isinstance(key, str) and (not isinstance(entry, TensorStorageMetadata) or _well_formed_tensor(entry))
            for key, entry in metadata.state_dict_metadata.items()
        )
        files = all(
            isinstance(index.fqn, str)
            and isinstance(info.relative_path, str)
            and info.offset >= 0
            and info.length >= 0
            and (info.transform_descriptors is None or isinstance(info.transform_descriptors, list | tuple))
            for index, info in metadata.storage_data.items()
        )
    except (AttributeError, TypeError):
        return False
    return keys and files


def _well_formed_tensor(entry: TensorStorageMetadata) -> bool:
    sizes = [entry.size, *(part for chunk in entry.chunks for part in (chunk.sizes, chunk.offsets))]
    counts = all(len(size) == len(entry.size) and all(type(n) is int and n >= 0 for n in size) for size in sizes)
    return isinstance(entry.properties.dtype, torch.dtype) and counts
