"""How a model family lays a video out in a prompt; the families in models/ implement it, data and vision read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megalong.records import FrameSelection


class VideoLayout(Protocol):
    """Frame sizes, token ids and positions of one family. A family without vision has none.

    A step is what the tower takes at a time: `frames_per_step` frames that become tokens_per_step() embeddings.
    """

    frames_per_step: int  # every selection's number of frames is a multiple of it

    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """Pixels (height, width) that `num_frames` frames of a file of height x width pixels are decoded to."""

    def tokens_per_step(self, selection: FrameSelection) -> int:
        """Embeddings that the tower makes of one step of the selection's frames."""

    def video_ids(self, selection: FrameSelection) -> list[int]:
        """Token ids of a video: MEDIA_TOKEN where embeddings go, and whatever stands around and between them."""

    def positions(self, ids: Sequence[int], selections: Sequence[FrameSelection]) -> tuple[Tensor, int]:
        """Positions of a prompt, int64 on the CPU, [P] or [3, P], and the position that every response starts at."""
