"""The decoding process: what it decodes, what it refuses, how it ends."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import av
import fake_decoder
import numpy as np
import pytest
from test_video import numbers, pick
from video_files import write_video

from megalong.data import video_process
from megalong.data.video import DecodeError, decode_frames, probe
from megalong.data.video_process import DecoderProcessError, ProcessFrameDecoder

Make = Callable[[str], ProcessFrameDecoder]
SERVER = video_process.SERVER
"""What a training run starts."""

TRAINER = """
import sys, time
from megalong.data import video_process
from megalong.data.video_process import ProcessFrameDecoder
video_process.SERVER = sys.argv[1]
decoder = ProcessFrameDecoder("packets", settings="packets")
decoder.probe(sys.argv[2])
print(decoder._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def make() -> Iterator[Make]:
    made: list[ProcessFrameDecoder] = []

    @cache
    def decoder(name: str) -> ProcessFrameDecoder:
        made.append(ProcessFrameDecoder(name, settings=name))
        return made[-1]

    with mock.patch.object(video_process, "SERVER", fake_decoder.__name__):
        yield decoder
    for item in made:
        item.close()


def test_files_are_indexed_and_decoded_side_by_side(make: Make, tmp_path: Path) -> None:
    decoder = make("packets")
    paths = [write_video(tmp_path / f"{place}.mp4", 60, gop=12) for place in range(3)]
    index, here = decoder.probe(str(paths[0])), probe(paths[0])
    assert index.ticks_F.tolist() == here.ticks_F.tolist()
    assert (index.key_ticks, index.width, index.orientation) == (here.key_ticks, here.width, here.orientation)
    chosen = [pick(path, list(range(60))) for path in paths]
    with ThreadPoolExecutor(3) as pool:
        for clip, selection in zip(
            pool.map(lambda item: decoder.decode(item, first=7, last=60), chosen), chosen, strict=True
        ):
            assert (clip.selection, clip.first) == (selection, 7)
            assert numbers(clip) == list(range(7, 60))
            expected = decode_frames(selection, first=7, last=60).frames_FHWC
            assert np.abs(clip.frames_FHWC.astype(int) - expected).max() <= 1
    assert decoder.fallbacks == {}


def test_what_a_training_run_starts_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself, which has no GPU's package here, and finds that out when it decodes."""
    (tmp_path / "PyNvVideoCodec.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(video_process, "SERVER", SERVER)
    path = write_video(tmp_path / "a.mp4", 60, gop=12)
    decoder = ProcessFrameDecoder("nvcodec", "0", "0", settings="nvcodec")
    try:
        assert decoder.probe(str(path)).ticks_F.tolist() == probe(path).ticks_F.tolist()
        with pytest.raises(DecodeError, match="no such file"):
            decoder.probe(str(tmp_path / "b.mp4"))
        with pytest.raises(DecoderProcessError, match=r"failed:\nTraceback(.|\n)*video_server.py"):
            decoder.decode(pick(path, [3]), first=0, last=1)
    finally:
        decoder.close()


def test_a_refused_file_is_counted_and_named_once(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_video(tmp_path / "a.mp4", 60, gop=12)
    decoder = make("refusing")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert numbers(decoder.decode(pick(path, list(range(60))), first=0, last=60)) == list(range(60))
    assert decoder.fallbacks == {str(path): "not today"}
    assert [str(path) in line and "not today" in line for line in caplog.messages] == [True]


def test_a_file_that_cannot_be_decoded_is_a_decode_error_and_the_process_goes_on(make: Make, tmp_path: Path) -> None:
    decoder, good = make("packets"), write_video(tmp_path / "a.mp4", 60)
    chosen = pick(good, [3])
    good.rename(tmp_path / "b.mp4")
    for call in (lambda: decoder.probe(str(good)), lambda: decoder.decode(chosen, first=0, last=1)):
        with pytest.raises(DecodeError) as caught:
            call()
        assert (caught.value.path, caught.value.reason) == (str(good), "no such file or directory")
    assert numbers(decoder.decode(pick(tmp_path / "b.mp4", [3]), first=0, last=1)) == [3]


def test_a_file_that_is_refused_and_broken_is_both(make: Make, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    chosen = pick(path, list(range(60)))
    with av.open(str(path)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux() if packet.size][13]
    data = bytearray(path.read_bytes())
    data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    decoder = make("refused")
    with pytest.raises(DecodeError, match="corrupt|cannot be decoded"):
        decoder.decode(chosen, first=0, last=60)
    assert decoder.fallbacks == {str(path): "not today"}


@pytest.mark.parametrize("fault", ["dying", "dying later"])
def test_a_process_that_is_killed_is_an_error_that_says_where(make: Make, fault: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    decoder = make(fault)
    text = rf"^{path}: the decoding process {decoder._process.pid} has ended \(exit code -9; -9: killed, by the system"
    large = replace(pick(path, [3]), height=1 << 14, width=1 << 14)  # on its way for a while
    for _ in range(2):
        with pytest.raises(DecoderProcessError, match=text):
            decoder.decode(large, first=0, last=1)


def test_frames_of_another_size_than_asked_for_end_the_process(make: Make, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    decoder = make("miscounting")
    with pytest.raises(
        DecoderProcessError, match=r"because of .*shape=\(1, 2, 2, 3\)\) is not of frames of shape \(1, "
    ):
        decoder.decode(pick(path, [3]), first=0, last=1)


def test_an_error_of_the_process_arrives_with_its_traceback_and_it_goes_on(make: Make, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    decoder = make("confused")
    with pytest.raises(DecoderProcessError, match=r"failed:\nTraceback(.|\n)*in decode\n(.|\n)*a file of its own"):
        decoder.decode(pick(path, [3]), first=0, last=1)
    assert decoder.probe(str(path)).num_frames == 60
    with pytest.raises(DecoderProcessError, match=r"found no memory on its GPU .*4 GiB.*lower rollout.memory_share"):
        make("full").decode(pick(path, [3]), first=0, last=1)


def test_a_process_that_does_not_start_is_an_error(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        DecoderProcessError, match=r"has ended \(exit code 1;.*what it said is in this process's output"
    ):
        make("broken").probe("a.mp4")
    assert "no such package" in capfd.readouterr().err


def test_what_cannot_be_received_ends_the_process(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("no page-locked memory")

    path = write_video(tmp_path / "a.mp4", 60)
    decoder, chosen = make("packets again"), pick(path, [3])
    assert decoder.probe(str(path)).num_frames == 60
    with monkeypatch.context() as patch:
        patch.setattr(video_process.torch, "empty", full)
        with pytest.raises(RuntimeError, match="no page-locked memory"):
            decoder.decode(chosen, first=0, last=1)
    decoder._process.wait(timeout=60)  # its answer finds no place
    with pytest.raises(DecoderProcessError, match=r"has ended because of RuntimeError\('no page-locked memory'\) here"):
        decoder.decode(chosen, first=0, last=1)


def test_it_ends_with_a_trainer_that_is_killed_and_not_by_the_scheduler_s_signal(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, fake_decoder.__name__, str(path)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        pid = int(trainer.stdout.readline())
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)
        assert is_running(pid)
    finally:
        trainer.kill()
        trainer.wait()
    limit = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Not ended, though nobody may have waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
