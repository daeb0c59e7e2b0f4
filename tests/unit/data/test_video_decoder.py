"""The GPU decoder's own work (segments side by side, order, fall-backs) with FFmpeg in the place of the hardware."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import av
import numpy as np
import pytest
import torch
from test_video import CODINGS, numbers, pick
from torch import Tensor
from video_files import cut_file, write_video

from megalong.config.errors import ConfigError
from megalong.config.tree import VideoDecoder
from megalong.data import video_decoder
from megalong.data.video import DecodeError, VideoIndex, decode_frames, probe
from megalong.data.video_decoder import CpuFrameDecoder, GpuFrameDecoder, open_decoder
from megalong.data.video_segments import Coding, RefusedError, Segment, as_byte_stream, read_segment


class PacketDecoder:
    """FFmpeg fed as the hardware is: packets of a segment, no container."""

    alive = 0

    def __init__(self) -> None:
        PacketDecoder.alive += 1
        self.threads: set[int] = set()

    def decode(self, index: VideoIndex, segment: Segment, coding: Coding) -> Iterator[tuple[int, Tensor]]:
        self.threads.add(threading.get_ident())
        assert len(self.threads) == 1
        place_of = {int(index.ticks_F[frame]): place for place, frame in enumerate(segment.frames)}
        context = av.CodecContext.create(coding.codec, "r")
        packets = []
        for source in read_segment(index, segment, as_byte_stream):
            packets.append(av.Packet(source.data))
            packets[-1].pts = source.tick
        for packet in [*packets, None]:
            for frame in context.decode(packet):
                if frame.pts in place_of:
                    rgb = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float()
                    yield place_of[frame.pts], rgb


class Refusing(PacketDecoder):
    def decode(self, index: VideoIndex, segment: Segment, coding: Coding) -> Iterator[tuple[int, Tensor]]:
        if segment.first > 0:
            raise RefusedError("not today")
        yield from super().decode(index, segment, coding)


@pytest.fixture
def decoder() -> Iterator[GpuFrameDecoder]:
    decoder = GpuFrameDecoder(torch.device("cpu"), PacketDecoder, streams=3)
    yield decoder
    decoder.close()


@pytest.mark.parametrize("rotation", [None, 90, 180])
@pytest.mark.parametrize("coding", ["h264 b-frames mp4", "hevc open gop", "vp9"])
def test_frames_are_those_of_decode_frames(
    decoder: GpuFrameDecoder, coding: str, rotation: int | None, tmp_path: Path
) -> None:
    name, settings = CODINGS[coding]
    path = write_video(tmp_path / name, 60, **settings, rotation=rotation if name.endswith("mp4") else None)
    for frames, first, last in ((range(60), 0, 60), (range(60), 17, 41), ([1, 7, 30, 30, 30], 1, 5), ([5], 0, 1)):
        chosen = pick(path, list(frames))
        expected = decode_frames(chosen, first=first, last=last)
        clip = decoder.decode(chosen, first=first, last=last)
        assert (clip.selection, clip.first) == (chosen, first)
        assert np.abs(clip.frames_FHWC.astype(int) - expected.frames_FHWC).max() <= 1
    assert decoder.decode(chosen, first=1, last=1).frames_FHWC.shape == (0, 48, 48, 3)
    assert decoder.fallbacks == {}


def test_files_share_the_streams_and_each_stream_has_one_decoder(
    decoder: GpuFrameDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PacketDecoder, "alive", 0)
    paths = [write_video(tmp_path / f"{place}.mp4", 60) for place in range(3)]
    with ThreadPoolExecutor(3) as pool:
        clips = pool.map(lambda path: decoder.decode(pick(path, list(range(60))), first=0, last=60), paths)
        assert [numbers(clip) for clip in clips] == [list(range(60))] * 3
    assert PacketDecoder.alive <= 3


@pytest.mark.parametrize("refuse", ["the stream", "a segment"])
def test_a_refused_file_is_decoded_by_pyav(refuse: str, tmp_path: Path) -> None:
    codec, make, reason = {
        "the stream": ("mpeg4", PacketDecoder, "codec mpeg4"),
        "a segment": ("libx264", Refusing, "not today"),
    }[refuse]
    path = write_video(tmp_path / "a.mp4", 60, codec=codec)
    decoder = GpuFrameDecoder(torch.device("cpu"), make, streams=2)
    for _ in range(2):
        assert numbers(decoder.decode(pick(path, list(range(60))), first=0, last=60)) == list(range(60))
    decoder.close()
    assert decoder.fallbacks == {str(path): reason}


def test_small_videos_are_pyav_s_by_plan(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, gop=12)
    width, height = probe(path).width, probe(path).height
    decoder = GpuFrameDecoder(torch.device("cpu"), Refusing, streams=2, cpu_pixels=30 * width * height)
    small = pick(path, [0, 11, 40, 44, 48])  # from the keyframes 0, 36 and 48: 12 + 9 + 1 frames
    large = pick(path, [11, 35, 44])  # 12 + 12 + 9
    for chosen, fallbacks in ((small, set()), (large, {str(path)})):
        clip = decoder.decode(chosen, first=1, last=3)
        np.testing.assert_array_equal(clip.frames_FHWC, decode_frames(chosen, first=1, last=3).frames_FHWC)
        assert decoder.fallbacks.keys() == fallbacks
    decoder.close()


def test_auto_takes_nvcodec_before_dali_and_leaves_small_videos_to_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    backend = SimpleNamespace(
        NvCodecDecoder=lambda number: made.append(f"nvcodec {number}"), DaliDecoder=lambda number: made.append("dali")
    )
    monkeypatch.setattr(video_decoder, "import_module", lambda name: backend)
    started = mock.Mock(side_effect=lambda *arguments, settings: (video_decoder.make_gpu_decoder(arguments), settings))
    monkeypatch.setattr(video_decoder, "ProcessFrameDecoder", started)
    monkeypatch.setattr(video_decoder, "version", {"PyNvVideoCodec": "2.2.4"}.__getitem__)
    for installed, expected in (({"PyNvVideoCodec", "nvidia.dali"}, "nvcodec 3"), ({"nvidia.dali"}, "dali")):
        monkeypatch.setattr(video_decoder, "_is_installed", installed.__contains__)
        decoder, settings = open_decoder(VideoDecoder.auto, torch.device("cuda", 3))
        decoder._make()
        assert made.pop() == expected
        assert decoder.cpu_pixels == video_decoder.CPU_PIXELS
        assert settings == f"{expected.split()[0]}, pyav up to 32000000 pixels"
        decoder.close()
        dali, settings = open_decoder(VideoDecoder.dali, torch.device("cuda", 3))
        assert (dali.cpu_pixels, settings) == (0, "dali")
        dali.close()
    monkeypatch.setattr(video_decoder, "_is_installed", lambda package: False)
    assert isinstance(open_decoder(VideoDecoder.auto, torch.device("cuda", 3)), CpuFrameDecoder)


@pytest.mark.parametrize("kind", [VideoDecoder.auto, VideoDecoder.nvcodec])
def test_a_library_that_is_too_old_is_named(kind: VideoDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_decoder, "_is_installed", lambda package: True)
    monkeypatch.setattr(video_decoder, "version", lambda package: "2.1.0")
    with pytest.raises(ConfigError, match="^PyNvVideoCodec 2.1.0 is installed; install 2.2 or later"):
        open_decoder(kind, torch.device("cuda", 0))


def test_a_broken_file_is_a_decode_error_and_no_fall_back(decoder: GpuFrameDecoder, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", 60)
    chosen = pick(whole, list(range(60)))
    cut_file(whole, whole, keep=0.6)
    with pytest.raises(DecodeError):
        decoder.decode(chosen, first=0, last=60)
    assert decoder.fallbacks == {}


def test_the_cpu_has_pyav_and_nothing_else() -> None:
    for kind in (VideoDecoder.auto, VideoDecoder.pyav):
        decoder = open_decoder(kind, torch.device("cpu"))
        assert isinstance(decoder, CpuFrameDecoder)
        assert decoder.settings == "pyav"
    for kind in (VideoDecoder.dali, VideoDecoder.nvcodec):
        with pytest.raises(ConfigError, match=f"video.decoder={kind.name} needs a GPU"):
            open_decoder(kind, torch.device("cpu"))
