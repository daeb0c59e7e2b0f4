"""Real files, written here: the frames that come out are the frames that were asked for."""

import os
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from video_files import SQUARE, numbered_picture, read_number, write_video

from megalong.config.tree import FrameSampling
from megalong.data import video
from megalong.data.video import DecodeError, Orientation, decode_frames, probe, select_frames
from megalong.records import FrameSelection


def decode(selection, *, size, **changes):
    """decode_frames at another size than the selection's."""
    return decode_frames(replace(selection, height=size, width=size), **changes)


def select(path, num_frames=10_000):
    return select_frames(
        probe(path), sampling=FrameSampling.uniform, num_frames=num_frames, fps=1.0, max_frames=1, layout=SQUARE
    )


def pick(path, frames):
    index = probe(path)
    return FrameSelection(
        path=str(path), frames=tuple(frames), seconds=tuple(index.seconds_F[list(frames)].tolist()), height=48, width=48
    )


def numbers(clip):
    return [read_number(picture) for picture in clip.frames_FHWC]


CODINGS = {
    "h264 b-frames mp4": ("a.mp4", {"options": {"bf": "3", "x264-params": "b-adapt=0:b-pyramid=normal"}}),
    "h264 open gop mp4": ("a.mp4", {"options": {"bf": "3", "x264-params": "b-adapt=0:open-gop=1"}}),
    "h264 open gop mkv": ("a.mkv", {"options": {"bf": "3", "x264-params": "b-adapt=0:open-gop=1"}}),
    "h264 open gop ts": ("a.ts", {"options": {"bf": "3", "x264-params": "b-adapt=0:open-gop=1"}}),
    "h264 b-frames flv": ("a.flv", {"options": {"bf": "2", "x264-params": "b-adapt=0"}}),
    "h264 b-frames avi": ("a.avi", {"options": {"bf": "3", "x264-params": "b-adapt=0"}}),
    "h264 no b-frames": ("a.mp4", {"options": {"bf": "0"}}),
    "h264 fragmented": ("a.mp4", {"mux_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264 intra refresh": ("a.mp4", {"options": {"x264-params": "intra-refresh=1"}}),
    "hevc open gop": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=4:open-gop=1"}}),
    "mpeg4 b-frames mp4": ("a.mp4", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "mpeg4 b-frames avi": ("a.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "mpeg2 b-frames": ("a.mpg", {"codec": "mpeg2video", "options": {"bf": "2"}, "size": (64, 64)}),
    "wmv2": ("a.wmv", {"codec": "wmv2"}),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "deadline": "realtime"}}),
    "av1": ("a.mp4", {"codec": "libsvtav1", "options": {"preset": "10"}, "size": (64, 64)}),
    "mjpeg": ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "one keyframe": ("a.mp4", {"gop": 1000}),
    "all keyframes": ("a.mp4", {"gop": 1}),
}


@pytest.mark.parametrize("coding", CODINGS)
def test_the_wanted_frames_come_out_and_no_others(tmp_path, coding):
    name, settings = CODINGS[coding]
    path = write_video(tmp_path / name, 60, **settings)
    assert probe(path).num_frames == 60
    np.testing.assert_allclose(probe(path).seconds_F, np.arange(60) / 25, atol=1e-3)
    assert numbers(decode(select(path), size=48)) == list(range(60))
    rng = np.random.default_rng(0)
    for count in (1, 1, 1, 2, 3, 5, 9, 20):
        wanted = sorted(rng.choice(60, count, replace=False).tolist())
        assert numbers(decode(pick(path, wanted), size=48)) == wanted


@pytest.mark.parametrize("rate", [1, 10, 30, 60])
def test_rates(tmp_path, rate):
    path = write_video(tmp_path / "a.mp4", 30, rate=rate)
    selection = select_frames(
        probe(path), sampling=FrameSampling.fps, num_frames=1, fps=2.0, max_frames=100, layout=SQUARE
    )
    step = rate / 2
    assert selection.frames == tuple(dict.fromkeys(int(k * step) for k in range(int(29 / step) + 1)))
    np.testing.assert_allclose(selection.seconds, np.array(selection.frames) / rate, atol=1e-4)
    assert numbers(decode(selection, size=64)) == list(selection.frames)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate(tmp_path, name):
    pts = np.cumsum([0, *([40, 33, 7, 500, 40] * 6), 60_000, 1]).tolist()
    path = write_video(tmp_path / name, len(pts), pts=pts, options={"bf": "2"})
    index = probe(path)
    np.testing.assert_allclose(index.seconds_F, np.array(pts) / 1000, atol=1e-3)
    assert numbers(decode(pick(path, [3, 4, 17, 29, 31, 32]), size=64)) == [3, 4, 17, 29, 31, 32]
    by_rate = select_frames(index, sampling=FrameSampling.fps, num_frames=1, fps=1.0, max_frames=100, layout=SQUARE)
    assert numbers(decode(by_rate, size=64)) == [0, 8, 18, 23, 30]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_coding_any_times_any_frames(data):
    suffix = data.draw(st.sampled_from(["mp4", "mkv", "ts"]))
    # FFmpeg does not recognise a transport stream of less than ten 188-byte packets.
    count = data.draw(st.integers(8 if suffix == "ts" else 1, 40))
    gaps = data.draw(st.lists(st.integers(1, 900), min_size=count - 1, max_size=count - 1))
    options = {
        "bf": str(data.draw(st.integers(0, 4))),
        "x264-params": f"b-adapt=0:b-pyramid=normal:open-gop={data.draw(st.integers(0, 1))}",
    }
    wanted = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    with tempfile.TemporaryDirectory() as folder:
        pts = np.cumsum([0, *gaps]).tolist()
        path = write_video(
            Path(folder) / f"a.{suffix}", count, gop=data.draw(st.integers(1, 15)), pts=pts, options=options
        )
        np.testing.assert_allclose(probe(path).seconds_F, np.array(pts) / 1000, atol=1e-3)
        assert numbers(decode(pick(path, wanted), size=48)) == wanted


def test_times_count_from_the_first_frame(tmp_path):
    path = write_video(tmp_path / "a.mkv", 10, pts=[5000 + 40 * frame for frame in range(10)])
    assert probe(path).ticks_F[0] > 0
    np.testing.assert_allclose(probe(path).seconds_F, 0.04 * np.arange(10), atol=1e-3)
    assert numbers(decode(pick(path, [0, 9]), size=64)) == [0, 9]


def test_what_an_edit_list_cuts_off_is_no_frame(tmp_path):
    source = write_video(tmp_path / "a.mp4", 60, options={"bf": "2"})
    path = tmp_path / "edited.mp4"
    with av.open(str(source)) as reading, av.open(str(path), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size:
                shift = int(17 / 25 / packet.time_base)  # 17 frames, into the second group of pictures
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                writing.mux(packet)
    index = probe(path)
    assert index.num_frames == 43
    assert index.seconds_F[1] == pytest.approx(0.04)
    assert numbers(decode(pick(path, [0, 1, 30, 42]), size=64)) == [17, 18, 47, 59]


def test_frames_before_the_first_keyframe_are_not_counted(tmp_path):
    source = write_video(tmp_path / "a.ts", 60, options={"bf": "2"})
    path = tmp_path / "cut.ts"
    with av.open(str(source)) as reading, av.open(str(path), "w") as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for place, packet in enumerate(reading.demux(video=0)):
            if packet.size and place >= 5:
                packet.stream = stream
                writing.mux(packet)
    index = probe(path)
    assert index.num_frames == 48
    assert numbers(decode(pick(path, [0, 20]), size=64)) == [12, 32]


def test_ranks_share_a_selection(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60)
    selection = select(path, 7)
    whole = decode_frames(selection)
    assert (whole.first, whole.frames_FHWC.shape, whole.frames_FHWC.dtype) == (0, (7, 48, 48, 3), np.uint8)
    parts = [decode_frames(selection, first=first, last=last) for first, last in ((0, 3), (3, 3), (3, 7))]
    assert [part.first for part in parts] == [0, 3, 3]
    assert all(part.selection is selection for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.frames_FHWC for part in parts]), whole.frames_FHWC)


