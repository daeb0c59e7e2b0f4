"""Vocabulary-parallel log-probabilities against the serial twin and plain autograd, one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalong.objectives import logprobs as module
from megalong.objectives.logprobs import logprobs_reference, vocab_parallel_logprobs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def case(*, rows: int, vocab: int, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden_RD = torch.randn(rows, width, dtype=dtype, generator=generator)
    weight_VD = torch.randn(vocab, width, dtype=dtype, generator=generator) * 2
    targets_R = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden_RD.requires_grad_(), weight_VD.requires_grad_(), targets_R


def plain(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Categorical: nothing of ours."""
    logits_RV = hidden_RD @ weight_VD.t() / temperature
    logprobs_R = -torch.nn.functional.cross_entropy(logits_RV, targets_R, reduction="none")
    return logprobs_R, torch.distributions.Categorical(logits=logits_RV).entropy()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk_elements", [1, 40, 1 << 26], ids=["one row", "four rows", "all rows"])
def test_values_entropy_and_gradients(
    layout: object, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float, chunk_elements: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
    hidden_RD, weight_VD, targets_R = case(rows=11, vocab=10, dtype=dtype)
    upstream_R = torch.linspace(-1, 2, 11, dtype=dtype)
    got = vocab_parallel_logprobs(
        hidden_RD, weight_VD, targets_R, group=layout.tp, real_vocab=10, temperature=temperature
    )
    got_grads = torch.autograd.grad((got[0] * upstream_R).sum(), (hidden_RD, weight_VD))
    for oracle in (plain, logprobs_reference):
        want = oracle(hidden_RD, weight_VD, targets_R, temperature=temperature)
        want_grads = torch.autograd.grad((want[0] * upstream_R).sum(), (hidden_RD, weight_VD))
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(got_grads, want_grads, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert got[0].dtype == got[1].dtype == dtype
    assert not got[1].requires_grad


def test_padded_vocabulary_rows_are_no_tokens(layout: object) -> None:
    hidden_RD, weight_VD, targets_R = case(rows=5, vocab=7)
    # Padding holds zeros after a load, but whatever it holds must not count.
    padded_VD = torch.cat((weight_VD.detach(), torch.full((3, 6), 50.0, dtype=torch.float64))).requires_grad_()
    got = vocab_parallel_logprobs(hidden_RD, padded_VD, targets_R, group=layout.tp, real_vocab=7)
    want = plain(hidden_RD, weight_VD, targets_R)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got_hidden, got_weight = torch.autograd.grad(got[0].sum(), (hidden_RD, padded_VD))
    want_hidden, want_weight = torch.autograd.grad(want[0].sum(), (hidden_RD, weight_VD))
    torch.testing.assert_close(got_hidden, want_hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_weight[:7], want_weight, rtol=1e-12, atol=1e-12)
    assert torch.equal(got_weight[7:], torch.zeros(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("chunk_elements", [20, 1 << 26], ids=["four rows", "all rows"])
def test_rows_without_a_target_are_left_out(
    layout: object, monkeypatch: pytest.MonkeyPatch, chunk_elements: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
    hidden_RD, weight_VD, targets_R = case(rows=7, vocab=5)
    kept_R = torch.tensor([True, False, True, True, False, True, True])
    upstream_R = torch.linspace(1, 2, 7, dtype=torch.float64)
    got = vocab_parallel_logprobs(
        hidden_RD, weight_VD, targets_R.masked_fill(~kept_R, -1), group=layout.tp, real_vocab=5
    )
    want = plain(hidden_RD[kept_R], weight_VD, targets_R[kept_R])
    torch.testing.assert_close(got[0][kept_R], want[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1][kept_R], want[1], rtol=1e-12, atol=1e-12)
    assert [part[~kept_R].tolist() for part in got] == [[0, 0], [0, 0]]
    got_grads = torch.autograd.grad((got[0] * upstream_R).sum(), (hidden_RD, weight_VD))
    want_grads = torch.autograd.grad((want[0] * upstream_R[kept_R]).sum(), (hidden_RD, weight_VD))
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-12, atol=1e-12)


def test_a_token_outside_the_vocabulary_has_probability_zero(layout: object) -> None:
    hidden_RD, weight_VD, _ = case(rows=2, vocab=5)
    targets_R = torch.tensor([3, 4])
    logprobs_R, _ = vocab_parallel_logprobs(hidden_RD, weight_VD, targets_R, group=layout.tp, real_vocab=4)
    assert logprobs_R.isinf().tolist() == [False, True]
    assert logprobs_R[1] < 0


def test_the_back_end_is_chosen_by_device_and_dtype() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    choices = [(cuda, torch.float32), (cuda, torch.float64), (cpu, torch.bfloat16), (cpu, torch.float32)]
    for device, dtype in choices:
        assert isinstance(module.choose_backend("auto", device=device, dtype=dtype), module.PlainLogprobs)
    pytest.importorskip("triton", reason="the triton back end needs Triton")
    for dtype in (torch.bfloat16, torch.float16):
        assert isinstance(module.choose_backend("auto", device=cuda, dtype=dtype), module.TritonLogprobs)
    with pytest.raises(ValueError, match="take float16 and bfloat16, got torch.float32"):
        module.choose_backend("triton", device=cuda, dtype=torch.float32)


def test_zero_rows(layout: object) -> None:
    hidden_RD, weight_VD, targets_R = case(rows=0, vocab=7)
    logprobs_R, entropy_R = vocab_parallel_logprobs(hidden_RD, weight_VD, targets_R, group=layout.tp, real_vocab=7)
    assert logprobs_R.shape == entropy_R.shape == (0,)
    grads = torch.autograd.grad(logprobs_R.sum(), (hidden_RD, weight_VD))
    assert torch.equal(grads[0], torch.zeros(0, 6, dtype=torch.float64))
    assert torch.equal(grads[1], torch.zeros(7, 6, dtype=torch.float64))


def test_logits_of_thousands_stay_finite(layout: object) -> None:
    hidden_RD = torch.tensor([[1e4], [-1e4]])
    weight_VD = torch.tensor([[1.0], [0.0], [-1.0]])
    logprobs_R, entropy_R = vocab_parallel_logprobs(
        hidden_RD, weight_VD, torch.tensor([0, 0]), group=layout.tp, real_vocab=3
    )
    assert logprobs_R.tolist() == [0.0, -2e4]
    assert entropy_R.tolist() == [0.0, 0.0]


def test_frozen_head_gets_no_gradient_and_hidden_does(layout: object) -> None:
    hidden_RD, weight_VD, targets_R = case(rows=3, vocab=5)
    frozen_VD = weight_VD.detach()
    logprobs_R, _ = vocab_parallel_logprobs(hidden_RD, frozen_VD, targets_R, group=layout.tp, real_vocab=5)
    logprobs_R.sum().backward()
    want = torch.autograd.grad(plain(hidden_RD, frozen_VD, targets_R)[0].sum(), hidden_RD)[0]
    torch.testing.assert_close(hidden_RD.grad, want, rtol=1e-12, atol=1e-12)
    assert frozen_VD.grad is None


def test_bfloat16_is_scored_in_float32(layout: object) -> None:
    hidden_RD, weight_VD, targets_R = case(rows=6, vocab=9, dtype=torch.float32)
    low_RD, low_VD = hidden_RD.detach().bfloat16(), weight_VD.detach().bfloat16()
    got = vocab_parallel_logprobs(low_RD, low_VD, targets_R, group=layout.tp, real_vocab=9)
    want = (low_RD @ low_VD.t()).float().log_softmax(-1).gather(1, targets_R[:, None])[:, 0]
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(layout: object, temperature: float) -> None:
    hidden_RD, weight_VD, targets_R = case(rows=2, vocab=5)
    with pytest.raises(ValueError, match=f"temperature must be above 0.*{temperature}"):
        vocab_parallel_logprobs(hidden_RD, weight_VD, targets_R, group=layout.tp, real_vocab=5, temperature=temperature)


def test_a_shard_of_padding_alone_is_refused(layout: object) -> None:
    hidden_RD, weight_VD, targets_R = case(rows=2, vocab=5)
    with pytest.raises(ValueError, match=r"only padding.*lower parallel\.tp"):
        vocab_parallel_logprobs(hidden_RD, weight_VD, targets_R, group=layout.tp, real_vocab=0)
