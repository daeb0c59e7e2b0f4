"""The qwen2_5_vl family: what a stock Hugging Face folder says about its sizes, pixels and chat format.

Layout: config.json, preprocessor_config.json, the tokenizer and safetensors in one folder. Sizes are read, never
assumed; no code of the checkpoint is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.config.qwen_vl_shape import IMAGE, VIDEO, PixelRule, TowerShape, read_pixel_rule, read_tower, text_part
from megalong.models.errors import CheckpointError
from megalong.models.gpt_shape import GptShape, read_gpt_shape
from megalong.models.json_files import load_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen25VlSpec:
    path: Path
    gpt: GptShape
    tower: TowerShape
    ticks_per_second: float  # temporal positions
    video: PixelRule
    image: PixelRule


def read_spec(path: str | Path) -> Qwen25VlSpec:
    """Read a checkpoint folder's JSON files. Raises CheckpointError or ConfigError naming file and key."""
    path = Path(path)
    file = path / "config.json"
    config = load_json(file)
    gpt = read_text_shape(config, "qwen2_5_vl", file=file)
    tower = read_tower(file, config, windowed=True)
    require_same_width(tower, gpt, file=file)
    ticks = config["vision_config"].get("tokens_per_second", 4)
    if not isinstance(ticks, int | float) or ticks <= 0:
        raise CheckpointError(f"{file}: vision_config.tokens_per_second is {ticks!r}, expected a number > 0")
    return Qwen25VlSpec(
        path=path,
        gpt=gpt,
        tower=tower,
        ticks_per_second=float(ticks),
        video=read_pixel_rule(path, VIDEO),
        image=read_pixel_rule(path, IMAGE),
    )


def read_text_shape(config: dict[str, Any], model_type: str, *, file: Path, qk_norm: bool = False) -> GptShape:
    """The LLM's sizes. Raises CheckpointError when the folder is another kind of model's, or has no M-RoPE."""
    found = config.get("model_type")
    if found != model_type:
        raise CheckpointError(f"{file}: model_type is {found!r}, expected {model_type!r}; see model.family")
    text = text_part(file, config)
    gpt = read_gpt_shape(text.values, where=text.where, qkv_bias=not qk_norm, qk_norm=qk_norm)
    if gpt.mrope_section is None:
        raise CheckpointError(
            f"{text.where}: mrope_section is missing in rope_parameters (rope_scaling in older files)"
        )
    return gpt


def require_same_width(tower: TowerShape, gpt: GptShape, *, file: Path) -> None:
    """Raise CheckpointError when the tower's embeddings do not fit the LLM."""
    if tower.out != gpt.hidden:
        raise CheckpointError(
            f"{file}: vision_config.out_hidden_size is {tower.out}, expected the LLM's width {gpt.hidden}"
        )
