"""Reads pytorch_model*.bin files, where the user allows it: tensors and nothing else come out of them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_tools.errors import ConvertError

PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"


def is_pickled(file: Path) -> bool:
    """Whether a file's name is that of pickled weights or of their index."""
    return file.name.startswith("pytorch_model") and file.name.endswith((".bin", ".bin.index.json"))


def safetensors_name(file: Path) -> str:
    """The name under which an export writes what is in `file`: its own, or that of a .bin file's safetensors twin."""
    if file.suffix != ".bin":
        return file.name
    return file.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


@lru_cache(maxsize=1)
def unpickled(file: Path) -> dict[str, Tensor]:
    """A file's tensors, memory-mapped; the last file stays open. Raises ConvertError for anything but named tensors."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch and pickle raise a dozen kinds for a file that is not what it should be
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConvertError(f"{file}: not a complete file of nothing but tensors ({what}); save it again") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{file}: holds a {type(content).__name__}, expected a mapping from names to tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ConvertError(f"{file}: {name!r} is no plain tensor but a {type(tensor).__name__}")
    return content
