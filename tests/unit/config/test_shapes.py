"""Readers of sizes by family: text checkpoints, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalong.config.costs import llm_params
from megalong.config.errors import ConfigError
from megalong.config.shapes import SHIPPED_SHAPES, read_model_shape
from megalong.config.tree import VideoConfig

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
    "rope_theta": 1000000, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip


def read(folder: Path, family: str, values: dict) -> object:
    (folder / "config.json").write_text(json.dumps(values))
    return read_model_shape(folder, family=family, video=VideoConfig())


def test_parameters_of_the_shipped_7b_are_qwen2_5_s() -> None:
    shape = read_model_shape(SHIPPED_SHAPES["qwen2_5"], family="qwen2_5", video=VideoConfig())
    assert llm_params(shape) == 7_615_616_512
    assert (shape.qkv_bias, shape.qk_norm, shape.vision) == (True, False, None)


def test_parameters_of_qwen3_8b(tmp_path: Path) -> None:
    shape = read(tmp_path, "qwen3", QWEN3_8B)
    assert llm_params(shape) == 8_190_735_360  # 8.2 B, 6.95 B without the embeddings, as its model card says
    assert (shape.head_dim, shape.qkv_bias, shape.qk_norm) == (128, False, True)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {}, "model_type is 'qwen3', expected 'qwen2'; set model.family or model.path"),
        ("qwen3", {"head_dim": None}, "head_dim is absent"),
        ("qwen3", {"num_key_value_heads": 5}, "num_attention_heads=32 is not a multiple of num_key_value_heads=5"),
        ("llama", {}, "model.family='llama' is not known; one of"),
    ],
)
def test_errors(tmp_path: Path, family: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, family, {**QWEN3_8B, **changes})
