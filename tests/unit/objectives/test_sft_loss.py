"""The supervised loss."""

import pytest
import torch

from megalong.config.tree import Aggregation
from megalong.objectives.aggregation import row_weights
from megalong.objectives.sft_loss import sft_loss


def test_it_is_the_token_mean_of_the_cross_entropy() -> None:
    logits_RV = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets_R = torch.tensor([0, 6, 3, 3, 1])
    weights_R = row_weights(
        (2, 3), aggregation=Aggregation.token, max_response_tokens=9, total_tokens=5, total_responses=2
    )
    want = torch.nn.functional.cross_entropy(logits_RV, targets_R)
    (want_grad_RV,) = torch.autograd.grad(want, logits_RV)
    logprobs_R = logits_RV.log_softmax(-1).gather(1, targets_R[:, None])[:, 0]
    got = sft_loss(logprobs_R, weights_R=weights_R)
    (got_grad_RV,) = torch.autograd.grad(got, logits_RV)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)  # the weights are float32
    torch.testing.assert_close(got_grad_RV, want_grad_RV, rtol=1e-6, atol=1e-9)


def test_without_rows_it_is_zero_with_a_gradient() -> None:
    logprobs_R = torch.zeros(0, requires_grad=True)
    loss = sft_loss(logprobs_R, weights_R=torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs_R.grad.shape == (0,)


def test_weights_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights_R must be \(2,\) like logprobs_R, got \(1,\)"):
        sft_loss(torch.zeros(2), weights_R=torch.ones(1))
