"""DALI on NVDEC: a segment is remuxed into a file in memory, of which DALI returns the wanted frames as RGB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from megalong.data.video_index import VideoIndex
from megalong.data.video_pixels import recolour
from megalong.data.video_segments import Coding, RefusedError, Segment, as_matroska, read_segment, refusal

_BLOCK = 64  # pixels; the largest that codecs round sizes up to
_BLACK, _GREY = 255 / 16, 255 / 2  # what DALI takes for 16 and 128: a sixteenth and a half of the whole range
_CHUNK = 4  # frames that are turned into floats at a time


class DaliDecoder:
    """One decoding stream of one device; for one thread. device: None decodes on the CPU (VP8, VP9)."""

    _size_of: ClassVar[dict[tuple[str, int, int], tuple[int, int]]] = {}  # codec and blocks -> first size of its files

    def __init__(self, device: int | None) -> None:
        self._pipeline = _decode_pipeline(
            batch_size=1, num_threads=1, device_id=device, prefetch_queue_depth=1, exec_dynamic=True,
            target="cpu" if device is None else "mixed",
        )  # fmt: skip
        self._pipeline.build()

    def decode(self, index: VideoIndex, segment: Segment, coding: Coding) -> Iterator[tuple[int, Tensor]]:
        """Yield (place in the segment, [F, 3, H, W] float32 RGB in 0..255), all frames of the segment, in order.

        Raises RefusedError or torch.OutOfMemoryError when DALI does, and the former when what it returns is not what
        was asked for. The decoder must not be used again then.
        """
        _one_size_per_block(self._size_of, coding)
        file, ticks = read_segment(index, segment, as_matroska)
        place_of = {tick: place for place, tick in enumerate(ticks)}
        wanted = [place_of[int(tick)] for tick in index.ticks_F[list(segment.frames)]]
        self._pipeline.feed_input("file", [np.frombuffer(file, np.uint8)])
        self._pipeline.feed_input("frames", [np.array(wanted, np.int32)])
        try:
            (output,) = self._pipeline.run()
            frames_FHWC = torch.from_dlpack(output[0])
        except RuntimeError as error:
            raise refusal("DALI", _cause(error)) from error
        expected = (len(wanted), coding.height, coding.width, 3)
        if tuple(frames_FHWC.shape) != expected:
            raise RefusedError(f"DALI returned pictures of shape {tuple(frames_FHWC.shape)}, expected {expected}")
        for place in range(0, len(wanted), _CHUNK):
            rgb_FCHW = frames_FHWC[place : place + _CHUNK].permute(0, 3, 1, 2).float()
            yield place, recolour(rgb_FCHW, coding, black=_BLACK, grey=_GREY)


def _one_size_per_block(size_of: dict[tuple[str, int, int], tuple[int, int]], coding: Coding) -> None:
    """Raise RefusedError for files of nearly the size of others, which are decoded to wrong pictures.

    DALI keeps hardware decoders for the whole process and finds them again by a size that is cropped where they are
    made, and coded (in whole blocks) where they are looked up: a 318 x 234 file takes over that of a 320 x 240 one.
    """
    size = (coding.width, coding.height)
    block = (coding.codec, -(-coding.width // _BLOCK), -(-coding.height // _BLOCK))
    first = size_of.setdefault(block, size)
    if first != size:
        raise RefusedError(
            f"DALI mixes up files of {size[0]} x {size[1]} and {first[0]} x {first[1]}, which this process has decoded"
        )


@pipeline_def
def _decode_pipeline(target: str) -> object:
    file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
    frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
    return fn.decoders.video(file, frames=frames, device=target, affine=False)


def _cause(error: RuntimeError) -> str:
    """DALI's own reason in a message that also names the operator, the pipeline's definition and a stack."""
    lines = [line.strip() for line in str(error).rpartition("encountered:")[2].splitlines() if line.strip()]
    return lines[0][:300] if lines else "unknown error"
