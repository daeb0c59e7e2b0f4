"""The qwen3_vl family: what a stock Hugging Face folder says about its sizes, pixels and chat format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megalong.config.qwen_vl_shape import IMAGE, VIDEO, PixelRule, TowerShape, read_pixel_rule, read_tower
from megalong.models.errors import CheckpointError
from megalong.models.gpt_shape import GptShape
from megalong.models.json_files import load_json
from megalong.models.qwen2_5_vl.spec import read_text_shape, require_same_width


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3VlSpec:
    path: Path
    gpt: GptShape
    tower: TowerShape
    video: PixelRule
    image: PixelRule


def read_spec(path: str | Path) -> Qwen3VlSpec:
    """Read a checkpoint folder's JSON files. Raises CheckpointError or ConfigError naming file and key."""
    path = Path(path)
    file = path / "config.json"
    config = load_json(file)
    gpt = read_text_shape(config, "qwen3_vl", file=file, qk_norm=True)
    tower = read_tower(file, config, windowed=False)
    require_same_width(tower, gpt, file=file)
    if tower.deepstack > gpt.layers:
        raise CheckpointError(
            f"{file}: vision_config.deepstack_visual_indexes has {tower.deepstack} entries, the LLM {gpt.layers} layers"
        )
    return Qwen3VlSpec(
        path=path,
        # Its M-RoPE is interleaved whether the file says so or not.
        gpt=replace(gpt, mrope_interleaved=True, deepstack=tower.deepstack),
        tower=tower,
        video=read_pixel_rule(path, VIDEO, budget=0),
        image=read_pixel_rule(path, IMAGE, budget=0),
    )
