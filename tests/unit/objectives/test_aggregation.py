"""Row weights: the three means, and that no split of the batch changes the gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.tree import Aggregation
from megalong.objectives.aggregation import row_weights

LENS = (1, 3, 2)
LOSS_R = torch.tensor([1.0, 2.0, 4.0, 6.0, 10.0, 20.0])


@pytest.mark.parametrize(
    ("aggregation", "want"),
    [
        (Aggregation.token, (1 + 2 + 4 + 6 + 10 + 20) / 6),
        (Aggregation.sequence, (1 + (2 + 4 + 6) / 3 + (10 + 20) / 2) / 3),
        (Aggregation.constant, (1 + 2 + 4 + 6 + 10 + 20) / (3 * 8)),
    ],
)
def test_the_weighted_sum_is_the_mean_it_names(aggregation, want) -> None:
    weights_R = row_weights(LENS, aggregation=aggregation, max_response_tokens=8, total_tokens=6, total_responses=3)
    assert weights_R.dtype == torch.float32
    torch.testing.assert_close((weights_R * LOSS_R).sum(), torch.tensor(want))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_any_partition_of_the_responses_gives_the_same_gradient(aggregation, data) -> None:
    lens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    part_of = data.draw(st.lists(st.integers(0, 3), min_size=len(lens), max_size=len(lens)))
    totals = {
        "aggregation": aggregation,
        "max_response_tokens": 9,
        "total_tokens": sum(lens),
        "total_responses": len(lens),
    }
    inputs_R = torch.randn(sum(lens), dtype=torch.float64, generator=torch.Generator().manual_seed(len(lens)))

    def gradient(parts: list[list[int]]) -> torch.Tensor:
        parameter = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        rows = inputs_R.split(lens)
        for part in parts:
            weights_R = row_weights([lens[i] for i in part], **totals)
            part_R = torch.cat([rows[i] for i in part]) if part else inputs_R[:0]
            (weights_R * (parameter * part_R).exp()).sum().backward()
        return parameter.grad

    whole = gradient([list(range(len(lens)))])
    split = gradient([[i for i, part in enumerate(part_of) if part == wanted] for wanted in range(4)])
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-14)


def test_an_empty_micro_batch_has_no_weights() -> None:
    for aggregation in Aggregation:
        weights_R = row_weights((), aggregation=aggregation, max_response_tokens=4, total_tokens=9, total_responses=2)
        assert weights_R.tolist() == []


def test_totals_that_are_only_local_to_another_micro_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5 tokens, 3 responses\) are smaller than this micro-batch \(6 tokens"):
        row_weights(LENS, aggregation=Aggregation.token, max_response_tokens=8, total_tokens=5, total_responses=3)
    with pytest.raises(ValueError, match="2 responses"):
        row_weights(LENS, aggregation=Aggregation.token, max_response_tokens=8, total_tokens=6, total_responses=2)


def test_a_response_longer_than_the_constant_is_refused() -> None:
    totals = {"max_response_tokens": 2, "total_tokens": 6, "total_responses": 3}
    with pytest.raises(ValueError, match="3 tokens is longer than data.max_response_tokens=2"):
        row_weights(LENS, aggregation=Aggregation.constant, **totals)
    assert len(row_weights(LENS, aggregation=Aggregation.token, **totals)) == 6
