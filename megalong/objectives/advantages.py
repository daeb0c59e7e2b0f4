"""Advantages: how much better a response did than its baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalong.config.tree import AdvantageKind
from megalong.records import ScoredGroup

STD_EPS = 1e-6


# All arithmetic is float64: a group of equal float32 rewards then has exactly its reward as mean, and its
# advantages are exactly 0. In float32 a rounding error of 6e-8 over STD_EPS would look like a signal of 0.06.


def grpo(rewards_G: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6); std is the sample one (divides by G - 1), as torch.std is."""
    return (rewards_G - rewards_G.mean()) / (rewards_G.std() + STD_EPS)


def dr_grpo(rewards_G: Tensor) -> Tensor:
    """r - mean: no division by the spread, so questions of every difficulty weigh the same."""
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: Tensor) -> Tensor:
    """r - mean of the other G - 1, which equals (r - mean) * G / (G - 1)."""
    return (rewards_G - rewards_G.mean()) * (len(rewards_G) / (len(rewards_G) - 1))


BASELINES: dict[AdvantageKind, Callable[[Tensor], Tensor]] = {
    AdvantageKind.grpo: grpo,
    AdvantageKind.dr_grpo: dr_grpo,
    AdvantageKind.rloo: rloo,
    AdvantageKind.reinforce_pp: grpo,
}
"""Each maps float64 rewards of at least two responses to advantages."""
WHOLE_BATCH = frozenset({AdvantageKind.reinforce_pp})
"""Kinds whose baseline is over all responses of the call instead of over each group."""


def group_advantages(rewards: Sequence[Tensor], *, kind: AdvantageKind) -> list[Tensor]:
    """rewards: one [G] float tensor for each group, of any G. Returns one [G] float32 tensor for each.

    reinforce_pp takes mean and sample std over all responses passed in: pass the groups of the global batch.
    Raises ValueError when a baseline would have fewer than two responses, and for rewards that are not finite.
    """
    for index, rewards_G in enumerate(rewards):
        if rewards_G.ndim != 1 or not len(rewards_G):
            raise ValueError(f"rewards of group {index} must be [G] with G > 0, got {tuple(rewards_G.shape)}")
        if not torch.isfinite(rewards_G).all():
            raise ValueError(f"rewards of group {index} are not finite: {rewards_G.tolist()}")
    if not rewards:
        return []
    sizes = [len(rewards_G) for rewards_G in rewards]
    whole = kind in WHOLE_BATCH
    if (sum(sizes) if whole else min(sizes)) < 2:
        raise ValueError(
            f"grpo.advantage={kind.name} compares responses, but "
            f"{'the batch' if whole else f'group {sizes.index(1)}'} has only one; set rollout.group_size to 2 or more"
        )
    baseline = BASELINES[kind]
    if whole:
        return list(baseline(torch.cat(list(rewards)).double()).float().split(sizes))
    return [baseline(rewards_G.double()).float() for rewards_G in rewards]


def has_spread(scored: ScoredGroup) -> bool:
    """Whether the accuracy of a group's responses differs: DAPO's dynamic sampling keeps such groups.

    Raises ValueError when the group was scored without an accuracy column.
    """
    if "accuracy" not in scored.part_names:
        raise ValueError(f"dynamic sampling reads the accuracy reward; the group has only {scored.part_names}")
    accuracy_G = scored.parts_GK[:, scored.part_names.index("accuracy")]
    return bool((accuracy_G != accuracy_G[0]).any())
