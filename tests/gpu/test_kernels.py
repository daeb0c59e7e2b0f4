"""The Triton kernels on a real GPU: several shapes, real step sizes, an emulated vocabulary shard, 64-bit addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def case(rows: int, width: int, vocab: int, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + vocab)
    hidden_RD = torch.randn(rows, width, device="cuda", generator=generator).to(dtype)
    weight_VD = (torch.randn(vocab, width, device="cuda", generator=generator) * 2.5 / width**0.5).to(dtype)
    targets_R = torch.randint(0, vocab, (rows,), device="cuda", generator=generator)
    return hidden_RD.requires_grad_(), weight_VD.requires_grad_(), targets_R


def outputs(parts: tuple[Tensor, ...], group: object, upstream_R: Tensor, **settings: object) -> tuple[Tensor, ...]:
    from megalong.objectives.logprobs import vocab_parallel_logprobs

    found = vocab_parallel_logprobs(*parts, group=group, **{"real_vocab": len(parts[1]), **settings})
    return *found, *torch.autograd.grad((found[0] * upstream_R.to(found[0].dtype)).sum(), parts[:2])


def exact(parts: tuple[Tensor, ...], group: object, upstream_R: Tensor, **settings: object) -> tuple[Tensor, ...]:
    doubles = [part.detach().double().requires_grad_() for part in parts[:2]]
    return outputs((*doubles, parts[2]), group, upstream_R, **settings)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], *, gradient: float = 4e-3) -> None:
    for value, truth in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-5)
    for value, truth in zip(got[2:], want[2:], strict=True):
        assert (value.double() - truth).norm() <= gradient * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"),
    [(1, 64, 1000), (37, 128, 8449), (1000, 896, 20001), (8200, 256, 9000), (130, 3584, 152064)],
    ids=["one row", "odd", "odd vocabulary", "two row steps", "7B head"],
)
def test_logprobs_against_float64(group: object, rows: int, width: int, vocab: int, dtype: torch.dtype) -> None:
    parts = case(rows, width, vocab, dtype=dtype)
    upstream_R = torch.linspace(-1, 2, rows, device="cuda")
    got = outputs(parts, group, upstream_R, temperature=0.8)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[2].dtype == got[3].dtype == dtype
    assert_close(got, exact(parts, group, upstream_R, temperature=0.8))
    again = outputs(parts, group, upstream_R, temperature=0.8)
    assert all(torch.equal(first, second) for first, second in zip(got, again, strict=True))


def test_ignored_rows_and_padded_vocabulary(group: object) -> None:
    hidden_RD, weight_VD, targets_R = case(300, 512, 10000)
    kept_R = torch.arange(300, device="cuda") % 3 != 1
    padded_VD = torch.cat((weight_VD.detach(), weight_VD.detach()[:240] * 50)).requires_grad_()
    upstream_R = torch.linspace(1, 2, 300, device="cuda")
    got = outputs((hidden_RD, padded_VD, targets_R.masked_fill(~kept_R, -100)), group, upstream_R, real_vocab=10000)
    kept = (hidden_RD.detach()[kept_R].requires_grad_(), weight_VD, targets_R[kept_R])
    want = exact(kept, group, upstream_R[kept_R])
    assert_close((got[0][kept_R], got[1][kept_R], got[2][kept_R], got[3][:10000]), want)
    assert not any(part.any() for part in (*(part[~kept_R] for part in got[:3]), got[3][10000:]))


def test_vocabulary_shards_add_up(group: object) -> None:
    """What tensor-parallel ranks hold and reduce, one shard after the other."""
    from megalong_kernels import logprob as kernels

    hidden_RD, weight_VD, targets_R = case(700, 896, 30000)
    upstream_R = torch.linspace(-1, 1, 700, device="cuda")
    want = exact((hidden_RD, weight_VD, targets_R), group, upstream_R)
    hidden, shards = hidden_RD.detach(), weight_VD.detach().split(13000)
    locals_R = [torch.where((targets_R // 13000) == rank, targets_R % 13000, -1) for rank in range(len(shards))]
    parts = [
        kernels.fold_logits(hidden, shard, local, scale=1.0) for shard, local in zip(shards, locals_R, strict=True)
    ]
    stacked = torch.stack(parts).double()
    largest_R = stacked[:, 0].amax(0)
    drop = stacked[:, 0] - largest_R
    mass_R = (stacked[:, 1] * drop.exp()).sum(0)
    tilt_R = ((stacked[:, 2] + stacked[:, 1] * drop) * drop.exp()).sum(0)
    lse_R = largest_R + mass_R.log()
    grads_VD = [torch.empty_like(shard) for shard in shards]
    hidden_grads = [
        kernels.grads_of_logits(
            upstream_R, lse_R.float(), hidden, shard, local, scale=1.0, grad_weight_VD=grad
        ).double()
        for shard, local, grad in zip(shards, locals_R, grads_VD, strict=True)
    ]
    logprobs_R, entropy_R = stacked[:, 3].sum(0) - lse_R, mass_R.log() - tilt_R / mass_R
    assert_close((logprobs_R, entropy_R, sum(hidden_grads), torch.cat(grads_VD)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_automatic_attention_finds_its_fast_kernels_correct(dtype: torch.dtype, head_dim: int) -> None:
    from megalong.attention.kernels import KERNELS, choose_kernel, is_installed

    short = "flash_attn_3" if is_installed(KERNELS["flash_attn_3"]) else "flash"
    long = "flash_attn_4" if is_installed(KERNELS["flash_attn_4"]) else "cudnn"
    how = {"device": torch.device("cuda", 0), "dtype": dtype, "head_dim": head_dim, "merged": True}
    for kernel, rows, tokens in ((long, 4096, 131_072), (short, 1, 131_072), (short, 512, 512)):
        chosen = choose_kernel("auto", num_rows=rows, num_tokens=tokens, **how)
        assert isinstance(chosen, KERNELS[kernel].make), (rows, tokens)


def test_memory_stays_at_one_step(group: object) -> None:
    from megalong_kernels import logprob as kernels

    parts = case(8192, 512, 65536)
    upstream_R = torch.ones(8192, device="cuda")
    outputs(parts, group, upstream_R)  # cuBLAS takes its workspace once
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    got = outputs(parts, group, upstream_R)
    kept = sum(part.nbytes for part in got)
    extra = torch.cuda.max_memory_allocated() - held - kept
    step = kernels.ROW_STEP * kernels.VOCAB_STEP
    assert extra <= 1.1 * (step * (4 + 2) + 8192 * 512 * 4)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 60 << 30, reason="needs 60 GiB of free GPU memory"
)
def test_addresses_beyond_32_bits() -> None:
    from megalong_kernels import logprob as kernels
    from megalong_kernels.sequence_shard import shard_rows, unshard_rows

    rows, width = 300_000, 8448  # 2.5e9 logits
    logits_RC = torch.zeros(rows, width, device="cuda")
    last = slice(rows - 3, rows)
    logits_RC[last] = torch.randn(3, width, device="cuda")
    targets_R = torch.full((rows,), 5, device="cuda")
    parts_4R, want = (torch.zeros(4, rows, device="cuda") for _ in range(2))
    kernels.fold_chunk(logits_RC, parts_4R, targets_R, first=0, scale=1.0)
    kernels.fold_chunk_reference(logits_RC[last], want[:, last], targets_R[last], first=0, scale=1.0)
    torch.testing.assert_close(parts_4R[:, last], want[:, last], rtol=1e-5, atol=1e-4)
    grad_RC = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
    coef_R, lse_R = torch.ones(rows, device="cuda"), logits_RC[-1].logsumexp(0).expand(rows).contiguous()
    kernels.grad_chunk(logits_RC, grad_RC, coef_R, lse_R, targets_R, first=0, scale=1.0)
    want_RC = torch.empty(3, width, device="cuda", dtype=torch.bfloat16)
    kernels.grad_chunk_reference(
        logits_RC[last], want_RC, coef_R[last], lse_R[last], targets_R[last], first=0, scale=1.0
    )
    torch.testing.assert_close(grad_RC[last], want_RC, rtol=1e-2, atol=1e-6)
    del logits_RC, grad_RC

    places, width = 650_000, 3584  # 2.3e9 elements
    text_MD = torch.randn(1000, width, device="cuda").bfloat16()
    frames_ND = torch.randn(places - 1000, width, device="cuda").bfloat16()
    index_T = torch.randperm(places, device="cuda")
    shard_TD = shard_rows(frames_ND, text_MD, index_T)
    for place in (0, 1, places - 2, places - 1):
        source = index_T[place].item()
        row = frames_ND[source] if source < len(frames_ND) else text_MD[source - len(frames_ND)]
        assert torch.equal(shard_TD[place], row)
    back = unshard_rows(shard_TD, index_T, places)
    assert torch.equal(back[: len(frames_ND)], frames_ND)
    assert torch.equal(back[len(frames_ND) :], text_MD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [1, 77, 3584, 5000])
def test_sequence_shards_equal_their_twin(width: int, dtype: torch.dtype) -> None:
    from megalong_kernels.sequence_shard import shard_rows

    generator = torch.Generator("cuda").manual_seed(width)
    frames_ND, text_MD = (
        torch.randn(rows, width, device="cuda", generator=generator).to(dtype).requires_grad_() for rows in (900, 300)
    )
    index_T = torch.randint(-1, 1200, (2001,), device="cuda", generator=generator)
    upstream_TD = torch.randn(2001, width, device="cuda", generator=generator).to(dtype)
    out, want = (shard_rows(frames_ND, text_MD, index_T, backend=backend) for backend in ("triton", "plain"))
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out, (frames_ND, text_MD), upstream_TD, retain_graph=True)
    again = torch.autograd.grad(out, (frames_ND, text_MD), upstream_TD)
    assert all(torch.equal(first, second) for first, second in zip(grads, again, strict=True))
    doubles = [part.detach().double().requires_grad_() for part in (frames_ND, text_MD)]
    truths = torch.autograd.grad(shard_rows(*doubles, index_T), doubles, upstream_TD.double())
    for grad, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 3584), (2, 3, 3584), (0, 3584)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_sampler_s_logits_are_not_rounded(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from megalong.rollout.logits import float32_logits

    hidden = torch.randn(shape, device="cuda").to(dtype)
    weight_VD = (torch.randn(20_000, 3584, device="cuda") / 8).to(dtype)  # logits of the size of 7
    logits = float32_logits(hidden, weight_VD)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight_VD.double().t(), rtol=1e-4, atol=2e-4)
