"""Megatron checkpoint to Hugging Face folder: what goes into which file, and the writing of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.ahead import ahead
from checkpoints_tools.errors import ConvertError
from checkpoints_tools.hf_folder import HfFolder, joined
from checkpoints_tools.megatron_folder import MegatronFolder, check_checkpoint, megatron_checkpoint
from checkpoints_tools.pickled_files import safetensors_name
from checkpoints_tools.places import Blueprint, Place, check_folder, read_blueprint
from checkpoints_tools.safetensors_files import SafetensorsFile, Slot, reshard, write_index
from megalong.engine.checkpoint import no_checkpoint
from megalong.models.names import canonical


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportPlan:
    """Everything checked; nothing written."""

    checkpoint: MegatronFolder
    folder: HfFolder  # --like
    blueprint: Blueprint
    dtypes: dict[str, torch.dtype]  # canonical name of each tensor that comes from the checkpoint
    cast: torch.dtype | None  # what was asked for: the configs say it then
    layout: dict[str, dict[str, list[Slot]]]  # sub-folder -> file name -> tensors
    copied: tuple[Path, ...]  # files of --like

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(slot.num_bytes for files in self.layout.values() for slots in files.values() for slot in slots)

    def notes(self) -> tuple[str, ...]:
        """Where the config says another dtype than the tensors get: loaders that follow it would cast."""
        if self.cast is not None:
            return ()
        notes = []
        for sub in self.layout:
            written = {str(dtype).removeprefix("torch.") for name, dtype in self.dtypes.items() if name.startswith(sub)}
            config = self.folder.path / sub / "config.json"
            said = json.loads(config.read_text()) if config.is_file() else {}
            said = said.get("dtype") or said.get("torch_dtype")
            if said and written != {said}:
                notes.append(
                    f"{joined(sub, 'config.json')} says dtype {said}, the tensors are {', '.join(sorted(written))}"
                )
        return tuple(notes)


def plan_export(
    megatron: Path, like: Path, *,
    dtype: torch.dtype | None = None, shard_bytes: int | None = None, allow_pickle: bool = False,
) -> ExportPlan:  # fmt: skip
    """Read all headers and check them against each other. Raises ConvertError for anything that does not fit."""
    found = megatron_checkpoint(megatron)
    if found is None:
        raise ConvertError(no_checkpoint(megatron))
    blueprint = read_blueprint(like)
    folder = HfFolder(like, blueprint.folders, allow_pickle=allow_pickle)
    check_folder(folder, blueprint)
    checkpoint = MegatronFolder(found)
    check_checkpoint(checkpoint, blueprint)
    dtypes = {
        canonical(name): dtype or checkpoint.dtype(place.key) for place in blueprint.places for name in place.entry.hf
    }
    return ExportPlan(
        checkpoint=checkpoint,
        folder=folder,
        blueprint=blueprint,
        dtypes=dtypes,
        cast=dtype,
        layout=_layout(folder, dtypes, shard_bytes),
        copied=_copied_files(folder),
    )


def write_export(plan: ExportPlan, target: Path, *, progress: Callable[[int], object]) -> None:
    """Write the whole folder; progress(bytes) is called for each tensor written."""
    for file in plan.copied:
        copy = target / file.relative_to(plan.folder.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if plan.cast is not None and file.name == "config.json":
            config = with_dtype(json.loads(file.read_text(encoding="utf-8")), str(plan.cast))
            copy.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(file, copy)
    with ExitStack() as stack:
        file_of: dict[str, SafetensorsFile] = {}
        opened: list[SafetensorsFile] = []
        for sub, files in plan.layout.items():
            (target / sub).mkdir(parents=True, exist_ok=True)
            write_index(target / sub, files, metadata=plan.folder.index_metadata(sub))
            for name, slots in files.items():
                opened.append(SafetensorsFile(target / sub / name, slots))
                stack.callback(opened[-1].abandon)
                file_of.update({canonical(joined(sub, slot.name)): opened[-1] for slot in slots})

        def put(name: str, tensor: Tensor) -> None:
            file_of[name].put(plan.folder.tensors[name].name, tensor)
            progress(tensor.nbytes)

        def make(place: Place) -> list[Tensor]:
            parts = place.entry.join([plan.checkpoint.read_place(place)])
            names = map(canonical, place.entry.hf)
            return [tensor.to(plan.dtypes[name]).contiguous() for name, tensor in zip(names, parts, strict=True)]

        places = plan.blueprint.places
        for place, parts in zip(places, ahead(make, places), strict=True):
            for name, tensor in zip(place.entry.hf, parts, strict=True):
                put(canonical(name), tensor)
        for name, tensor in plan.folder.tensors.items():
            if name not in plan.dtypes:
                put(name, plan.folder.read(tensor))
        for file in opened:
            file.close()


def with_dtype(value: Any, dtype: str) -> Any:
    """A config whose dtypes, those of nested configs too, are `dtype` (torch.bfloat16, say): loaders follow them."""
    if isinstance(value, list):
        return [with_dtype(item, dtype) for item in value]
    if not isinstance(value, dict):
        return value
    names = {"dtype": dtype.removeprefix("torch."), "torch_dtype": dtype.removeprefix("torch."), "model_dtype": dtype}
    return {
        key: names[key] if key in names and isinstance(item, str) else with_dtype(item, dtype)
        for key, item in value.items()
    }


def _layout(
    folder: HfFolder, dtypes: dict[str, torch.dtype], shard_bytes: int | None
) -> dict[str, dict[str, list[Slot]]]:
    layout: dict[str, dict[str, list[Slot]]] = {}
    for sub in folder.folders:
        files: dict[str, list[Slot]] = {}
        for name, tensor in folder.tensors.items():
            if tensor.folder == sub:
                slot = Slot(name=tensor.name, dtype=dtypes.get(name, tensor.dtype), shape=tensor.shape)
                files.setdefault(safetensors_name(tensor.file), []).append(slot)
        if shard_bytes is not None:
            files = reshard([slot for slots in files.values() for slot in slots], shard_bytes=shard_bytes)
        layout[sub] = files
    return layout


def _copied_files(folder: HfFolder) -> tuple[Path, ...]:
    """Every file of the folder but weights and hidden ones (download caches, version control)."""
    return tuple(
        path
        for path in sorted(folder.path.rglob("*"))
        if path.is_file()
        and not folder.is_weight_file(path)
        and not any(part.startswith(".") for part in path.relative_to(folder.path).parts)
    )
