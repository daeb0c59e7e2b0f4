"""The parts of the GRPO and SFT loops that need no model."""

from __future__ import annotations

import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from megalong import evaluating, grpo, rollouts, sft
from megalong import run as run_module
from megalong.config.tree import AdvantageKind, Aggregation, LearningRateSchedule, OptimizerConfig, RunConfig
from megalong.engine.checkpoint import newest_checkpoint
from megalong.engine.trainer import learning_rate, merge_sums
from megalong.metrics import PhaseTimer
from megalong.models.errors import CheckpointError
from megalong.records import Dropped, Prompt, RolloutGroup, Sample, ScoredGroup, StepStats

RIGHT, WRONG = "<think>t</think> <answer>A</answer>", "<think>t</think> <answer>B</answer>"


def prompt(name: str) -> Prompt:
    sample = Sample(
        sample_id=name, question="q", answer="A", videos=(), problem_type="multiple choice", category="c",
        reasoning="", subtitles="",
    )  # fmt: skip
    return Prompt(sample=sample, ids_P=(1, 2, 3), selections=(), positions_P=torch.arange(3), next_position=3)


def group(name: str, texts: Sequence[str]) -> RolloutGroup:
    return RolloutGroup(
        prompt=prompt(name),
        response_ids=tuple((index + 1,) * (index + 1) for index in range(len(texts))),
        logprobs=tuple((-1.0,) * (index + 1) for index in range(len(texts))),
        texts=tuple(texts),
        truncated=(False,) * len(texts),
        weights_version=0,
    )


def scored(name: str, accuracies: Sequence[float], *, round: int = 0) -> ScoredGroup:
    column = torch.tensor(accuracies)
    return ScoredGroup(
        group=group(name, [RIGHT if value else WRONG for value in accuracies]),
        rewards_G=column,
        parts_GK=torch.stack((column, torch.ones(len(column))), dim=1),
        part_names=("accuracy", "format"),
        round=round,
    )


def names(items: Sequence[ScoredGroup]) -> list[str]:
    return [item.group.prompt.sample.sample_id for item in items]


def fake_run(layout: object, *, config: RunConfig | None = None, **parts: object) -> SimpleNamespace:
    return SimpleNamespace(layout=layout, config=config or RunConfig(), timer=PhaseTimer(), **parts)


def config(**grpo_settings: object) -> RunConfig:
    built = RunConfig()
    built.data.max_response_tokens = 8
    built.rollout.group_size = 2
    for name, value in grpo_settings.items():
        setattr(built.grpo, name, value)
    return built


# ---- learning rate


def rates(total: int, **settings: object) -> list[float]:
    chosen = OptimizerConfig(lr=1.0, **settings)
    return [learning_rate(step, total, chosen) for step in range(total)]


def test_constant_after_warm_up() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(3) == [1.0, 1.0, 1.0]


def test_linear_goes_down_to_the_minimum_at_the_total() -> None:
    settings = {"schedule": LearningRateSchedule.linear, "warmup_steps": 2, "min_lr": 0.2}
    assert rates(6, **settings) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])
    assert learning_rate(6, 6, OptimizerConfig(lr=1.0, **settings)) == pytest.approx(0.2)


def test_cosine_is_at_the_mean_half_way() -> None:
    settings = {"schedule": LearningRateSchedule.cosine, "min_lr": 0.1}
    values = rates(8, **settings)
    assert values[0] == 1.0
    assert values[4] == pytest.approx(0.55)
    assert values[2] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert values == sorted(values, reverse=True)
    assert learning_rate(8, 8, OptimizerConfig(lr=1.0, **settings)) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", [LearningRateSchedule.linear, LearningRateSchedule.cosine])
def test_past_the_total_the_minimum_stays(schedule: LearningRateSchedule) -> None:
    settings = OptimizerConfig(lr=1.0, schedule=schedule, min_lr=0.1)
    assert [learning_rate(step, 4, settings) for step in (4, 5, 8, 40)] == pytest.approx([0.1] * 4)


def test_warm_up_longer_than_the_run() -> None:
    assert rates(2, warmup_steps=4, schedule=LearningRateSchedule.cosine) == [0.25, 0.5]


# ---- statistics


