"""Frame sizes and token ids of the Qwen-VL families; the sizes are those that transformers' video processors gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_vl

from megalong.config.qwen_vl_shape import PixelRule, TowerShape
from megalong.config.shapes import read_model_shape
from megalong.config.tree import VideoConfig
from megalong.models.errors import CheckpointError
from megalong.models.families import FAMILIES
from megalong.models.qwen2_5_vl.layout import WindowedFrames
from megalong.models.qwen3_vl.layout import TimedFrames
from megalong.records import MEDIA_TOKEN, FrameSelection

TOWER = TowerShape(
    hidden=1, layers=1, full_layers=1, window_patches=1, ffn=1, patch_size=4, merge_size=2, frames_per_step=2,
    deepstack=0, positions=0, out=1,
)  # fmt: skip
RULE = PixelRule(min_pixels=256, max_pixels=6400, max_video_tokens=600, mean=(0.5,) * 3, std=(0.5,) * 3)
WINDOWED = WindowedFrames(tower=TOWER, video=RULE, image=RULE, ticks_per_second=2, start_id=1, end_id=2)
TIMED = TimedFrames(
    tower=TOWER, video=replace(RULE, max_pixels=57600, max_video_tokens=0), image=RULE, max_frame_pixels=0,
    encode=lambda text: [ord(character) + 10 for character in text], start_id=1, end_id=2,
)  # fmt: skip
CAPPED = replace(TIMED, video=replace(RULE, max_pixels=57600, max_video_tokens=20))


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "size"),
    [
        (37, 280, 232, (40, 32)),
        (35, 137, 234, (32, 56)),
        (3, 134, 30, (136, 32)),
        (38, 140, 9, (144, 8)),
        (6, 32, 230, (24, 208)),
    ],
)
def test_a_qwen2_5_frame_has_its_share_of_the_video_s_budget(
    num_frames: int, height: int, width: int, size: tuple[int, int]
) -> None:
    assert WINDOWED.frame_size(height=height, width=width, num_frames=num_frames) == size


@pytest.mark.parametrize(
    ("layout", "num_frames", "height", "width", "size"),
    [
        (TIMED, 2, 257, 201, (184, 144)),
        (TIMED, 11, 217, 283, (56, 80)),
        (TIMED, 38, 93, 76, (40, 32)),
        (TIMED, 19, 171, 31, (128, 16)),
        (CAPPED, 4, 33, 223, (8, 88)),
        (CAPPED, 31, 73, 41, (40, 24)),
        (CAPPED, 5, 293, 271, (32, 32)),
    ],
)
def test_a_qwen3_video_is_limited_as_a_whole(
    layout: TimedFrames, num_frames: int, height: int, width: int, size: tuple[int, int]
) -> None:
    assert layout.frame_size(height=height, width=width, num_frames=num_frames) == size


def test_one_frame_is_a_picture(tmp_path: Path) -> None:
    picture = PixelRule(min_pixels=256, max_pixels=1024, max_video_tokens=600, mean=(0.5,) * 3, std=(0.5,) * 3)
    for layout in (replace(WINDOWED, image=picture), replace(TIMED, image=picture)):
        assert layout.frame_size(height=300, width=300, num_frames=1) == (32, 32)
        still = FrameSelection(path="a.png", frames=(0, 0), seconds=(0.0, 0.0), height=32, width=32)
        ids = layout.video_ids(still)
        assert ids == [1, *[MEDIA_TOKEN] * 16, 2]
        positions, following = layout.positions([9, *ids, 9], [still])
        assert positions[0].tolist() == [0, 1, *[2] * 16, 6, 7]
        assert following == 8


def test_video_max_frame_pixels_lowers_the_processor_s_limits(tmp_path: Path) -> None:
    for family, write in tiny_vl.WRITERS.items():
        entry, folder = FAMILIES[family], write(tmp_path / family)
        tokens, spec = entry.read_tokens(folder), entry.read_spec(folder)
        sizes = []
        for pixels in (0, 4 * 64, 64):
            layout = entry.vision.layout(spec, tokens, VideoConfig(max_frame_pixels=pixels))
            sizes.append(layout.frame_size(height=400, width=400, num_frames=4))
        assert sizes[0] > sizes[1] == (16, 16) > sizes[2] == (8, 8)


def test_video_max_video_tokens_takes_the_place_of_the_processor_s_budget(tmp_path: Path) -> None:
    for family, write in tiny_vl.WRITERS.items():
        entry, folder = FAMILIES[family], write(tmp_path / family)
        tokens, spec = entry.read_tokens(folder), entry.read_spec(folder)
        for limit in (8 * 4, 8 * 9):  # a square of whole blocks in each of 8 steps
            video = VideoConfig(num_frames=16, max_video_tokens=limit)
            layout = entry.vision.layout(spec, tokens, video)
            height, width = layout.frame_size(height=4000, width=4000, num_frames=16)
            found = height * width // spec.tower.block**2 * 16 // spec.tower.frames_per_step
            assert found == limit, family
            vision = read_model_shape(folder, family=family, video=video).vision
            assert limit <= vision.embeds_per_frame * 16 < limit + 16, family  # of a frame, rounded up


@pytest.mark.parametrize("num_frames", [2, 3, 7, 8, 45])
@pytest.mark.parametrize("size", [(400, 400), (360, 640), (500, 260)])
def test_no_video_has_more_tokens_than_video_max_video_tokens(
    num_frames: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """Nor where the processor's least pixels of a frame would make it so; last frames fill up the last step."""
    for family, write in tiny_vl.WRITERS.items():
        entry, folder = FAMILIES[family], write(tmp_path / family)
        tokens, spec = entry.read_tokens(folder), entry.read_spec(folder)
        spec = replace(spec, video=replace(spec.video, min_pixels=64 * 64))
        layout = entry.vision.layout(spec, tokens, VideoConfig(max_video_tokens=100))
        height, width = layout.frame_size(height=size[0], width=size[1], num_frames=num_frames)
        steps = -(-num_frames // spec.tower.frames_per_step)
        assert steps * height * width // spec.tower.block**2 <= 100, family


def test_a_tokenizer_without_the_markers_is_refused(tmp_path: Path) -> None:
    for family, write in tiny_vl.WRITERS.items():
        entry, folder = FAMILIES[family], write(tmp_path / family)
        tokens = replace(entry.read_tokens(folder), encode_markup=lambda text: list(text.encode()))
        with pytest.raises(CheckpointError, match=r"'<\|vision_start\|>' must be one token"):
            entry.vision.layout(entry.read_spec(folder), tokens, VideoConfig())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, r"config.json: model_type is 'qwen2_vl', expected 'qwen2_5_vl'"),
        ({"vision_config": {"out_hidden_size": 64}}, r"out_hidden_size is 64, expected the LLM's width 32"),
        ({"vision_config": {"tokens_per_second": 0}}, r"tokens_per_second is 0, expected a number > 0"),
        ({"text_config": {"rope_parameters": {"rope_theta": 1e4}}}, r"mrope_section is missing"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    folder = tiny_vl.write_qwen2_5_vl(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        FAMILIES["qwen2_5_vl"].read_spec(folder)
