"""flash-attn 2, 3 and 4 and Transformer Engine behind the kernel interface: conversions, choice and refusals.

On stand-ins with the packages' signatures; tests/gpu runs the packages themselves.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stand_ins
import torch
from torch import Tensor

from megalong.attention.kernels import FASTEST_FIRST, KERNELS, CpuFlashKernel, Kernel, PlainKernel, choose_kernel
from megalong.attention.pack import pack_attention
from megalong.attention.reference import pack_attention_reference
from megalong.attention.tree import encode_segments, plan_calls
from megalong.records import Segment

PACKAGES = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "te")
CPU = torch.device("cpu")
SHARED = [
    Segment(start=0, length=9, parent=-1),
    Segment(start=9, length=4, parent=0),
    Segment(start=13, length=7, parent=0),
]
ALONE = [Segment(start=0, length=12, parent=-1), Segment(start=12, length=8, parent=-1)]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages are installed, and take float32 on a CPU before cpu_flash does."""
    stand_ins.install(monkeypatch, *PACKAGES)
    for name in PACKAGES:
        monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], device="cpu", dtypes=(torch.float32,)))
    monkeypatch.setitem(FASTEST_FIRST, "cpu", ("te", "flash_attn_3", "flash_attn_2", "cpu_flash"))


def choose(name: str = "auto", *, merged: bool = True) -> Kernel:
    return choose_kernel(name, device=CPU, dtype=torch.float32, num_rows=9, num_tokens=9, head_dim=8, merged=merged)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize(("causal", "rows", "keys"), [(True, 6, 6), (False, 3, 7), (False, 1, 5)])
