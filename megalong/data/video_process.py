"""GPU decoding in a process of its own.

A dozen threads that feed decoders packet by packet hold Python's interpreter lock most of the time, and every call into
torch of the process that trains waits for it: with them it made a thirtieth of the calls per second.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe

import numpy as np
import torch

from megalong.data.video_index import DecodeError, VideoIndex
from megalong.records import Clip, FrameSelection

logger = logging.getLogger(__name__)

SERVER = "megalong.data.video_server"
"""Module that the decoding process runs: another one than this, whose classes would have other names there."""
_END_SECONDS = 5


class DecoderProcessError(Exception):
    """The decoding process ended, or failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Frames of an answer, as they are there; their bytes follow it."""

    number: int  # of the call
    place: int  # of the first one
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The end of an answer."""

    number: int  # of the call
    index: VideoIndex | None = None
    refusal: str | None = None  # why another decoder than the GPU's had to take the file
    broken: DecodeError | None = None
    failure: str | None = None  # of the process itself: what its error says


@dataclass(frozen=True, slots=True)
class _Call:
    frames: Future[np.ndarray] = field(default_factory=Future)  # that the pieces are written to
    answer: Future[Reply] = field(default_factory=Future)


class ProcessFrameDecoder:
    """See FrameDecoder; calls of several threads are answered side by side. Raises DecoderProcessError, too.

    arguments: of the decoder, for the module SERVER. settings: see FrameDecoder.
    """

    on_gpu = True

    def __init__(self, *arguments: str, settings: str) -> None:
        self.settings = settings
        self.fallbacks: dict[str, str] = {}
        self._numbers = itertools.count()
        self._waiting: dict[int, _Call] = {}
        self._lock = threading.Lock()  # of what is sent, and of _waiting
        self._ended = ""  # how, once it is known
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER, str(theirs.fileno()), str(os.getpid()), *arguments],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # signals to the trainer's session end its step first
            )
        self._reader = threading.Thread(target=self._read, name="decoder replies", daemon=True)
        self._reader.start()

    def probe(self, path: str) -> VideoIndex:
        """See video_index.probe."""
        return self._result(self._send("probe", path), path).index

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip:
        """See FrameDecoder. The frames are in page-locked memory."""
        call = self._send("decode", selection, first, last)
        shape = (last - first, selection.height, selection.width, 3)
        try:  # meanwhile: page-locking the frames of an hour takes seconds
            frames_FHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
        except BaseException as error:
            call.frames.set_exception(error)
            raise
        call.frames.set_result(frames_FHWC)
        self._result(call, selection.path)
        return Clip(selection=selection, first=first, frames_FHWC=frames_FHWC)

    def close(self) -> None:
        """End the process; what it is asked meanwhile fails."""
        self._process.kill()  # it has nothing to save, and pays no heed to SIGTERM
        self._process.wait()
        self._reader.join()
        self._connection.close()

    def _send(self, method: str, *args: object) -> _Call:
        number, call = next(self._numbers), _Call()
        request = pickle.dumps((number, method, args))
        with self._lock:
            if not self._ended:
                self._waiting[number] = call
                with suppress(OSError):  # it is gone: the reader says how
                    self._connection.send_bytes(request)
            else:
                call.answer.set_result(Reply(number=number, failure=self._ended))
        return call

    def _result(self, call: _Call, path: str) -> Reply:
        reply = call.answer.result()
        if reply.refusal and self.fallbacks.setdefault(path, reply.refusal) is reply.refusal:
            logger.warning("%s: decoded on the CPU, the GPU does not take it: %s", path, reply.refusal)
        if reply.broken is not None:
            raise reply.broken
        if reply.failure is not None:
            raise DecoderProcessError(f"{path}: {reply.failure}; video.decoder=pyav decodes without that process")
        return reply

    def _read(self) -> None:
        """On a thread: give answers to those who wait, until the process ends."""
        try:
            while True:
                message: Piece | Reply = pickle.loads(self._connection.recv_bytes())
                if isinstance(message, Piece):
                    frames_FHWC = self._waiting[message.number].frames.result()
                    into_FHWC = frames_FHWC[message.place :][: message.shape[0]]
                    if into_FHWC.shape != message.shape:
                        raise ValueError(f"{message} is not of frames of shape {frames_FHWC.shape}")
                    _receive(self._connection, into_FHWC)
                    continue
                with self._lock:
                    call = self._waiting.pop(message.number)
                call.answer.set_result(message)
        except (EOFError, OSError):
            why = ""  # it has hung up
        except Exception as error:  # noqa: BLE001 - told to those who wait
            why = f" because of {error!r} here"
            self._process.kill()
        try:
            code = self._process.wait(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:  # it has hung up, and something in it does not end
            self._process.kill()
            code = self._process.wait()
        with self._lock:
            self._ended = (
                f"the decoding process {self._process.pid} has ended{why} (exit code {code}; -9: killed, by the system "
                "when memory is short); what it said is in this process's output"
            )
            lost, self._waiting = self._waiting, {}
        for number, call in lost.items():
            call.answer.set_result(Reply(number=number, failure=self._ended))


def _receive(connection: Connection, frames: np.ndarray) -> None:
    """Fill an array with the bytes that follow a message, without a copy and without the interpreter lock."""
    left = memoryview(frames.reshape(-1))
    while left:
        count = os.readv(connection.fileno(), [left])
        if not count:
            raise EOFError
        left = left[count:]
