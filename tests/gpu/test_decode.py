"""Frames of the NVDEC engines against PyAV's: the same frames, and their pixels within the tolerances below."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "data"))
from video_files import cut_file, numbered_picture, read_number, write_video

from megalong.config.tree import VideoDecoder
from megalong.data.video import DecodeError, decode_frames, probe
from megalong.data.video_decoder import open_decoder
from megalong.data.video_index import opened
from megalong.data.video_pixels import resized, rgb_of_nv12
from megalong.data.video_process import ProcessFrameDecoder
from megalong.data.video_segments import read_coding
from megalong.records import FrameSelection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZE = (320, 240)
PYAV = {8: (1.3, 12), 10: (1.6, 16)}
"""By bits per sample: grey levels to the CPU path, the mean over a clip and the most of any value. FFmpeg's conversion
rounds down: on these pictures it is 0.7 (full range), 1.1 and 1.4 (10 bits) from the exact formulas."""
EXACT = {"nvcodec": (0.05, 1), "dali": (0.8, 12)}
"""The same to those formulas, video_pixels' on the CPU, of what FFmpeg decodes. Decoders must agree bit by bit, so
that PyNvVideoCodec's differ by a rounding at most. DALI interpolates chroma, which we and FFmpeg repeat, and rounds to
8 bits before we get its pictures."""

X264, X265 = "x264-params", {"x265-params": "log-level=none:bframes=4"}
FILES = {
    "h264 b-frames mp4": ("a.mp4", {"options": {"bf": "3", X264: "b-adapt=0:b-pyramid=normal"}}),
    "h264 no b-frames": ("a.mp4", {"options": {"bf": "0"}}),
    "h264 mkv": ("a.mkv", {"options": {"bf": "3", X264: "b-adapt=0"}}),
    "h264 ts": ("a.ts", {"options": {"bf": "3", X264: "b-adapt=0"}}),
    "h264 one keyframe": ("a.mp4", {"gop": 1000}),
    "h264 all keyframes": ("a.mp4", {"gop": 1}),
    "h264 bt709": ("a.mp4", {"options": {"colorspace": "bt709"}}),
    "h264 full range": ("a.mp4", {"pix_fmt": "yuvj420p"}),
    "h264 cropped": ("a.mp4", {"size": (606, 470)}),
    "hevc": ("a.mp4", {"codec": "libx265", "options": X265}),
    "hevc open gop": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=4:open-gop=1"}}),
    "hevc 10 bit": ("a.mp4", {"codec": "libx265", "options": X265, "pix_fmt": "yuv420p10le"}),
    "vp9": (
        "a.webm",
        {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}},
    ),
    "av1": ("a.mp4", {"codec": "libsvtav1", "options": {"preset": "10"}}),
    "rotated 90": ("a.mp4", {"rotation": 90}),
    "rotated 180": ("a.mp4", {"rotation": 180}),
    "mirrored": ("a.mp4", {"matrix": [-65536, 0, 0, 0, 65536, 0, 320 << 16, 0, 1 << 30]}),
    "variable frame rate": ("a.mp4", {"pts": [40 * i + 300 * (i // 7) for i in range(60)]}),
}
REFUSED_BY_DALI = {"h264 all keyframes": "CUDA_ERROR_INVALID_VALUE"}
"""It makes no decoder for a stream without references between pictures."""
NO_AV1 = {"nvcodec": "not supported on this GPU", "dali": "Failed to create video decoder"}
"""How they say that the GPU's engines do not decode it."""
REFUSED = {
    "mpeg4": ("a.mp4", {"codec": "mpeg4"}, "codec mpeg4"),
    "4:4:4": ("a.mp4", {"pix_fmt": "yuv444p"}, "pixel format"),
    "odd size": ("a.webm", {"codec": "libvpx-vp9", "size": (319, 239), "options": {"cpu-used": "8"}}, "odd size"),
    "open gop": ("a.mp4", {"options": {"bf": "3", X264: "b-adapt=0:open-gop=1"}}, "random access"),
    "intra refresh": ("a.mp4", {"options": {X264: "intra-refresh=1"}}, "random access"),
    "tiny": ("a.mp4", {"size": (16, 16)}, ""),
}


