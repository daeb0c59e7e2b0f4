"""Logits of half-precision weights in float32: on the CPU here, on a GPU in tests/gpu/test_kernels.py."""

from __future__ import annotations

import pytest
import torch

from megalong.rollout.logits import float32_logits


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (0, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_products_are_not_rounded(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, generator=generator).to(dtype) for size in (shape, (40, 64)))
    logits = float32_logits(hidden, weight)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