def stats(loss: float, **metrics: float) -> StepStats:
    return StepStats(
        loss=loss, grad_norm=2 * loss, learning_rate=loss / 10, skipped=loss > 2, num_tokens=int(loss * 100),
        metrics=metrics,
    )  # fmt: skip


def test_merge_sums_adds_and_takes_maxima() -> None:
    parts = [{"a": 1.0, "gap_max": -3.0}, {"a": 2.0, "b": 5.0, "gap_max": -4.0}, {}]
    assert merge_sums(parts) == {"a": 3.0, "b": 5.0, "gap_max": -3.0}


def test_merge_updates_means_sums_and_maxima() -> None:
    merged = grpo.merge_updates([stats(1.0, entropy=2.0, gap_max=7.0), stats(3.0, entropy=4.0, gap_max=5.0)])
    assert merged == StepStats(
        loss=2.0, grad_norm=4.0, learning_rate=0.3, skipped=True, num_tokens=400,
        metrics={"entropy": 3.0, "gap_max": 7.0},
    )  # fmt: skip


# ---- dynamic sampling


def test_only_with_spread_keeps_groups_whose_accuracy_differs() -> None:
    before = [Dropped(sample_id="x", stage="decode", reason="r")]
    kept, dropped = grpo.only_with_spread(
        [scored("flat", [1, 1]), scored("mixed", [1, 0]), scored("wrong", [0, 0])], before
    )
    assert names(kept) == ["mixed"]
    assert dropped[0] == before[0]
    assert [(drop.sample_id, drop.stage, drop.reason) for drop in dropped[1:]] == [
        ("flat", "group", "all responses have the same accuracy"),
        ("wrong", "group", "all responses have the same accuracy"),
    ]


def test_trim_to_batch_keeps_the_first_groups(layout: object) -> None:
    items = [scored(name, [1, 0], round=number) for name, number in zip("abcd", (0, 0, 1, 1), strict=True)]
    kept, dropped = grpo.trim_to_batch(fake_run(layout, config=config(batch_size=3)), items, [])
    assert names(kept) == ["a", "b", "c"]
    assert [(drop.sample_id, drop.stage, drop.reason) for drop in dropped] == [
        ("d", "group", "the refilled batch is full")
    ]
    run = fake_run(layout, config=config(batch_size=9))
    assert grpo.trim_to_batch(run, items, []) == (items, [])


@pytest.mark.parametrize(
    ("rank", "want"), [(0, ["a", "b"]), (1, ["c"])]  # rounds: rank 0 has 0, 1, 2 and rank 1 has 0, 1
)  # fmt: skip
def test_trim_to_batch_takes_round_after_round_over_all_replicas(
    layout: object, monkeypatch: pytest.MonkeyPatch, rank: int, want: list[str]
) -> None:
    monkeypatch.setattr(grpo, "gather_objects", lambda item, group: [[0, 1, 2], [0, 1]])
    run = fake_run(SimpleNamespace(dp=None, dp_rank=rank), config=config(batch_size=3))
    mine = [scored(name, [1, 0], round=number) for number, name in enumerate(("abx", "cy")[rank])]
    kept, dropped = grpo.trim_to_batch(run, mine, [])
    assert names(kept) == want
    assert len(kept) + len(dropped) == len(mine)


class Batches:
    """Prompts p0, p1, .. two at a time; the first of each batch is a flat group, the second as `spread` says."""

    def __init__(self) -> None:
        self.handed_out = 0

    def __next__(self) -> tuple[list[Prompt], list[Dropped]]:
        self.handed_out += 2
        return [prompt(f"p{self.handed_out - 2}"), prompt(f"p{self.handed_out - 1}")], []

    def decode_ahead(self) -> None:
        """There are no videos."""


class Sampler:
    """Right and wrong for the prompts in `mixed`, all wrong for the others."""

    def __init__(self, mixed: set[str], *, shares_gpus: bool = False) -> None:
        self.mixed, self.shares_gpus = mixed, shares_gpus
        self.repeats: list[list[int]] = []

    def owners(self, prompts: Sequence[Prompt]) -> list[int]:
        return [0] * len(prompts)

    def embeds_room(self, prompts: Sequence[Prompt]) -> None:
        return None

    def release(self) -> None:
        """Nothing sleeps here; tests/parallel/test_engine_sleeps.py is about that."""

    def begin(
        self,
        prompts: Sequence[Prompt],
        embeds: Sequence[Tensor | None],
        *,
        sampling: object,
        step: int,
        repeats: list[int],
    ) -> Sequence[Prompt]:
        self.repeats.append(repeats)
        return prompts

    def finish(self, pending: Sequence[Prompt]) -> list[RolloutGroup]:
        return [
            group(item.sample.sample_id, [RIGHT if item.sample.sample_id in self.mixed else WRONG, WRONG])
            for item in pending
        ]


