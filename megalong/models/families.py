"""The model families: one line each. A new family is a folder with spec, tower, weights and model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megalong.models.longvila import model as longvila_model
from megalong.models.longvila import spec as longvila_spec
from megalong.models.longvila import tokens as longvila_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the rest of megalong asks of a family."""

    read_spec: Callable[[Path], Any]  # sizes from the checkpoint folder's JSON
    build: Callable[..., Any]  # (TransformerConfig, spec, use_te=) -> module
    weight_folders: tuple[str, ...]  # sub-folders that hold safetensors
    read_tokens: Callable[[Path], longvila_tokens.ChatTokens]  # tokenizer and the ids a prompt needs
    sampler_model: Callable[[Path, torch.dtype], PreTrainedModel]  # transformers LLM without weights
    sampler_prefix: str  # sync names of the sampler's parameters start with this


FAMILIES: dict[str, Family] = {
    "longvila": Family(
        read_spec=longvila_spec.read_spec,
        build=longvila_model.LongVila,
        weight_folders=("llm", "vision_tower", "mm_projector"),
        read_tokens=longvila_tokens.read_tokens,
        sampler_model=longvila_tokens.sampler_model,
        sampler_prefix="llm/",
    ),
}
