"""Planning sizes of Qwen-VL checkpoints from their JSON alone, against the models themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_vl
from transformers import AutoConfig, AutoModelForImageTextToText

from megalong.config import costs
from megalong.config.errors import ConfigError
from megalong.config.qwen_vl_shape import IMAGE, VIDEO, read_pixel_rule
from megalong.config.shapes import read_model_shape
from megalong.config.tree import VideoConfig

BLOCK = (2 * tiny_vl.PATCH) ** 2
VIDEO_8 = VideoConfig(num_frames=8)


@pytest.fixture(scope="module", params=tiny_vl.WRITERS)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny_vl.WRITERS[request.param](tmp_path_factory.mktemp(request.param))


def test_parameter_counts_are_the_model_s(stock: tuple[str, Path]) -> None:
    family, folder = stock
    shape = read_model_shape(folder, family=family, video=VIDEO_8)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    of = {name: tensor.numel() for name, tensor in model.named_parameters()}
    mergers = {name for name in of if ".merger." in name or ".deepstack_merger_list." in name}
    tower = {name for name in of if ".visual." in name} - mergers
    assert costs.llm_params(shape) == sum(of[name] for name in set(of) - mergers - tower)
    assert shape.vision.tower_params == sum(of[name] for name in tower)
    assert shape.vision.projector_params == sum(of[name] for name in mergers)
    assert shape.vision.largest_projector_param == max(of[name] for name in mergers)


def test_a_frame_s_tokens_follow_the_processor_and_the_settings(tmp_path: Path) -> None:
    folder = tiny_vl.write_qwen2_5_vl(tmp_path / "a")
    vision = read_model_shape(folder, family="qwen2_5_vl", video=VIDEO_8).vision
    assert (vision.embeds_per_frame, vision.tokens_per_frame, vision.embed_width) == (6, 6, 32)  # 12 blocks a step
    capped = read_model_shape(folder, family="qwen2_5_vl", video=replace(VIDEO_8, max_frame_pixels=5 * BLOCK)).vision
    assert capped.embeds_per_frame == 3
    folder = tiny_vl.write_qwen3_vl(tmp_path / "b")
    vision = read_model_shape(folder, family="qwen3_vl", video=VIDEO_8).vision
    # 60 blocks over 8 frames: 7 a step, and 12 tokens for its time.
    assert (vision.embeds_per_frame, vision.tokens_per_frame, vision.embed_width) == (4, 10, 3 * 32)


def test_rules_of_pictures_and_videos_are_found_where_transformers_looks(tmp_path: Path) -> None:
    folder = tiny_vl.write_qwen3_vl(tmp_path)
    assert read_pixel_rule(folder, VIDEO, budget=0).max_pixels == 60 * BLOCK
    assert read_pixel_rule(folder, IMAGE, budget=0).max_pixels == 12 * BLOCK
    shared = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"shortest_edge": 64, "longest_edge": 640}}
    (folder / "processor_config.json").write_text(json.dumps({VIDEO: {**shared, "cap_pixels_per_frame": True}}))
    rule = read_pixel_rule(folder, VIDEO, budget=0)
    assert (rule.min_pixels, rule.max_pixels, rule.max_video_tokens, rule.std) == (64, 640, 768, (0.25, 0.25, 0.25))
    assert read_pixel_rule(folder, IMAGE, budget=0).max_pixels == 12 * BLOCK


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"model_type": "llama"}, r"model_type is 'llama', expected 'qwen2_5_vl'"),
        ("config.json", {"vision_config": None}, r"vision_config is None"),
        ("config.json", {"vision_config": {"depth": 0}}, r"vision_config: depth is 0, expected a positive integer"),
        ("preprocessor_config.json", {"max_pixels": None}, r"size.longest_edge \(max_pixels\) is absent"),
        ("preprocessor_config.json", {"min_pixels": 1 << 40}, r"min_pixels=1099511627776 is over max_pixels=768"),
        ("preprocessor_config.json", {"image_std": [1.0]}, r"image_std is \[1.0\], expected three numbers"),
    ],
)
def test_bad_files_are_named_with_their_key(tmp_path: Path, file: str, changes: dict, message: str) -> None:
    folder = tiny_vl.write_qwen2_5_vl(tmp_path)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    with pytest.raises(ConfigError, match=rf"{file}.*{message}"):
        read_model_shape(folder, family="qwen2_5_vl", video=VIDEO_8)


def test_no_processor_file_is_an_error(tmp_path: Path) -> None:
    folder = tiny_vl.write_qwen2_5_vl(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="none of processor_config.json"):
        read_model_shape(folder, family="qwen2_5_vl", video=VIDEO_8)


def test_flat_files_of_transformers_4_are_read_alike(tmp_path: Path) -> None:
    """Published Qwen2.5-VL folders keep the LLM's keys at the top, rope_theta beside rope_scaling."""
    folder = tiny_vl.write_qwen2_5_vl(tmp_path)
    new = read_model_shape(folder, family="qwen2_5_vl", video=VIDEO_8)
    content = json.loads((folder / "config.json").read_text())
    text = content.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    flat = {**text, **content, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (folder / "config.json").write_text(json.dumps(flat))
    assert read_model_shape(folder, family="qwen2_5_vl", video=VIDEO_8) == new
    assert AutoConfig.from_pretrained(folder).text_config.hidden_size == new.hidden
