"""Decoding a file on the NVDEC engines of a GPU: its segments side by side, PyAV for the files that are refused."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from megalong.config.errors import ConfigError
from megalong.config.tree import VideoDecoder
from megalong.data.video import decode_frames, wanted_frames
from megalong.data.video_index import VideoIndex, probe
from megalong.data.video_pixels import resized
from megalong.data.video_process import ProcessFrameDecoder
from megalong.data.video_segments import Coding, RefusedError, Segment, num_decoded, plan_segments, read_coding
from megalong.records import Clip, FrameSelection

logger = logging.getLogger(__name__)

STREAMS = 14
"""Decoding streams per GPU: two for each NVDEC engine of an H200."""
_SEGMENT_BYTES = 128 << 20  # pictures of a segment at full size that may be in memory at once
_PACKAGES = {VideoDecoder.nvcodec: "PyNvVideoCodec", VideoDecoder.dali: "nvidia.dali"}  # auto takes the first there is
NVCODEC = Version("2.2")
"""The first PyNvVideoCodec that keeps pictures to itself when it is told to."""
CPU_PIXELS = 32_000_000
"""video.decoder=auto: selections for which no more pixels than this must be decoded go to PyAV, by plan. A core takes
0.06 to 0.2 s for as many (B11, small), and a GPU tens of milliseconds to open a decoder, for segments that are too few
to fill its streams."""


class SegmentDecoder(Protocol):
    def decode(self, index: VideoIndex, segment: Segment, coding: Coding) -> Iterator[tuple[int, Tensor]]:
        """Yield (place in the segment, [F, 3, H, W] float RGB in 0..255) until each frame was there once."""
        ...


class FrameDecoder(Protocol):
    """What indexes files and makes Clips of selections; thread-safe."""

    on_gpu: bool
    settings: str  # all that decides the pixels of a file: decoders differ by a few grey levels
    fallbacks: dict[str, str]  # files that another decoder than the chosen one had to take -> why

    def probe(self, path: str) -> VideoIndex: ...

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip: ...

    def close(self) -> None: ...


class CpuFrameDecoder:
    """PyAV, one thread per call."""

    on_gpu = False
    settings = VideoDecoder.pyav.name

    def __init__(self) -> None:
        self.fallbacks: dict[str, str] = {}

    def probe(self, path: str) -> VideoIndex:
        return probe(path)

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip:
        return decode_frames(selection, first=first, last=last)

    def close(self) -> None:
        """There is nothing to stop."""


class GpuFrameDecoder:
    """What the decoding process of a GPU holds (video_server). Thread-safe.

    Decodes with `streams` decoders of one GPU, which all calls share. The frames are those of `decode_frames`. A
    file that the GPU path refuses goes to PyAV, which also has the last word on damaged ones; each such file is in
    `fallbacks`. Not so selections that are PyAV's by plan: those for which at most `cpu_pixels` pixels must be
    decoded.
    """

    def __init__(
        self, device: torch.device, make: Callable[[], SegmentDecoder], *, streams: int = STREAMS, cpu_pixels: int = 0
    ) -> None:
        self.device, self.streams, self.cpu_pixels, self.fallbacks = device, streams, cpu_pixels, {}
        self._make = make
        self._pool = ThreadPoolExecutor(max_workers=streams, thread_name_prefix="nvdec")
        self._mine = threading.local()

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip:
        """As `decode_frames`; raises DecodeError."""
        frames_FHWC = np.empty((last - first, selection.height, selection.width, 3), np.uint8)
        for place, piece_FHWC in self.pieces(selection, first=first, last=last):
            frames_FHWC[place : place + len(piece_FHWC)] = piece_FHWC
        return Clip(selection=selection, first=first, frames_FHWC=frames_FHWC)

    def pieces(self, selection: FrameSelection, *, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (place among the frames [first, last), [F, height, width, 3] uint8) as they are there, in any order; a
        later piece is right where it overlaps an earlier one. Raises DecodeError."""
        if first == last or self._is_small(selection):
            yield 0, decode_frames(selection, first=first, last=last).frames_FHWC
            return
        try:
            yield from self._pieces(selection, first, last)
        except RefusedError as refusal:
            self.fallbacks.setdefault(selection.path, str(refusal))
            yield 0, decode_frames(selection, first=first, last=last).frames_FHWC

    def close(self) -> None:
        """Stop the decoding threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _is_small(self, selection: FrameSelection) -> bool:
        """By the whole selection, so that a video's ranks take one decoder, however many they are."""
        if not self.cpu_pixels:
            return False
        index = probe(selection.path)
        wanted = wanted_frames(selection, index, first=0, last=len(selection.frames))
        return num_decoded(index, wanted) * index.width * index.height <= self.cpu_pixels

    def _pieces(self, selection: FrameSelection, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        index = probe(selection.path)
        wanted = wanted_frames(selection, index, first=first, last=last)
        coding = read_coding(index)
        most_frames = max(1, _SEGMENT_BYTES // (coding.width * coding.height * 3))
        aim = min(most_frames, math.ceil(len(wanted) / (2 * self.streams)))
        size = (selection.height, selection.width)
        running = {
            self._pool.submit(self._decode_segment, index, segment, coding, size): segment.first
            for segment in plan_segments(index, wanted, aim=aim, most_frames=most_frames)
        }
        try:
            for future in as_completed(running):
                place, frames_FHWC = running.pop(future), future.result().numpy()
                yield place, frames_FHWC
                if place + len(frames_FHWC) == len(wanted) < last - first:  # the last one, repeated
                    yield len(wanted), frames_FHWC[-1:].repeat(last - first - len(wanted), axis=0)
        finally:
            for future in running:
                future.cancel()

    def _decode_segment(self, index: VideoIndex, segment: Segment, coding: Coding, size: tuple[int, int]) -> Tensor:
        """[F, *size, 3] uint8 in page-locked memory."""
        height, width = size
        decoder, stream = self._decoder()
        frames_FHWC = torch.empty(
            (len(segment.frames), height, width, 3), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        try:
            with torch.cuda.stream(stream):
                for place, rgb_FCHW in decoder.decode(index, segment, coding):
                    small_FHWC = resized(rgb_FCHW, height=height, width=width, orientation=index.orientation)
                    frames_FHWC[place : place + len(small_FHWC)].copy_(small_FHWC, non_blocking=True)
                if stream is not None:
                    stream.synchronize()
        except BaseException:
            self._mine.decoder = None  # its state is not known any more
            raise
        return frames_FHWC

    def _decoder(self) -> tuple[SegmentDecoder, torch.cuda.Stream | None]:
        """This thread's decoder and CUDA stream."""
        mine = self._mine
        if not hasattr(mine, "stream"):
            on_gpu = self.device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(self.device)
            mine.stream, mine.decoder = torch.cuda.Stream(self.device) if on_gpu else None, None
        if mine.decoder is None:
            with torch.cuda.stream(mine.stream):
                mine.decoder = self._make()
        return mine.decoder, mine.stream


def open_decoder(kind: VideoDecoder, device: torch.device) -> FrameDecoder:
    """The decoder of video.decoder for a device; one on a GPU is in a process of its own.

    Raises ConfigError when it needs a GPU or a package there is not.
    """
    on_gpu = device.type == "cuda"
    cpu_pixels = CPU_PIXELS if kind is VideoDecoder.auto else 0
    if kind is VideoDecoder.auto:
        installed = [kind for kind in _PACKAGES if _is_installed(_PACKAGES[kind])]
        if on_gpu and not installed:
            logger.warning("videos are decoded on the CPU: none of %s is installed", ", ".join(_PACKAGES.values()))
        kind = installed[0] if on_gpu and installed else VideoDecoder.pyav
    if kind is VideoDecoder.pyav:
        return CpuFrameDecoder()
    if not on_gpu:
        raise ConfigError([f"video.decoder={kind.name} needs a GPU, this process has none; set it to auto or pyav"])
    if not _is_installed(_PACKAGES[kind]):
        raise ConfigError(
            [f"video.decoder={kind.name} needs {_PACKAGES[kind]}, which is not installed; install it, or set auto"]
        )
    if kind is VideoDecoder.nvcodec and (found := Version(version(_PACKAGES[kind]))) < NVCODEC:
        raise ConfigError(
            [f"PyNvVideoCodec {found} is installed; install {NVCODEC} or later, or set video.decoder to dali or pyav"]
        )
    number = torch.cuda.current_device() if device.index is None else device.index
    # Which files are refused is not part of it: the same decoder refuses them again.
    settings = f"{kind.name}, pyav up to {cpu_pixels} pixels" if cpu_pixels else kind.name
    return ProcessFrameDecoder(kind.name, str(number), str(cpu_pixels), settings=settings)


def make_gpu_decoder(arguments: list[str]) -> GpuFrameDecoder:
    """Of the arguments that open_decoder gives to the decoding process."""
    kind, number, cpu_pixels = arguments
    if VideoDecoder[kind] is VideoDecoder.dali:
        make = import_module("megalong.data.video_dali").DaliDecoder
    else:
        make = import_module("megalong.data.video_nvcodec").NvCodecDecoder
    device = torch.device("cuda", int(number))
    return GpuFrameDecoder(device, lambda: make(device.index), cpu_pixels=int(cpu_pixels))


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
