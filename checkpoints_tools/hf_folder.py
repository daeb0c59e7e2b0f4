"""Reads a Hugging Face folder's safetensors headers, and its tensors one at a time. Runs no code of the folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.direct_files import DirectReader, tensor_bytes
from checkpoints_tools.errors import ConvertError, raise_all
from checkpoints_tools.pickled_files import PICKLED_INDEX, PICKLED_SINGLE, is_pickled, unpickled
from megalong.models.names import canonical

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class HfTensor:
    """One tensor as a safetensors header describes it."""

    folder: str  # sub-folder of the checkpoint, for example "llm"; "" for the checkpoint folder itself
    name: str  # as stored
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0  # of its bytes in a safetensors file

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def joined(folder: str, name: str) -> str:
    """`<folder>/<name>`; the name alone for the checkpoint folder itself."""
    return f"{folder}/{name}" if folder else name


class HfFolder:
    """The tensors of `folders` under `path`, by canonical `<folder>/<name>`, in the order of the files.

    Only headers are read here. Raises ConvertError naming file and tensor for pickled weights, a cut or malformed
    file, an index that points outside its folder, and a tensor that is missing, stored twice or not in the index.
    allow_pickle: a folder without safetensors may hold pytorch_model*.bin, of which only tensors are loaded.
    """

    def __init__(self, path: Path, folders: Sequence[str], *, allow_pickle: bool = False) -> None:
        self.path, self.folders = path, tuple(folders)
        self.tensors: dict[str, HfTensor] = {}
        strays = [] if "" in folders else [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
        for stray in sorted(strays):
            raise ConvertError(f"{stray}: weights are expected in {', '.join(folders)}, not beside config.json")
        for folder in folders:
            for tensor in _folder_tensors(path, folder, allow_pickle=allow_pickle):
                key = canonical(joined(folder, tensor.name))
                if key in self.tensors:
                    raise ConvertError(
                        f"{tensor.file}: tensor {tensor.name!r} is stored a second time "
                        f"(the first, {self.tensors[key].name!r}, is in {self.tensors[key].file})"
                    )
                self.tensors[key] = tensor

    def read(self, tensor: HfTensor) -> Tensor:
        """The tensor, in memory of its own (of a .bin file: mapped)."""
        if tensor.file.suffix == ".bin":
            return unpickled(tensor.file)[tensor.name].contiguous()
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        with DirectReader(tensor.file) as file:
            if file.read_into(tensor_bytes(whole), start=tensor.start) < tensor.num_bytes:
                raise ConvertError(f"{tensor.file}: ends inside tensor {tensor.name!r}; it changed while it was read")
        return whole

    def is_weight_file(self, file: Path) -> bool:
        """Whether an export writes this file anew instead of copying it."""
        inside = file.parent in [self.path / folder for folder in self.folders]
        return inside and (file.suffix == ".safetensors" or file.name == INDEX or is_pickled(file))

    def index_metadata(self, folder: str) -> dict[str, Any]:
        """`metadata` of the folder's index; empty without an index."""
        for index in (self.path / folder / INDEX, self.path / folder / PICKLED_INDEX):
            if index.is_file():
                return dict(_read_index(index).get("metadata") or {})
        return {}


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """safe_open, its errors turned into a ConvertError that names the file."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{file}: not a complete safetensors file ({error}); download or copy it again") from error


def _folder_tensors(path: Path, name: str, *, allow_pickle: bool) -> list[HfTensor]:
    folder = path / name
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder; the checkpoint's weights are expected there")
    pickled = [file for file in sorted(folder.iterdir()) if is_pickled(file)]
    if pickled and not allow_pickle:
        raise ConvertError(
            f"{pickled[0]}: pickled weights are refused, because loading a pickle can run code; save them as "
            "safetensors and remove the .bin files, or give --allow-pickle, which lets nothing but tensors in"
        )
    index, single = folder / INDEX, folder / SINGLE
    if pickled:
        if index.is_file() or single.is_file():
            raise ConvertError(f"{folder}: both safetensors and {pickled[0].name} are there; remove what is not meant")
        index, single = folder / PICKLED_INDEX, folder / PICKLED_SINGLE
    if index.is_file() and single.is_file():
        raise ConvertError(f"{folder}: both {single.name} and {index.name} are there; remove the one that is not meant")
    if single.is_file():
        return _file_tensors(single, name)
    if not index.is_file():
        raise ConvertError(f"{folder}: neither {single.name} nor {index.name} is there")
    return _indexed_tensors(index, name)


def _indexed_tensors(index: Path, folder: str) -> list[HfTensor]:
    file_of = _checked_weight_map(index)
    found: dict[str, HfTensor] = {}
    problems = []
    for file_name in dict.fromkeys(file_of.values()):
        for tensor in _file_tensors(index.parent / file_name, folder):
            if tensor.name not in file_of:
                problems.append(f"{tensor.file}: unexpected tensor {tensor.name!r}, which {index.name} does not list")
            elif file_of[tensor.name] != file_name:
                problems.append(
                    f"{tensor.file}: tensor {tensor.name!r} is stored twice; {index.name} says {file_of[tensor.name]}"
                )
            else:
                found[tensor.name] = tensor
    problems += [f"{index.parent / file_of[name]}: tensor {name!r} is missing" for name in file_of if name not in found]
    raise_all(problems)
    return list(found.values())


def _checked_weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_index(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index}: key 'weight_map' is missing or empty")
    kind = "safetensors" if index.name == INDEX else "bin"
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and Path(file_name).name == file_name and file_name.endswith(f".{kind}")
        if not plain or not (index.parent / file_name).is_file():
            raise ConvertError(
                f"{index}: tensor {name!r} points at {file_name!r}, which is not a {kind} file of that folder"
            )
    return weight_map


def _read_index(index: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise ConvertError(f"{index}: {twice!r} is listed twice")
        return dict(pairs)

    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConvertError(f"{index}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{index}: expected a JSON object, got {type(content).__name__}")
    return content


def _file_tensors(file: Path, folder: str) -> list[HfTensor]:
    tensors = []
    if file.suffix == ".bin":
        for name, tensor in unpickled(file).items():
            if tensor.dtype not in DTYPE_NAMES.values():
                raise ConvertError(f"{file}: tensor {name!r} has dtype {tensor.dtype}, which safetensors does not have")
            shape = tuple(tensor.shape)
            tensors.append(HfTensor(folder=folder, name=name, file=file, dtype=tensor.dtype, shape=shape))
        return tensors
    with open_safetensors(file) as shard:
        starts = _starts(file)
        for name in shard.offset_keys():
            header = shard.get_slice(name)
            dtype = header.get_dtype()
            if dtype not in DTYPE_NAMES:
                raise ConvertError(f"{file}: tensor {name!r} has dtype {dtype}; known are {', '.join(DTYPE_NAMES)}")
            tensors.append(
                HfTensor(
                    folder=folder,
                    name=name,
                    file=file,
                    dtype=DTYPE_NAMES[dtype],
                    shape=tuple(header.get_shape()),
                    start=starts[name],
                )
            )
    return tensors


def _starts(file: Path) -> dict[str, int]:
    """Tensor name -> where its bytes begin; for a file that the safetensors library has found sound."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    return {name: 8 + length + value["data_offsets"][0] for name, value in header.items() if name != "__metadata__"}
