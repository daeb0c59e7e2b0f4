"""Weigh the reward functions into one number per response."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from megalong.records import RolloutGroup, ScoredGroup
from megalong.rewards.functions import REWARDS, check_weights

ALWAYS_SHOWN = ("accuracy", "format")
"""Columns of every ScoredGroup: plotted, and read by dynamic sampling, also when their weight is 0."""
OVERLONG = "overlong"
"""Column of the length penalty, last, present when it is on."""


def overlong_penalty(num_tokens: int, *, overlong_buffer: int, max_response_tokens: int) -> float:
    """DAPO's soft penalty: 0 up to `max_response_tokens - overlong_buffer`, then linear to -1 at the limit."""
    over = num_tokens - (max_response_tokens - overlong_buffer)
    return -min(over / overlong_buffer, 1.0) if overlong_buffer and over > 0 else 0.0


def score_groups(
    groups: Sequence[RolloutGroup],
    *,
    weights: Mapping[str, float],
    overlong_buffer: int,
    max_response_tokens: int,
) -> list[ScoredGroup]:
    """Score every response of every group.

    rewards_G is the weighted sum of the reward functions plus the overlong penalty. parts_GK holds the
    unweighted values in the order accuracy, format, the other names of `weights`, and `overlong` when
    `overlong_buffer` > 0. A truncated response counts as `max_response_tokens` long.

    Raises ValueError for weights that check_weights refuses, a buffer outside [0, max_response_tokens], or a
    reward function that returns a value outside [0, 1].
    """
    check_weights(weights)
    if not 0 <= overlong_buffer <= max_response_tokens:
        raise ValueError(
            f"reward.overlong_buffer is {overlong_buffer}; expected 0 to data.max_response_tokens={max_response_tokens}"
        )
    names = (*ALWAYS_SHOWN, *(name for name in weights if name not in ALWAYS_SHOWN))
    column_weights = [weights.get(name, 0.0) for name in names]
    if overlong_buffer:
        names, column_weights = (*names, OVERLONG), [*column_weights, 1.0]
    scored = []
    for group in groups:
        rows = [
            response_parts(
                group, index, names=names, overlong_buffer=overlong_buffer, max_response_tokens=max_response_tokens
            )
            for index in range(len(group.texts))
        ]
        totals = [math.fsum(w * part for w, part in zip(column_weights, row, strict=True)) for row in rows]
        scored.append(
            ScoredGroup(
                group=group,
                rewards_G=torch.tensor(totals, dtype=torch.float32),
                parts_GK=torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(names)),
                part_names=names,
            )
        )
    return scored


def response_parts(
    group: RolloutGroup,
    index: int,
    *,
    names: Sequence[str],
    overlong_buffer: int,
    max_response_tokens: int,
) -> list[float]:
    """Unweighted values of response `index` of `group`, one for each of `names`."""
    sample = group.prompt.sample
    parts = []
    for name in names:
        if name == OVERLONG:
            length = max_response_tokens if group.truncated[index] else len(group.response_ids[index])
            parts.append(
                overlong_penalty(length, overlong_buffer=overlong_buffer, max_response_tokens=max_response_tokens)
            )
            continue
        value = REWARDS[name](group.texts[index], sample)
        if not 0.0 <= value <= 1.0:
            raise ValueError(
                f"reward {name!r} returned {value} for sample {sample.sample_id}, response {index}; "
                f"expected a value from 0 to 1"
            )
        parts.append(value)
    return parts
