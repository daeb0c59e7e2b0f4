"""The policy loss against formulas written out by hand, row by row, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalong.config.tree import AdvantageKind, Aggregation, KlEstimator, RatioLevel
from megalong.objectives.advantages import group_advantages
from megalong.objectives.aggregation import row_weights
from megalong.objectives.policy_loss import PolicyLossSettings, policy_loss

PPO = PolicyLossSettings(
    clip_low=0.2,
    clip_high=0.28,
    ratio=RatioLevel.token,
    kl_coef=0.0,
    kl_estimator=KlEstimator.k3,
    tis_cap=0.0,
)


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_rows(*ratios: float) -> Tensor:
    return rows(*ratios).log()


def run(
    logprobs_R: Tensor, advantages: list[float], lens: list[int], settings: PolicyLossSettings = PPO, **given: Tensor
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, its gradient to logprobs_R, and metrics; weights 1 per row unless given."""
    logprobs_R = logprobs_R.clone().requires_grad_()
    arguments = {
        "old_logprobs_R": None,
        "ref_logprobs_R": None,
        "sampler_logprobs_R": logprobs_R.detach().clone(),
        "weights_R": torch.ones_like(logprobs_R.detach()),
    } | given
    loss, metrics = policy_loss(
        logprobs_R,
        advantages_S=rows(*advantages),
        response_R=torch.arange(len(lens)).repeat_interleave(torch.tensor(lens, dtype=torch.int64)),
        settings=settings,
        **arguments,
    )
    loss.backward()
    assert not any(value.requires_grad or value.ndim for value in metrics.values())
    return loss.item(), logprobs_R.grad, {name: value.item() for name, value in metrics.items()}


def test_without_old_the_gradient_is_exactly_minus_advantage() -> None:
    loss, grad_R, metrics = run(rows(-1.0, -0.3, -2.0), [0.7, -1.3], [2, 1])
    assert loss == pytest.approx(-(0.7 + 0.7 - 1.3), rel=1e-15)
    assert grad_R.tolist() == [-0.7, -0.7, 1.3]
    assert metrics["ratio"] == 3.0
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0.0


@pytest.mark.parametrize("settings", [PPO, replace(PPO, clip_low=0.0, clip_high=0.0)])
@pytest.mark.parametrize("ratio", list(RatioLevel))
def test_old_equal_to_the_policy_is_the_same_as_no_old(settings, ratio) -> None:
    settings = replace(settings, ratio=ratio)
    logprobs_R = rows(-1.0, -0.3, -2.0)
    without, with_old = (
        run(logprobs_R, [0.7, -1.3], [2, 1], settings, old_logprobs_R=old) for old in (None, logprobs_R)
    )
    assert without[0] == with_old[0]
    assert without[1].tolist() == with_old[1].tolist()


# Row:      0    1    2    3    4    5    6    7
RATIOS = (0.5, 0.9, 1.25, 1.5, 0.5, 0.9, 1.25, 1.5)
CLIPPED = (0.5, 0.9, 1.25, 1.28, 0.8, 0.9, 1.25, 1.5)  # advantage +2 for rows 0-3, -3 for rows 4-7
FLAT_ROWS = (3, 4)


def test_asymmetric_clip_of_token_ratios() -> None:
    old_R = rows(-1.0, -2.0, -3.0, -0.5, -1.0, -2.0, -3.0, -0.5)
    weights_R = rows(1, 2, 3, 4, 5, 6, 7, 8) / 10
    loss, grad_R, metrics = run(
        old_R + log_rows(*RATIOS), [2.0, -3.0], [4, 4], old_logprobs_R=old_R, weights_R=weights_R
    )
    advantages = [2.0] * 4 + [-3.0] * 4
    weights = weights_R.tolist()
    assert loss == pytest.approx(
        -sum(w * a * c for w, a, c in zip(weights, advantages, CLIPPED, strict=True)), rel=1e-12
    )
    want_R = [
        0.0 if i in FLAT_ROWS else -w * a * r
        for i, (w, a, r) in enumerate(zip(weights, advantages, RATIOS, strict=True))
    ]
    torch.testing.assert_close(grad_R, rows(*want_R), rtol=1e-12, atol=0)
    assert metrics["clip_fraction_high"] == pytest.approx(0.4)
    assert metrics["clip_fraction_low"] == pytest.approx(0.5)
    assert metrics["ratio"] == pytest.approx(sum(w * r for w, r in zip(weights, RATIOS, strict=True)))
    assert metrics["policy_loss"] == pytest.approx(loss)


