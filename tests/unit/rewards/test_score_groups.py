"""Weighted rewards of groups and the overlong penalty."""

import re

import pytest
import torch

from megalong.config.errors import ConfigError
from megalong.records import Prompt, RolloutGroup, Sample
from megalong.rewards.functions import REWARDS, check_weights
from megalong.rewards.score import score_groups

RIGHT = "<think>r</think><answer>B</answer>"
WRONG = "<think>r</think><answer>A</answer>"


def a_group(texts: list[str], lengths: list[int] | None = None, truncated: list[bool] | None = None) -> RolloutGroup:
    sample = Sample(
        sample_id="q1",
        question="?",
        answer="B",
        videos=(),
        problem_type="multiple choice",
        category="plot",
        reasoning="",
        subtitles="",
    )
    lengths = lengths or [2] * len(texts)
    return RolloutGroup(
        prompt=Prompt(sample=sample, ids_P=(1,), selections=(), positions_P=torch.arange(1), next_position=1),
        response_ids=tuple((5,) * length for length in lengths),
        logprobs=tuple((-1.0,) * length for length in lengths),
        texts=tuple(texts),
        truncated=tuple(truncated or [False] * len(texts)),
        weights_version=0,
    )


def score(group: RolloutGroup, weights: dict[str, float], buffer: int = 0, limit: int = 100):
    return score_groups([group], weights=weights, overlong_buffer=buffer, max_response_tokens=limit)[0]


def test_rewards_are_the_weighted_sum() -> None:
    group = a_group([RIGHT, WRONG, "B", "no"])
    scored = score(group, {"accuracy": 0.9, "format": 0.1})
    assert scored.group is group
    assert scored.part_names == ("accuracy", "format")
    torch.testing.assert_close(scored.rewards_G, torch.tensor([1.0, 0.1, 0.9, 0.0]), rtol=0, atol=1e-7)
    assert scored.parts_GK.tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]
    assert scored.rewards_G.dtype == scored.parts_GK.dtype == torch.float32


def test_accuracy_and_format_are_columns_also_without_weight() -> None:
    scored = score(a_group([RIGHT, "B"]), {"format": 1.0})
    assert scored.part_names == ("accuracy", "format")
    assert scored.rewards_G.tolist() == [1.0, 0.0]
    assert scored.parts_GK.tolist() == [[1, 1], [1, 0]]


def test_another_reward_is_one_more_column(monkeypatch) -> None:
    monkeypatch.setitem(REWARDS, "brevity", lambda response, sample: 1.0 / len(response))
    scored = score(a_group(["B", "BB"]), {"brevity": 2.0, "accuracy": 1.0})
    assert scored.part_names == ("accuracy", "format", "brevity")
    assert scored.parts_GK.tolist() == [[1, 0, 1], [0, 0, 0.5]]
    assert scored.rewards_G.tolist() == [3.0, 1.0]


def test_overlong_penalty_is_linear_in_the_buffer_and_full_when_truncated() -> None:
    group = a_group([RIGHT] * 6, lengths=[80, 81, 90, 100, 120, 10], truncated=[False] * 5 + [True])
    scored = score(group, {"accuracy": 1.0}, buffer=20)
    assert scored.part_names == ("accuracy", "format", "overlong")
    torch.testing.assert_close(scored.parts_GK[:, 2], torch.tensor([0, -0.05, -0.5, -1, -1, -1]))
    torch.testing.assert_close(scored.rewards_G, torch.tensor([1, 0.95, 0.5, 0, 0, 0]))


def test_without_a_buffer_a_truncated_response_keeps_its_reward() -> None:
    scored = score(a_group([RIGHT], lengths=[100], truncated=[True]), {"accuracy": 1.0})
    assert scored.rewards_G.tolist() == [1.0]
    assert scored.part_names == ("accuracy", "format")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"acuracy": 1.0},
            "^unknown key reward.weights.acuracy; did you mean reward.weights.accuracy[?] Rewards are "
            + re.escape(", ".join(REWARDS)),
        ),
        ({"accuracy": float("nan")}, "finite"),
        ({"accuracy": 0.0}, "every response 0"),
        ({}, "every response 0"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        score(a_group([RIGHT]), weights)


def test_every_unknown_reward_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        check_weights({"formt": 0.0, "accuracy": 1.0, "acc": 0.5})
    starts = [problem.partition("?")[0] for problem in caught.value.problems]
    assert starts == [
        "unknown key reward.weights.formt; did you mean reward.weights.format",
        "unknown key reward.weights.acc; did you mean reward.weights.accuracy",
    ]


@pytest.mark.parametrize("buffer", [-1, 101])
def test_a_buffer_outside_the_response_is_refused(buffer) -> None:
    with pytest.raises(ValueError, match=f"overlong_buffer is {buffer}; expected 0 to data.max_response_tokens=100"):
        score(a_group([RIGHT]), {"accuracy": 1.0}, buffer=buffer)


def test_a_reward_outside_its_range_is_an_error(monkeypatch) -> None:
    monkeypatch.setitem(REWARDS, "wild", lambda response, sample: 1.5)
    with pytest.raises(ValueError, match="'wild' returned 1.5 for sample q1, response 0"):
        score(a_group([RIGHT]), {"wild": 1.0})
