"""The plan of a hardware decoder's work: the packets it gets are enough, few, and those of the right frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_video import CODINGS, numbers, pick
from video_files import read_number, write_video

from megalong.data.video import Orientation, decode_frames, probe
from megalong.data.video_pixels import recolour, resized, rgb_of_nv12
from megalong.data.video_segments import (
    CodedFrame,
    Coding,
    PacketFacts,
    RefusedError,
    Segment,
    as_byte_stream,
    as_matroska,
    needed_packets,
    plan_segments,
    read_coding,
    read_segment,
)

TAKEN = (
    "h264 b-frames mp4",
    "h264 b-frames flv",
    "h264 no b-frames",
    "h264 fragmented",
    "hevc open gop",
    "vp9",
    "av1",
    "one keyframe",
    "all keyframes",
)
SIZE = {"size": (64, 48)}


@pytest.fixture(scope="module", params=TAKEN)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    name, settings = CODINGS[request.param]
    return str(write_video(tmp_path_factory.mktemp("videos") / name, 60, **{**SIZE, **settings}))


def segments_of(path: str, wanted: list[int], *, aim: int = 4, most_frames: int = 8) -> list[Segment]:
    return plan_segments(probe(path), wanted, aim=aim, most_frames=most_frames)


def decoded(packets: list[CodedFrame], codec: str) -> dict[int, int]:
    """Tick -> number on the picture, by FFmpeg's decoder of the same codec without any container."""
    context = av.CodecContext.create("libdav1d" if codec == "av1" else codec, "r")
    found = {}
    parts = []
    for source in packets:
        packet = av.Packet(source.data)
        packet.pts = source.tick
        parts += context.decode(packet)
    for frame in [*parts, *context.decode(None)]:
        assert not frame.is_corrupt
        found[frame.pts] = read_number(frame.to_ndarray(format="rgb24"))
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 20, 60])
def test_the_packets_of_a_segment_decode_to_its_frames(file: str, count: int) -> None:
    index, codec = probe(file), read_coding(probe(file)).codec
    wanted = sorted(np.random.default_rng(count).choice(60, count, replace=False).tolist())
    segments = segments_of(file, wanted)
    assert [frame for segment in segments for frame in segment.frames] == wanted
    assert all(len(segment.frames) <= 8 for segment in segments)
    for segment in segments:
        found = decoded(read_segment(index, segment, as_byte_stream), codec)
        assert [found[int(index.ticks_F[frame])] for frame in segment.frames] == list(segment.frames)


@pytest.mark.parametrize("count", [1, 5, 60])
def test_a_segment_as_a_file_holds_its_frames_evenly_spaced(file: str, count: int, tmp_path: Path) -> None:
    index = probe(file)
    wanted = sorted(np.random.default_rng(count).choice(60, count, replace=False).tolist())
    for segment in segments_of(file, wanted):
        data, ticks = read_segment(index, segment, as_matroska)
        (tmp_path / "segment.mkv").write_bytes(data)
        remuxed = probe(tmp_path / "segment.mkv")
        assert remuxed.num_frames == len(ticks)
        np.testing.assert_allclose(remuxed.seconds_F, 0.04 * np.arange(len(ticks)), atol=1e-9)
        places = [ticks.index(int(index.ticks_F[frame])) for frame in segment.frames]
        assert numbers(decode_frames(pick(tmp_path / "segment.mkv", places))) == list(segment.frames)


def test_packets_nobody_needs_are_left_out(tmp_path: Path) -> None:
    settings = {"options": {"bf": "3", "x264-params": "b-adapt=0:b-pyramid=none"}, "gop": 12}
    index = probe(write_video(tmp_path / "a.mp4", 48, **settings))
    (segment,) = plan_segments(index, [0, 25], aim=9, most_frames=9)
    packets = read_segment(index, segment, as_byte_stream)
    frames = sorted(int(np.searchsorted(index.ticks_F, packet.tick)) for packet in packets)
    # Frame 0 needs itself, frame 25 (a B-frame of the third group) its two neighbours; the second group is not needed.
    assert frames == [0, 24, 25, 28]


