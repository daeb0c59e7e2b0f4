"""Sizes of stock Qwen2.5-VL and Qwen3-VL checkpoints, from their JSON files alone, and their rule for frame sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalong.config.errors import ConfigError
from megalong.config.json_part import Part, read_json
from megalong.config.model_shape import ModelShape, VisionShape, llm_shape
from megalong.config.tree import FrameSampling, VideoConfig

VIDEO, IMAGE = "video_processor", "image_processor"
TIMESTAMP_TOKENS = 12
"""<1234.5 seconds> before a step of Qwen3-VL, and the markers around it; a long video's times have more digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerShape:
    """Sizes of the vision transformer; counts unless said."""

    hidden: int
    layers: int
    full_layers: int
    """Layers whose attention spans the whole picture; in the others it stays inside a window."""
    window_patches: int
    ffn: int
    patch_size: int
    """Pixels."""
    merge_size: int
    """Side of the square of patches that becomes one embedding."""
    frames_per_step: int
    deepstack: int
    """Embeddings that come with each, for the first layers of the LLM."""
    positions: int
    """Rows of a learnt position embedding; 0: none."""
    out: int

    @property
    def block(self) -> int:
        """Side in pixels of what becomes one embedding; frames are multiples of it."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelRule:
    """What a processor's JSON says about the pixels of a picture or a video."""

    min_pixels: int
    max_pixels: int
    max_video_tokens: int
    """Qwen2.5-VL: no frame gets more than its even share of 90 % of this many tokens' pixels. Qwen3-VL: no frame gets
    more than this many tokens. 0: no such limit."""
    video_tokens: int = 0
    """video.max_video_tokens, of whole steps, the last frame repeated; 0: not set."""
    mean: tuple[float, float, float]  # of the three channels, pixels in 0..1
    std: tuple[float, float, float]

    def most_frame_pixels(self, num_frames: int, *, block: int, frames_per_step: int) -> int:
        """Pixels that each of num_frames frames of a Qwen2.5-VL video may have."""
        if self.video_tokens:
            of_step = self.video_tokens // -(-num_frames // frames_per_step)
            return min(self.max_pixels, max(1, of_step) * block**2)
        if not self.max_video_tokens:
            return self.max_pixels
        # An embedding stands for a block of each of the frames of a step.
        budget = int(self.max_video_tokens * block**2 * 0.9) * frames_per_step
        return max(min(self.max_pixels, budget // num_frames), int(self.min_pixels * 1.05))

    def most_video_pixels(self, num_frames: int, *, block: int) -> int:
        """Pixels that all frames of a Qwen3-VL video may have together: its limits are of whole videos."""
        if not self.max_video_tokens:
            return self.max_pixels
        share = min(self.max_video_tokens * block**2, self.max_pixels // num_frames)
        return max(share, int(self.min_pixels * 1.05)) * num_frames

    def capped(self, max_frame_pixels: int) -> PixelRule:
        """The same with video.max_frame_pixels; 0 changes nothing."""
        if not max_frame_pixels:
            return self
        return replace(
            self, min_pixels=min(self.min_pixels, max_frame_pixels), max_pixels=min(self.max_pixels, max_frame_pixels)
        )

    def with_share_of(self, max_video_tokens: int) -> PixelRule:
        """A Qwen2.5-VL rule with video.max_video_tokens; 0 changes nothing."""
        return replace(self, video_tokens=max_video_tokens)

    def with_pixels_of(self, max_video_tokens: int, tower: TowerShape) -> PixelRule:
        """A Qwen3-VL rule with video.max_video_tokens; 0 changes nothing."""
        if not max_video_tokens:
            return self
        pixels = max_video_tokens * tower.block**2 * tower.frames_per_step
        return replace(self, video_tokens=max_video_tokens, max_pixels=pixels)


def read_qwen2_5_vl_shape(path: Path, video: VideoConfig) -> ModelShape:
    """Sizes of the LLM, and of the vision side at the largest frames that a video of the most frames may have.

    Frames of a shorter video may be larger, where video.max_frame_pixels or the processor does not forbid it.
    """
    file, top = _read_top(path, "qwen2_5_vl")
    tower = read_tower(file, top, windowed=True)
    rule = read_pixel_rule(path, VIDEO).with_share_of(video.max_video_tokens).capped(video.max_frame_pixels)
    frames = video.max_frames if video.sampling is FrameSampling.fps else video.num_frames
    pixels = rule.most_frame_pixels(max(1, frames), block=tower.block, frames_per_step=tower.frames_per_step)
    return llm_shape(text_part(file, top), vision=vision_shape(tower, frame_pixels=pixels, text_per_step=0), mrope=True)


def read_qwen3_vl_shape(path: Path, video: VideoConfig) -> ModelShape:
    """Sizes of the LLM, and of the vision side at the largest frames that `video` and the processor allow."""
    file, top = _read_top(path, "qwen3_vl")
    tower, llm = read_tower(file, top, windowed=False), text_part(file, top)
    llm.size("head_dim")  # not hidden_size / heads there, so never worked out
    frames = max(tower.frames_per_step, video.max_frames if video.sampling is FrameSampling.fps else video.num_frames)
    rule = read_pixel_rule(path, VIDEO, budget=0).with_pixels_of(video.max_video_tokens, tower)
    pixels = rule.most_video_pixels(frames, block=tower.block) // frames
    if video.max_frame_pixels:
        pixels = min(pixels, video.max_frame_pixels)
    vision = vision_shape(tower, frame_pixels=max(pixels, tower.block**2), text_per_step=TIMESTAMP_TOKENS)
    return llm_shape(llm, vision=vision, qkv_bias=False, qk_norm=True, mrope=True)


def read_tower(file: Path, top: dict[str, Any], *, windowed: bool) -> TowerShape:
    """`vision_config` of a config.json. Raises ConfigError naming the key."""
    values = top.get("vision_config")
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: vision_config is {values!r}, expected an object")
    part = Part(values, f"{file}: vision_config")
    layers, patch = part.size("depth"), part.size("patch_size")
    full = values.get("fullatt_block_indexes", []) if windowed else range(layers)
    return TowerShape(
        hidden=part.size("hidden_size"),
        layers=layers,
        full_layers=len(full),
        window_patches=(part.size("window_size") // patch) ** 2 if windowed else 0,
        ffn=part.size("intermediate_size"),
        patch_size=patch,
        merge_size=part.size("spatial_merge_size", default=2),
        frames_per_step=part.size("temporal_patch_size", default=2),
        deepstack=len(values.get("deepstack_visual_indexes", [])),
        positions=0 if windowed else part.size("num_position_embeddings"),
        out=part.size("out_hidden_size"),
    )


def text_part(file: Path, top: dict[str, Any]) -> Part:
    """The LLM's part: `text_config`, or the file itself in folders that transformers 4 wrote."""
    nested = top.get("text_config")
    if not isinstance(nested, dict):
        return Part(top, str(file))
    # The flag stands in either place, or in both.
    tied = bool(top.get("tie_word_embeddings") or nested.get("tie_word_embeddings"))
    return Part({**nested, "tie_word_embeddings": tied}, f"{file}: text_config")


def read_pixel_rule(path: Path, kind: str, *, budget: int = 128_000) -> PixelRule:
    """The rule of the folder's video or image processor. Raises ConfigError naming the file and the key.

    budget: max_video_tokens when the file does not say; 0 (Qwen3-VL): only applied when cap_pixels_per_frame is true.
    """
    where, values = _processor(path, kind)
    size = values.get("size") or {}
    # Older files say min_pixels and max_pixels, which the processors prefer to `size`.
    limits = Part(
        {
            "size.shortest_edge (min_pixels)": values.get("min_pixels") or size.get("shortest_edge"),
            "size.longest_edge (max_pixels)": values.get("max_pixels") or size.get("longest_edge"),
            "max_video_tokens": values.get("max_video_tokens"),
        },
        where,
    )
    asked = values.get("cap_pixels_per_frame")
    budgeted = bool(budget) if asked is None else asked
    rule = PixelRule(
        min_pixels=limits.size("size.shortest_edge (min_pixels)"),
        max_pixels=limits.size("size.longest_edge (max_pixels)"),
        max_video_tokens=limits.size("max_video_tokens", default=budget or 768) if budgeted else 0,
        mean=_three(values, "image_mean", where),
        std=_three(values, "image_std", where),
    )
    if rule.min_pixels > rule.max_pixels:
        raise ConfigError(f"{where}: min_pixels={rule.min_pixels} is over max_pixels={rule.max_pixels}")
    return rule


def vision_shape(tower: TowerShape, *, frame_pixels: int, text_per_step: int) -> VisionShape:
    """The numbers that planning reads. text_per_step: tokens that stand beside a step's embeddings."""
    patches, per_step = frame_pixels // tower.patch_size**2, tower.frames_per_step
    embeds = frame_pixels // tower.block**2
    wide = tower.merge_size**2 * tower.hidden
    pairs = tower.full_layers * patches**2
    pairs += (tower.layers - tower.full_layers) * patches * min(patches, tower.window_patches)
    linear = tower.layers * _matrix_params(tower) + 3 * per_step * tower.patch_size**2 * tower.hidden
    return VisionShape(
        tokens_per_frame=-(-(embeds + text_per_step) // per_step),
        embeds_per_frame=-(-embeds // per_step),
        embed_width=tower.out * (1 + tower.deepstack),
        frames_per_step=1,  # a last frame is repeated to fill its step
        tower_params=_tower_params(tower),
        largest_tower_param=tower.hidden * max(3 * tower.hidden, tower.ffn, tower.positions),
        projector_params=_merger_params(tower, norm=_norm_params(tower, tower.hidden))
        + tower.deepstack * _merger_params(tower, norm=_norm_params(tower, wide)),
        largest_projector_param=wide * max(wide, tower.out),
        frame_bytes=3 * frame_pixels,
        frame_flops=(
            2 * patches * linear + 4 * pairs * tower.hidden
            + 2 * embeds * (1 + tower.deepstack) * _merger_params(tower, norm=0)
        ) // per_step,
        # 8 width-sized and 3 ffn-sized per patch.
        frame_elements=patches * (8 * tower.hidden + 3 * tower.ffn) // per_step,
        tower_layers=tower.layers,
    )  # fmt: skip


def _read_top(path: Path, model_type: str) -> tuple[Path, dict[str, Any]]:
    file = path / "config.json"
    values = read_json(file)
    if values.get("model_type") != model_type:
        raise ConfigError(
            f"{file}: model_type is {values.get('model_type')!r}, expected {model_type!r}; "
            "set model.family or model.path"
        )
    return file, values


def _processor(path: Path, kind: str) -> tuple[str, dict[str, Any]]:
    """The processor's JSON, looked for where transformers does: the old files first, then processor_config.json."""
    names = ["preprocessor_config.json"]
    if kind == VIDEO:
        names.insert(0, "video_preprocessor_config.json")
    nested = path / "processor_config.json"
    if nested.is_file():
        content = read_json(nested).get(kind)
        if isinstance(content, dict):
            return f"{nested}: {kind}", content
    for name in names:
        if (path / name).is_file():
            return str(path / name), read_json(path / name)
    raise ConfigError(f"{path}: none of processor_config.json (with {kind!r}), {', '.join(names)} is there")


def _three(values: dict[str, Any], key: str, where: str) -> tuple[float, float, float]:
    numbers = values.get(key)
    if not isinstance(numbers, list) or len(numbers) != 3:
        raise ConfigError(f"{where}: {key} is {numbers!r}, expected three numbers")
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


def _matrix_params(tower: TowerShape) -> int:
    """Of one layer: q, k, v, output, and a gated MLP (Qwen2.5-VL) or a plain one (Qwen3-VL)."""
    matrices = 2 if tower.positions else 3
    return 4 * tower.hidden**2 + matrices * tower.hidden * tower.ffn


def _tower_params(tower: TowerShape) -> int:
    """All but the mergers."""
    width, ffn = tower.hidden, tower.ffn
    biases = 5 * width + (ffn if tower.positions else 2 * ffn)
    layer = _matrix_params(tower) + biases + 2 * _norm_params(tower, width)
    embeddings = 3 * tower.frames_per_step * tower.patch_size**2 * width
    if tower.positions:
        embeddings += width + tower.positions * width
    return embeddings + tower.layers * layer


def _norm_params(tower: TowerShape, width: int) -> int:
    """RMSNorm (Qwen2.5-VL) has no bias, LayerNorm (Qwen3-VL) has."""
    return 2 * width if tower.positions else width


def _merger_params(tower: TowerShape, *, norm: int) -> int:
    wide = tower.merge_size**2 * tower.hidden
    return norm + wide * wide + wide + wide * tower.out + tower.out
