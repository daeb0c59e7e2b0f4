"""read_longvila_shape: every place a size may be written, and errors that name file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalong.config.errors import ConfigError
from megalong.config.longvila_shape import read_longvila_shape, read_siglip_shape
from megalong.config.shapes import SHIPPED_SHAPES

LLM = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 4096,
}
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 56,
    "patch_size": 14,
}
PROJECTOR = {"mm_projector_type": "mlp_downsample"}


def write_checkpoint(folder: Path, **top: Any) -> Path:
    parts = {"llm": LLM, "vision_tower": TOWER, "mm_projector": PROJECTOR}
    for name, values in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(values))
    top = {"mm_vision_select_layer": -2, **{f"{name}_cfg": name for name in parts}, **top}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in top.items() if value is not None}))
    return folder


def test_shipped_7b_shape() -> None:
    shape = read_longvila_shape(SHIPPED_SHAPES["longvila"])
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (3584, 28, 28, 4, 128)
    assert (shape.ffn, shape.vocab, shape.tied, shape.max_positions) == (18944, 152064, False, 1048576)
    tower = read_siglip_shape(SHIPPED_SHAPES["longvila"])
    assert (tower.hidden, tower.heads, tower.ffn) == (1152, 16, 4304)
    assert (tower.layers, tower.layers_run) == (27, 26)
    assert shape.vision.tokens_per_frame == 257


@pytest.mark.parametrize("top", [{}, {"llm_cfg": None}])
def test_sub_folder_names_are_the_default(tmp_path: Path, top: dict[str, Any]) -> None:
    shape = read_longvila_shape(write_checkpoint(tmp_path, **top))
    assert (shape.hidden, shape.head_dim, shape.rope_theta, shape.tied) == (64, 16, 10000.0, False)
    assert shape.vision.tokens_per_frame == 2 * 2 + 1


@pytest.mark.parametrize("as_text", [False, True])
def test_mapping_in_the_top_file_wins_over_the_folder(tmp_path: Path, as_text: bool) -> None:
    llm = {**LLM, "hidden_size": 128, "head_dim": 24, "tie_word_embeddings": True, "rope_theta": 5e6}
    shape = read_longvila_shape(write_checkpoint(tmp_path, llm_cfg=json.dumps(llm) if as_text else llm))
    assert (shape.hidden, shape.head_dim, shape.tied, shape.rope_theta) == (128, 24, True, 5e6)


@pytest.mark.parametrize(
    "given",
    ["/lustre/train/run/llm", "./LongVILA-R1-7B/llm", {"model_type": "qwen2", "_name_or_path": "./R1/llm"}],
)
def test_training_path_falls_back_to_the_sub_folder_of_that_name(tmp_path: Path, given: Any) -> None:
    assert read_longvila_shape(write_checkpoint(tmp_path, llm_cfg=given)).hidden == 64


@pytest.mark.parametrize(
    ("image", "patch", "kind", "tokens"),
    [
        (448, 14, "mlp_downsample", 257),
        (448, 14, "mlp_downsample_2x2_fix", 257),
        (448, 14, "mlp_downsample_3x3_fix", 122),  # 32 -> 33 padded -> 11 x 11
        (384, 14, "mlp_downsample", 197),  # 27 whole patches -> 28 padded -> 14 x 14
        (384, 14, "mlp_downsample_3x3_fix", 82),  # 27 = 9 x 3: no padding
    ],
)
def test_tokens_per_frame(tmp_path: Path, image: int, patch: int, kind: str, tokens: int) -> None:
    tower = {**TOWER, "image_size": image, "patch_size": patch}
    folder = write_checkpoint(tmp_path, vision_tower_cfg=tower, mm_projector_cfg={"mm_projector_type": kind})
    assert read_longvila_shape(folder).vision.tokens_per_frame == tokens


@pytest.mark.parametrize(
    ("top", "where", "what"),
    [
        ({"llm_cfg": {**LLM, "hidden_size": None}}, "config.json: llm_cfg", "hidden_size is absent"),
        ({"llm_cfg": {**LLM, "hidden_size": "64"}}, "config.json: llm_cfg", "hidden_size is '64'"),
        ({"llm_cfg": {**LLM, "rope_parameters": {}}}, "config.json: llm_cfg", "rope_theta"),
        ({"llm_cfg": {**LLM, "num_key_value_heads": 3}}, "config.json: llm_cfg", "num_key_value_heads=3"),
        ({"llm_cfg": {**LLM, "tie_word_embeddings": 1}}, "config.json: llm_cfg", "expected true or false"),
        ({"llm_cfg": "{nope"}, "config.json: llm_cfg", "not valid JSON"),
        ({"llm_cfg": 7}, "config.json", "llm_cfg is 7"),
        ({"vision_tower_cfg": "tower"}, "tower/config.json", "vision_tower_cfg='tower'"),
        ({"vision_tower_cfg": {**TOWER, "image_size": 7}}, "vision_tower_cfg", "smaller than patch_size=14"),
        ({"mm_projector_cfg": {"mm_projector_type": "linear"}}, "mm_projector_cfg", "expected one of mlp_downsample"),
        ({"mm_vision_select_layer": None}, "config.json", "mm_vision_select_layer is None"),
        ({"mm_vision_select_layer": -4}, "config.json", "leaves no layer"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, top: dict[str, Any], where: str, what: str) -> None:
    folder = write_checkpoint(tmp_path, **top)
    with pytest.raises(ConfigError) as caught:
        read_longvila_shape(folder)
    assert where in str(caught.value)
    assert what in str(caught.value)


def test_absent_folder_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^model.path=.*nowhere is no folder; expected that of .* download it and set"
    ):
        read_longvila_shape(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"/config.json: cannot read .*model.path"):
        read_longvila_shape(tmp_path)


def test_a_stock_checkpoint_with_the_default_family_names_the_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}))
    with pytest.raises(ConfigError, match=r"model_type is 'qwen2_5_vl', .*; set model.family or model.path$"):
        read_longvila_shape(tmp_path)


def test_pooled_frames_count_by_the_step(tmp_path: Path) -> None:
    encoder = {"_target_": "llava.model.encoders.TSPVideoEncoder"}
    tower = {**TOWER, "image_size": 448}
    vision = read_longvila_shape(write_checkpoint(tmp_path, vision_tower_cfg=tower, video_encoder=encoder)).vision
    assert vision.tokens_per_frame == 33  # 257 for 8 frames, rounded up
    assert vision.embeds_per_frame == 32
    alone = read_longvila_shape(write_checkpoint(tmp_path, vision_tower_cfg=tower)).vision
    assert (alone.tokens_per_frame, alone.embeds_per_frame) == (257, 256)
    assert vision.frame_flops == alone.frame_flops
