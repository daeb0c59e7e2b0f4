"""Activations that wait in host memory: what is where at every moment, and that the right ones come back."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalong.parallel.offload import Offload


class FakeCopies:
    """Copies between ordinary tensors; counts those that stand for device memory and notes what happens in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.on_device: list[weakref.ref[Tensor]] = []

    def to_host(self, tensor: Tensor) -> tuple[list[Tensor], str]:
        name = f"{tensor.flatten()[0].item():g}"
        self.on_device.append(weakref.ref(tensor))
        self.log.append(f"out {name}")
        return [tensor.clone()], f"out {name}"

    def to_device(self, blocks: list[Tensor], like: Tensor, after: str) -> tuple[Tensor, str]:
        name = after.removeprefix("out ")
        tensor = blocks[0].clone().view(like.shape)
        self.on_device.append(weakref.ref(tensor))
        self.log.append(f"back {name}")
        return tensor, f"back {name}"

    def wait(self, event: str) -> None:
        self.log.append(f"wait {event}")

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.on_device)


def is_input(tensor: Tensor) -> bool:
    return tensor.dim() == 2


class Layer(torch.autograd.Function):
    """y = x * scale * (its `kept` output), which it asks for again in the backward as a recomputed layer would."""

    @staticmethod
    def forward(ctx: object, x: Tensor, scale: Tensor, offload: Offload, kept: bool) -> Tensor:
        ctx.back = offload.put(x.detach() + 0.5) if kept else None
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        if ctx.back is not None:
            torch.testing.assert_close(ctx.back(), x + 0.5, rtol=0, atol=0)
        return grad * scale, (grad * x).sum().reshape(1), None, None


def forward(offload: Offload, x: Tensor, scales: list[Tensor], *, kept: bool = False) -> Tensor:
    with offload.forward(is_input, layers=len(scales)):
        for scale in scales:
            x = Layer.apply(x, scale, offload, kept)
    return x


def scales() -> list[Tensor]:
    return [torch.tensor([float(factor)], requires_grad=True) for factor in (2, 3, 5, 7)]


def test_layers_leave_two_behind_and_come_back_one_ahead() -> None:
    copies = FakeCopies()
    out = forward(Offload(copies), torch.ones(2, 3, requires_grad=True), scales())
    # The inputs are 1, 2, 6 and 30; with the third layer the first leaves the device.
    assert copies.log == ["out 1", "out 2", "out 6", "wait out 1", "out 30", "wait out 2"]
    copies.log.clear()
    out.sum().backward()
    # 30 and 6 are still there. With a layer, the one before it starts on its way.
    assert copies.log == ["back 2", "back 1", "wait back 2", "wait back 1"]


def test_gradients_are_those_without_an_offload() -> None:
    for kept in (False, True):
        x, factors = torch.tensor([[1.0, -2.0]], requires_grad=True), scales()
        offload = Offload(FakeCopies())
        (forward(offload, x, factors, kept=kept) ** 2).sum().backward()
        assert x.grad.tolist() == [[2 * 210 * 210.0, 2 * 210 * -420.0]]
        assert [factor.grad.item() for factor in factors] == [2 * 5 * 210**2 / factor.item() for factor in factors]


def test_no_more_than_two_layers_are_on_the_device() -> None:
    """Two tensors a layer; autograd itself holds the one that it is at."""
    copies = FakeCopies()
    seen: list[int] = []
    put, offload = Offload.put, Offload(copies)

    def watch(self: Offload, tensor: Tensor) -> Callable[[], Tensor]:
        back = put(self, tensor)
        seen.append(copies.alive())

        def take() -> Tensor:
            tensor = back()
            seen.append(copies.alive())
            return tensor

        return take

    offload.put = watch.__get__(offload)
    x = torch.ones(1, 1, requires_grad=True)
    factors = [torch.tensor([1.0 + i], requires_grad=True) for i in range(12)]
    out = forward(offload, x, factors, kept=True)
    forward_peak, forward_end = max(seen), copies.alive()
    seen.clear()
    out.sum().backward()
    assert forward_peak == 2 * 3  # the third layer puts its own before the first one's leave
    assert forward_end == 2 * 2
    assert max(seen) <= 2 * 2
    assert copies.alive() == 0


def test_two_forwards_under_way_as_in_a_pipeline() -> None:
    offload = Offload(FakeCopies())
    packs = [torch.tensor([[value]], requires_grad=True) for value in (1.0, 10.0, 100.0)]
    factors = scales()
    outs = [forward(offload, packs[0], factors, kept=True), forward(offload, packs[1], factors, kept=True)]
    outs[0].sum().backward()
    outs.append(forward(offload, packs[2], factors, kept=True))
    outs[1].sum().backward()
    outs[2].sum().backward()
    assert [pack.grad.item() for pack in packs] == [210.0] * 3
    assert [factor.grad.item() for factor in factors] == [111 * 210 / factor.item() for factor in factors]


def test_other_tensors_stay() -> None:
    copies = FakeCopies()
    with Offload(copies).forward(is_input, layers=1):
        out = torch.ones(3, requires_grad=True).exp()[None].exp().exp()
    assert copies.log == [f"out {math.exp(math.e):g}"]  # the third result is a layer's input too, but one too many
    out.sum().backward()


def test_misuse_is_refused() -> None:
    offload = Offload(FakeCopies())
    with pytest.raises(RuntimeError, match="inside a forward only"):
        offload.put(torch.ones(1))
    with offload.forward(is_input, layers=1):
        back = offload.put(torch.ones(1))
    assert back().tolist() == [1.0]
    with pytest.raises(RuntimeError, match="asked for twice"):
        back()
