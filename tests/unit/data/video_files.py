"""Small videos whose pictures carry their own number, so that a test can tell which frame it got."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from megalong.models.longvila.layout import SquareFrames

BITS = 12
SQUARE = SquareFrames(size=48, tokens_per_frame=4, newline_id=1)


def numbered_picture(number: int, *, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8: `number` in binary as a 3 x 4 board of black and white blocks."""
    rows = np.arange(height) * 3 // height
    columns = np.arange(width) * 4 // width
    bits = (number >> (rows[:, None] * 4 + columns[None, :])) & 1
    return np.repeat((bits * 215 + 20).astype(np.uint8)[..., None], 3, axis=2)


def read_number(picture_HWC: np.ndarray) -> int:
    """The number on a picture, whatever its size. Raises ValueError when a block is neither dark nor light."""
    height, width, _ = picture_HWC.shape
    number = 0
    for bit in range(BITS):
        row, column = divmod(bit, 4)
        level = float(picture_HWC[(2 * row + 1) * height // 6, (2 * column + 1) * width // 8].mean())
        if 90 < level < 160:
            raise ValueError(f"block {bit} is grey ({level})")
        number |= int(level > 128) << bit
    return number


def write_video(
    path: Path,
    num_frames: int = 60,
    *,
    codec: str = "libx264",
    gop: int = 12,
    pts: list[int] | None = None,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (64, 48),
    rate: int = 25,
    pix_fmt: str = "yuv420p",
    rotation: int | None = None,
    matrix: list[int] | None = None,
    pictures: list[np.ndarray] | None = None,
    mux_options: dict[str, str] | None = None,
) -> Path:
    """Encode numbered pictures (or `pictures`); pts: in units of 1/1000 s, default one per 1/rate s."""
    with av.open(str(path), "w", options=mux_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(gop), **(options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number in range(num_frames):
            picture = numbered_picture(number, width=size[0], height=size[1]) if pictures is None else pictures[number]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate) if pts is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    # For root, SVT-AV1 makes the thread that calls it a real-time one of the highest priority, and all processes that
    # it starts from then on are: a world of them that wait in loops leaves no core to the one they wait for.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_sound(path: Path, *, seconds: float = 0.5) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = np.zeros((1, int(16000 * seconds)), dtype=np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_empty_video(path: Path) -> Path:
    """A well-formed file whose video stream has no packets."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


def cut_file(source: Path, target: Path, *, keep: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * keep)])
    return target
