"""Changes to and views of the safetensors files of a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megalong.models.longvila.demo_checkpoint import DemoModelSize

SIZE = DemoModelSize(
    hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, max_positions=256, vocab=300,
    tower_hidden=16, tower_layers=3, tower_heads=2, tower_intermediate=32, image=16, patch=4,
)  # fmt: skip


def edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite a safetensors file with what `change` makes of its tensors."""
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """`<folder>/<file>:<name>` -> tensor."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def split_llm(folder: Path) -> None:
    """Cut llm/model.safetensors into two files and an index."""
    single = folder / "llm/model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "llm" / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0, "note": "kept"}, "weight_map": weight_map}
    (folder / "llm/model.safetensors.index.json").write_text(json.dumps(index))
