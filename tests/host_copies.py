"""What stands for the copies between a GPU and the host where there is no GPU, for the optimizer's states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Copy:
    """Of some tensors, to be done once what it comes after is."""

    run: Callable[[], object]
    after: tuple[Copy, ...]
    is_done: bool = False

    def do(self) -> None:
        if not self.is_done:
            self.is_done = True
            for copy in self.after:
                copy.do()
            self.run()


class LateCopies:
    """A copy is done when something waits for it and no earlier, which is as late as a stream may do it."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.moved = [0, 0]  # bytes there and back
        self._last = [Copy(lambda: None, ()), Copy(lambda: None, ())]  # of each stream

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def buffer(self, num_bytes: int) -> Tensor:
        self.buffers.append(torch.full((num_bytes,), 255, dtype=torch.uint8))  # NaN as any floating-point type
        return self.buffers[-1]

    def to_device(self, host: Sequence[Tensor], device: Sequence[Tensor], after: Copy | None) -> Copy:
        return self._start(0, host, device, () if after is None else (after,))

    def to_host(self, device: Sequence[Tensor], host: Sequence[Tensor]) -> Copy:
        return self._start(1, device, host, ())

    def wait(self, event: Copy) -> None:
        event.do()

    def finish(self) -> None:
        for copy in self._last:
            copy.do()

    def _start(
        self, stream: int, sources: Sequence[Tensor], targets: Sequence[Tensor], after: tuple[Copy, ...]
    ) -> Copy:
        def run() -> None:
            for source, target in zip(sources, targets, strict=True):
                assert source.shape == target.shape
                assert source.dtype == target.dtype
                target.copy_(source)
                self.moved[stream] += source.nbytes

        self._last[stream] = Copy(run, (self._last[stream], *after))
        return self._last[stream]


class EarlyCopies(LateCopies):
    """A copy is done at once."""

    def _start(
        self, stream: int, sources: Sequence[Tensor], targets: Sequence[Tensor], after: tuple[Copy, ...]
    ) -> Copy:
        copy = super()._start(stream, sources, targets, after)
        copy.do()
        return copy