def test_clip_higher_lets_a_rare_good_token_grow() -> None:
    """DAPO: a ratio of 1.25 with a positive advantage is flat with 0.2 / 0.2 and free with 0.2 / 0.28."""
    old_R, logprobs_R = rows(-3.0), rows(-3.0) + log_rows(1.25)
    _, symmetric_R, _ = run(logprobs_R, [1.0], [1], replace(PPO, clip_high=0.2), old_logprobs_R=old_R)
    _, higher_R, _ = run(logprobs_R, [1.0], [1], old_logprobs_R=old_R)
    assert symmetric_R.tolist() == [0.0]
    assert higher_R.item() == pytest.approx(-1.25)


def test_gspo_ratio_is_that_of_the_sequence_and_reaches_every_token() -> None:
    settings = replace(PPO, ratio=RatioLevel.sequence)
    old_R = rows(-1.0, -2.0, -3.0, -0.5, -1.5)
    log_ratio_R = rows(0.3, -0.1, 0.1, -0.4, 0.2)  # means 0.1 (of three) and -0.1 (of two)
    weights_R = rows(1, 2, 3, 4, 5) / 10
    loss, grad_R, metrics = run(
        old_R + log_ratio_R, [2.0, -3.0], [3, 2], settings, old_logprobs_R=old_R, weights_R=weights_R
    )
    up, down = math.exp(0.1), math.exp(-0.1)
    assert loss == pytest.approx(-(0.6 * 2.0 * up + 0.9 * -3.0 * down), rel=1e-12)
    want_R = rows(*[-0.6 * 2.0 * up / 3] * 3, *[0.9 * 3.0 * down / 2] * 2)
    torch.testing.assert_close(grad_R, want_R, rtol=1e-12, atol=0)
    assert metrics["ratio"] == pytest.approx(0.6 * up + 0.9 * down)


def test_gspo_clips_whole_sequences() -> None:
    settings = replace(PPO, ratio=RatioLevel.sequence, clip_low=3e-4, clip_high=4e-4)
    old_R = rows(-1.0, -2.0, -3.0, -0.5)
    # Mean log ratios 0.001 and -0.0001; single tokens are far outside the clip range on both sides.
    loss, grad_R, metrics = run(
        old_R + rows(0.5, -0.498, -0.5, 0.4998), [1.0, -1.0], [2, 2], settings, old_logprobs_R=old_R
    )
    kept = math.exp(-1e-4)
    assert loss == pytest.approx(-(2 * 1.0004) + 2 * kept, rel=1e-9)
    torch.testing.assert_close(grad_R, rows(0.0, 0.0, kept, kept), rtol=1e-9, atol=0)
    assert metrics["clip_fraction_high"] == 2.0
    assert metrics["clip_fraction_low"] == 0.0


def test_truncated_importance_sampling_weighs_rows_without_a_gradient() -> None:
    settings = replace(PPO, tis_cap=2.0)
    logprobs_R = rows(-1.0, -1.0, -1.0)
    sampler_R = logprobs_R - log_rows(0.5, 1.5, 4.0)  # old / sampler is 0.5, 1.5, 4
    loss, grad_R, metrics = run(logprobs_R, [2.0], [3], settings, sampler_logprobs_R=sampler_R)
    assert loss == pytest.approx(-2.0 * (0.5 + 1.5 + 2.0), rel=1e-12)
    torch.testing.assert_close(grad_R, rows(-1.0, -3.0, -4.0), rtol=1e-12, atol=0)
    assert metrics["tis_weight"] == pytest.approx(4.0)


