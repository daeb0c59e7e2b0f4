"""Tensors that live in host memory visit the device in pieces, copied there and back beside what is computed on them.

Three pieces are on the device at a time: one on its way there, one that is computed on and one on its way back, so that
both directions are always busy.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megalong.config.costs import STATE_BUFFERS, STATE_PIECE_BYTES

PIECE_BYTES = STATE_PIECE_BYTES
"""Most of a tensor that is on the device in one piece."""
_PORTABLE = 1  # cudaHostRegisterPortable


class HostCopies(Protocol):
    """Host memory and how pieces move. An event is done when the copies before it are."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in host memory that copies go to and from beside the compute."""

    def buffer(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 on the device."""

    def to_device(self, host: Sequence[Tensor], device: Sequence[Tensor], after: Any) -> Any:
        """Start copying when `after` (None: nothing) is done: event."""

    def to_host(self, device: Sequence[Tensor], host: Sequence[Tensor]) -> Any:
        """Start copying when what was computed so far is done: event."""

    def wait(self, event: Any) -> None:
        """What is computed from here on starts when the event is done."""

    def finish(self) -> None:
        """Return when all copies are done."""


class CudaHostCopies:
    """Pinned memory and one stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.there, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pinned: list[Tensor] = []
        # The list keeps the memory until it is no longer pinned; at exit the driver does that.
        weakref.finalize(self, _unpin_all, self._pinned).atexit = False

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Raises MemoryError when the host refuses it (a container at its limit is ended by its system instead).

        Pinned as it is: torch's allocator of pinned memory rounds up to a power of two. A mapping of its own, shared
        with child processes: of a private one, the processes that write a checkpoint would get a copy of all that is
        pinned; and the tensor is its whole storage, which is what the writer of checkpoints does not copy either.
        """
        count = math.prod(shape)
        num_bytes = count * dtype.itemsize
        try:
            tensor = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=dtype, count=count).view(*shape)
        except OSError as error:
            raise MemoryError(f"{num_bytes:,} bytes of host memory for a tensor {tuple(shape)}: {error}") from error
        code = pin(tensor)
        if code:
            held = sum(other.nbytes for other in self._pinned)
            raise MemoryError(
                f"cudaHostRegister cannot pin {num_bytes:,} bytes of host memory beside {held:,} (CUDA error {code})"
            )
        self._pinned.append(tensor)
        return tensor

    def buffer(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def to_device(
        self, host: Sequence[Tensor], device: Sequence[Tensor], after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        # The memory of the first pieces may have been freed by work that is still queued.
        self.there.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None:
            self.there.wait_event(after)
        return _copy(host, device, self.there)

    def to_host(self, device: Sequence[Tensor], host: Sequence[Tensor]) -> torch.cuda.Event:
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        return _copy(device, host, self.back)

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        self.there.synchronize()
        self.back.synchronize()


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor], stream: torch.cuda.Stream) -> torch.cuda.Event:
    with torch.cuda.stream(stream):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
    return stream.record_event()


def pin(tensor: Tensor) -> int:
    """Page-lock the memory of a tensor for every CUDA context of the process; returns CUDA's error code, 0 if done."""
    return int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, _PORTABLE))


def unpin(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def _unpin_all(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        unpin(tensor)


def compute_on_device(
    pieces: Sequence[Sequence[Tensor]], compute: Callable[[int, Sequence[Tensor]], None], copies: HostCopies
) -> None:
    """compute(index, the device's copies of pieces[index]) for each piece in turn; what it leaves in them goes back.

    pieces: flat tensors in host memory, each at most PIECE_BYTES; they have their new values when this returns.
    """
    if not pieces:
        return
    longest = max(tensor.nbytes for piece in pieces for tensor in piece)
    slots = [[copies.buffer(longest) for _ in range(max(map(len, pieces)))] for _ in range(STATE_BUFFERS)]
    arrived: dict[int, Any] = {}

    def visitors(index: int) -> list[Tensor]:
        buffers = slots[index % STATE_BUFFERS]
        return [buffer[: host.nbytes].view(host.dtype) for buffer, host in zip(buffers, pieces[index], strict=False)]

    def start(index: int, after: Any) -> None:
        if index < len(pieces):
            arrived[index] = copies.to_device(pieces[index], visitors(index), after)

    try:
        for index in range(STATE_BUFFERS):
            start(index, None)
        for index, piece in enumerate(pieces):
            copies.wait(arrived.pop(index))
            compute(index, visitors(index))
            left = copies.to_host(visitors(index), piece)
            start(index + STATE_BUFFERS, left)
    finally:
        # Freed before that, the buffers would be overwritten while copies read and write them.
        copies.finish()
