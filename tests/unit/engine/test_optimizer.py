"""The norm of a gradient: its value, and that no copy of a whole gradient is made for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalong.engine import optimizer
from megalong.engine.optimizer import ShardedAdamW

SHAPES = {"a": (5, 7), "b": (3,), "copy": (4, 4)}


def with_gradients(layout: object) -> ShardedAdamW:
    """Two counted parameters and one that another rank counts."""
    generator = torch.Generator().manual_seed(3)
    named = []
    for name, shape in SHAPES.items():
        param = nn.Parameter(torch.zeros(shape))
        param.main_grad = torch.randn(shape, generator=generator)
        named.append((name, param))
    return ShardedAdamW(named, layout, counted=frozenset({"a", "b"}), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


class Float64Sizes(TorchDispatchMode):
    """The number of elements of every float64 tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("chunk", [1, 4, 35, 1 << 22])
def test_norm_is_that_of_the_counted_gradients_in_any_pieces(
    layout: object, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(optimizer, "NORM_CHUNK", chunk)
    adam = with_gradients(layout)
    counted = [param.main_grad.double().flatten() for name, param in adam.named if name != "copy"]
    with Float64Sizes() as made:
        norm = adam.grad_norm()
    assert norm == pytest.approx(torch.cat(counted).norm().item(), rel=1e-14)
    assert 0 < max(made.sizes) <= min(chunk, 35)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", list(SHAPES))
def test_one_bad_element_anywhere_shows(layout: object, monkeypatch: pytest.MonkeyPatch, name: str, bad: float) -> None:
    monkeypatch.setattr(optimizer, "NORM_CHUNK", 2)
    adam = with_gradients(layout)
    dict(adam.named)[name].main_grad.view(-1)[-1] = bad
    assert not math.isfinite(adam.grad_norm())
