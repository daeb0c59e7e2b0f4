"""The longvila family: what a checkpoint folder says about its sizes, tokens and chat format.

Layout: config.json, llm/, vision_tower/, mm_projector/ (the VILA 2.0 layout of LongVILA-R1-7B). Sizes are read,
never assumed; no code of the checkpoint is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalong.config.errors import ConfigError
from megalong.config.longvila_shape import SiglipShape, checkpoint_part, read_siglip_shape
from megalong.models.errors import CheckpointError
from megalong.models.gpt_shape import GptShape, read_gpt_shape
from megalong.models.json_files import load_json

SYSTEM_PROMPT = "You are a helpful assistant"


@dataclass(frozen=True, kw_only=True, slots=True)
class LongVilaSpec:
    path: Path
    gpt: GptShape
    vision: SiglipShape
    tower_config: dict[str, Any] = field(repr=False)  # what transformers builds the tower from


def read_spec(path: str | Path) -> LongVilaSpec:
    """Read a checkpoint folder's JSON files, as planning does. Raises CheckpointError naming file and key."""
    path = Path(path)
    config = load_json(path / "config.json")
    try:
        vision = read_siglip_shape(path)
        llm, tower = checkpoint_part(path, config, "llm"), checkpoint_part(path, config, "vision_tower")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return LongVilaSpec(
        path=path,
        gpt=read_gpt_shape(llm.values, where=llm.where),
        vision=vision,
        tower_config=tower.values.get("vision_config", tower.values),
    )