def sampling_run(layout: object, sampler: Sampler, *, on_gpu: bool = False, **settings: object) -> SimpleNamespace:
    return fake_run(
        layout, config=config(batch_size=2, **settings), sampler=sampler, sync_weights=lambda: None, report_dropped=len,
        vision=SimpleNamespace(
            embeddings_of=lambda prompts, owners, room_ND: [None] * len(prompts), release=lambda *, keep: None,
            decoder=SimpleNamespace(on_gpu=on_gpu),
        ),
    )  # fmt: skip


def sample_groups(
    layout: object, mixed: set[str], **settings: object
) -> tuple[list[ScoredGroup], list[Dropped], Sampler, Batches]:
    sampler, batches = Sampler(mixed), Batches()
    return *grpo.sample_groups(sampling_run(layout, sampler, **settings), batches, step=4), sampler, batches


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_fails_ends_its_decoding_and_waits_for_nobody(fails: bool) -> None:
    parts = mock.Mock()
    settings = {item.name: None for item in fields(run_module.Run)}
    run = run_module.Run(**(settings | {name: getattr(parts, name) for name in ("vision", "sampler", "logger")}))
    with pytest.raises(RuntimeError, match="lost") if fails else nullcontext(), run as same:
        assert same is run
        if fails:
            raise RuntimeError("lost")
    everything = [mock.call.vision.close(), mock.call.sampler.close(), mock.call.logger.close()]
    assert parts.mock_calls == ([mock.call.vision.close(wait=False)] if fails else everything)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("shares_gpus", [False, True])
def test_videos_are_decoded_while_engines_sample_and_not_before_on_their_gpus(
    layout: object, shares_gpus: bool, on_gpu: bool
) -> None:
    sampler, batches, calls = Sampler(set(), shares_gpus=shares_gpus), Batches(), mock.Mock()
    for owner, name in ((batches, "decode_ahead"), (sampler, "begin"), (sampler, "finish"), (sampler, "release")):
        wrapped = mock.Mock(side_effect=getattr(owner, name))
        calls.attach_mock(wrapped, name)
        setattr(owner, name, wrapped)
    grpo.sample_batch(sampling_run(layout, sampler, on_gpu=on_gpu), batches, step=1, seen=Counter())
    before = [] if shares_gpus and on_gpu else ["decode_ahead"]  # while embeddings and weights are handed over
    assert [name for name, *_ in calls.mock_calls] == [*before, "begin", "decode_ahead", "finish", "release"]


def test_without_dynamic_sampling_flat_groups_stay(layout: object) -> None:
    kept, dropped, sampler, _ = sample_groups(layout, {"p1"})
    assert names(kept) == ["p0", "p1"]
    assert dropped == []
    assert sampler.repeats == [[0, 0]]
    assert kept[1].rewards_G.tolist() == pytest.approx([1.0, 0.1])


def test_dynamic_sampling_refills_until_the_batch_is_full(layout: object) -> None:
    kept, dropped, sampler, batches = sample_groups(layout, {"p1", "p4", "p5"}, dynamic_sampling=True)
    assert names(kept) == ["p1", "p4"]
    assert sampler.repeats == [[0, 0]] * 3
    assert batches.handed_out == 6
    assert [(drop.sample_id, drop.reason.split()[0]) for drop in dropped] == [
        ("p0", "all"), ("p2", "all"), ("p3", "all"), ("p5", "the"),
    ]  # fmt: skip


def test_dynamic_sampling_stops_at_its_limit_with_what_it_has(layout: object) -> None:
    kept, _, sampler, _ = sample_groups(layout, {"p1"}, dynamic_sampling=True, dynamic_sampling_max_batches=3)
    assert names(kept) == ["p1"]
    assert sampler.repeats == [[0, 0]] * 3


