"""Which reader knows the JSON files of a model family, and the sizes that ship for planning without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalong.config.errors import ConfigError
from megalong.config.longvila_shape import read_longvila_shape
from megalong.config.model_shape import ModelShape
from megalong.config.qwen_shape import read_qwen_shape
from megalong.config.qwen_vl_shape import read_qwen2_5_vl_shape, read_qwen3_vl_shape
from megalong.config.tree import VideoConfig

_SHAPES = Path(__file__).parents[2] / "launch" / "shapes"
SHIPPED_SHAPES = {
    "longvila": _SHAPES / "longvila_7b",
    "qwen2_5": _SHAPES / "qwen2_5_7b",
    "qwen2_5_vl": _SHAPES / "qwen2_5_vl_3b",
}
"""JSON-only folders with the sizes of LongVILA-R1-7B, Qwen2.5-7B and Qwen2.5-VL-3B."""


def _text(model_type: str) -> Callable[[Path, VideoConfig], ModelShape]:
    return lambda path, _: read_qwen_shape(path, model_type=model_type)


SHAPE_READERS: dict[str, Callable[[Path, VideoConfig], ModelShape]] = {
    "longvila": lambda path, _: read_longvila_shape(path),
    "qwen2": _text("qwen2"),
    "qwen2_5": _text("qwen2"),
    "qwen3": _text("qwen3"),
    "qwen2_5_vl": read_qwen2_5_vl_shape,
    "qwen3_vl": read_qwen3_vl_shape,
}
"""Family -> (checkpoint folder, config.video) -> sizes; the same families as megalong.models.families.FAMILIES."""


def read_model_shape(path: str | Path, *, family: str, video: VideoConfig) -> ModelShape:
    """Sizes of a checkpoint folder. Raises ConfigError for an unknown family or a file that does not say enough."""
    check_family(family)
    return SHAPE_READERS[family](Path(path), video)


def check_family(family: str) -> None:
    if family not in SHAPE_READERS:
        raise ConfigError(f"model.family={family!r} is not known; one of {sorted(SHAPE_READERS)}")
