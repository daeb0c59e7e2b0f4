"""A function of rows in slices equals the function of all rows, and keeps nothing but its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megalong.models.layer import slice_rows


class Mlp(nn.Module):
    """x + down(silu(up(x))), counting the rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(6, 10).double(), nn.Linear(10, 6).double()
        self.seen: list[int] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.append(len(rows))
        return rows + self.down(nn.functional.silu(self.up(rows)))


def rows_and_weights() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(11, 1, 6, dtype=torch.float64, requires_grad=True), torch.randn(11, 1, 6, dtype=torch.float64)


def gradients(mlp: Mlp, rows: Tensor) -> list[Tensor]:
    return [part.grad.clone() for part in (rows, *mlp.parameters())]


def whole() -> tuple[Tensor, list[Tensor]]:
    mlp, (rows, weights) = Mlp(), rows_and_weights()
    out = mlp(rows)
    (out.sin() * weights).sum().backward()
    return out.detach(), gradients(mlp, rows)


@pytest.mark.parametrize("slices", [1, 2, 4, 11])
def test_values_and_gradients_are_those_of_the_whole(slices: int) -> None:
    want, want_grads = whole()
    mlp, (rows, weights) = Mlp(), rows_and_weights()
    out = slice_rows(mlp, rows, slices=slices)
    (out.sin() * weights).sum().backward()
    torch.testing.assert_close(out, want, rtol=0, atol=1e-14)
    for ours, theirs in zip(gradients(mlp, rows), want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert len(mlp.seen) == 2 * slices  # once forward, once in the backward
    assert max(mlp.seen) == -(-11 // slices)
    assert sum(mlp.seen) == 2 * 11


def test_nothing_but_the_rows_is_kept() -> None:
    mlp, (rows, _) = Mlp(), rows_and_weights()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        slice_rows(mlp, rows, slices=3)
    assert [tensor.data_ptr() for tensor in kept] == [rows.data_ptr()]


def test_a_forward_that_nobody_reads_is_skipped_and_shows_when_somebody_does() -> None:
    _, want_grads = whole()
    mlp, (rows, weights) = Mlp(), rows_and_weights()
    upstream = weights * whole()[0].cos()
    out = slice_rows(mlp, rows, slices=4, skip_forward=True)
    assert out.shape == rows.shape
    assert out.isnan().all()
    assert mlp.seen == []
    out.backward(upstream)
    for ours, theirs in zip(gradients(mlp, rows), want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_gradients_add_up_over_uses() -> None:
    """As over micro-batches: the second backward adds to what the first left."""
    mlp, (rows, weights) = Mlp(), rows_and_weights()
    _, want_grads = whole()
    for _ in range(2):
        out = slice_rows(mlp, rows, slices=3)
        (out.sin() * weights).sum().backward()
    for ours, theirs in zip(gradients(mlp, rows), want_grads, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=0, atol=1e-13)