def test_dynamic_sampling_without_a_usable_group_is_an_error(layout: object) -> None:
    with pytest.raises(
        RuntimeError, match=r"step 4: 3 batches of 2 prompts gave no group.*grpo\.dynamic_sampling=false"
    ):
        sample_groups(layout, set(), dynamic_sampling=True, dynamic_sampling_max_batches=3)


@pytest.mark.parametrize(("rank", "want"), [(0, [[0, 0, 1], [3]]), (1, [[2, 0], [1, 4]])])
def test_repeats_are_counted_over_the_step_in_the_order_of_the_global_batch(
    layout: object, monkeypatch: pytest.MonkeyPatch, rank: int, want: list[list[int]]
) -> None:
    batches = [["aba", "ac"], ["a", "ba"]]  # two batches on two replicas
    run = fake_run(SimpleNamespace(dp=None, dp_rank=rank))
    seen: Counter[str] = Counter()
    for batch, expected in zip(batches, want, strict=True):
        monkeypatch.setattr(rollouts, "gather_objects", lambda item, group, batch=batch: [list(part) for part in batch])
        assert rollouts.count_repeats(run, [prompt(name) for name in batch[rank]], seen) == expected


def test_more_prefill_than_a_prompt_per_group_is_said_once(layout: object, caplog: pytest.LogCaptureFixture) -> None:
    """Each further response computes a block of 128 tokens anew, or all of a prompt that is shorter."""
    run = fake_run(layout, told_of_prefill=False)
    run.config.rollout.group_size = 8

    def end_step(prefilled: int, *, prompt: int = 100_000) -> None:
        counts = {"prefilled_tokens": prefilled, "handover_seconds": 0.5, "prompt_tokens": prompt, "sampled_groups": 1}
        run.sampler = SimpleNamespace(take_counts=lambda: counts)
        assert rollouts.prefill_metrics(run) == counts

    end_step(8 * 100, prompt=100)
    end_step(100_000 + 7 * 128)
    assert caplog.messages == []
    end_step(152_000)
    end_step(800_000)
    assert caplog.messages == [
        "vLLM computed 152,000 prompt tokens for prompts of 100,000, 1.5 times what one prompt per group takes: keys "
        "and values were gone before a group's other responses began; raise rollout.memory_share or rollout.engine_tp"
    ]
    run.sampler = SimpleNamespace(take_counts=dict)
    assert rollouts.prefill_metrics(run) == {}


# ---- from rewards to packs and losses


def test_pack_updates_shares_groups_out_and_keeps_their_advantages(layout: object) -> None:
    items = [scored(name, values) for name, values in zip("abc", ([1, 0], [1, 1], [0, 1]), strict=True)]
    updates = grpo.pack_updates(fake_run(layout, config=config(updates_per_batch=2)), items)
    assert [[batch.advantages_S.sign().tolist() for batch in update] for update in updates] == [
        [[1.0, -1.0, -1.0, 1.0]],  # a and c
        [[0.0, 0.0]],  # b
    ]
    few = grpo.pack_updates(fake_run(layout, config=config(updates_per_batch=4)), items[:2])
    assert [len(update) for update in few] == [1, 1]  # no update without a group ..
    assert grpo.pack_updates(fake_run(layout, config=config(updates_per_batch=2)), []) == [[]]  # .. but for one


def test_an_update_takes_all_questions_about_a_video_that_come_together(layout: object) -> None:
    settings = config(updates_per_batch=2)
    settings.data.questions_per_video = 2
    items = [scored(name, values) for name, values in zip("abcde", ([1, 0], [0, 1]) * 2 + ([0, 0],), strict=False)]
    updates = grpo.pack_updates(fake_run(layout, config=settings), items)
    assert [[batch.advantages_S.sign().tolist() for batch in update] for update in updates] == [
        [[1.0, -1.0, -1.0, 1.0, 0.0, 0.0]],  # a and b, e
        [[1.0, -1.0, -1.0, 1.0]],  # c and d
    ]
    assert len(grpo.pack_updates(fake_run(layout, config=settings), items[:2])) == 1


def test_the_only_response_that_drops_have_left_has_no_advantage(layout: object) -> None:
    settings = config(advantage=AdvantageKind.reinforce_pp)
    ((batch,),) = grpo.pack_updates(fake_run(layout, config=settings), [scored("a", [1])])
    assert batch.advantages_S.tolist() == [0.0]


