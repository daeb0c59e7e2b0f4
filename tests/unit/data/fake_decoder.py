"""In the place of megalong.data.video_process: the decoding process, with FFmpeg in the place of the hardware."""

from __future__ import annotations

import os
import sys

import torch
from test_video_decoder import PacketDecoder, Refusing

from megalong.data import video_process
from megalong.data.video_decoder import GpuFrameDecoder


class Dying(PacketDecoder):
    def decode(self, *_: object) -> None:
        os.kill(os.getpid(), 9)


DECODERS = {"packets": PacketDecoder, "refusing": Refusing, "dying": Dying}


def make(arguments: list[str]) -> GpuFrameDecoder:
    (name,) = arguments
    if name == "broken":
        sys.exit("no such package")
    return GpuFrameDecoder(torch.device("cpu"), DECODERS[name], streams=3)


if __name__ == "__main__":
    video_process.serve(make)
