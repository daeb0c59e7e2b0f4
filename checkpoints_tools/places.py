"""Where each tensor lives on both sides, from the family's weight table and a model without memory.

Names come from the weight table alone. Megatron's storage keys, stacking of layers and shapes come from
`sharded_state_dict()` of the model built on torch's meta device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from checkpoints_tools.errors import ConvertError, raise_all
from checkpoints_tools.families import FILES
from checkpoints_tools.hf_folder import HfFolder, HfTensor, joined
from megalong.attention.core import PackCoreAttention
from megalong.models.chat import check_added_tokens
from megalong.models.families import FAMILIES
from megalong.models.gpt import transformer_config
from megalong.models.names import canonical
from megalong.models.weights import Entry, VocabRows
from megalong.parallel.layout import ContextGroups, destroy_layout, make_layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One entry of the weight table: a box of a Megatron tensor, and Hugging Face tensors."""

    entry: Entry
    model_shape: tuple[int, ...]  # of the whole parameter (tp=1)
    key: str  # Megatron's storage key; layers of one kind share it, stacked along dimension 0
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # of the box inside global_shape
    sizes: tuple[int, ...]  # of the box; model_shape with ones in front for stacked dimensions
    hf_shapes: tuple[tuple[int, ...], ...]  # one per entry.hf

    @property
    def num_elements(self) -> int:
        return math.prod(self.model_shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """All places of a model, and the tensors of its Hugging Face folder that are not part of the model."""

    family: str
    spec: Any
    folders: tuple[str, ...]
    places: tuple[Place, ...]
    carried: frozenset[str]  # canonical names; must be in the folder
    optional: frozenset[str]  # canonical names; may be


def read_blueprint(path: Path) -> Blueprint:
    """Read the sizes from a Hugging Face folder's JSON. Raises ConvertError for an unknown or malformed layout."""
    family = family_of_folder(path)
    try:
        spec = FAMILIES[family].read_spec(path)
        check_added_tokens(path / FAMILIES[family].weight_folders[0], vocab=spec.gpt.vocab)
        places = _places(family, spec)
        carried, optional = FILES[family].carried(spec)
    except ConvertError:
        raise
    except KeyError as error:
        raise ConvertError(f"{path}: key {error} is missing in the {family} checkpoint's JSON files") from error
    except ValueError as error:
        raise ConvertError(str(error)) from error
    tabled = {canonical(name) for place in places for name in place.entry.hf}
    return Blueprint(
        family=family,
        spec=spec,
        folders=FAMILIES[family].weight_folders,
        places=tuple(places),
        carried=frozenset(carried - tabled),
        optional=frozenset(optional - tabled),
    )


def family_of_folder(path: Path) -> str:
    """The family whose folders `path` has, or for stock checkpoints, whose model_type its config.json says.

    qwen2 stands for qwen2_5 too: their files do not differ.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ConvertError(f"{path}: no such folder")
    if not file.is_file():
        raise ConvertError(f"{path}: not a Hugging Face checkpoint folder (no config.json)")
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ConvertError(f"{file}: not a JSON object ({error})") from error
    layouts = []
    for name, family in FAMILIES.items():
        if FILES[name].model_type is None:
            layouts.append(f"{name}: folders {', '.join(family.weight_folders)}")
            found = all((path / folder).is_dir() for folder in family.weight_folders)
        else:
            layouts.append(f"{name}: model_type {FILES[name].model_type}")
            found = model_type == FILES[name].model_type
        if found:
            return name
    raise ConvertError(f"{path}: the layout of no known family ({'; '.join(layouts)})")


def check_folder(folder: HfFolder, blueprint: Blueprint) -> None:
    """Raise ConvertError for every missing, unexpected or misshaped tensor of the folder, by name and file."""
    problems, known = [], set(blueprint.carried | blueprint.optional)
    for place in blueprint.places:
        for name, shape in zip(place.entry.hf, place.hf_shapes, strict=True):
            known.add(canonical(name))
            tensor = folder.tensors.get(canonical(name))
            if tensor is None:
                problems.append(f"{folder.path}: tensor {name!r} is missing (it fills {place.entry.megatron})")
            elif tensor.shape != shape:
                problems.append(_shape_problem(place, tensor, shape))
    problems += [f"{folder.path}: tensor {name!r} is missing" for name in blueprint.carried - folder.tensors.keys()]
    for name, tensor in folder.tensors.items():
        if name not in known:
            problems.append(f"{tensor.file}: unexpected tensor {tensor.name!r}; the config files leave no place for it")
    raise_all(problems)


def _shape_problem(place: Place, tensor: HfTensor, shape: tuple[int, ...]) -> str:
    what = f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, expected {list(shape)}"
    if isinstance(place.entry, VocabRows) and tensor.shape[1:] == shape[1:]:
        return f"{what}: vocabulary mismatch, {joined(tensor.folder, 'config.json')} says vocab_size={shape[0]}"
    return what


def _places(family: str, spec: Any) -> list[Place]:
    config = transformer_config(
        spec.gpt, tp=1, cp=1, pp=1, sequence_parallel=False, dtype=torch.float32, recompute=False, on_gpu=False
    )
    with _single_process_groups(), torch.device("meta"):
        model = FAMILIES[family].build(
            config, spec, use_te=False, core_attention=partial(PackCoreAttention, context=ContextGroups())
        )
        table, state = model.weight_table(), model.sharded_state_dict()
    shapes = {name: param.shape for name, param in model.named_parameters()}
    if {entry.megatron for entry in table} != shapes.keys():
        raise ConvertError(f"the weight table of {family} does not name the parameters that its model has")
    return [_place(entry, shapes[entry.megatron], state[entry.megatron]) for entry in table]


@contextmanager
def _single_process_groups() -> Iterator[None]:
    """Megatron's modules ask for parallel groups even when there is one process. Groups that exist are used."""
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() != 1:
            raise ConvertError("checkpoint tools run in one process, without tensor parallelism")
        yield
        return
    make_layout(tp=1, cp=1, pp=1, seed=1)
    try:
        yield
    finally:
        destroy_layout()


def _place(entry: Entry, shape: torch.Size, stored: ShardedTensor | ShardedTensorFactory) -> Place:
    pieces = list(_pieces(stored.build() if isinstance(stored, ShardedTensorFactory) else stored))
    keys = {piece.key for piece in pieces}
    if len(keys) != 1:
        raise ConvertError(f"{entry.megatron}: megatron-core stores it under several keys {sorted(keys)}")
    ends = [
        tuple(
            offset + size
            for offset, size in zip(
                piece.global_offset, (1,) * piece.prepend_axis_num + tuple(piece.local_shape), strict=True
            )
        )
        for piece in pieces
    ]
    first = tuple(min(values) for values in zip(*(piece.global_offset for piece in pieces), strict=True))
    last = tuple(max(values) for values in zip(*ends, strict=True))
    whole = torch.empty(shape, device="meta")
    return Place(
        entry=entry,
        model_shape=tuple(shape),
        key=keys.pop(),
        global_shape=tuple(pieces[0].global_shape),
        offsets=first,
        sizes=tuple(end - start for start, end in zip(first, last, strict=True)),
        hf_shapes=tuple(tuple(part.shape) for part in entry.join([whole])),
    )


def _pieces(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    else:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _pieces(inner)
