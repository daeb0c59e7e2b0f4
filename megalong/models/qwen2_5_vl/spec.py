"""The qwen2_5_vl family: what a stock Hugging Face folder says about its sizes, pixels and chat format.

Layout: config.json, preprocessor_config.json, the tokenizer and safetensors in one folder. Sizes are read, never
assumed; no code of the checkpoint is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.models.errors import CheckpointError
from megalong.models.gpt_shape import GptShape, read_gpt_shape
from megalong.models.json_files import load_json, require_sizes
from megalong.models.qwen2_5_vl.pixels import PixelLimits

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_SIZES = ("depth", "hidden_size", "num_heads", "out_hidden_size", "patch_size", "window_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """Sizes of the windowed tower and its merger."""

    hidden: int
    layers: int
    patch_size: int  # pixels
    merge_size: int  # side of the square of patches that becomes one embedding
    frames_per_step: int
    ticks_per_second: float  # temporal positions
    max_video_tokens: int
    """Budget of a whole video: no frame gets more than its even share of 90 % of this many tokens' pixels."""
    limits: PixelLimits

    @property
    def block(self) -> int:
        """Side in pixels of what becomes one embedding; frames are multiples of it."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen25VlSpec:
    path: Path
    gpt: GptShape
    vision: VisionShape


def read_spec(path: str | Path) -> Qwen25VlSpec:
    """Read a checkpoint folder's JSON files. Raises CheckpointError naming file and key."""
    path = Path(path)
    config = load_json(path / "config.json")
    require_model_type(config, "qwen2_5_vl", path=path)
    where = f"{path}/config.json"
    gpt = read_gpt_shape(text_config(config), where=where)
    if gpt.mrope_section is None:
        raise CheckpointError(f"{where}: mrope_section is missing from rope_parameters (rope_scaling in older files)")
    values = vision_config(config, keys=VISION_SIZES, hidden=gpt.hidden, where=where)
    processor = read_video_processor(path)
    vision = VisionShape(
        hidden=values["hidden_size"],
        layers=values["depth"],
        patch_size=values["patch_size"],
        merge_size=values.get("spatial_merge_size", 2),
        frames_per_step=values.get("temporal_patch_size", 2),
        ticks_per_second=float(values.get("tokens_per_second", 4)),
        max_video_tokens=processor.get("max_video_tokens", 128_000),
        limits=read_limits(processor, mean=CLIP_MEAN, std=CLIP_STD, where=str(path)),
    )
    return Qwen25VlSpec(path=path, gpt=gpt, vision=vision)


def require_model_type(config: dict[str, Any], expected: str, *, path: Path) -> None:
    """Raise CheckpointError when the folder is another kind of model's."""
    found = config.get("model_type")
    if found != expected:
        raise CheckpointError(f"{path}/config.json: model_type is {found!r}, expected {expected!r}; see model.family")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The LLM's part: `text_config`, or the file itself in folders that transformers 4 wrote."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    # The flag stands in either place, or in both.
    tied = bool(config.get("tie_word_embeddings") or nested.get("tie_word_embeddings"))
    return {**nested, "tie_word_embeddings": tied}


def vision_config(config: dict[str, Any], *, keys: tuple[str, ...], hidden: int, where: str) -> dict[str, Any]:
    """`vision_config`, its sizes checked. Raises CheckpointError."""
    values = config.get("vision_config")
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: vision_config is {values!r}, expected an object")
    require_sizes(values, keys, f"{where}: vision_config")
    if values["out_hidden_size"] != hidden:
        raise CheckpointError(
            f"{where}: vision_config.out_hidden_size is {values['out_hidden_size']}, expected the LLM's width {hidden}"
        )
    return values


def read_video_processor(path: Path) -> dict[str, Any]:
    """The JSON of the video processor, looked for as transformers does; pictures without one have the image's."""
    nested = path / "processor_config.json"
    if nested.is_file():
        content = load_json(nested)
        if isinstance(content.get("video_processor"), dict):
            return content["video_processor"]
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            return load_json(path / name)
    raise CheckpointError(f"{path}: neither preprocessor_config.json nor video_preprocessor_config.json is there")


def read_limits(
    processor: dict[str, Any], *, mean: tuple[float, ...], std: tuple[float, ...], where: str
) -> PixelLimits:
    """Pixel limits and normalisation of a processor's JSON; mean and std are its class's own defaults."""
    size = processor.get("size") or {}
    # Older files say min_pixels and max_pixels, which the processors prefer to `size`.
    least = processor.get("min_pixels") or size.get("shortest_edge")
    most = processor.get("max_pixels") or size.get("longest_edge")
    for name, value in (("min_pixels (size.shortest_edge)", least), ("max_pixels (size.longest_edge)", most)):
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: the processor's {name} is {value!r}, expected a positive integer")
    if least > most:
        raise CheckpointError(f"{where}: the processor's min_pixels={least} is over its max_pixels={most}")
    return PixelLimits(
        min_pixels=least,
        max_pixels=most,
        mean=_three(processor.get("image_mean") or mean, name="image_mean", where=where),
        std=_three(processor.get("image_std") or std, name="image_std", where=where),
    )


def _three(values: Any, *, name: str, where: str) -> tuple[float, float, float]:
    if len(values) != 3:
        raise CheckpointError(f"{where}: the processor's {name} is {values!r}, expected three numbers")
    return (float(values[0]), float(values[1]), float(values[2]))