def test_importance_weight_compares_the_old_policy_not_the_new_one() -> None:
    old_R = rows(-1.0)
    settings = replace(PPO, tis_cap=2.0)
    _, grad_R, _ = run(
        old_R + log_rows(1.1), [1.0], [1], settings, old_logprobs_R=old_R, sampler_logprobs_R=old_R - log_rows(0.5)
    )
    assert grad_R.item() == pytest.approx(-0.5 * 1.1, rel=1e-12)


@pytest.mark.parametrize(
    ("estimator", "values", "slopes"),
    [
        (KlEstimator.k1, [0.5, -1.0], [1.0, 1.0]),
        (KlEstimator.k2, [0.125, 0.5], [0.5, -1.0]),
        (KlEstimator.k3, [math.exp(-0.5) - 0.5, math.e - 2], [1 - math.exp(-0.5), 1 - math.e]),
    ],
)
def test_kl_is_added_with_its_coefficient_and_not_importance_weighted(estimator, values, slopes) -> None:
    settings = replace(PPO, kl_coef=0.1, kl_estimator=estimator, tis_cap=1.0)
    logprobs_R, weights_R = rows(-1.0, -2.0), rows(0.25, 0.75)
    loss, grad_R, metrics = run(
        logprobs_R,
        [2.0],
        [2],
        settings,
        ref_logprobs_R=logprobs_R - rows(0.5, -1.0),
        sampler_logprobs_R=logprobs_R - log_rows(0.5),
        weights_R=weights_R,
    )
    kl = 0.25 * values[0] + 0.75 * values[1]
    assert loss == pytest.approx(-0.5 * 2.0 + 0.1 * kl, rel=1e-12)
    assert grad_R.tolist() == pytest.approx([0.25 * (-1 + 0.1 * slopes[0]), 0.75 * (-1 + 0.1 * slopes[1])], rel=1e-12)
    assert metrics["kl_loss"] == pytest.approx(0.1 * kl)
    assert metrics["policy_loss"] == pytest.approx(-1.0)
    assert metrics["kl"] == pytest.approx(0.25 * (math.exp(-0.5) - 0.5) + 0.75 * (math.e - 2))


def test_a_reference_without_coefficient_is_measured_only() -> None:
    logprobs_R = rows(-1.0)
    loss, grad_R, metrics = run(logprobs_R, [2.0], [1], ref_logprobs_R=logprobs_R - 0.5)
    assert (loss, grad_R.tolist(), metrics["kl_loss"]) == (-2.0, [-2.0], 0.0)
    assert metrics["kl"] == pytest.approx(math.exp(-0.5) - 0.5)


def test_sampler_gap_is_a_weighted_sum_and_a_maximum() -> None:
    old_R = rows(-1.0, -1.0)
    _, _, metrics = run(
        old_R + 0.05, [1.0], [2], old_logprobs_R=old_R, sampler_logprobs_R=rows(-1.2, -0.5), weights_R=rows(0.1, 0.9)
    )
    assert metrics["sampler_gap_sum"] == pytest.approx(0.1 * 0.2 + 0.9 * 0.5)
    assert metrics["sampler_gap_max"] == pytest.approx(0.5)


def test_without_rows_everything_is_zero() -> None:
    loss, grad_R, metrics = run(rows(), [], [], replace(PPO, tis_cap=2.0, kl_coef=0.1), ref_logprobs_R=rows())
    assert loss == 0.0
    assert grad_R.shape == (0,)
    assert set(metrics.values()) == {0.0}


