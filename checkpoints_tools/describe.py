"""inspect: family, sizes, tensors, dtypes and a checksum of a checkpoint folder."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoints_tools.direct_files import tensor_bytes
from checkpoints_tools.hf_folder import HfFolder
from checkpoints_tools.megatron_folder import MegatronFolder, megatron_checkpoint

SLICE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    path: str
    kind: str  # "hf" or "megatron"
    family: str
    sizes: dict[str, Any]
    tensors: int
    parameters: int
    num_bytes: int
    dtypes: dict[str, int]  # name -> tensors
    checksum: str | None  # None: not asked for
    listing: list[dict[str, Any]] = field(default_factory=list)  # name, shape, dtype of each tensor
    optimizer_tensors: int = 0  # of a training checkpoint; not counted above


def describe(path: Path, *, checksum: bool = True, allow_pickle: bool = False) -> Description:
    """Describe a folder of either kind. The checksum does not depend on files, shards or their order: it is the crc32
    of every tensor's name, shape, dtype and crc32, in order of names. Raises ConvertError for an unreadable folder."""
    found = megatron_checkpoint(path)
    return _describe_megatron(found, checksum) if found else _describe_hf(path, checksum, allow_pickle=allow_pickle)


def _describe_hf(path: Path, checksum: bool, *, allow_pickle: bool) -> Description:
    # The families bring megatron-core and transformers, which a Megatron folder is described without.
    from checkpoints_tools.places import FAMILIES, family_of_folder

    name = family_of_folder(path)
    family = FAMILIES[name]
    folder = HfFolder(path, family.weight_folders, allow_pickle=allow_pickle)
    spec = asdict(family.read_spec(path))
    for key in ("path", "tower_config"):
        spec.pop(key, None)
    rows = {key: (tensor.shape, tensor.dtype) for key, tensor in folder.tensors.items()}

    def crc_of(key: str) -> int:
        return zlib.crc32(tensor_bytes(folder.read(folder.tensors[key])))

    return _description(rows, crc_of if checksum else None, path=str(path), kind="hf", family=name, sizes=spec)


def _describe_megatron(path: Path, checksum: bool) -> Description:
    folder = MegatronFolder(path)
    rows = {key: (folder.shape(key), folder.dtype(key)) for key in folder.tensors}

    def crc_of(key: str) -> int:
        crc = 0
        for offsets, sizes in folder.slices(key, num_bytes=SLICE_BYTES):
            crc = zlib.crc32(tensor_bytes(folder.read_box(key, offsets=offsets, sizes=sizes)), crc)
        return crc

    return _description(
        rows,
        crc_of if checksum else None,
        path=str(path),
        kind="megatron",
        family=folder.family or _family_by_parts(folder),
        sizes=_llm_sizes(rows),
        optimizer_tensors=folder.optimizer_keys,
    )


def _family_by_parts(folder: MegatronFolder) -> str:
    """Of a checkpoint from before they said their family; some families have the same parts."""
    from checkpoints_tools.families import FILES

    parts = {key.split(".")[1] for key in folder.tensors if key.startswith("vision.")}
    found = [name for name, files in FILES.items() if files.vision_parts == parts]
    return f"{' or '.join(found) or 'unknown'} (the checkpoint does not say it)"


def _llm_sizes(rows: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
    """What the shapes of the LLM's tensors say; the number of heads is not among it."""
    shape = {key.partition(".")[2]: value[0] for key, value in rows.items() if key.startswith("llm.")}
    sizes: dict[str, Any] = {}
    if "embedding.word_embeddings.weight" in shape:
        sizes["vocab_rows"], sizes["hidden"] = shape["embedding.word_embeddings.weight"]
        sizes["tied"] = "output_layer.weight" not in shape
    if "decoder.layers.mlp.linear_fc2.weight" in shape:
        sizes["layers"], _, sizes["ffn"] = shape["decoder.layers.mlp.linear_fc2.weight"]
    return sizes


def _description(
    rows: dict[str, tuple[tuple[int, ...], torch.dtype]], crc_of: Callable[[str], int] | None, **known: Any
) -> Description:
    total = 0
    for key in tqdm(sorted(rows), desc="checksum", unit="tensor", disable=None if crc_of else True):
        if crc_of:
            shape, dtype = rows[key]
            total = zlib.crc32(f"{key}{list(shape)}{dtype}{crc_of(key):08x}".encode(), total)
    elements = {key: torch.Size(shape).numel() for key, (shape, _) in rows.items()}
    return Description(
        **known,
        tensors=len(rows),
        parameters=sum(elements.values()),
        num_bytes=sum(elements[key] * dtype.itemsize for key, (_, dtype) in rows.items()),
        dtypes=dict(Counter(str(dtype).removeprefix("torch.") for _, dtype in rows.values())),
        checksum=f"{total:08x}" if crc_of else None,
        listing=[
            {"name": key, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            for key, (shape, dtype) in sorted(rows.items())
        ],
    )
