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
from pathlib import Path

import fake_decoder
import numpy as np
import pytest
from test_video import numbers, pick
from video_files import write_video

from megalong.data import video_process
from megalong.data.video import DecodeError, decode_frames, probe
from megalong.data.video_process import DecoderProcessError, ProcessFrameDecoder

Make = Callable[[str], ProcessFrameDecoder]

TRAINER = """
import sys, time
from megalong.data import video_process
from megalong.data.video_process import ProcessFrameDecoder
video_process.SERVER = sys.argv[1]
decoder = ProcessFrameDecoder("packets", settings="packets")
decoder.probe(sys.argv[2])
print(decoder._process.pid, decoder._folder, flush=True)
time.sleep(600)
"""


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr(video_process, "SERVER", fake_decoder.__name__)
    made: list[ProcessFrameDecoder] = []

    def decoder(name: str) -> ProcessFrameDecoder:
        made.append(ProcessFrameDecoder(name, settings=name))
        return made[-1]

    yield decoder
    for item in made:
        item.close()
        assert not item._folder.exists()


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


def test_a_process_that_is_killed_is_an_error_that_says_where(make: Make, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    decoder = make("dying")
    for _ in range(2):
        with pytest.raises(DecoderProcessError, match=rf"ended at {path} \(exit code -9; -9: killed, by the system"):
            decoder.decode(pick(path, [3]), first=0, last=1)


def test_a_process_that_does_not_start_is_an_error(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DecoderProcessError, match=r"ended before it decoded anything \(exit code 1;"):
        make("broken").probe("a.mp4")
    assert "no such package" in capfd.readouterr().err


def test_it_ends_with_a_trainer_that_is_killed_and_not_by_the_scheduler_s_signal(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, fake_decoder.__name__, str(path)],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        pid, folder = trainer.stdout.readline().split()
        os.kill(int(pid), signal.SIGTERM)
        time.sleep(0.5)
        assert is_running(int(pid))
    finally:
        trainer.kill()
        trainer.wait()
    limit = time.monotonic() + 20
    while (is_running(int(pid)) or Path(folder).exists()) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not is_running(int(pid))
    assert not Path(folder).exists()


def is_running(pid: int) -> bool:
    """Not ended, though nobody may have waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
