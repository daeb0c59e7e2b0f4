"""GPU decoding in a process of its own.

A dozen threads that feed decoders packet by packet hold Python's interpreter lock most of the time, and every call into
torch of the process that trains waits for it: with them it made a thirtieth of the calls per second.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megalong.data.video_index import VideoIndex, probe
from megalong.records import Clip, FrameSelection

logger = logging.getLogger(__name__)

SERVER = "megalong.data.video_process"
"""Module that the decoding process runs."""
_START_SECONDS = 300  # importing torch and the decoder's package
_KEY = "MEGALONG_DECODER_KEY"
_METHODS = ("probe", "decode")


class DecoderProcessError(Exception):
    """The decoding process ended, or did not start."""


class Decoder(Protocol):
    """What the process holds: thread-safe."""

    fallbacks: dict[str, str]

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip: ...


class ProcessFrameDecoder:
    """See FrameDecoder; calls of several threads are answered side by side. Raises DecoderProcessError, too.

    arguments: of the decoder, for the module SERVER. settings: see FrameDecoder.
    """

    on_gpu = True

    def __init__(self, *arguments: str, settings: str) -> None:
        self.settings = settings
        self.fallbacks: dict[str, str] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="megalong-decoder-"))
        self._lock = threading.Lock()
        self._calls: Any = None  # the proxy, when the process has answered
        socket, key = str(self._folder / "socket"), os.urandom(16).hex()
        self._manager = _Manager(address=socket, authkey=key.encode())
        self._process = subprocess.Popen(
            [sys.executable, "-m", SERVER, socket, str(os.getpid()), *arguments],
            env={**os.environ, _KEY: key, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # signals to the trainer's session end its step first
        )

    def probe(self, path: str) -> VideoIndex:
        """See video_index.probe."""
        return self._call("probe", path)

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip:
        """See FrameDecoder. The frames are in page-locked memory."""
        frames_FHWC, refusal = self._call("decode", selection, first, last)
        if refusal and self.fallbacks.setdefault(selection.path, refusal) is refusal:
            logger.warning("%s: decoded on the CPU, the GPU does not take it: %s", selection.path, refusal)
        pinned_FHWC = torch.empty(frames_FHWC.shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        pinned_FHWC.copy_(torch.from_numpy(frames_FHWC))
        return Clip(selection=selection, first=first, frames_FHWC=pinned_FHWC.numpy())

    def close(self) -> None:
        """End the process; what it is asked meanwhile fails."""
        self._process.kill()  # it has nothing to save, and pays no heed to SIGTERM
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, method: str, *args: object) -> Any:
        try:
            return getattr(self._connected(), method)(*args)
        except (EOFError, ConnectionError, AuthenticationError) as error:
            path = args[0] if isinstance(args[0], str) else args[0].path
            raise self._ended(f"at {path}") from error

    def _connected(self) -> Any:
        """The proxy: every thread has a connection of its own."""
        with self._lock:
            limit = time.monotonic() + _START_SECONDS
            while self._calls is None:
                if self._process.poll() is not None:
                    raise self._ended("before it decoded anything")
                if time.monotonic() > limit:
                    self._process.kill()
                    raise self._ended(f"since it was not ready after {_START_SECONDS} s")
                try:
                    self._manager.connect()
                    self._calls = self._manager.decoder()
                except (FileNotFoundError, ConnectionError):  # it does not listen yet
                    time.sleep(0.05)
            return self._calls

    def _ended(self, when: str) -> DecoderProcessError:
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "none"
        return DecoderProcessError(
            f"the decoding process {self._process.pid} ended {when} (exit code {code}; -9: killed, by the system when "
            "memory is short); its last words are in this process's output; video.decoder=pyav decodes without it"
        )


class _Manager(BaseManager):
    """The standard library's server of an object's methods, a thread to a connection."""


_Manager.register("decoder", exposed=_METHODS)


class _Served:
    """What the trainer calls."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._lock = threading.Lock()
        self._running = 0

    def probe(self, path: str) -> VideoIndex:
        return probe(path)

    def decode(self, selection: FrameSelection, first: int, last: int) -> tuple[np.ndarray, str | None]:
        """Frames, and why another decoder had to make them."""
        with self._lock:
            self._running += 1
        try:
            clip = self.decoder.decode(selection, first=first, last=last)
        finally:
            with self._lock:
                self._running -= 1
                if not self._running and torch.cuda.is_initialized():
                    torch.cuda.empty_cache()  # pictures at full size: the trainer needs the memory
        return clip.frames_FHWC, self.decoder.fallbacks.get(selection.path)


def serve(make: Callable[[list[str]], Decoder]) -> None:
    """The decoding process: its arguments are a socket, the trainer's process and what `make` takes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the trainer ends this process (Slurm tells every process)
    socket, trainer, *arguments = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(trainer), Path(socket).parent), daemon=True).start()
    served = _Served(make(arguments))

    class Manager(BaseManager):
        pass

    Manager.register("decoder", callable=lambda: served, exposed=_METHODS)
    Manager(address=socket, authkey=os.environ[_KEY].encode()).get_server().serve_forever()


def _end_with(trainer: int, folder: Path) -> None:
    """A trainer that is killed cannot end this process."""
    while os.getppid() == trainer:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main() -> None:
    from megalong.data.video_decoder import make_gpu_decoder

    def make(arguments: list[str]) -> Decoder:
        # Before anything is pinned: page-locked memory belongs to the first device that there is.
        torch.cuda.set_device(int(arguments[1]))
        return make_gpu_decoder(arguments)

    serve(make)


if __name__ == "__main__":
    main()