def test_a_ratio_far_out_is_finite_in_float32() -> None:
    old_R = torch.tensor([-500.0, 0.0])
    loss, grad_R, _ = run(
        torch.tensor([0.0, -500.0]),
        [-1.0],
        [2],
        replace(PPO, tis_cap=2.0),
        old_logprobs_R=old_R,
        sampler_logprobs_R=old_R + 500.0,
    )
    assert math.isfinite(loss)
    assert grad_R.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", list(AdvantageKind))
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_first_update_is_the_policy_gradient_of_each_method(kind, aggregation) -> None:
    """GRPO, Dr.GRPO, RLOO, REINFORCE++ with each mean: rewards to gradient, written out."""
    lens, rewards, limit = [1, 3, 2], [1.0, 0.0, 0.5], 4
    mean, std = 0.5, 0.5 + 1e-6  # sample standard deviation of 1, 0, 0.5
    want_advantages = {
        AdvantageKind.grpo: [(r - mean) / std for r in rewards],
        AdvantageKind.dr_grpo: [r - mean for r in rewards],
        AdvantageKind.rloo: [1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5],
        AdvantageKind.reinforce_pp: [(r - mean) / std for r in rewards],
    }[kind]
    want_weights = {
        Aggregation.token: [1 / 6] * 3,
        Aggregation.sequence: [1 / (3 * n) for n in lens],
        Aggregation.constant: [1 / (3 * limit)] * 3,
    }[aggregation]
    (advantages_S,) = group_advantages([torch.tensor(rewards)], kind=kind)
    weights_R = row_weights(
        lens, aggregation=aggregation, max_response_tokens=limit, total_tokens=6, total_responses=3
    ).double()
    _, grad_R, _ = run(torch.full((6,), -1.0).double(), advantages_S.tolist(), lens, weights_R=weights_R)
    want = [-w * a for w, a, n in zip(want_weights, want_advantages, lens, strict=True) for _ in range(n)]
    torch.testing.assert_close(grad_R, rows(*want), rtol=1e-6, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("ratio", list(RatioLevel))
def test_any_split_into_micro_batches_gives_the_same_gradient_and_metrics(ratio, data) -> None:
    lens = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    part_of = data.draw(st.lists(st.integers(0, 2), min_size=len(lens), max_size=len(lens)))
    generator = torch.Generator().manual_seed(sum(lens))
    num_rows = sum(lens)
    old_R, ref_R, sampler_R = (torch.randn(3, num_rows, generator=generator, dtype=torch.float64) - 2).unbind()
    logprobs_R = old_R + 0.3 * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lens), generator=generator, dtype=torch.float64).tolist()
    choice = replace(PPO, ratio=ratio, kl_coef=0.05, tis_cap=2.0)

    def totals(parts: list[list[int]]) -> tuple[Tensor, dict[str, float]]:
        grad_R, sums = torch.zeros(num_rows, dtype=torch.float64), {}
        places = torch.arange(num_rows).split(lens)
        for part in filter(None, parts):
            part_lens = [lens[i] for i in part]
            place = torch.cat([places[i] for i in part])
            weights_R = row_weights(
                part_lens,
                aggregation=Aggregation.sequence,
                max_response_tokens=5,
                total_tokens=num_rows,
                total_responses=len(lens),
            )
            _, grad_R[place], metrics = run(
                logprobs_R[place],
                [advantages[i] for i in part],
                part_lens,
                choice,
                old_logprobs_R=old_R[place],
                ref_logprobs_R=ref_R[place],
                sampler_logprobs_R=sampler_R[place],
                weights_R=weights_R.double(),
            )
            for name, value in metrics.items():
                together = max if name.endswith("_max") else lambda a, b: a + b
                sums[name] = together(sums.get(name, 0.0), value)
        return grad_R, sums

    whole_R, whole = totals([list(range(len(lens)))])
    split_R, split = totals([[i for i, part in enumerate(part_of) if part == wanted] for wanted in range(3)])
    torch.testing.assert_close(split_R, whole_R, rtol=1e-12, atol=1e-15)
    assert split == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_low": 1.2}, "grpo.clip_low is 1.2; expected 0 to 1"),
        ({"clip_high": -0.1}, "grpo.clip_high is -0.1"),
        ({"kl_coef": float("nan")}, "grpo.kl_coef is nan"),
        ({"tis_cap": -1.0}, "grpo.tis_cap is -1.0"),
    ],
)
def test_settings_outside_their_range_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PPO, **change)


def test_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grpo.kl_coef=0.1 needs reference log-probabilities"):
        run(rows(-1.0), [1.0], [1], replace(PPO, kl_coef=0.1))


@pytest.mark.parametrize("name", ["old_logprobs_R", "ref_logprobs_R", "sampler_logprobs_R", "weights_R"])
def test_rows_of_another_batch_are_refused(name) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be \[2\] like logprobs_R, got \(3,\)"):
        run(rows(-1.0, -1.0), [1.0], [2], **{name: rows(1.0, 1.0, 1.0)})
