"""Every attention kernel that this GPU and its packages have, on packs of real widths, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalong.attention.kernels import KERNELS, LARGEST_ERROR, _defect, is_installed
from megalong.attention.pack import pack_attention
from megalong.attention.reference import pack_attention_reference
from megalong.attention.tree import encode_segments, plan_calls
from megalong.records import Segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


ON_GPUS = [name for name, entry in KERNELS.items() if entry.device == "cuda"]


def missing(name: str) -> str:
    return "" if is_installed(KERNELS[name]) else f"{KERNELS[name].module} is not installed"


def named(*names: str) -> list:
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=missing(name) or "installed"))
        for name in names
    ]


def segments_of(*lengths_and_parents: tuple[int, int]) -> list[Segment]:
    segments: list[Segment] = []
    for length, parent in lengths_and_parents:
        segments.append(Segment(start=segments[-1].stop if segments else 0, length=length, parent=parent))
    return segments


SHARED = segments_of((1000, -1), (130, 0), (1, 0), (257, 0))
ALONE = segments_of((700, -1), (1, -1), (687, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", named(*ON_GPUS))
def test_the_trial_of_auto_finds_nothing_wrong(name: str, head_dim: int, dtype: torch.dtype) -> None:
    assert _defect(name, device=torch.device("cuda", 0), dtype=dtype, head_dim=head_dim) == ""


@pytest.mark.parametrize("segments", [SHARED, ALONE], ids=["shared prefix", "alone"])
@pytest.mark.parametrize("name", named(*ON_GPUS))
def test_packs_equal_the_reference_in_float64(name: str, segments: list[Segment]) -> None:
    if segments is SHARED and not KERNELS[name].merges:
        with pytest.raises(ValueError, match="sequences that stand alone"):
            outputs_and_grads(name, segments)
        return
    for ours, want in zip(outputs_and_grads(name, segments), outputs_and_grads("", segments), strict=True):
        assert (ours.double() - want).norm() <= LARGEST_ERROR[torch.bfloat16] * want.norm()


def outputs_and_grads(name: str, segments: list[Segment]) -> list[Tensor]:
    """name "": the reference."""
    generator = torch.Generator("cuda").manual_seed(1)
    total = segments[-1].stop
    given = [torch.randn(total, heads, 128, device="cuda", generator=generator).bfloat16() for heads in (28, 4, 4, 28)]
    *rows, upstream = given if name else [part.double() for part in given]
    leaves = [row.requires_grad_() for row in rows]
    if not name:
        out = pack_attention_reference(*leaves, segments, scale=128**-0.5)
    else:
        plan = plan_calls(tuple(encode_segments(segments)), ring_rank=0, ring_size=1)
        heads_first = [row.transpose(0, 1)[None].contiguous() for row in leaves]
        out = pack_attention(*heads_first, plan, scale=128**-0.5, kernel=name)[0].transpose(0, 1)
    return [out, *torch.autograd.grad(out, leaves, upstream)]
