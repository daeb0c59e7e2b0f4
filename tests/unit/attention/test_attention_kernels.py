"""Which attention kernel `auto` takes: the fastest that is correct on the device at hand, said once with the reason."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megalong.attention.kernels import KERNELS, CpuFlashKernel, Kernel, PlainKernel, choose_kernel

CPU = torch.device("cpu")


class HalvedOutput(CpuFlashKernel):
    def forward(self, *args: Tensor, **settings: object) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*args, **settings)
        return out / 2, lse


class IgnoresMergedSums(CpuFlashKernel):
    """A backward that computes log-sum-exps of its own, as one for whole sequences may."""

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out, lse = self.forward(query, key, value, causal=causal, scale=scale)
        return super().backward(grad_out, query, key, value, out, lse, causal=causal, scale=scale)


class Missing(CpuFlashKernel):
    def forward(self, *_: Tensor, **__: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no kernel image is available\nfor this device")


def choose(
    name: str = "auto", *, dtype: torch.dtype = torch.float32, num_tokens: int = 9, merged: bool = True
) -> Kernel:
    return choose_kernel(
        name, device=CPU, dtype=dtype, num_rows=num_tokens, num_tokens=num_tokens, head_dim=8, merged=merged
    )


@pytest.mark.parametrize("dtype", KERNELS["cpu_flash"].dtypes, ids=str)
def test_the_fast_kernel_is_taken_where_it_is_correct_and_named_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        chosen = [choose(dtype=dtype, num_tokens=count) for count in (5, 6, 5)]
    assert {type(kernel) for kernel in chosen} == {CpuFlashKernel}
    (line,) = caplog.messages
    assert line == (
        f"attention of {dtype}, heads 8 wide, on cpu: cpu_flash, the fastest that takes them; equal to the definition "
        "here"
    )


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (HalvedOutput, "whose output is off by 5.0e-01 of its norm (causal)"),
        (IgnoresMergedSums, "whose dQ is off by"),
        (Missing, "which fails: no kernel image is available"),
    ],
)
def test_a_kernel_that_is_wrong_here_is_passed_over_with_a_warning(
    broken: type[Kernel], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(KERNELS, "cpu_flash", replace(KERNELS["cpu_flash"], make=broken))
    with caplog.at_level(logging.INFO):
        assert [type(choose()) for _ in range(2)] == [PlainKernel] * 2
    refused, taken = caplog.records
    assert f"not cpu_flash, {reason}" in refused.getMessage()
    assert "plain, whole score matrices, since no fast kernel is correct here" in taken.getMessage()
    assert {refused.levelno, taken.levelno} == {logging.WARNING}


def test_where_no_fast_kernel_takes_the_input_the_definition_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert isinstance(choose(dtype=torch.float16), PlainKernel)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().endswith("since no fast kernel takes them")


def test_whole_score_matrices_on_a_gpu_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Float32 there, which no fast kernel takes: an hour of video would not fit, or take for ever."""
    where = {"device": torch.device("cuda"), "dtype": torch.float32, "num_rows": 9, "num_tokens": 9, "head_dim": 8}
    with caplog.at_level(logging.INFO):
        chosen = [choose_kernel("auto", merged=merged, **where) for merged in (False, True)]
    assert [type(kernel) for kernel in chosen] == [PlainKernel] * 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("since no fast kernel takes them; set model.dtype=bfloat16")


@pytest.mark.parametrize("name", ["plain", "cpu_flash"])
def test_a_forced_kernel_is_taken_and_named_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert isinstance(choose(name), KERNELS[name].make)
    assert caplog.messages == [f"attention of torch.float32 on cpu: {name}, as model.attention says"]


@pytest.mark.parametrize(("name", "dtype"), [("cudnn", torch.bfloat16), ("cpu_flash", torch.float16)])
def test_a_forced_kernel_that_does_not_take_the_input_is_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"model\.attention={name} runs on .*not on cpu.*set model\.attention=auto"):
        choose(name, dtype=dtype)


def test_choosing_leaves_the_random_numbers_of_a_run_alone() -> None:
    torch.manual_seed(4)
    want = torch.rand(3)
    torch.manual_seed(4)
    choose()
    assert torch.equal(torch.rand(3), want)
