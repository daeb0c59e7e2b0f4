"""Sizes of a stock Qwen2, Qwen2.5 or Qwen3 text checkpoint, from its config.json alone."""

from __future__ import annotations

from pathlib import Path

from megalong.config.errors import ConfigError
from megalong.config.json_part import Part, read_json
from megalong.config.model_shape import ModelShape, llm_shape


def read_qwen_shape(path: str | Path, *, model_type: str) -> ModelShape:
    """model_type: "qwen2" (also Qwen2.5's) or "qwen3", which config.json must say. Raises ConfigError."""
    file = Path(path) / "config.json"
    values = read_json(file)
    if values.get("model_type") != model_type:
        raise ConfigError(
            f"{file}: model_type is {values.get('model_type')!r}, expected {model_type!r}; "
            "set model.family or model.path"
        )
    is_qwen3 = model_type == "qwen3"
    llm = Part(values, str(file))
    if is_qwen3:
        llm.size("head_dim")  # not hidden_size / heads there, so never worked out
    return llm_shape(llm, vision=None, qkv_bias=not is_qwen3, qk_norm=is_qwen3)