def test_a_package_computes_the_definition_of_any_strides(
    name: str, causal: bool, rows: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins.install(monkeypatch, name)
    generator = torch.Generator().manual_seed(rows)

    def cut(heads: int, length: int) -> Tensor:
        """Rows of a longer pack, as the plan's calls take them."""
        return torch.randn(2, heads, length + 5, 8, generator=generator)[:, :, 2 : 2 + length]

    parts = query, key, value = cut(4, rows), cut(2, keys), cut(2, keys)
    how = {"causal": causal, "scale": 0.4}
    kernel, plain = KERNELS[name].make(), PlainKernel()
    out, lse = plain.forward(query, key, value, **how)
    got, got_lse = kernel.forward(*parts, **how)
    assert got.shape == query.shape
    assert got_lse.shape == query.shape[:3]
    torch.testing.assert_close((got, got_lse), (out, lse))
    # The output and log-sum-exp of another call merged in, both cut out of longer ones; an expanded gradient.
    whole = [torch.cat((torch.full_like(part, 3.0), part), dim=2)[:, :, rows:] for part in (out / 2, lse + 0.7)]
    for grad in (torch.randn(query.shape, generator=generator), torch.ones(2, 1, 1, 1).expand(query.shape)):
        torch.testing.assert_close(
            kernel.backward(grad, *parts, *whole, **how), plain.backward(grad, *parts, *whole, **how)
        )


def outputs_and_grads(rows: list[Tensor], upstream: Tensor, segments: list[Segment], kernel: str) -> list[Tensor]:
    leaves = [row.clone().requires_grad_() for row in rows]
    if kernel == "reference":
        out = pack_attention_reference(*leaves, segments, scale=0.3)
    else:
        plan = plan_calls(tuple(encode_segments(segments)), ring_rank=0, ring_size=1)
        heads_first = [row.transpose(0, 1)[None] for row in leaves]
        out = pack_attention(*heads_first, plan, scale=0.3, kernel=kernel)[0].transpose(0, 1)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize(
    ("name", "segments"),
    [
        ("flash_attn_2", SHARED),
        ("flash_attn_3", SHARED),
        ("flash_attn_4", SHARED),
        ("te", ALONE),
        ("auto", SHARED),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_packs_run_on_a_package(name: str, segments: list[Segment]) -> None:
    torch.manual_seed(2)
    rows = [torch.randn(20, heads, 8) for heads in (4, 2, 2)]
    upstream = torch.randn(20, 4, 8)
    got, want = (outputs_and_grads(rows, upstream, segments, kernel) for kernel in (name, "reference"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_transformer_engine_is_tried_and_taken_for_sequences_that_stand_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = [type(choose(merged=merged)) for merged in (False, True, False)]
    assert chosen == [KERNELS[name].make for name in ("te", "flash_attn_3", "te")]
    alone, merged = caplog.messages
    assert alone.startswith("attention of torch.float32, heads 8 wide, on cpu of sequences that stand alone: te, ")
    assert "on cpu: flash_attn_3, the fastest" in merged


@pytest.mark.usefixtures("on_cpu")
def test_transformer_engine_forced_where_outputs_are_merged_is_refused() -> None:
    assert isinstance(choose("te", merged=False), KERNELS["te"].make)
    with pytest.raises(ValueError, match=r"model\.attention=te computes sequences that stand alone.*mr_sp\.mode="):
        choose("te", merged=True)
    torch.manual_seed(0)
    rows = [torch.randn(20, heads, 8) for heads in (4, 2, 2)]
    with pytest.raises(ValueError, match=r"model\.attention=te computes sequences that stand alone"):
        outputs_and_grads(rows, torch.randn(20, 4, 8), SHARED, "te")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_installed_is_never_tried_and_refused_when_forced(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = replace(KERNELS[name], device="cpu", dtypes=(torch.float32,), module="no_such_module")
    monkeypatch.setitem(KERNELS, name, absent)
    monkeypatch.setitem(FASTEST_FIRST, "cpu", (name, "cpu_flash"))
    with caplog.at_level(logging.INFO):
        assert isinstance(choose(merged=False), CpuFlashKernel)
    assert len(caplog.messages) == 1
    with pytest.raises(ValueError, match=f"model.attention={name} needs the Python module no_such_module, which is"):
        choose(name, merged=False)


@pytest.mark.parametrize(("there", "missing"), [("flash_attn_4", "flash_attn_2"), ("flash_attn_2", "flash_attn_4")])
def test_two_packages_of_one_name_are_told_apart(there: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch, there)
    for name in (there, missing):
        monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], device="cpu", dtypes=(torch.float32,)))
    assert isinstance(choose(there), KERNELS[there].make)
    with pytest.raises(ValueError, match=f"model.attention={missing} needs the Python module flash_attn\\."):
        choose(missing)


@pytest.mark.parametrize(("given", "seen"), [("", None), ("/opt/cudnn", "/opt/cudnn")])
def test_an_empty_place_of_cudnn_is_none(given: str, seen: str | None) -> None:
    """Transformer Engine would search the whole disk for it."""
    code = "import os, megalong; print(os.environ.get('CUDNN_HOME'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDNN_HOME": given},
        check=True,
    )
    assert done.stdout.strip() == str(seen)


@pytest.mark.parametrize("chosen", [None, "0"])
def test_flash_attn_4_keeps_what_it_compiles_on_disk_unless_told_not_to(chosen: str | None) -> None:
    names = [f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR")]
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if chosen is not None:
        environment[names[0]] = chosen
    script = f"import megalong, os; print(*(os.environ[name] for name in {names}))"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    enabled, folder = result.stdout.split()
    assert enabled == (chosen or "1")
    assert Path(folder).parent.is_dir()


@pytest.mark.usefixtures("on_cpu")
def test_an_installed_package_that_does_not_load_is_passed_over_with_its_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Built for another torch: the import itself fails."""
    monkeypatch.setitem(sys.modules, "flash_attn_3._C", None)
    with caplog.at_level(logging.INFO):
        assert isinstance(choose(), KERNELS["flash_attn_2"].make)
    refused, taken = caplog.records
    assert refused.levelno == logging.WARNING
    assert "not flash_attn_3, which fails: import of flash_attn_3._C halted" in refused.getMessage()
    assert "flash_attn_2, the fastest" in taken.getMessage()


def test_a_forced_kernel_that_cannot_run_ends_the_build_of_a_model(tiny_checkpoint, layout) -> None:
    from megalong.config.errors import ConfigError
    from megalong.config.tree import AttentionKernel, Dtype, ModelConfig
    from megalong.engine.build import build_model

    assert {kernel.value for kernel in AttentionKernel} == {"auto", *KERNELS}
    config = ModelConfig(path=str(tiny_checkpoint), dtype=Dtype.float32, attention=AttentionKernel.flash_attn_2)
    with pytest.raises(ConfigError, match=r"model\.attention=flash_attn_2 runs on cuda .* not on cpu"):
        build_model(config, layout, sequence_parallel=False, load=False)
