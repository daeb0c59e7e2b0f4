"""What a family's Hugging Face folder holds beside the model, and how its Megatron keys begin: one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from megalong.models.longvila.spec import LongVilaSpec
from megalong.models.names import canonical


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFiles:
    carried: Callable[[Any], tuple[set[str], set[str]]]  # spec -> canonical names that must, and that may, be there
    vision_parts: frozenset[str]  # what follows "vision." in its Megatron keys; empty without vision
    model_type: str | None  # that a stock checkpoint's config.json says; None: known by its folders


def longvila_carried(spec: LongVilaSpec) -> tuple[set[str], set[str]]:
    """All names of the stock SigLIP tower; its last block, post_layernorm and head are not part of the model."""
    with torch.device("meta"):
        names = {
            use_head: {
                canonical(f"vision_tower/{name}")
                for name in SiglipVisionModel(
                    SiglipVisionConfig(**{**spec.tower_config, "vision_use_head": use_head})
                ).state_dict()
            }
            for use_head in (False, True)
        }
    # Published towers without a head do not always say so in their config.
    return names[False], names[True] - names[False]


def nothing_carried(spec: Any) -> tuple[set[str], set[str]]:
    """Every tensor of the folder is part of the model."""
    return set(), set()


def _text(model_type: str) -> FamilyFiles:
    return FamilyFiles(carried=nothing_carried, vision_parts=frozenset(), model_type=model_type)


FILES: dict[str, FamilyFiles] = {
    "longvila": FamilyFiles(
        carried=longvila_carried, vision_parts=frozenset({"embeddings", "encoder", "projector"}), model_type=None
    ),
    "qwen2_5_vl": FamilyFiles(carried=nothing_carried, vision_parts=frozenset({"visual"}), model_type="qwen2_5_vl"),
    "qwen3_vl": FamilyFiles(carried=nothing_carried, vision_parts=frozenset({"visual"}), model_type="qwen3_vl"),
    "qwen2": _text("qwen2"),
    "qwen2_5": _text("qwen2"),
    "qwen3": _text("qwen3"),
}
