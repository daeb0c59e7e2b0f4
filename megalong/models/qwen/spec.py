"""The text families qwen2, qwen2_5 (the same architecture) and qwen3: stock Hugging Face checkpoints.

Qwen3 has no bias on queries, keys and values, an RMSNorm on every query and key head, and a head_dim of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalong.models.errors import CheckpointError
from megalong.models.gpt_shape import GptShape, read_gpt_shape
from megalong.models.json_files import load_json, require_sizes

SYSTEM_PROMPTS = {
    "qwen2": "You are a helpful assistant.",
    "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen3": "",
}
"""What the chat template of each family says when a conversation has no system turn of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenSpec:
    path: Path
    gpt: GptShape


def read_spec(path: str | Path, *, model_type: str) -> QwenSpec:
    """Read config.json, which must say model_type "qwen2" or "qwen3". Raises CheckpointError naming file and key."""
    path = Path(path)
    file = path / "config.json"
    config = load_json(file)
    if config.get("model_type") != model_type:
        raise CheckpointError(
            f"{file}: model_type is {config.get('model_type')!r}, expected {model_type!r}; "
            "set model.family or model.path"
        )
    is_qwen3 = model_type == "qwen3"
    if is_qwen3:
        require_sizes(config, ("head_dim",), str(file))  # not hidden_size / heads there, so never worked out
    shape = read_gpt_shape(config, where=str(file), qkv_bias=not is_qwen3, qk_norm=is_qwen3)
    return QwenSpec(path=path, gpt=shape)
