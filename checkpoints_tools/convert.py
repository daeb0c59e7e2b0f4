"""The two conversions. Both hold one entry of the weight table in memory at a time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.building import building, check_target
from checkpoints_tools.errors import ConvertError, raise_all
from checkpoints_tools.export import plan_export, write_export
from checkpoints_tools.hf_folder import HfFolder, joined
from checkpoints_tools.megatron_writer import write_checkpoint
from checkpoints_tools.places import Blueprint, Place, check_folder, read_blueprint
from megalong.config.validate import split_problems
from megalong.models.names import canonical

STORED = (torch.float32, torch.bfloat16)
"""Dtypes that the framework trains in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was written, or with dry_run what would be."""

    out: str
    family: str
    tensors: int  # of the model, in Hugging Face names
    num_bytes: int  # of all tensors written
    dtypes: tuple[str, ...]  # of the model's tensors
    carried_tensors: int = 0  # outside the model, copied from the Hugging Face folder
    copied_files: int = 0
    weight_files: tuple[str, ...] = ()  # of an export
    notes: tuple[str, ...] = ()
    checked_layout: dict[str, int] = field(default_factory=dict)  # tp, pp, and the vocabulary rows padded for tp
    dry_run: bool = False
    seconds: float = 0.0


def hf_to_megatron(
    hf: Path, out: Path, *,
    dtype: torch.dtype | None = None, tp: int = 1, pp: int = 1, allow_pickle: bool = False, dry_run: bool = False,
) -> Conversion:  # fmt: skip
    """Write a Megatron checkpoint of the Hugging Face folder, loadable at any layout. dtype None keeps each tensor's.

    tp, pp: the layout that is going to train it. The files do not depend on it; that the model can be cut so is checked
    before anything is written, with the words training would use. allow_pickle: take .bin files where there are no
    safetensors. Raises ConvertError, with nothing left at `out`, for anything that does not fit.
    """
    began = time.monotonic()
    blueprint = read_blueprint(hf)
    layout = _checked_layout(blueprint, tp=tp, pp=pp)
    folder = HfFolder(hf, blueprint.folders, allow_pickle=allow_pickle)
    check_folder(folder, blueprint)
    dtypes = _stored_dtypes(folder, blueprint, dtype)
    total = sum(place.num_elements * dtypes[place.key].itemsize for place in blueprint.places)
    done = Conversion(
        out=str(out),
        family=blueprint.family,
        tensors=sum(len(place.entry.hf) for place in blueprint.places),
        num_bytes=total,
        dtypes=_names(dtypes.values()),
        checked_layout=layout,
        dry_run=dry_run,
    )
    check_target(out, num_bytes=total)
    if dry_run:
        return done
    common = {"family": blueprint.family, "checked_layout": layout}
    with building(out) as (partial, stop_if_asked), _bar(total, "hf-to-megatron") as bar:

        def make(place: Place) -> Tensor:
            stop_if_asked()
            parts = [folder.read(folder.tensors[canonical(name)]) for name in place.entry.hf]
            tensor = place.entry.cut(parts, rank=0, size=1).to(dtypes[place.key]).contiguous()
            bar.update(tensor.nbytes)
            return tensor

        write_checkpoint(partial, blueprint.places, dtypes, make=make, common=common)
    return replace(done, seconds=round(time.monotonic() - began, 2))


def megatron_to_hf(
    megatron: Path, like: Path, out: Path, *,
    dtype: torch.dtype | None = None, shard_bytes: int | None = None, allow_pickle: bool = False, dry_run: bool = False,
) -> Conversion:  # fmt: skip
    """Write a Hugging Face folder with the checkpoint's weights in the names, files and order of `like`.

    megatron: a checkpoint, or a run's folder of them (the newest is taken). dtype None keeps the checkpoint's; another
    one is also what each config.json says then. Tensors outside the weight table and all other files are those of
    `like`, unchanged. shard_bytes None keeps the weight files of `like`; otherwise each folder's are cut anew.
    allow_pickle: `like` may hold .bin files; what is written is safetensors. Raises ConvertError, with nothing left at
    `out`.
    """
    began = time.monotonic()
    plan = plan_export(megatron, like, dtype=dtype, shard_bytes=shard_bytes, allow_pickle=allow_pickle)
    done = Conversion(
        out=str(out),
        family=plan.blueprint.family,
        tensors=len(plan.dtypes),
        num_bytes=plan.num_bytes,
        dtypes=_names(plan.dtypes.values()),
        carried_tensors=len(plan.folder.tensors) - len(plan.dtypes),
        copied_files=len(plan.copied),
        weight_files=tuple(joined(sub, file) for sub, files in plan.layout.items() for file in files),
        notes=plan.notes(),
        dry_run=dry_run,
    )
    check_target(out, num_bytes=plan.num_bytes + sum(file.stat().st_size for file in plan.copied))
    if dry_run:
        return done
    with building(out) as (partial, stop_if_asked), _bar(plan.num_bytes, "megatron-to-hf") as bar:

        def progress(num_bytes: int) -> None:
            stop_if_asked()
            bar.update(num_bytes)

        write_export(plan, partial, progress=progress)
    return replace(done, seconds=round(time.monotonic() - began, 2))


def _checked_layout(blueprint: Blueprint, *, tp: int, pp: int) -> dict[str, int]:
    gpt = blueprint.spec.gpt
    if min(tp, pp) < 1:
        raise ConvertError(f"--tp {tp} --pp {pp}: expected positive numbers")
    raise_all([text.replace("parallel.", "--") for text in split_problems(gpt, tp=tp, pp=pp)])
    return {"tp": tp, "pp": pp, "vocab_rows": gpt.vocab + -gpt.vocab % tp}


def _stored_dtypes(folder: HfFolder, blueprint: Blueprint, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Storage key -> dtype. Layers that share a key must share a dtype."""
    problems: list[str] = []
    dtypes: dict[str, torch.dtype] = {}
    for place in blueprint.places:
        for name in place.entry.hf:
            tensor = folder.tensors[canonical(name)]
            if not tensor.dtype.is_floating_point or (dtype is None and tensor.dtype not in STORED):
                problems.append(
                    f"{tensor.file}: tensor {tensor.name!r} has dtype {tensor.dtype}, expected float32 or bfloat16"
                    + (" (or give --dtype)" if tensor.dtype.is_floating_point else "")
                )
            first = dtypes.setdefault(place.key, dtype or tensor.dtype)
            if dtype is None and tensor.dtype != first:
                problems.append(
                    f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}, but others that become part of "
                    f"{place.key} are {first}; give --dtype to make them one"
                )
    raise_all(problems)
    return dtypes


def _names(dtypes: object) -> tuple[str, ...]:
    return tuple(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _bar(total: int, name: str) -> tqdm:
    # disable=None: no bar where standard error is no terminal.
    return tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None)
