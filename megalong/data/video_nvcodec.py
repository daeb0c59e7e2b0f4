"""PyNvVideoCodec on NVDEC: fed packet by packet, it returns pictures with the timestamps of their packets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import PyNvVideoCodec as nvc  # noqa: N813
import torch
from torch import Tensor

from megalong.data.video_index import VideoIndex
from megalong.data.video_pixels import rgb_of_nv12
from megalong.data.video_segments import (
    CodedFrame,
    Coding,
    RefusedError,
    Segment,
    as_byte_stream,
    read_segment,
    refusal,
)

_CODECS = {"h264": "H264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1"}


class NvCodecDecoder:
    """One decoding stream of one device; for one thread, whose current CUDA stream it works on."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._coding: Coding | None = None

    def decode(self, index: VideoIndex, segment: Segment, coding: Coding) -> Iterator[tuple[int, Tensor]]:
        """Yield (place in the segment, [1, 3, H, W] float32 RGB in 0..255), each frame of the segment once.

        Raises RefusedError or torch.OutOfMemoryError when the library does, and the former when a frame does not come
        out. The decoder must not be used again then.
        """
        packets = read_segment(index, segment, as_byte_stream)
        place_of = {int(index.ticks_F[frame]): place for place, frame in enumerate(segment.frames)}
        try:
            for frame in self._decoded(packets, coding, wanted=frozenset(place_of)):
                place = place_of.pop(frame.getPTS(), None)
                if place is not None:  # as a picture that is shown twice is the second time
                    yield place, _rgb(torch.from_dlpack(frame), coding)
        except (nvc.PyNvVCException, nvc.PyNvVCExceptionUnsupported) as error:
            raise refusal("PyNvVideoCodec", " ".join(str(error).split())[:300]) from error
        if place_of:
            missing = segment.frames[min(place_of.values())]
            raise RefusedError(f"PyNvVideoCodec did not return {len(place_of)} frames, the first is {missing}")

    def _decoded(self, packets: Sequence[CodedFrame], coding: Coding, *, wanted: frozenset[int]) -> Iterator[object]:
        """The pictures of the `wanted` ticks. The others stay in the decoder, which would copy each of them, and wait
        for it, before the next one."""
        if coding != self._coding:
            self._decoder = nvc.CreateDecoder(
                gpuid=self.device,
                codec=getattr(nvc.cudaVideoCodec, _CODECS[coding.codec]),
                cudacontext=0,
                cudastream=torch.cuda.current_stream().cuda_stream,
                usedevicememory=True,
            )
            self._coding = coding
        for packet in packets:
            data = np.frombuffer(packet.data, np.uint8)
            source = nvc.PacketData()
            source.bsl_data, source.bsl, source.pts = data.ctypes.data, len(data), packet.tick
            source.discardable = packet.tick not in wanted
            yield from self._decoder.Decode(source)
        yield from self._decoder.Decode(nvc.PacketData())  # the end: what is left comes out


def _rgb(surface: Tensor, coding: Coding) -> Tensor:
    """surface: [1.5 H, W], the luma rows, then the rows of interleaved chroma."""
    expected = (coding.height * 3 // 2, coding.width)
    if tuple(surface.shape) != expected:
        raise RefusedError(f"PyNvVideoCodec returned a picture of shape {tuple(surface.shape)}, expected {expected}")
    if surface.dtype not in (torch.uint8, torch.uint16):
        raise RefusedError(f"PyNvVideoCodec returned samples of type {surface.dtype}")
    bits = 8 if surface.dtype is torch.uint8 else 16
    luma_HW, chroma_hW = surface[: coding.height], surface[coding.height :]
    return rgb_of_nv12(luma_HW[None], chroma_hW.unflatten(1, (-1, 2))[None], coding, bits=bits)
