"""How longvila lays a video out: square frames, the tokens of each step and a newline, positions counted up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalong.config.tree import VideoConfig
from megalong.models.chat import ChatTokens
from megalong.models.errors import CheckpointError
from megalong.models.longvila.spec import LongVilaSpec
from megalong.records import MEDIA_TOKEN, FrameSelection


@dataclass(frozen=True, kw_only=True, slots=True)
class SquareFrames:
    """See data.video_layout.VideoLayout."""

    size: int  # pixels
    tokens_per_frame: int  # of a frame, or of the mean of frames_per_step of them; newline not counted
    newline_id: int
    frames_per_step: int = 1  # more: TSP, which averages frames

    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        return self.size, self.size

    def tokens_per_step(self, selection: FrameSelection) -> int:
        return self.tokens_per_frame

    def video_ids(self, selection: FrameSelection) -> list[int]:
        step = [MEDIA_TOKEN] * self.tokens_per_frame + [self.newline_id]
        return step * (len(selection.frames) // self.frames_per_step)

    def positions(self, ids: Sequence[int], selections: Sequence[FrameSelection]) -> tuple[Tensor, int]:
        return torch.arange(len(ids)), len(ids)


def video_layout(spec: LongVilaSpec, tokens: ChatTokens, video: VideoConfig) -> SquareFrames:
    """The tower's square, whatever the file's size. Raises CheckpointError when a newline is not one token."""
    newline = tokens.encode("\n")
    if len(newline) != 1:
        raise CheckpointError(f"{spec.path}/llm: a newline must be one token, this tokenizer gives {newline}")
    return SquareFrames(
        size=spec.vision.image_size,
        tokens_per_frame=spec.vision.embeds_per_step,
        newline_id=newline[0],
        frames_per_step=spec.vision.frames_per_step,
    )
