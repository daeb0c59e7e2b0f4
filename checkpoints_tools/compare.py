"""verify: compares two checkpoints tensor by tensor, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.hf_folder import HfFolder
from checkpoints_tools.megatron_folder import MegatronFolder, check_checkpoint, megatron_checkpoint
from checkpoints_tools.places import FAMILIES, check_folder, family_of_folder, read_blueprint
from megalong.models.names import canonical

SLICE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Equal when `differences` is empty."""

    compared: int  # tensors on both sides
    num_bytes: int
    differences: tuple[str, ...]  # each names its tensor
    outside: int = 0  # tensors of a Hugging Face folder that no Megatron checkpoint has

    @property
    def equal(self) -> bool:
        return not self.differences


Pair = tuple[str, Tensor, Tensor]


def verify(
    a: Path, b: Path, *, like: Path | None = None, dtype: torch.dtype | None = None, allow_pickle: bool = False
) -> Comparison:
    """Compare two folders, each a Hugging Face or a Megatron checkpoint.

    like: a Hugging Face folder whose names and sizes are used for two Megatron checkpoints; without it they are
    compared by storage key, where a vocabulary padded for another tensor-parallel size counts as a difference.
    dtype: both sides are cast to it first. allow_pickle: Hugging Face folders may hold .bin files. Raises
    ConvertError for a folder that cannot be read.
    """
    found = [megatron_checkpoint(path) for path in (a, b)]
    outside = 0
    if not any(found):
        pairs, differences = _hf_pairs(*(_open_hf(path, allow_pickle=allow_pickle) for path in (a, b)))
    elif all(found) and like is None:
        pairs, differences = _megatron_pairs(MegatronFolder(found[0]), MegatronFolder(found[1]))
    else:
        source = like if all(found) else (b if found[0] else a)
        blueprint = read_blueprint(source)
        folder = HfFolder(source, blueprint.folders, allow_pickle=allow_pickle)
        check_folder(folder, blueprint)
        sides = [MegatronFolder(path) if path else folder for path in found]
        for side in sides:
            if isinstance(side, MegatronFolder):
                check_checkpoint(side, blueprint)
        pairs, differences = _place_pairs(sides, blueprint.places), []
        outside = 0 if all(found) else len(folder.tensors) - sum(len(place.entry.hf) for place in blueprint.places)
    compared = num_bytes = 0
    for name, left, right in tqdm(pairs, desc="verify", unit="tensor", disable=None):
        compared, num_bytes = compared + 1, num_bytes + left.nbytes
        difference = _difference(left, right, dtype)
        if difference:
            differences.append(f"{name}: {difference}")
        del left, right  # before the next ones are read
    return Comparison(compared=compared, num_bytes=num_bytes, differences=tuple(differences), outside=outside)


def _open_hf(path: Path, *, allow_pickle: bool) -> HfFolder:
    return HfFolder(path, FAMILIES[family_of_folder(path)].weight_folders, allow_pickle=allow_pickle)


def _hf_pairs(a: HfFolder, b: HfFolder) -> tuple[Iterator[Pair], list[str]]:
    both = [name for name in a.tensors if name in b.tensors]
    pairs = ((name, a.read(a.tensors[name]), b.read(b.tensors[name])) for name in both)
    return pairs, _only(a.tensors, b.tensors, a.path, b.path)


def _megatron_pairs(a: MegatronFolder, b: MegatronFolder) -> tuple[Iterator[Pair], list[str]]:
    differences = _only(a.tensors, b.tensors, a.path, b.path)
    both = []
    for key in a.tensors:
        if key not in b.tensors:
            continue
        if a.shape(key) == b.shape(key):
            both.append(key)
        else:
            hint = " (padding of the vocabulary? give --like)" if a.shape(key)[1:] == b.shape(key)[1:] else ""
            differences.append(f"{key}: shape {list(a.shape(key))} against {list(b.shape(key))}{hint}")

    def pairs() -> Iterator[Pair]:
        for key in both:
            for offsets, sizes in a.slices(key, num_bytes=SLICE_BYTES):
                name = key if sizes == a.shape(key) else f"{key}[{offsets[0]}:{offsets[0] + sizes[0]}]"
                yield (
                    name,
                    a.read_box(key, offsets=offsets, sizes=sizes),
                    b.read_box(key, offsets=offsets, sizes=sizes),
                )

    return pairs(), differences


def _place_pairs(sides: list[MegatronFolder | HfFolder], places: tuple) -> Iterator[Pair]:
    for place in places:
        columns = []
        for side in sides:
            if isinstance(side, MegatronFolder):
                columns.append(place.entry.join([side.read_place(place)]))
            else:
                columns.append(tuple(side.read(side.tensors[canonical(name)]) for name in place.entry.hf))
        yield from zip(place.entry.hf, *columns, strict=True)


def _only(a: dict, b: dict, a_path: Path, b_path: Path) -> list[str]:
    return [
        *(f"{name}: only in {a_path}" for name in a if name not in b),
        *(f"{name}: only in {b_path}" for name in b if name not in a),
    ]


def _difference(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> str | None:
    if a.shape != b.shape:
        return f"shape {list(a.shape)} against {list(b.shape)}"
    if dtype is not None:
        a, b = a.to(dtype), b.to(dtype)
    if a.dtype != b.dtype:
        return f"dtype {a.dtype} against {b.dtype}"
    a, b = a.contiguous(), b.contiguous()
    # As bytes: NaN equals itself, and -0.0 is not 0.0.
    if torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
        return None
    unequal = (a.view(-1).view(torch.uint8) != b.view(-1).view(torch.uint8)).view(-1, a.itemsize).any(dim=1)
    first = int(unequal.int().argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(first), a.shape)]
    return (
        f"{int(unequal.sum())} of {a.numel()} elements differ, the first at {at}: "
        f"{a.view(-1)[first].item()!r} against {b.view(-1)[first].item()!r}"
    )
