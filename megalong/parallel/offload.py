"""Activations wait for their backward in host memory and are copied there and back beside the compute.

A forward puts tensors layer by layer; its backward takes them in the opposite order. On the device there are those of
two layers: in the forward the last two that were put, whose copies may still be under way, and in the backward the one
that is being differentiated and the one before it, which is on its way back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from megalong.config.costs import OFFLOAD_DEVICE_LAYERS

DEVICE_LAYERS = OFFLOAD_DEVICE_LAYERS
"""Layers whose tensors may be on the device at a time, beside those of the layer that runs."""
BLOCK_BYTES = 1 << 26
"""Host memory is taken in blocks of this size: torch's allocator of pinned memory rounds up to a power of two and
reuses what is exactly as large, whatever the lengths of the packs."""


class Copies(Protocol):
    """How tensors move. An event is done when the copy before it is."""

    def to_host(self, tensor: Tensor) -> tuple[Sequence[Tensor], Any]:
        """Start copying a contiguous tensor: (host blocks, event)."""

    def to_device(self, blocks: Sequence[Tensor], like: Tensor, after: Any) -> tuple[Tensor, Any]:
        """Start copying back when `after` is done: (tensor, event). like: a meta tensor of its shape and dtype."""

    def wait(self, event: Any) -> None:
        """What is computed from here on starts when the event is done."""


class CudaCopies:
    """Pinned memory and one stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> tuple[Sequence[Tensor], torch.cuda.Event]:
        self.out.wait_stream(torch.cuda.current_stream(self.device))
        blocks = []
        with torch.cuda.stream(self.out):
            for part in _blocks(tensor):
                block = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
                blocks.append(block.copy_(part, non_blocking=True))
        return blocks, self.out.record_event()

    def to_device(
        self, blocks: Sequence[Tensor], like: Tensor, after: torch.cuda.Event
    ) -> tuple[Tensor, torch.cuda.Event]:
        tensor = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        # The memory may have been freed by work that is still queued.
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        self.back.wait_event(after)
        with torch.cuda.stream(self.back):
            for part, block in zip(_blocks(tensor), blocks, strict=True):
                part.copy_(block, non_blocking=True)
        return tensor, self.back.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(BLOCK_BYTES // tensor.element_size())


class _Layer:
    """What a layer put, and the layer before it in the same forward."""

    def __init__(self, before: _Layer | None) -> None:
        self.items: list[_Item] = []
        self.before = before

    def start_back(self) -> None:
        for item in self.items:
            item.start_back()

    def leave_device(self) -> None:
        for item in self.items:
            item.leave_device()


class _Item:
    """One tensor: on the device, in host memory, or both."""

    def __init__(self, tensor: Tensor, copies: Copies) -> None:
        self.copies = copies
        self.tensor: Tensor | None = tensor.detach().contiguous()
        self.like = torch.empty_like(self.tensor, device="meta")
        self.blocks, self.out = copies.to_host(self.tensor)
        self.back: Any = None

    def leave_device(self) -> None:
        # Freed before that, its memory would be overwritten while the copy reads it.
        self.copies.wait(self.out)
        self.tensor = None

    def start_back(self) -> None:
        if self.tensor is None:
            self.tensor, self.back = self.copies.to_device(self.blocks, self.like, self.out)

    def take(self) -> Tensor:
        # Of a tensor that never left, the way out may still be under way: nobody reads what arrives.
        if self.back is not None:
            self.copies.wait(self.back)
        tensor, self.tensor, self.blocks = self.tensor, None, ()
        return tensor


class Offload:
    """The activations of forwards that await their backward; several forwards may be under way (pipeline stages)."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self._open: _Layer | None = None  # of the forward that runs
        self._resident: deque[_Layer] = deque()

    @contextmanager
    def forward(self, is_layer_input: Callable[[Tensor], bool], *, layers: int) -> Iterator[None]:
        """One forward. The first `layers` tensors that autograd saves and is_layer_input accepts go to the host.

        Each ends a layer.
        """
        left = layers

        def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
            nonlocal left
            if not left or not is_layer_input(tensor):
                return tensor
            left -= 1
            back = self.put(tensor)
            self._end_layer()
            return back

        def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed()

        self._open = _Layer(None)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield
        finally:
            self._open = None

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Send a tensor of the layer that runs to the host. Returns what gives it back, once; starts the layer before.

        Raises RuntimeError outside a forward, or when it is asked for twice.
        """
        if self._open is None:
            raise RuntimeError("activations can be offloaded inside a forward only")
        item, layer = _Item(tensor, self.copies), self._open
        layer.items.append(item)

        def take() -> Tensor:
            if item not in layer.items:
                raise RuntimeError("an offloaded activation was asked for twice; its host memory is given up")
            layer.start_back()
            if layer.before is not None:
                layer.before.start_back()
            layer.items.remove(item)
            return item.take()

        return take

    def _end_layer(self) -> None:
        self._resident.append(self._open)
        self._open = _Layer(self._open)
        if len(self._resident) > DEVICE_LAYERS:
            self._resident.popleft().leave_device()