def facts(text: str) -> list[PacketFacts]:
    """Of "K0 P3 b1 b2": keyframe, reference and not, with their ticks."""
    words = [(word[0], int(word[1:])) for word in text.split()]
    return [PacketFacts(tick=tick, is_key=kind == "K", is_reference=kind != "b") for kind, tick in words]


@pytest.mark.parametrize(
    ("packets", "ticks", "needed"),
    [
        ("K0 P3 b1 b2 P6 b4 b5", {2}, "K0 P3 b2"),
        ("K0 P3 b1 b2 P6 b4 b5", {0}, "K0"),
        ("K0 P3 b1 b2 K9 b7 b8 P12", {0, 12}, "K0 K9 P12"),
        ("K0 P3 b1 b2 P6 K9 b7 b8 P12", {0, 8}, "K0 P3 P6 K9 b8"),  # 8 leads the second keyframe
        ("K0 P3 K9 R7 b8 P12", {0, 12}, "K0 K9 P12"),
        ("K0 P3 K9 R7 b8 P12", {8}, "K0 P3 K9 R7 b8"),
        ("K9 b7 b8 P12 b10", {12}, "K9 P12"),
        ("K0 P1 K2 P3 K4 P5", {1, 5}, "K0 P1 K4 P5"),
    ],
)
def test_needed_packets(packets: str, ticks: set[int], needed: str) -> None:
    words = packets.split()
    assert [words[place] for place in needed_packets(facts(packets), ticks)] == needed.split()


def test_pictures_of_a_lower_temporal_layer_stay() -> None:
    layered = [
        PacketFacts(tick=0, is_key=True, is_reference=True),
        PacketFacts(tick=2, is_key=False, is_reference=False),
        PacketFacts(tick=1, is_key=False, is_reference=False, layer=1),
        PacketFacts(tick=3, is_key=False, is_reference=False, layer=1),
    ]
    assert needed_packets(layered, {3}) == [0, 1, 3]


def test_segments_end_at_keyframes_and_have_bounded_frames(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "a.mp4", 60, gop=10))
    plan = [segment.frames for segment in segments_of(path, list(range(0, 60, 3)), aim=8, most_frames=8)]
    assert plan == [tuple(range(0, 20, 3)), tuple(range(21, 40, 3)), tuple(range(42, 60, 3))]
    # Below the aim there is one group to a segment, whole up to the most, and cut there.
    plan = segments_of(path, list(range(12)), aim=1, most_frames=4)
    assert [(segment.first, segment.frames) for segment in plan] == [
        (0, (0, 1, 2, 3)), (4, (4, 5, 6, 7)), (8, (8, 9)), (10, (10, 11)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"codec": "mpeg4"}, "codec mpeg4"),
        ({"pix_fmt": "yuv444p"}, "pixel format yuv444p in h264"),
        ({"codec": "libvpx-vp9", "size": (63, 49), "options": {"deadline": "realtime"}}, "odd size 63 x 49"),
        ({"options": {"flags": "+ildct+ilme", "x264-params": "tff=1"}}, "interlaced"),
    ],
)
def test_streams_the_hardware_would_not_decode_to_the_same_pictures_are_refused(
    settings: dict[str, object], reason: str, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "a.mkv", 24, **settings)
    with pytest.raises(RefusedError, match=reason):
        read_coding(probe(path))


@pytest.mark.parametrize("coding", ["h264 intra refresh", "h264 open gop mp4"])
def test_keyframes_to_which_a_decoder_cannot_seek_are_refused(coding: str, tmp_path: Path) -> None:
    name, settings = CODINGS[coding]
    path = str(write_video(tmp_path / name, 60, **{**settings, "gop": 12}))
    (segment,) = plan_segments(probe(path), list(range(60)), aim=60, most_frames=60)
    with pytest.raises(RefusedError, match="no random access points"):
        read_segment(probe(path), segment, as_byte_stream)


