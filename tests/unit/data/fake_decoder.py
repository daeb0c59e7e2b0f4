"""In the place of megalong.data.video_server: the decoding process, with FFmpeg in the place of the hardware."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from test_video_decoder import PacketDecoder, Refusing

from megalong.data import video_server
from megalong.data.video_decoder import GpuFrameDecoder
from megalong.data.video_segments import RefusedError
from megalong.records import FrameSelection


class Dying(PacketDecoder):
    def decode(self, *_: object) -> None:
        os.kill(os.getpid(), 9)


class Refused(PacketDecoder):
    def decode(self, *_: object) -> None:
        raise RefusedError("not today")


class Confused(PacketDecoder):
    def decode(self, *_: object) -> None:
        raise EOFError("a file of its own")


class Full(PacketDecoder):
    def decode(self, *_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 4 GiB")


DECODERS = {
    "packets": PacketDecoder, "packets again": PacketDecoder, "refusing": Refusing, "refused": Refused, "dying": Dying,
    "confused": Confused, "full": Full,
}  # fmt: skip


class DyingLater:
    """Ends while its frames are on their way, at the latest before it says that they have left."""

    device = torch.device("cpu")
    fallbacks: ClassVar[dict[str, str]] = {}

    def pieces(self, selection: FrameSelection, *, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        threading.Timer(0.2, os.kill, (os.getpid(), 9)).start()
        yield 0, np.zeros((last - first, selection.height, selection.width, 3), np.uint8)
        os.kill(os.getpid(), 9)


class Miscounting(DyingLater):
    """Sends frames of another size than it was asked for."""

    def pieces(self, selection: FrameSelection, *, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, np.zeros((last - first, 2, 2, 3), np.uint8)


def make(arguments: list[str]) -> video_server.Decoder:
    (name,) = arguments
    if name == "dying later":
        return DyingLater()
    if name == "miscounting":
        return Miscounting()
    if name == "broken":
        sys.exit("no such package")
    return GpuFrameDecoder(torch.device("cpu"), DECODERS[name], streams=3)


if __name__ == "__main__":
    video_server.serve(make)
