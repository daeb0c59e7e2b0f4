"""How qwen3_vl lays a video out: the time of each step in words before its vision tokens, interleaved M-RoPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megalong.config.qwen_vl_shape import PixelRule, TowerShape
from megalong.config.tree import VideoConfig
from megalong.models.chat import ChatTokens
from megalong.models.qwen2_5_vl.layout import VISION_END, VISION_START, fit_image, marker_id
from megalong.models.qwen2_5_vl.pixels import fit_video_to_pixels
from megalong.models.qwen2_5_vl.positions import Grid, mrope_positions
from megalong.models.qwen3_vl.spec import Qwen3VlSpec
from megalong.records import MEDIA_TOKEN, FrameSelection


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedFrames:
    """See data.video_layout.VideoLayout."""

    tower: TowerShape
    video: PixelRule
    image: PixelRule
    max_frame_pixels: int  # of a video's frames; 0: the rule alone
    encode: Callable[[str], list[int]]
    start_id: int
    end_id: int

    @property
    def frames_per_step(self) -> int:
        return self.tower.frames_per_step

    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """Multiples of a block near the file's shape, all frames together within the processor's pixels.

        One frame is a picture. Raises ValueError for one of extreme shape.
        """
        if num_frames == 1:
            return fit_image(height, width, rule=self.image, block=self.tower.block)
        if self.video.video_tokens:  # which counts what is repeated to fill a step; the processor's rule does not
            num_frames = -(-num_frames // self.frames_per_step) * self.frames_per_step
        most = self.video.most_video_pixels(num_frames, block=self.tower.block)
        if self.max_frame_pixels:
            most = min(most, self.max_frame_pixels * num_frames)
        return fit_video_to_pixels(
            (num_frames, height, width),
            factor=self.tower.block,
            frames_per_step=self.frames_per_step,
            min_pixels=min(self.video.min_pixels, most),
            max_pixels=most,
        )

    def tokens_per_step(self, selection: FrameSelection) -> int:
        return (selection.height // self.tower.block) * (selection.width // self.tower.block)

    def video_ids(self, selection: FrameSelection) -> list[int]:
        if len(set(selection.frames)) == 1:  # a picture has no time
            return self._step_ids(selection)
        ids: list[int] = []
        for seconds in self.step_seconds(selection):
            ids += self.encode(f"<{seconds:.1f} seconds>")
            ids += self._step_ids(selection)
        return ids

    def _step_ids(self, selection: FrameSelection) -> list[int]:
        return [self.start_id, *[MEDIA_TOKEN] * self.tokens_per_step(selection), self.end_id]

    def step_seconds(self, selection: FrameSelection) -> list[float]:
        """The middle between a step's first and last frame."""
        per_step, seconds = self.frames_per_step, selection.seconds
        return [(seconds[at] + seconds[at + per_step - 1]) / 2 for at in range(0, len(seconds), per_step)]

    def positions(self, ids: Sequence[int], selections: Sequence[FrameSelection]) -> tuple[Tensor, int]:
        # Time is in the words, so every step is a picture for M-RoPE.
        block = self.tower.block
        grids = [
            Grid(ticks=(0,), rows=selection.height // block, columns=selection.width // block)
            for selection in selections
            for _ in range(len(selection.frames) // self.frames_per_step)
        ]
        return mrope_positions(ids, grids)


def video_layout(spec: Qwen3VlSpec, tokens: ChatTokens, video: VideoConfig) -> TimedFrames:
    """The layout with the tokenizer's ids. Raises CheckpointError when a vision marker is not one token."""
    return TimedFrames(
        tower=spec.tower,
        video=spec.video.with_pixels_of(video.max_video_tokens, spec.tower),
        image=spec.image.capped(video.max_frame_pixels),
        max_frame_pixels=video.max_frame_pixels,
        encode=tokens.encode,
        start_id=marker_id(tokens, VISION_START, path=str(spec.path)),
        end_id=marker_id(tokens, VISION_END, path=str(spec.path)),
    )