def test_a_damaged_packet_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24)
    index = probe(path)
    with av.open(str(path)) as container:
        place, size = next((p.pos, p.size) for p in container.demux() if p.pts == index.ticks_F[13] and p.size)
    data = bytearray(path.read_bytes())
    data[place : place + 4] = b"\xff" * 4
    path.write_bytes(data)
    assert size > 4
    with pytest.raises(RefusedError, match="do not add up"):
        read_segment(probe(path), Segment(first=0, frames=(13,)), as_byte_stream)


@pytest.mark.parametrize(("matrix", "number"), [("bt601", 5), ("bt709", 1), ("bt2020", 9)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_are_those_of_the_cpu_path(matrix: str, number: int, full_range: bool) -> None:
    """Against FFmpeg's own conversion, for every matrix and range."""
    rng = np.random.default_rng(0)
    luma, chroma = rng.integers(60, 180, (4, 8), np.uint8), rng.integers(90, 160, (2, 4, 2), np.uint8)
    luma, chroma = luma.repeat(8, 0).repeat(8, 1), chroma.repeat(8, 0).repeat(8, 1)
    planes = np.concatenate([luma.ravel(), chroma[..., 0].ravel(), chroma[..., 1].ravel()]).reshape(48, 64)
    frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
    frame.colorspace, frame.color_range = number, 2 if full_range else 1
    expected = frame.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray()
    coding = Coding(codec="h264", width=64, height=32, bits=8, matrix=matrix, full_range=full_range)
    ours_FCHW = rgb_of_nv12(torch.from_numpy(luma)[None], torch.from_numpy(chroma)[None], coding)
    ours = ours_FCHW[0].permute(1, 2, 0).round().numpy()
    assert np.abs(ours - expected).max() <= 2
    wide_FCHW = rgb_of_nv12(
        (torch.from_numpy(luma).to(torch.int32) << 8)[None], (torch.from_numpy(chroma).to(torch.int32) << 8)[None],
        coding, bits=16,
    )  # fmt: skip
    torch.testing.assert_close(wide_FCHW, ours_FCHW)
    as_601 = rgb_of_nv12(torch.from_numpy(luma)[None], torch.from_numpy(chroma)[None], replace(coding, matrix="bt601"))
    inside = (as_601 > 0) & (as_601 < 255) & (ours_FCHW > 0) & (ours_FCHW < 255)
    inside = inside.all(1, keepdim=True).expand_as(inside)
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(recolour(as_601, coding)[inside], ours_FCHW[inside], atol=1e-2, rtol=0)
    wide_luma, wide_chroma = torch.from_numpy(luma).int() << 8, (torch.from_numpy(chroma).int() << 8) + 128
    wide_luma += 0 if full_range else 16
    shifted = rgb_of_nv12(wide_luma[None], wide_chroma[None], replace(coding, matrix="bt601"), bits=16)
    inside = inside & ((shifted > 0) & (shifted < 255)).all(1, keepdim=True)
    unshifted = recolour(shifted, coding, black=15.9375, grey=127.5)
    torch.testing.assert_close(unshifted[inside], ours_FCHW[inside], atol=1e-2, rtol=0)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("mirror_x", [False, True])
@pytest.mark.parametrize("mirror_y", [False, True])
def test_the_resize_is_the_cpu_path_s(transpose: bool, mirror_x: bool, mirror_y: bool) -> None:
    from megalong.data.video import _resize, _turn

    orientation = Orientation(transpose=transpose, mirror_x=mirror_x, mirror_y=mirror_y)
    picture = np.random.default_rng(1).integers(0, 256, (90, 160, 3), np.uint8)
    stored = (20, 30) if transpose else (30, 20)
    expected = _turn(_resize(picture, stored), orientation)
    ours = resized(
        torch.from_numpy(picture).permute(2, 0, 1)[None].float(), height=30, width=20, orientation=orientation
    )
    assert ours.shape == (1, 30, 20, 3)
    assert np.abs(ours[0].numpy().astype(int) - expected).max() <= 1
