"""Turn a global mean into one weight per row, so that any split of the batch only has to be summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalong.config.tree import Aggregation


def row_weights(
    response_lens: Sequence[int],
    *,
    aggregation: Aggregation,
    max_response_tokens: int,
    total_tokens: int,
    total_responses: int,
) -> Tensor:
    """Weights for the rows of a micro-batch, responses in order.

    response_lens: rows of each of its responses. total_tokens, total_responses: response tokens and responses
    of the global batch (all micro-batches of all replicas of this optimizer step). Returns weights_R [R]
    float32, CPU, R = sum(response_lens). The loss of the step is sum_r weights_R[r] * loss_R[r] added up over
    all micro-batches and replicas; added up, not averaged: gradients are summed over data parallel ranks.

    token: 1 / total_tokens. sequence: 1 / (total_responses * length of the row's response). constant:
    1 / (total_responses * max_response_tokens), which no response's length changes.
    Raises ValueError for totals smaller than this micro-batch, or a response longer than the constant.
    """
    lens_S = torch.tensor(list(response_lens), dtype=torch.int64)
    num_rows, longest = int(lens_S.sum()), max(response_lens, default=0)
    if total_tokens < num_rows or total_responses < len(lens_S):
        raise ValueError(
            f"totals of the global batch ({total_tokens} tokens, {total_responses} responses) are smaller than "
            f"this micro-batch ({num_rows} tokens, {len(lens_S)} responses)"
        )
    if aggregation is Aggregation.constant and longest > max_response_tokens:
        raise ValueError(
            f"a response of {longest} tokens is longer than data.max_response_tokens={max_response_tokens}, "
            f"the constant of grpo.aggregation=constant"
        )
    denominators_S = {
        Aggregation.token: torch.full_like(lens_S, total_tokens),
        Aggregation.sequence: total_responses * lens_S,
        Aggregation.constant: torch.full_like(lens_S, total_responses * max_response_tokens),
    }[aggregation]
    return denominators_S.double().repeat_interleave(lens_S).reciprocal().float()
