"""How qwen2_5_vl lays a video out: frames near their own shape, one run of vision tokens, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megalong.config.qwen_vl_shape import PixelRule, TowerShape
from megalong.config.tree import VideoConfig
from megalong.models.chat import ChatTokens
from megalong.models.errors import CheckpointError
from megalong.models.qwen2_5_vl.pixels import fit_to_pixels
from megalong.models.qwen2_5_vl.positions import Grid, mrope_positions, step_ticks
from megalong.models.qwen2_5_vl.spec import Qwen25VlSpec
from megalong.records import MEDIA_TOKEN, FrameSelection

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowedFrames:
    """See data.video_layout.VideoLayout."""

    tower: TowerShape
    video: PixelRule
    image: PixelRule
    ticks_per_second: float
    start_id: int
    end_id: int

    @property
    def frames_per_step(self) -> int:
        return self.tower.frames_per_step

    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """Multiples of a block near the file's shape, within the processor's pixels and a frame's share of the budget.

        One frame is a picture. Raises ValueError for one of extreme shape.
        """
        block = self.tower.block
        if num_frames == 1:
            return fit_image(height, width, rule=self.image, block=block)
        most = self.video.most_frame_pixels(num_frames, block=block, frames_per_step=self.frames_per_step)
        least = min(self.video.min_pixels, most)
        return fit_to_pixels(height, width, factor=block, min_pixels=least, max_pixels=most)

    def tokens_per_step(self, selection: FrameSelection) -> int:
        return (selection.height // self.tower.block) * (selection.width // self.tower.block)

    def video_ids(self, selection: FrameSelection) -> list[int]:
        steps = len(selection.frames) // self.frames_per_step
        return [self.start_id, *[MEDIA_TOKEN] * (steps * self.tokens_per_step(selection)), self.end_id]

    def positions(self, ids: Sequence[int], selections: Sequence[FrameSelection]) -> tuple[Tensor, int]:
        return mrope_positions(ids, [self.grid(selection) for selection in selections])

    def grid(self, selection: FrameSelection) -> Grid:
        """Temporal positions, rows and columns of a video's run of vision tokens."""
        return Grid(
            ticks=step_ticks(selection, frames_per_step=self.frames_per_step, ticks_per_second=self.ticks_per_second),
            rows=selection.height // self.tower.block,
            columns=selection.width // self.tower.block,
        )


def video_layout(spec: Qwen25VlSpec, tokens: ChatTokens, video: VideoConfig) -> WindowedFrames:
    """The layout with the tokenizer's ids. Raises CheckpointError when a vision marker is not one token."""
    return WindowedFrames(
        tower=spec.tower,
        video=spec.video.with_share_of(video.max_video_tokens).capped(video.max_frame_pixels),
        image=spec.image.capped(video.max_frame_pixels),
        ticks_per_second=spec.ticks_per_second,
        start_id=marker_id(tokens, VISION_START, path=str(spec.path)),
        end_id=marker_id(tokens, VISION_END, path=str(spec.path)),
    )


def fit_image(height: int, width: int, *, rule: PixelRule, block: int) -> tuple[int, int]:
    """The size of a picture. Raises ValueError for one of extreme shape."""
    return fit_to_pixels(height, width, factor=block, min_pixels=rule.min_pixels, max_pixels=rule.max_pixels)


def marker_id(tokens: ChatTokens, marker: str, *, path: str) -> int:
    """Id of a marker. Raises CheckpointError when the tokenizer does not make one token of it."""
    ids = tokens.encode_markup(marker)
    if len(ids) != 1:
        raise CheckpointError(f"{path}: {marker!r} must be one token, this tokenizer gives {ids}")
    return ids[0]