@pytest.fixture(scope="module", params=[VideoDecoder.dali, VideoDecoder.nvcodec], ids=lambda kind: kind.name)
def decoder(request):
    pytest.importorskip({"dali": "nvidia.dali", "nvcodec": "PyNvVideoCodec"}[request.param.name])
    decoder = open_decoder(request.param, torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(decoder, ProcessFrameDecoder)
    decoder.kind = request.param.name
    yield decoder
    decoder.close()


def pictures(width: int, height: int) -> list[np.ndarray]:
    """Numbered boards in soft colours that drift, so that colour conversion and resize are seen as well."""
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    found = []
    for number in range(60):
        board = numbered_picture(number, width=width, height=height).astype(np.float32)
        phase = np.array([0.0, 2.1, 4.2]) + number / 7
        colour = 40 * np.sin(phase + 3 * across + 2 * down)
        found.append(np.clip(board + np.where(board > 128, -1, 1) * np.abs(colour), 0, 255).astype(np.uint8))
    return found


def write(folder: Path, name: str, settings: dict) -> Path:
    settings = {"size": SIZE, **settings}
    return write_video(folder / name, 60, pictures=pictures(*settings["size"]), **settings)


def pick(path: Path, frames: list[int], *, height: int = 112, width: int = 112) -> FrameSelection:
    index = probe(path)
    seconds = tuple(index.seconds_F[frames].tolist())
    return FrameSelection(path=str(path), frames=tuple(frames), seconds=seconds, height=height, width=width)


def exact_frames(chosen: FrameSelection, *, first: int, last: int) -> np.ndarray:
    """[last - first, height, width, 3] uint8: every frame of the file decoded by FFmpeg, converted by video_pixels."""
    index = probe(chosen.path)
    coding = read_coding(index)
    height, width, wide = coding.height, coding.width, coding.bits > 8
    place_of = {int(tick): place for place, tick in enumerate(index.ticks_F)}
    found = {}
    with opened(chosen.path) as (container, stream):
        for frame in container.decode(stream):
            if place_of[frame.pts] not in chosen.frames[first:last]:
                continue
            samples = torch.from_numpy(frame.to_ndarray().astype(np.int32)).ravel() << (6 if wide else 0)
            luma_HW = samples[: height * width].view(height, width)
            chroma_hw2 = samples[height * width :].view(2, height // 2, width // 2).movedim(0, 2)
            rgb = rgb_of_nv12(luma_HW[None], chroma_hw2[None], coding, bits=16 if wide else 8)
            size = {"height": chosen.height, "width": chosen.width, "orientation": index.orientation}
            found[place_of[frame.pts]] = resized(rgb, **size)[0].numpy()
    return np.stack([found[frame] for frame in chosen.frames[first:last]])


def compare(decoder: ProcessFrameDecoder, chosen: FrameSelection, *, first: int = 0, last: int | None = None) -> None:
    last = len(chosen.frames) if last is None else last
    got = decoder.decode(chosen, first=first, last=last).frames_FHWC
    expected = decode_frames(chosen, first=first, last=last).frames_FHWC
    check(got, expected, PYAV[read_coding(probe(chosen.path)).bits], "PyAV")
    check(got, exact_frames(chosen, first=first, last=last), EXACT[decoder.kind], "exact")


def check(got: np.ndarray, expected: np.ndarray, bounds: tuple[float, float], what: str) -> None:
    assert got.shape == expected.shape
    assert got.dtype == np.uint8
    difference = got.astype(int) - expected
    mean, most, levels = np.abs(difference).mean(), np.abs(difference).max(), difference.mean((0, 1, 2)).round(2)
    print(f"{what}: mean {mean:.3f}, most {most}, by colour {levels}")  # noqa: T201 - the measured tolerance
    assert mean <= bounds[0]
    assert most <= bounds[1]


def assert_refused(decoder: ProcessFrameDecoder, chosen: FrameSelection, reason: str) -> None:
    """PyAV decodes it, and the reason is named."""
    got = decoder.decode(chosen, first=0, last=len(chosen.frames)).frames_FHWC
    np.testing.assert_array_equal(got, decode_frames(chosen).frames_FHWC)
    assert reason in decoder.fallbacks[chosen.path]


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_the_cpu_path(decoder, name, tmp_path):
    file, settings = FILES[name]
    path = write(tmp_path, file, settings)
    everything = pick(path, list(range(60)))
    if name == "av1":
        decoder.decode(everything, first=0, last=1)
        if NO_AV1[decoder.kind] in (reason := decoder.fallbacks.get(str(path), "")):
            pytest.skip(reason)
    if decoder.kind == "dali" and name in REFUSED_BY_DALI:
        assert_refused(decoder, everything, REFUSED_BY_DALI[name])
        return
    compare(decoder, everything)
    rng = np.random.default_rng(0)
    for count in (1, 1, 2, 5, 20):
        compare(decoder, pick(path, sorted(rng.choice(60, count, replace=False).tolist()), height=56, width=84))
    compare(decoder, everything, first=17, last=41)
    if "rotated" not in name and "mirrored" not in name:
        numbers = [read_number(picture) for picture in decoder.decode(everything, first=0, last=60).frames_FHWC]
        assert numbers == list(range(60))
    assert str(path) not in decoder.fallbacks, decoder.fallbacks[str(path)]


def test_a_file_of_nearly_the_size_of_another(decoder, tmp_path):
    """Cropped to nearly the size of one that is not: DALI would give it the other's hardware decoder."""
    compare(decoder, pick(write(tmp_path, "whole.mp4", {}), [3, 20, 41]))
    path = write(tmp_path, "cropped.mp4", {"size": (318, 234)})
    chosen = pick(path, [3, 20, 41])
    if decoder.kind == "nvcodec":
        compare(decoder, chosen)
        assert str(path) not in decoder.fallbacks
    else:
        got = decoder.decode(chosen, first=0, last=3).frames_FHWC
        np.testing.assert_array_equal(got, decode_frames(chosen).frames_FHWC)
        assert "mixes up files" in decoder.fallbacks[str(path)]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_gpu_refuses_is_decoded_by_pyav_and_named(decoder, name, tmp_path, caplog):
    file, settings, reason = REFUSED[name]
    path = write(tmp_path, file, settings)
    chosen = pick(path, [3, 20, 41])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_refused(decoder, chosen, reason)
    assert sum(str(path) in line for line in caplog.messages) == 1


def test_a_cut_or_missing_file_is_a_decode_error(decoder, tmp_path):
    whole = write(tmp_path, "a.mkv", {})
    chosen = pick(whole, list(range(60)))
    cut = replace(chosen, path=str(cut_file(whole, tmp_path / "cut.mkv", keep=0.6)))
    for broken in (cut, replace(chosen, path=str(tmp_path / "none.mkv"))):
        with pytest.raises(DecodeError):
            decoder.decode(broken, first=0, last=60)
        assert broken.path not in decoder.fallbacks


def test_damage_inside_a_packet_is_a_decode_error_of_pyav(decoder, tmp_path):
    import av

    path = write(tmp_path, "a.mp4", {})
    chosen = pick(path, list(range(60)))
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    data = bytearray(path.read_bytes())
    place, size = packets[13]
    data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    with pytest.raises(DecodeError, match="corrupt|cannot be decoded"):
        decoder.decode(chosen, first=0, last=60)
    assert str(path) in decoder.fallbacks


def test_a_selection_s_repeated_last_frame_is_decoded_once_and_repeated(decoder, tmp_path):
    chosen = pick(write(tmp_path, "a.mp4", {}), [2, 9, 30, 30, 30])
    got = decoder.decode(chosen, first=1, last=5).frames_FHWC
    assert [read_number(picture) for picture in got] == [9, 30, 30, 30]


def test_several_files_of_different_sizes_at_once(decoder, tmp_path):
    sizes = [(320, 240), (640, 360), (160, 320), (352, 288)]
    paths = [write(tmp_path, f"{place}.mp4", {"size": size}) for place, size in enumerate(sizes)] * 2
    with ThreadPoolExecutor(len(paths)) as pool:
        futures = [pool.submit(compare, decoder, pick(path, list(range(0, 60, 2)))) for path in paths]
        for future in futures:
            future.result()
    assert not {str(path) for path in paths} & decoder.fallbacks.keys()
