"""Advantages against hand-computed values."""

import math

import pytest
import torch

from megalong.config.tree import AdvantageKind
from megalong.objectives.advantages import BASELINES, group_advantages, has_spread
from megalong.records import Prompt, RolloutGroup, Sample, ScoredGroup

# Group means 0.5 and 2; sample standard deviations sqrt(1/3) and sqrt(2).
REWARDS = [torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 3.0])]
STD_1, STD_2 = math.sqrt(1 / 3) + 1e-6, math.sqrt(2) + 1e-6
# All six: mean 1, squared deviations 1 + 0 + 1 + 0 + 0 + 4 = 6, so the sample variance is 6 / 5.
STD_ALL = math.sqrt(6 / 5) + 1e-6


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        (
            AdvantageKind.grpo,
            [[-0.5 / STD_1, 0.5 / STD_1, -0.5 / STD_1, 0.5 / STD_1], [-1 / STD_2, 1 / STD_2]],
        ),
        (AdvantageKind.dr_grpo, [[-0.5, 0.5, -0.5, 0.5], [-1.0, 1.0]]),
        (AdvantageKind.rloo, [[-2 / 3, 2 / 3, -2 / 3, 2 / 3], [-2.0, 2.0]]),
        (AdvantageKind.reinforce_pp, [[-1 / STD_ALL, 0, -1 / STD_ALL, 0], [0, 2 / STD_ALL]]),
    ],
)
def test_closed_forms(kind, want) -> None:
    got = group_advantages(REWARDS, kind=kind)
    assert all(advantages_G.dtype == torch.float32 for advantages_G in got)
    for got_G, want_G in zip(got, want, strict=True):
        torch.testing.assert_close(got_G, torch.tensor(want_G), rtol=1e-6, atol=1e-7)


def test_every_kind_is_listed() -> None:
    assert set(BASELINES) == set(AdvantageKind)


def test_rloo_is_the_mean_of_the_others() -> None:
    rewards_G = torch.tensor([0.3, 1.0, 0.1, 0.0, 0.9])
    others_G = torch.stack([torch.cat((rewards_G[:i], rewards_G[i + 1 :])).mean() for i in range(5)])
    (got_G,) = group_advantages([rewards_G], kind=AdvantageKind.rloo)
    torch.testing.assert_close(got_G, rewards_G - others_G)


@pytest.mark.parametrize("kind", list(AdvantageKind))
@pytest.mark.parametrize("group_size", [2, 3, 5, 7, 8])
def test_equal_rewards_give_exactly_zero(kind, group_size) -> None:
    (got_G,) = group_advantages([torch.full((group_size,), 0.9)], kind=kind)
    assert got_G.tolist() == [0.0] * group_size


@pytest.mark.parametrize("kind", [AdvantageKind.grpo, AdvantageKind.dr_grpo, AdvantageKind.rloo])
def test_a_group_of_one_is_refused(kind) -> None:
    with pytest.raises(
        ValueError, match=rf"grpo.advantage={kind.name} .* group 1 has only one; set rollout.group_size"
    ):
        group_advantages([torch.tensor([0.0, 1.0]), torch.tensor([1.0])], kind=kind)


def test_reinforce_pp_takes_groups_of_one_but_not_a_batch_of_one() -> None:
    got = group_advantages([torch.tensor([0.0]), torch.tensor([1.0])], kind=AdvantageKind.reinforce_pp)
    torch.testing.assert_close(torch.cat(got), torch.tensor([-0.5, 0.5]) / (math.sqrt(0.5) + 1e-6))
    with pytest.raises(ValueError, match="the batch has only one"):
        group_advantages([torch.tensor([1.0])], kind=AdvantageKind.reinforce_pp)


def test_no_groups_give_no_advantages() -> None:
    assert group_advantages([], kind=AdvantageKind.grpo) == []


@pytest.mark.parametrize(
    ("rewards_G", "message"),
    [
        (torch.tensor([0.0, float("nan")]), "group 0 are not finite"),
        (torch.tensor([[0.0, 1.0]]), r"group 0 must be \[G\] with G > 0, got \(1, 2\)"),
        (torch.tensor([]), r"got \(0,\)"),
    ],
)
def test_rewards_that_are_no_group_are_refused(rewards_G, message) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages([rewards_G], kind=AdvantageKind.grpo)


def a_scored_group(names: tuple[str, ...], parts: list[list[float]]) -> ScoredGroup:
    sample = Sample(
        sample_id="q",
        question="?",
        answer="B",
        videos=(),
        problem_type="general",
        category="plot",
        reasoning="",
        subtitles="",
    )
    group = RolloutGroup(
        prompt=Prompt(sample=sample, ids_P=(), selections=(), positions_P=torch.arange(0), next_position=0),
        response_ids=((1,),) * len(parts),
        logprobs=((0.0,),) * len(parts),
        texts=("",) * len(parts),
        truncated=(False,) * len(parts),
        weights_version=0,
    )
    parts_GK = torch.tensor(parts)
    return ScoredGroup(group=group, rewards_G=parts_GK.sum(1), parts_GK=parts_GK, part_names=names)


def test_spread_is_that_of_accuracy_alone() -> None:
    names = ("format", "accuracy")
    assert has_spread(a_scored_group(names, [[1, 0], [1, 1], [1, 0]]))
    assert not has_spread(a_scored_group(names, [[0, 1], [1, 1]]))
    assert not has_spread(a_scored_group(names, [[0, 0], [1, 0]]))
    with pytest.raises(ValueError, match="accuracy"):
        has_spread(a_scored_group(("format",), [[1], [0]]))
