"""The log-probability kernels against their twins and against float64, in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from megalong_kernels import logprob as kernels  # noqa: E402

from megalong.objectives.logprobs import logprobs_reference, vocab_parallel_logprobs  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, WIDTH, VOCAB = 7, 16, 45
# Of the norm of a gradient: bfloat16 rounds the gradient of the logits and the result; the interpreter truncates.
GRADIENT_TOLERANCE = 4e-3 if DEVICE == "cuda" else 8e-3


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that leave a remainder in rows, columns and blocks alike."""
    monkeypatch.setattr(kernels, "ROW_STEP", 4)
    monkeypatch.setattr(kernels, "VOCAB_STEP", 19)
    monkeypatch.setattr(kernels, "BLOCK", 8)


def case(*, rows: int = ROWS, vocab: int = VOCAB, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_RD = torch.randn(rows, WIDTH, generator=generator)
    weight_VD = torch.randn(vocab, WIDTH, generator=generator)
    targets_R = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden_RD.to(DEVICE).bfloat16(), weight_VD.to(DEVICE).bfloat16(), targets_R.to(DEVICE)


def oracle(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, upstream_R: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, ...]:
    """logprobs, entropy, gradient of hidden and of weight in float64, from the bfloat16 values."""
    hidden, weight = (part.detach().double().requires_grad_() for part in (hidden_RD, weight_VD))
    logprobs_R, entropy_R = logprobs_reference(hidden, weight, targets_R, temperature=temperature)
    return logprobs_R, entropy_R, *torch.autograd.grad((logprobs_R * upstream_R).sum(), (hidden, weight))


def ours(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, upstream_R: Tensor, group: object, **settings: object
) -> tuple[Tensor, ...]:
    hidden, weight = (part.detach().clone().requires_grad_() for part in (hidden_RD, weight_VD))
    settings = {"real_vocab": len(weight_VD), "backend": "triton", **settings}
    logprobs_R, entropy_R = vocab_parallel_logprobs(hidden, weight, targets_R, group=group, **settings)
    return logprobs_R, entropy_R, *torch.autograd.grad((logprobs_R * upstream_R).sum(), (hidden, weight))


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Values to float32, gradients to the rounding of bfloat16."""
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    for mine, exact in zip(got[2:], want[2:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - exact).norm() <= GRADIENT_TOLERANCE * exact.norm()
        torch.testing.assert_close(mine.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 3, 7, 13])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_entropy_and_gradients(group: object, rows: int, temperature: float) -> None:
    parts = case(rows=rows, seed=rows)
    upstream_R = torch.linspace(-1, 2, rows, device=DEVICE)
    got = ours(*parts, upstream_R, group, temperature=temperature)
    close(got, oracle(*parts, upstream_R, temperature=temperature))
    assert got[0].dtype == got[1].dtype == torch.float32


def test_kernels_equal_their_twins() -> None:
    generator = torch.Generator().manual_seed(3)
    logits_RC = (torch.randn(5, 21, generator=generator) * 30).to(DEVICE)
    padded_RC = torch.full((5, 32), torch.nan, device=DEVICE)  # what lies beyond the columns is never read
    padded_RC[:, :21] = logits_RC
    targets_R = torch.tensor([0, 20, 9, -1, 55], device=DEVICE)
    parts = [torch.zeros(4, 5, device=DEVICE) for _ in range(2)]
    for part in parts:
        part[0] = kernels.LOWEST
    for first, columns in ((0, slice(0, 9)), (9, slice(9, 21))):
        kernels.fold_chunk(padded_RC[:, columns], parts[0], targets_R, first=first, scale=0.5)
        kernels.fold_chunk_reference(logits_RC[:, columns], parts[1], targets_R, first=first, scale=0.5)
    torch.testing.assert_close(parts[0], parts[1], rtol=1e-5, atol=1e-5)
    assert parts[0][3].tolist() == [logits_RC[0, 0] / 2, logits_RC[1, 20] / 2, logits_RC[2, 9] / 2, 0, 0]

    lse_R = (logits_RC / 2).logsumexp(1)
    coef_R = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], device=DEVICE)
    logits_RC[2] = padded_RC[2] = torch.nan  # coefficient 0: left out, whatever it holds
    grads = [torch.empty(5, 21, device=DEVICE) for _ in range(2)]
    kernels.grad_chunk(padded_RC[:, :21], grads[0], coef_R, lse_R, targets_R, first=0, scale=0.5)
    kernels.grad_chunk_reference(logits_RC, grads[1], coef_R, lse_R, targets_R, first=0, scale=0.5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(grads[0][2], torch.zeros(21, device=DEVICE))


def test_rows_without_a_target_are_left_out(group: object) -> None:
    hidden_RD, weight_VD, targets_R = case()
    kept_R = torch.tensor([True, False, True, True, False, True, True], device=DEVICE)
    upstream_R = torch.linspace(1, 2, ROWS, device=DEVICE)
    got = ours(hidden_RD, weight_VD, targets_R.masked_fill(~kept_R, -100), upstream_R, group)
    want = oracle(hidden_RD[kept_R], weight_VD, targets_R[kept_R], upstream_R[kept_R])
    close((got[0][kept_R], got[1][kept_R], got[2][kept_R], got[3]), want)
    for part in got[:3]:
        assert torch.equal(part[~kept_R], torch.zeros_like(part[~kept_R]))


def test_padded_vocabulary_rows_are_no_tokens(group: object) -> None:
    hidden_RD, weight_VD, targets_R = case()
    padding = torch.full((3, WIDTH), 50.0, dtype=torch.bfloat16, device=DEVICE)
    upstream_R = torch.ones(ROWS, device=DEVICE)
    got = ours(hidden_RD, torch.cat((weight_VD, padding)), targets_R, upstream_R, group, real_vocab=VOCAB)
    close((*got[:3], got[3][:VOCAB]), oracle(hidden_RD, weight_VD, targets_R, upstream_R))
    assert torch.equal(got[3][VOCAB:], torch.zeros_like(padding))


def test_logits_of_thousands_stay_finite(group: object) -> None:
    hidden_RD = torch.tensor([[1e4], [-1e4]], dtype=torch.bfloat16, device=DEVICE)
    weight_VD = torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.bfloat16, device=DEVICE)
    targets_R = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    got = ours(hidden_RD, weight_VD, targets_R, torch.ones(2, device=DEVICE), group)
    large = hidden_RD[0].item()
    assert got[0].tolist() == [0.0, -2 * large]
    assert got[1].tolist() == [0.0, 0.0]
    assert torch.isfinite(got[3]).all()


def test_a_bad_number_is_not_hidden(group: object) -> None:
    hidden_RD, weight_VD, targets_R = case()
    hidden_RD[2] = torch.nan
    got = ours(hidden_RD, weight_VD, targets_R, torch.ones(ROWS, device=DEVICE), group)
    for part in got[:2]:
        assert part.isnan().tolist() == [row == 2 for row in range(ROWS)]
    assert got[2][2].isnan().all()


def test_no_rows(group: object) -> None:
    got = ours(*case(rows=0), torch.zeros(0, device=DEVICE), group)
    assert [tuple(part.shape) for part in got] == [(0,), (0,), (0, WIDTH), (VOCAB, WIDTH)]
    assert torch.equal(got[3], torch.zeros_like(got[3]))


def test_frozen_head_gets_no_gradient_and_hidden_does(group: object) -> None:
    hidden_RD, weight_VD, targets_R = case()
    upstream_R = torch.linspace(-1, 1, ROWS, device=DEVICE)
    hidden = hidden_RD.requires_grad_()
    logprobs_R, entropy_R = vocab_parallel_logprobs(
        hidden, weight_VD, targets_R, group=group, real_vocab=VOCAB, backend="triton"
    )
    (logprobs_R * upstream_R).sum().backward()
    want = oracle(hidden_RD, weight_VD, targets_R, upstream_R)
    assert (hidden.grad.double() - want[2]).norm() <= GRADIENT_TOLERANCE * want[2].norm()
    assert not entropy_R.requires_grad


def test_columns_grow_when_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ROW_STEP", 8192)
    monkeypatch.setattr(kernels, "VOCAB_STEP", 8448)
    assert [list(kernels._column_steps(rows, 20000))[0] for rows in (8192, 100_000, 4096)] == [
        slice(0, 8448), slice(0, 8448), slice(0, 16896),
    ]  # fmt: skip
    assert list(kernels._column_steps(1, 152064)) == [slice(0, 152064)]


def test_full_precision_is_refused(group: object) -> None:
    hidden_RD, weight_VD, targets_R = case()
    with pytest.raises(ValueError, match="take float16 and bfloat16, got torch.float32; use backend='plain'"):
        vocab_parallel_logprobs(
            hidden_RD.float(), weight_VD.float(), targets_R, group=group, real_vocab=VOCAB, backend="triton"
        )