def test_updates_have_the_same_groups_on_any_number_of_replicas_after_several_rounds(
    layout: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas hold a first round of three groups and a refill of three."""
    replicas = [
        [scored("a", [1, 0]), scored("b", [0, 1]), scored("d", [1, 0], round=1)],
        [scored("c", [0, 1]), scored("e", [1, 0], round=1), scored("f", [0, 1], round=1)],
    ]
    monkeypatch.setattr(grpo, "pack_rollouts", lambda groups, advantages, **_: [
        (group.prompt.sample.sample_id, of_group.sign().tolist())
        for group, of_group in zip(groups, advantages, strict=True)
    ])  # fmt: skip
    in_order = sorted((item for part in replicas for item in part), key=lambda item: names([item]))
    alone = grpo.pack_updates(fake_run(layout, config=config(updates_per_batch=2)), in_order)
    assert alone == [[("a", [1, -1]), ("c", [-1, 1]), ("e", [1, -1])], [("b", [-1, 1]), ("d", [1, -1]), ("f", [-1, 1])]]

    def gather(mine: list, group: object) -> list[list]:
        get = "round" if isinstance(mine[0], int) else "rewards_G"
        return [[getattr(item, get) for item in part] for part in replicas]

    monkeypatch.setattr(grpo, "gather_objects", gather)
    runs = [fake_run(SimpleNamespace(dp=None, dp_rank=rank), config=config(updates_per_batch=2)) for rank in (0, 1)]
    parts = [grpo.pack_updates(run, part) for run, part in zip(runs, replicas, strict=True)]
    assert [sorted([*ours, *theirs]) for ours, theirs in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize(("updates", "kl_coef"), [(1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1)])
def test_add_logprobs_makes_only_the_passes_that_the_loss_reads(layout: object, updates: int, kl_coef: float) -> None:
    calls: list[str] = []

    class Trainer:
        weights = "policy"

        @contextmanager
        def reference_weights(self) -> Iterator[None]:
            self.weights = "reference"
            yield
            self.weights = "policy"

        def logprobs(self, packs: Sequence[object], *, temperature: float) -> list[Tensor]:
            calls.append(self.weights)
            return [torch.full((len(pack.rows_R),), float(len(calls))) for pack in packs]

    run = fake_run(layout, config=config(updates_per_batch=updates, kl_coef=kl_coef), trainer=Trainer())
    packed = grpo.pack_updates(run, [scored("a", [1, 0]), scored("b", [0, 1])])
    done = grpo.add_logprobs(run, packed)
    assert calls == ["policy"] * (updates if updates > 1 else 0) + ["reference"] * (updates if kl_coef > 0 else 0)
    for index, update in enumerate(done):
        for batch in update:
            assert (batch.old_logprobs_R is not None) is (updates > 1)
            assert (batch.ref_logprobs_R is not None) is (kl_coef > 0)
            if batch.ref_logprobs_R is not None:
                call = float(len(calls) - updates + index + 1)
                assert batch.ref_logprobs_R.tolist() == [call] * len(batch.tokens.rows_R)


@pytest.mark.parametrize("pack_tokens", [100, 1])
@pytest.mark.parametrize(
    ("aggregation", "want"),
    [
        # Two groups of responses of 1 and 2 tokens, advantages +0.5, -0.5 and -0.5, +0.5: 6 tokens, 4 responses.
        (Aggregation.token, [-0.5 / 6, 0.5 / 6, 0.5 / 6, 0.5 / 6, -0.5 / 6, -0.5 / 6]),
        (Aggregation.sequence, [-0.5 / 4, 0.5 / 8, 0.5 / 8, 0.5 / 4, -0.5 / 8, -0.5 / 8]),
        (Aggregation.constant, [-0.5 / 32, 0.5 / 32, 0.5 / 32, 0.5 / 32, -0.5 / 32, -0.5 / 32]),
    ],
)
def test_grpo_gradient_of_each_row_does_not_depend_on_the_packs(
    layout: object, aggregation: Aggregation, want: list[float], pack_tokens: int
) -> None:
    settings = config(aggregation=aggregation, advantage=AdvantageKind.dr_grpo, kl_coef=0.0)
    settings.data.pack_tokens = pack_tokens
    run = fake_run(layout, config=settings)
    batches = grpo.pack_updates(run, [scored("a", [1, 0]), scored("b", [0, 1])])[0]
    assert len(batches) == (1 if pack_tokens == 100 else 2)
    loss_of = grpo.grpo_loss(run, batches, grpo.loss_settings(settings))
    gradients: list[float] = []
    for index, batch in enumerate(batches):
        logprobs_R = torch.full((len(batch.tokens.rows_R),), -1.0, requires_grad=True)
        loss_of(index, logprobs_R, torch.zeros(()))[0].backward()
        gradients += logprobs_R.grad.tolist()
    assert gradients == pytest.approx(want)


def test_sft_loss_is_the_mean_over_all_target_tokens(layout: object) -> None:
    settings = RunConfig()
    settings.data.max_response_tokens = 5
    settings.data.pack_tokens = 5
    targets: dict[str, tuple[int, ...]] = {"a": (7,), "b": (7, 8, 9), "long": (7,) * 6}
    run = fake_run(layout, config=settings, builder=SimpleNamespace(target=lambda sample: targets[sample.sample_id]))
    packs, dropped = sft.pack_targets(run, [prompt(name) for name in targets])
    assert [pack.targets_R.tolist() for pack in packs] == [[7], [7, 8, 9]]
    assert [(drop.sample_id, drop.stage) for drop in dropped] == [("long", "target")]
    assert dropped[0].reason == "target of 6 tokens is over data.max_response_tokens=5"
    loss_of = sft.token_mean_loss(run, packs)
    values = [torch.tensor([-4.0]), torch.tensor([-1.0, -2.0, -5.0])]
    assert sum(float(loss_of(i, value, value)[0]) for i, value in enumerate(values)) == pytest.approx(12 / 4)
    assert sft.pack_targets(run, []) == ([], [])


def test_sample_rows_carry_text_reward_and_parts() -> None:
    rows = grpo.sample_rows(scored("a", [1, 0]))
    assert rows[1] == {
        "sample_id": "a", "question": "q", "answer": "A", "response": WRONG, "reward": 0.0, "accuracy": 0.0,
        "format": 1.0, "tokens": 2, "truncated": False,
    }  # fmt: skip
    assert len(rows) == 2


# ---- batches, evaluation, checkpoints


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"at_start": True, "at_end": True, "every": 0}, ["eval_start", "eval_end"]),
        ({"every": 2}, ["eval_000002", "eval_000004"]),
        ({"every": 3, "at_end": True}, ["eval_000003", "eval_end"]),
        ({}, []),
    ],
)
def test_when_evaluation_is_due(monkeypatch: pytest.MonkeyPatch, settings: dict, want: list[str]) -> None:
    done: list[str] = []
    monkeypatch.setattr(evaluating, "evaluate_policy", lambda run, samples, *, name, step: done.append(name))
    monkeypatch.setattr(evaluating, "is_evaluated", lambda run, *, step: False)
    chosen = RunConfig()
    for name, value in settings.items():
        setattr(chosen.eval, name, value)
    for step in range(6):
        run = SimpleNamespace(config=chosen, trainer=SimpleNamespace(step=step), step_before=step - 1)
        run.is_due = partial(run_module.Run.is_due, run)
        evaluating.evaluate_if_due(run, [], step=step, total=5)
    assert done == want


@pytest.mark.parametrize(
    ("step", "rows", "want"),
    [
        (0, [], ["eval_start"]),
        (4, [0], ["eval_000004"]),  # its round of steps 3 and 4 reached 3
        (4, [0, 4], []),
        (5, [0], []),  # its round of steps 4 and 5 reached none
        (8, [0], []),  # the call after the loop makes it
    ],
)
def test_before_the_loop_what_was_cut_short_is_evaluated(
    layout: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int, rows: list[int], want: list[str]
) -> None:
    done: list[str] = []
    monkeypatch.setattr(evaluating, "evaluate_policy", lambda run, samples, *, name, step: done.append(name))
    chosen = RunConfig()
    chosen.eval.at_start = chosen.eval.at_end = True
    chosen.eval.every = 3
    chosen.logger.run_dir = str(tmp_path)
    (tmp_path / "evaluations.jsonl").write_text("".join(f'{{"step": {row}}}\n' for row in rows))
    run = fake_run(layout, config=chosen, trainer=SimpleNamespace(step=step), step_before=step)
    run.is_due = partial(run_module.Run.is_due, run)
    evaluating.evaluate_before_loop(run, [], total=8, round_steps=2)
    assert done == want


@pytest.mark.parametrize(("before", "after", "want"), [(0, 3, False), (3, 6, True), (4, 5, True), (5, 8, False)])
def test_a_round_of_several_updates_is_due_when_it_reaches_a_multiple(before: int, after: int, want: bool) -> None:
    run = SimpleNamespace(trainer=SimpleNamespace(step=after), step_before=before)
    assert run_module.Run.is_due(run, 5) is want
    assert run_module.Run.is_due(run, 0) is False


def test_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.init_from=.*neither a megatron checkpoint nor a folder"):
        newest_checkpoint(tmp_path)
    for name in ("step_00000002", "step_00000010", "step_00000011.partial", "notes"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path).name == "step_00000010"
    (tmp_path / "metadata.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path


def test_prompt_batches_save_the_place_of_what_was_handed_out(layout: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch is planned ahead; a checkpoint must not skip it."""
    monkeypatch.setattr(run_module, "plan_prompts", lambda run, samples: ([prompt(s.sample_id) for s in samples], []))
    monkeypatch.setattr(run_module, "make_ready", lambda run, prompts: (prompts, []))
    samples = [prompt(str(index)).sample for index in range(7)]

    def batches(resumed: dict) -> run_module.PromptBatches:
        vision = SimpleNamespace(index_ahead=lambda selections: None)
        return run_module.PromptBatches(fake_run(layout, resumed=resumed, vision=vision), samples, batch_size=3)

    def ids(chosen: run_module.PromptBatches, count: int) -> list[list[str]]:
        return [[item.sample.sample_id for item in next(chosen)[0]] for _ in range(count)]

    whole = batches({})
    assert whole.position["position"] == 0
    want = ids(whole, 6)
    for done in range(6):
        first = batches({})
        ids(first, done)
        assert first.position["position"] == 3 * done
        assert ids(batches({"sampler": first.position}), 6 - done) == want[done:]


def test_run_steps_stop_after_the_step_in_progress_on_sigterm(layout: object) -> None:
    trainer = SimpleNamespace(step=3)
    seen: list[int] = []
    released: list[tuple[int, list]] = []
    run = run_module.Run(
        config=RunConfig(), layout=layout, trainer=trainer, builder=None, sampler=None, logger=None, timer=None,
        vision=SimpleNamespace(release=lambda *, keep: released.append((len(seen), keep))), origin=None, resumed={},
    )  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    with run.heeding_sigterm():
        for step in run.steps(9):
            seen.append(step)
            trainer.step += 1
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while the last checkpoint is written
    assert seen == [4, 5]
    assert released == [(0, []), (1, [])], "each step starts without the videos of the one before"
    assert signal.getsignal(signal.SIGTERM) is before


def test_weights_are_sent_once_per_update() -> None:
    sent: list[tuple[int, bool]] = []  # and whether frozen weights are among them
    trainer = SimpleNamespace(num_updates=0, export_weights=lambda *, name_of, frozen: frozen)
    sampler = SimpleNamespace(load_weights=lambda frozen, version: sent.append((version, frozen)), needs_weights=False)
    run = run_module.Run(
        config=RunConfig(), layout=None, trainer=trainer, vision=None, builder=None, sampler=sampler, logger=None,
        timer=None, origin=None, resumed={},
    )  # fmt: skip
    for updates in (0, 0, 1, 1, 3):
        trainer.num_updates = updates
        run.sync_weights()
    assert sent == [(0, True), (1, False), (3, False)]
    sampler.needs_weights = True  # an engine that slept threw them away
    run.sync_weights()
    assert sent[3:] == [(3, True)]


def test_make_ready_leaves_out_the_prompts_of_unreadable_videos() -> None:
    drop = Dropped(sample_id="b", stage="decode", reason="r")
    vision = SimpleNamespace(prepare=lambda samples, selections: [drop])
    prompts, dropped = run_module.make_ready(SimpleNamespace(vision=vision), [prompt("a"), prompt("b")])
    assert [item.sample.sample_id for item in prompts] == ["a"]
    assert dropped == [drop]