def test_a_repeated_last_frame_is_decoded_once_and_copied(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 12)
    shown, to_rgb = [], video._to_rgb
    monkeypatch.setattr(video, "_to_rgb", lambda frame, reformatter: shown.append(1) or to_rgb(frame, reformatter))
    assert numbers(decode(pick(path, [3, 7, 9, 9]), size=48)) == [3, 7, 9, 9]
    assert numbers(decode(pick(path, [3, 7, 9, 9]), first=2, last=4, size=48)) == [9, 9]
    assert numbers(decode(pick(path, [4, 4]), size=48)) == [4, 4]
    assert len(shown) == 3 + 1 + 1


def test_a_picture_file_is_a_video_of_one_frame(tmp_path):
    picture_HWC = numbered_picture(5, width=48, height=48)
    for name in ("a.png", "a.bmp"):
        Image.fromarray(picture_HWC).save(tmp_path / name)
        chosen = select(tmp_path / name)
        assert (chosen.frames, chosen.seconds) == ((0,), (0.0,))
        assert np.array_equal(decode(chosen, size=48).frames_FHWC[0], picture_HWC)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_a_photo_is_turned_as_its_exif_says(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "a camera", orientation
    stored = Image.fromarray(numbered_picture(5, width=64, height=48))
    stored.save(tmp_path / name, exif=exif, **({"quality": 100, "subsampling": 0} if name == "a.jpg" else {}))
    with Image.open(tmp_path / name) as picture:
        expected_HWC = np.asarray(ImageOps.exif_transpose(picture).convert("RGB")).astype(int)
    index = probe(str(tmp_path / name))
    assert (index.num_frames, index.height, index.width) == (1, *expected_HWC.shape[:2])
    chosen = replace(pick(tmp_path / name, [0]), height=index.height, width=index.width)
    assert np.abs(decode_frames(chosen).frames_FHWC[0] - expected_HWC).max() <= 8


def test_hidden_frames_of_vp8_are_no_frames(tmp_path):
    shown = write_video(tmp_path / "shown.webm", 30, codec="libvpx", pts=[40 * place for place in range(30)])
    with av.open(str(shown)) as source, av.open(str(tmp_path / "a.webm"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if not packet.size:
                continue
            data, time, is_key = bytes(packet), packet.pts, packet.is_keyframe
            packet.stream = copy
            target.mux(packet)
            if is_key:  # the keyframe again, which shows nothing this time
                hidden = av.Packet(bytes([data[0] & ~0x10]) + data[1:])
                hidden.pts = hidden.dts = time + 1
                hidden.time_base, hidden.stream = stream.time_base, copy
                target.mux(hidden)
    index = probe(str(tmp_path / "a.webm"))
    assert index.ticks_F.tolist() == probe(str(shown)).ticks_F.tolist()
    assert numbers(decode_frames(pick(tmp_path / "a.webm", range(30)))) == list(range(30))


def cut_in_two(path, *, first, second):
    """Patch an MP4's edit list to play `first` frames from the start and then those from `second` on (25 a second)."""
    data, path_to = bytearray(path.read_bytes()), (b"moov", b"trak", b"edts", b"elst")
    starts = [data.index(name) - 4 for name in path_to]
    at = starts[-1] + 16  # behind size, name, version and count
    _, begin, rate = struct.unpack_from(">IiI", data, at)
    timescale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    entries = ((first * 40, begin), (4000, begin + second * timescale // 25))
    data[at : at + 12] = b"".join(struct.pack(">IiI", length, start, rate) for length, start in entries)
    struct.pack_into(">I", data, at - 4, 2)
    for start in starts:
        struct.pack_into(">I", data, start, struct.unpack_from(">I", data, start)[0] + 12)
    path.write_bytes(data)


@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_part_cut_out_by_an_edit_list_is_left_out(b_frames, tmp_path):
    path = write_video(tmp_path / "a.mp4", 96, gop=24, options={"bf": str(b_frames)})
    cut_in_two(path, first=30, second=40)
    index = probe(path)
    assert numbers(decode_frames(pick(path, range(index.num_frames)))) == [*range(30), *range(40, 96)]


def test_only_the_groups_of_pictures_that_are_wanted_are_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 1000, gop=50, options={"bf": "0", "preset": "ultrafast"})
    decoded = []
    whole = video._decoded_from

    def counting(*arguments):
        for frame in whole(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decoded_from", counting)
    wanted = [3, 10, 60, 100, 555, 999]
    assert numbers(decode(pick(path, wanted), size=32)) == wanted
    # From 0 to 10, from 50 to 60, frame 100, from 550 to 555, from 950 to 999.
    assert len(decoded) == 11 + 11 + 1 + 6 + 50
    decoded.clear()
    decode(select(path), size=32)
    assert len(decoded) == 1000


@pytest.mark.parametrize("size", [(117, 93), (64, 93), (117, 48), (2, 2), (33, 1024)])
@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_odd_sizes(tmp_path, size, codec):
    width, height = size
    shades = np.tile(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, 1, 3))
    options = {"qp": "0"} if codec == "libx264" else {}
    if codec == "libx264":
        width, height = size = (width // 2 * 2, height) if height % 2 == 0 else size
    path = write_video(
        tmp_path / "a.mkv", 3, codec=codec, size=size, pictures=[shades] * 3, options=options, pix_fmt="yuv444p"
    )
    clip = decode(select(path), size=40)
    expected = np.asarray(Image.fromarray(shades).resize((40, 40), Image.BICUBIC))
    assert (probe(path).width, probe(path).height) == (width, height)
    for picture in clip.frames_FHWC:
        assert np.abs(picture.astype(int) - expected).max() <= 3  # YUV and back costs up to 2 levels


def test_odd_size_with_subsampled_colour(tmp_path):
    path = write_video(tmp_path / "a.mkv", 20, codec="ffv1", size=(117, 93))
    clip = decode(select(path), size=93)
    assert numbers(clip) == list(range(20))
    assert np.abs(clip.frames_FHWC[5, -1].astype(int) - clip.frames_FHWC[5, -4].astype(int)).max() <= 2
    assert np.abs(clip.frames_FHWC[5, :, -1].astype(int) - clip.frames_FHWC[5, :, -4].astype(int)).max() <= 2


@pytest.mark.parametrize("size", [(320, 180), (90, 160), (40, 40), (24, 18)])
def test_resize_is_siglips(tmp_path, size):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8) for _ in range(2)]
    path = write_video(tmp_path / "a.avi", 2, codec="rawvideo", size=size, pix_fmt="bgr24", pictures=pictures)
    clip = decode(select(path), size=40)
    processor = SiglipImageProcessorPil(size={"height": 40, "width": 40}, do_rescale=False, do_normalize=False)
    for got, picture in zip(clip.frames_FHWC, pictures, strict=True):
        oracle = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        difference = np.abs(got.astype(int) - oracle.astype(int))
        assert difference.max() <= 2
        assert difference.mean() < 0.2


def test_colours(tmp_path):
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:, :32] = (220, 30, 60)
    picture[:, 32:] = (20, 80, 200)
    for name, codec, pix_fmt in (
        ("a.mkv", "ffv1", "yuv444p"),
        ("b.mkv", "ffv1", "yuv420p"),
        ("c.avi", "mjpeg", "yuvj420p"),
    ):
        path = write_video(tmp_path / name, 1, codec=codec, pix_fmt=pix_fmt, pictures=[picture])
        (got,) = decode(select(path), size=32).frames_FHWC
        assert np.abs(got[16, 4].astype(int) - (220, 30, 60)).max() <= 4, name
        assert np.abs(got[16, 28].astype(int) - (20, 80, 200)).max() <= 4, name


ONE = 1 << 16
TURNS = {  # what the player shows, from what is stored
    "none": ({}, lambda picture: picture),
    "90 left": ({"rotation": 90}, lambda picture: np.rot90(picture, 1)),
    "180": ({"rotation": 180}, lambda picture: np.rot90(picture, 2)),
    "90 right": ({"rotation": -90}, lambda picture: np.rot90(picture, -1)),
    "mirrored": ({"matrix": [-ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30]}, lambda picture: picture[:, ::-1]),
    "upside down": ({"matrix": [ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30]}, lambda picture: picture[::-1]),
    "transposed": ({"matrix": [0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30]}, lambda picture: picture.transpose(1, 0, 2)),
    "an empty matrix": ({"matrix": [0] * 9}, lambda picture: picture),
    "a rounded 90 right": (
        {"matrix": [3, ONE, 0, -ONE, -4, 0, 0, 0, 1 << 30]},
        lambda picture: np.rot90(picture, -1),
    ),
    "a rounded 180": ({"matrix": [-ONE, 8, 0, -8, -ONE, 0, 0, 0, 1 << 30]}, lambda picture: np.rot90(picture, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_orientation(tmp_path, turn):
    settings, shown = TURNS[turn]
    picture = numbered_picture(0b000000110111, width=64, height=48)
    upright = shown(picture)
    path = write_video(tmp_path / "a.mp4", 4, pictures=[picture] * 4, options={"qp": "0"}, **settings)
    index = probe(path)
    assert (index.height, index.width) == upright.shape[:2]
    expected = np.asarray(Image.fromarray(upright).resize((36, 36), Image.BICUBIC)).astype(int)
    for got in decode(select(path), size=36).frames_FHWC:
        assert np.abs(got - expected).max() <= 4


@pytest.mark.parametrize("degrees", [30, 2, 88])
def test_orientation_that_is_no_quarter_turn_is_refused(tmp_path, degrees):
    path = write_video(tmp_path / "a.mp4", 2, rotation=degrees)
    with pytest.raises(DecodeError, match=f"turns it by {degrees} degrees, expected quarter turns"):
        probe(path)
    assert probe(write_video(tmp_path / "b.mp4", 2)).orientation == Orientation()


def test_sound_may_outlast_the_picture_and_covers_are_no_video(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        pictures = container.add_stream("libx264", rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number, width=64, height=48), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * 5), np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = 16000, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    assert numbers(decode(select(path), size=48)) == list(range(10))


def test_threads_decode_different_and_same_files(tmp_path):
    paths = [write_video(tmp_path / f"{number}.mp4", 40, options={"bf": "2"}) for number in range(3)]
    wanted = [[number, 13 + number, 39] for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(lambda n: decode(pick(paths[n % 3], wanted[n]), size=48), range(12)))
    assert [numbers(clip) for clip in clips] == wanted


def test_codec_threads_change_nothing(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60, options={"bf": "3", "x264-params": "open-gop=1"})
    selection = select(path, 9)
    one, two = (decode(selection, size=48, threads=threads).frames_FHWC for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_a_changed_file_is_indexed_again(tmp_path):
    path = write_video(tmp_path / "a.mp4", 60)
    selection = select(path, 5)
    write_video(path, 20)
    assert probe(path).num_frames == 20
    with pytest.raises(DecodeError, match="frame 30 at 1.200 s was selected, but the file has 20 frames.*changed"):
        decode(selection, size=32)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_damage_is_an_error_not_a_picture(tmp_path, name):
    path = write_video(tmp_path / name, 60, options={"bf": "0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        bodies = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert data.count(bodies[16]) == 1
    place = data.index(bodies[16])
    data[place : place + len(bodies[16])] = b"\xff" * len(bodies[16])
    path.write_bytes(data)
    assert numbers(decode(pick(path, [0, 11, 15, 24, 59]), size=48)) == [0, 11, 15, 24, 59]
    for wanted, failing in (([0, 16], 16), ([17], 17), ([20, 30], 20)):
        with pytest.raises(DecodeError, match=rf"frame {failing} of 60 .* cannot be decoded: .* corrupt"):
            decode(pick(path, wanted), size=48)


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        ((0, 1), {"first": 1, "last": 3}, r"\[1, 3\) is not a range of 2 frames"),
        ((0, 1), {"first": -1}, r"\[-1, 2\) is not a range"),
        ((0, 1), {"size": 0}, "size is 0 x 0 pixels"),
        ((1, 0), {}, "must be ascending"),
        ((1, 1, 2), {}, "only the last one repeated"),
        ((1, 2, 1, 2), {}, "only the last one repeated"),
    ],
)
def test_bad_arguments(tmp_path, frames, arguments, message):
    path = write_video(tmp_path / "a.mp4", 4)
    with pytest.raises(ValueError, match=message):
        decode(pick(path, frames), **{"size": 8, **arguments})


def test_speed(tmp_path):
    path = write_video(tmp_path / "a.mp4", 1500, size=(128, 128), gop=250, options={"bf": "3"})
    started = time.process_time()
    clip = decode(select(path, 64), size=128)
    spent = time.process_time() - started
    assert numbers(clip) == list(clip.selection.frames)
    assert spent < 0.6  # about 0.06 s on one core of 2024; the margin is for a busy machine


def test_writing_av1_leaves_this_process_one_like_others(tmp_path: Path) -> None:
    """The encoder of the test videos would make it a real-time process: see write_video."""
    write_video(tmp_path / "a.mp4", 3, codec="libsvtav1", options={"preset": "10"}, size=(64, 64))
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
