"""The decoding process (video_process): what it runs, and how it answers."""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch

from megalong.data.video_decoder import make_gpu_decoder
from megalong.data.video_index import DecodeError, probe
from megalong.data.video_process import Piece, Reply
from megalong.records import FrameSelection

logger = logging.getLogger(__name__)

_CALLS = 16  # that the process answers at a time; the trainer makes data.decode_workers at a time


class Decoder(Protocol):
    """What the process holds: thread-safe. device: of its work, set in every thread."""

    device: torch.device
    fallbacks: dict[str, str]

    def pieces(self, selection: FrameSelection, *, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """See GpuFrameDecoder."""
        ...


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
        try:
            if method == "probe":
                reply = Reply(number=number, index=probe(*args))
            else:
                self._decode(number, *args)
                reply = Reply(number=number, refusal=self.decoder.fallbacks.get(args[0].path))
        except DecodeError as error:
            reply = Reply(number=number, broken=error, refusal=self.decoder.fallbacks.get(error.path))
        except torch.OutOfMemoryError as error:
            reply = Reply(
                number=number,
                failure=f"the decoding process {os.getpid()} found no memory on its GPU beside the trainer ({error}); "
                "lower rollout.memory_share or what the trainer takes (docs/memory.md)",
            )
        except Exception:  # noqa: BLE001 - the trainer gets it and ends the run
            text = traceback.format_exc()
            reply = Reply(number=number, failure=f"the decoding process {os.getpid()} failed:\n{text}")
        self._send(reply)

    def _decode(self, number: int, selection: FrameSelection, first: int, last: int) -> None:
        """Send the frames, piece by piece."""
        on_gpu = self.decoder.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.decoder.device)  # of this thread
        with self._counting:
            self._decoding += 1
        try:
            for place, frames_FHWC in self.decoder.pieces(selection, first=first, last=last):
                self._send(Piece(number=number, place=place, shape=frames_FHWC.shape), frames_FHWC)
        finally:
            with self._counting:
                self._decoding -= 1
                if on_gpu and not self._decoding:
                    _release_memory()

    def _send(self, message: Reply | Piece, frames: np.ndarray | None = None) -> None:
        try:
            with self._sending:
                self.connection.send_bytes(pickle.dumps(message))
                left = memoryview(b"" if frames is None else np.ascontiguousarray(frames).reshape(-1))
                while left:
                    left = left[os.write(self.connection.fileno(), left) :]
        except BaseException:  # noqa: BLE001 - the trainer would wait for it for ever
            traceback.print_exc()
            os._exit(1)


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


if __name__ == "__main__":
    serve(make_gpu_decoder)
