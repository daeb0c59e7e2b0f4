"""Our side of PyNvVideoCodec, whose side FFmpeg plays: what it is fed, and what is done with what comes out."""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar
from unittest import mock

import av
import pytest
import torch
from test_video import numbers, pick
from video_files import write_video

from megalong.data.video_decoder import GpuFrameDecoder
from megalong.data.video_segments import RefusedError, refusal


class Codecs(Enum):
    H264 = "h264"
    HEVC = "hevc"


class PacketData:
    __slots__ = ("bsl", "bsl_data", "discardable", "pts")  # as the library's: nothing else can be set

    def __init__(self) -> None:
        self.bsl_data = self.bsl = self.pts = self.discardable = 0


class Picture:
    def __init__(self, frame: av.VideoFrame) -> None:
        self.tick, self.samples = frame.pts, torch.from_numpy(frame.to_ndarray(format="nv12"))

    def getPTS(self) -> int:  # noqa: N802 - the library's name
        return self.tick

    def __dlpack__(self, **how: object) -> object:
        return self.samples.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.samples.__dlpack_device__()


class Decoder:
    """Pictures whose packets are discardable are decoded and do not come out."""

    returned: ClassVar[list[int]] = []
    swallowed: ClassVar[list[int]] = []
    loses: ClassVar[set[int]] = set()
    error: ClassVar[str] = ""

    def __init__(self, codec: Codecs) -> None:
        self.codec, self.discarded, self.context = codec, set(), av.CodecContext.create(codec.value, "r")

    def Decode(self, source: PacketData) -> Iterator[Picture]:  # noqa: N802 - the library's name
        if self.error:
            raise sys.modules["PyNvVideoCodec"].PyNvVCException(self.error)
        packet = None
        if source.bsl:
            packet = av.Packet(ctypes.string_at(source.bsl_data, source.bsl))
            packet.pts = source.pts
            self.discarded |= {source.pts} if source.discardable else set()
        found = list(self.context.decode(packet))
        if packet is None:
            self.context = av.CodecContext.create(self.codec.value, "r")
        kept = [frame for frame in found if frame.pts not in self.discarded | self.loses]
        self.returned.extend(frame.pts for frame in kept)
        self.swallowed.extend(frame.pts for frame in found if frame.pts in self.discarded)
        self.discarded -= {frame.pts for frame in found}
        return [Picture(frame) for frame in kept]


@pytest.fixture
def decoder() -> Iterator[GpuFrameDecoder]:
    library = ModuleType("PyNvVideoCodec")
    library.cudaVideoCodec, library.PacketData = Codecs, PacketData
    library.CreateDecoder = lambda *, codec, **_: Decoder(codec)
    library.PyNvVCException = library.PyNvVCExceptionUnsupported = type("PyNvVCException", (Exception,), {})
    for items in (Decoder.returned, Decoder.swallowed, Decoder.loses):
        items.clear()
    name = "megalong.data.video_nvcodec"
    stream = mock.patch.object(torch.cuda, "current_stream", return_value=SimpleNamespace(cuda_stream=0))
    with mock.patch.dict(sys.modules, {"PyNvVideoCodec": library}), stream:
        sys.modules.pop(name, None)
        make = importlib.import_module(name).NvCodecDecoder
        made = GpuFrameDecoder(torch.device("cpu"), lambda: make(0), streams=3)
        yield made
        made.close()
    sys.modules.pop(name, None)


@pytest.mark.parametrize(("codec", "options"), [("libx264", {"bf": "3"}), ("libx265", {"x265-params": "bframes=4"})])
def test_pictures_that_are_not_wanted_stay_in_the_decoder(
    decoder: GpuFrameDecoder, codec: str, options: dict[str, str], tmp_path: Path
) -> None:
    wanted = [0, 7, 8, 21, 33, 40, 59]
    path = write_video(tmp_path / "a.mp4", 60, gop=20, codec=codec, options=options)
    clip = decoder.decode(pick(path, wanted), first=0, last=len(wanted))
    assert numbers(clip) == wanted
    assert not decoder.fallbacks
    assert len(Decoder.returned) == len(wanted)
    assert len(Decoder.swallowed) > len(wanted)
    assert not set(Decoder.swallowed) & set(Decoder.returned)


def test_a_wanted_picture_that_does_not_come_out_is_a_refusal(decoder: GpuFrameDecoder, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, gop=20)
    chosen = pick(path, [3, 30])
    with av.open(str(path)) as container:
        ticks = sorted(packet.pts for packet in container.demux() if packet.pts is not None)
    Decoder.loses.add(ticks[30])
    assert numbers(decoder.decode(chosen, first=0, last=2)) == [3, 30]
    assert decoder.fallbacks == {str(path): "PyNvVideoCodec did not return 1 frames, the first is 30"}


@pytest.mark.parametrize(
    "text",
    [
        "HandleVideoSequence : Error code : 2 Error Type : m_api.cuvidCreateDecoder(&m_hDecoder) returned error 2",
        "cuMemAlloc returned error CUDA_ERROR_OUT_OF_MEMORY",
        "CUDA error:\n out of memory",
    ],
)
def test_a_gpu_without_memory_is_no_refusal(
    decoder: GpuFrameDecoder, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = pick(write_video(tmp_path / "a.mp4", 60), [3])
    monkeypatch.setattr(Decoder, "error", text)
    with pytest.raises(torch.OutOfMemoryError, match=f"^PyNvVideoCodec: {re.escape(' '.join(text.split()))}"):
        decoder.decode(chosen, first=0, last=1)
    monkeypatch.setattr(Decoder, "error", "Error code : 801 returned error 801")
    assert numbers(decoder.decode(chosen, first=0, last=1)) == [3]
    assert decoder.fallbacks == {chosen.path: "PyNvVideoCodec: Error code : 801 returned error 801"}


@pytest.mark.parametrize(
    ("text", "full"),
    [("CUDA allocation failed", True), ("Can't allocate 3145728 bytes on device 0.", True), ("No such codec", False)],
)
def test_dali_says_it_otherwise(text: str, full: bool) -> None:
    assert isinstance(refusal("DALI", text), torch.OutOfMemoryError if full else RefusedError)
