"""GPU decoding in a process of its own.

A dozen threads that feed decoders packet by packet hold Python's interpreter lock most of the time, and every call into
torch of the process that trains waits for it: with them it made a thirtieth of the calls per second.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

import numpy as np
import torch

from megalong.data.video_index import DecodeError, VideoIndex, probe
from megalong.records import Clip, FrameSelection

logger = logging.getLogger(__name__)

SERVER = "megalong.data.video_process"
"""Module that the decoding process runs."""
_CALLS = 16  # that the process answers at a time; the trainer makes data.decode_workers at a time
_END_SECONDS = 5


class DecoderProcessError(Exception):
    """The decoding process ended, or failed."""


class Decoder(Protocol):
    """What the process holds: thread-safe. device: of its work, set in every thread."""

    device: torch.device
    fallbacks: dict[str, str]

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reply:
    """What the process answers; the bytes of the frames follow it."""

    number: int  # of the call
    index: VideoIndex | None = None
    frames_shape: tuple[int, ...] | None = None
    refusal: str | None = None  # why another decoder than the GPU's had to take the file
    broken: DecodeError | None = None
    failure: str | None = None  # of the process itself: what its error says


class ProcessFrameDecoder:
    """See FrameDecoder; calls of several threads are answered side by side. Raises DecoderProcessError, too.

    arguments: of the decoder, for the module SERVER. settings: see FrameDecoder.
    """

    on_gpu = True

    def __init__(self, *arguments: str, settings: str) -> None:
        self.settings = settings
        self.fallbacks: dict[str, str] = {}
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[tuple[_Reply, np.ndarray | None]]] = {}
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
        return self._call("probe", path, path)[0].index

    def decode(self, selection: FrameSelection, *, first: int, last: int) -> Clip:
        """See FrameDecoder. The frames are in page-locked memory."""
        frames_FHWC = self._call("decode", selection.path, selection, first, last)[1]
        return Clip(selection=selection, first=first, frames_FHWC=frames_FHWC)

    def close(self) -> None:
        """End the process; what it is asked meanwhile fails."""
        self._process.kill()  # it has nothing to save, and pays no heed to SIGTERM
        self._process.wait()
        self._reader.join()
        self._connection.close()

    def _call(self, method: str, path: str, *args: object) -> tuple[_Reply, np.ndarray | None]:
        number, answer = next(self._numbers), Future[tuple[_Reply, np.ndarray | None]]()
        request = pickle.dumps((number, method, args))
        with self._lock:
            if not self._ended:
                self._waiting[number] = answer
                with suppress(OSError):  # it is gone: the reader says how
                    self._connection.send_bytes(request)
            else:
                answer.set_result((_Reply(number=number, failure=self._ended), None))
        reply, frames_FHWC = answer.result()
        if reply.refusal and self.fallbacks.setdefault(path, reply.refusal) is reply.refusal:
            logger.warning("%s: decoded on the CPU, the GPU does not take it: %s", path, reply.refusal)
        if reply.broken is not None:
            raise reply.broken
        if reply.failure is not None:
            raise DecoderProcessError(f"{path}: {reply.failure}; video.decoder=pyav decodes without that process")
        return reply, frames_FHWC

    def _read(self) -> None:
        """On a thread: give answers to those who wait, until the process ends."""
        try:
            while True:
                reply: _Reply = pickle.loads(self._connection.recv_bytes())
                frames_FHWC = None
                if reply.frames_shape is not None:
                    pin = torch.cuda.is_available()
                    frames_FHWC = torch.empty(reply.frames_shape, dtype=torch.uint8, pin_memory=pin).numpy()
                    _receive(self._connection, frames_FHWC)
                with self._lock:
                    answer = self._waiting.pop(reply.number)
                answer.set_result((reply, frames_FHWC))
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
        for number, answer in lost.items():
            answer.set_result((_Reply(number=number, failure=self._ended), None))


def _receive(connection: Connection, frames: np.ndarray) -> None:
    """Fill an array with the bytes that follow a message, without a copy and without the interpreter lock."""
    left = memoryview(frames.reshape(-1))
    while left:
        count = os.readv(connection.fileno(), [left])
        if not count:
            raise EOFError
        left = left[count:]


def _send(connection: Connection, frames: np.ndarray) -> None:
    left = memoryview(np.ascontiguousarray(frames).reshape(-1))
    while left:
        left = left[os.write(connection.fileno(), left) :]


class _Server:
    """The decoding process's side of the connection."""

    def __init__(self, connection: Connection, decoder: Decoder) -> None:
        self.connection, self.decoder = connection, decoder
        self._pool = ThreadPoolExecutor(max_workers=_CALLS, thread_name_prefix="call")
        self._sending, self._counting = threading.Lock(), threading.Lock()
        self._decoding = 0

    def run(self) -> None:
        """Until the trainer hangs up."""
        while True:
            try:
                number, method, args = pickle.loads(self.connection.recv_bytes())
            except (EOFError, OSError):  # an OSError, when it did not read all that it was sent
                return
            self._pool.submit(self._answer, number, method, args)

    def _answer(self, number: int, method: str, args: tuple[Any, ...]) -> None:
        frames_FHWC = None
        try:
            if method == "probe":
                reply = _Reply(number=number, index=probe(*args))
            else:
                frames_FHWC = self._decode(*args)
                refusal = self.decoder.fallbacks.get(args[0].path)
                reply = _Reply(number=number, frames_shape=frames_FHWC.shape, refusal=refusal)
        except DecodeError as error:
            reply = _Reply(number=number, broken=error, refusal=self.decoder.fallbacks.get(error.path))
        except torch.OutOfMemoryError as error:
            reply = _Reply(
                number=number,
                failure=f"the decoding process {os.getpid()} found no memory on its GPU beside the trainer ({error}); "
                "lower rollout.memory_share or what the trainer takes (docs/memory.md)",
            )
        except Exception:  # noqa: BLE001 - the trainer gets it and ends the run
            text = traceback.format_exc()
            reply = _Reply(number=number, failure=f"the decoding process {os.getpid()} failed:\n{text}")
        try:
            with self._sending:
                self.connection.send_bytes(pickle.dumps(reply))
                if frames_FHWC is not None:
                    _send(self.connection, frames_FHWC)
        except BaseException:  # noqa: BLE001 - the trainer would wait for it for ever
            traceback.print_exc()
            os._exit(1)

    def _decode(self, selection: FrameSelection, first: int, last: int) -> np.ndarray:
        on_gpu = self.decoder.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.decoder.device)  # of this thread
        with self._counting:
            self._decoding += 1
        try:
            return self.decoder.decode(selection, first=first, last=last).frames_FHWC
        finally:
            with self._counting:
                self._decoding -= 1
                if on_gpu and not self._decoding:
                    _release_memory()


def _release_memory() -> None:
    """Pictures at full size: the trainer needs the memory."""
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:  # of a device that failed, which is what decoding has reported
        logger.warning("the decoding process could not release its memory: %s", error)


def serve(make: Callable[[list[str]], Decoder]) -> None:
    """The decoding process: its arguments are a connection, the trainer's process and what `make` takes."""
    faulthandler.enable()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the trainer ends this process (Slurm tells every process)
    file, trainer, *arguments = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(trainer),), daemon=True).start()
    try:
        _Server(Connection(int(file)), make(arguments)).run()
    except BaseException:  # noqa: BLE001 - its threads would keep it alive
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _end_with(trainer: int) -> None:
    """A trainer that is killed may leave its end of the connection to a child of its own."""
    while os.getppid() == trainer:
        time.sleep(1)
    os._exit(0)


def main() -> None:
    from megalong.data.video_decoder import make_gpu_decoder

    serve(make_gpu_decoder)


if __name__ == "__main__":
    main()
