"""GRPO on video: prompts -> groups -> rewards -> advantages -> packs -> train step -> weight sync."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from megalong.config.tree import RunConfig
from megalong.data.packing import pack_rollouts
from megalong.engine.trainer import LossOf, merge_sums
from megalong.evaluating import eval_samples, evaluate_before_loop, evaluate_if_due
from megalong.failures import RunFailedError
from megalong.metrics import PhaseTimer, end_table, plot_rewards
from megalong.objectives.advantages import group_advantages, has_spread
from megalong.objectives.aggregation import row_weights
from megalong.objectives.policy_loss import PolicyLossSettings, policy_loss
from megalong.parallel.collectives import gather_objects, sum_over
from megalong.records import Dropped, PolicyBatch, RolloutGroup, ScoredGroup, StepStats
from megalong.rewards.functions import check_weights
from megalong.rewards.score import score_groups
from megalong.rollouts import RolloutsAhead, begin_rollouts, prefill_metrics
from megalong.run import PromptBatches, Run, checked_shape, open_run, read_samples
from megalong.sft import log_step
from megalong.timeline import plot_timeline


def train_grpo(config: RunConfig, timer: PhaseTimer | None = None) -> None:
    """`megalong grpo`: reinforcement learning on data.train with verifiable rewards."""
    check_weights(config.reward.weights)
    checked_shape(config, task="grpo")
    samples = read_samples(config, manifest=config.data.train, video_dir=config.data.video_dir, thinking_targets=False)
    held_out = eval_samples(config) if config.eval.manifest else []
    with open_run(config, task="grpo", timer=timer or PhaseTimer()) as run, run.heeding_sigterm():
        settings = loss_settings(config)  # of a validated config
        batches = PromptBatches(run, samples, batch_size=config.grpo.batch_size)
        total = config.grpo.steps * config.grpo.updates_per_batch
        ahead = RolloutsAhead(run, batches, total=total) if config.rollout.steps_off_policy else None
        if held_out:
            evaluate_before_loop(run, held_out, total=total, round_steps=config.grpo.updates_per_batch)
        for step in run.steps(total):
            started = time.perf_counter()
            if ahead is not None:
                groups, dropped = ahead.take(step)
                scored = score(run, groups)
            else:
                scored, dropped = sample_groups(run, batches, step=step)
            num_dropped = run.report_dropped(dropped)  # before a step that may end the run for them
            with run.timer("logprob"):
                updates = add_logprobs(run, pack_updates(run, scored))
            with run.timer("train"):
                stats = [run.trainer.train_step(tokens_of(b), grpo_loss(run, b, settings), temperature=temperature(run))
                         for b in updates]  # fmt: skip
                run.trainer.step += config.grpo.updates_per_batch - len(updates)  # those that no group was left for
            log_rollouts(run, step, scored, stats, num_dropped, seconds=time.perf_counter() - started)
            run.save_if_due(ahead or batches)
            if held_out and run.trainer.step < total:
                evaluate_if_due(run, held_out, step=run.trainer.step, total=total)
        run.save(ahead or batches)
        if run.trainer.step == total:
            if held_out:
                evaluate_if_due(run, held_out, step=total, total=total)
            if run.layout.is_main:
                plot_rewards(config.logger.run_dir)
                plot_timeline(config.logger.run_dir)
                tqdm.write(end_table(config.logger.run_dir))


def temperature(run: Run) -> float:
    return run.config.rollout.temperature


def loss_settings(config: RunConfig) -> PolicyLossSettings:
    grpo = config.grpo
    return PolicyLossSettings(
        clip_low=grpo.clip_low,
        clip_high=grpo.clip_high,
        ratio=grpo.ratio,
        kl_coef=grpo.kl_coef,
        kl_estimator=grpo.kl_estimator,
        tis_cap=grpo.tis_cap,
    )


def sample_groups(run: Run, batches: PromptBatches, *, step: int) -> tuple[list[ScoredGroup], list[Dropped]]:
    """This replica's scored groups of one rollout batch.

    With dynamic sampling (DAPO), groups whose accuracy has no spread are dropped and more prompts are sampled until
    the global batch is full. Raises RunFailedError when grpo.dynamic_sampling_max_batches batches gave no usable group.
    """
    grpo = run.config.grpo
    seen: Counter[str] = Counter()  # samples that this step has had, over all replicas
    kept, dropped = sample_batch(run, batches, step=step, seen=seen)
    if not grpo.dynamic_sampling:
        return kept, dropped
    kept, dropped = only_with_spread(kept, dropped)
    sampled = 1
    while count_everywhere(run, kept) < grpo.batch_size and sampled < grpo.dynamic_sampling_max_batches:
        # Embeddings of the groups that are left out may make room for the next batch's.
        run.vision.release(keep=[item for scored in kept for item in scored.group.prompt.selections])
        more, lost = only_with_spread(*sample_batch(run, batches, step=step, seen=seen))
        kept += [dataclasses.replace(item, round=sampled) for item in more]
        dropped, sampled = [*dropped, *lost], sampled + 1
    if count_everywhere(run, kept) == 0:
        run.report_dropped(dropped)
        raise RunFailedError(
            f"step {step}: {sampled} batches of {grpo.batch_size} prompts gave no group with both right and wrong "
            "answers, dropped.jsonl of the run folder says why; where samples cannot be used, look at data.video_dir "
            "and data.max_prompt_tokens, else the data is too easy or too hard for this policy: change data.train, "
            "raise rollout.group_size, or set grpo.dynamic_sampling=false"
        )
    return trim_to_batch(run, kept, dropped)


def sample_batch(
    run: Run, batches: PromptBatches, *, step: int, seen: Counter[str]
) -> tuple[list[ScoredGroup], list[Dropped]]:
    """One batch of prompts, G responses each, scored. `seen` counts what the step has had before, and this batch."""
    with run.timer("data"):
        prompts, dropped = next(batches)
        if not (run.sampler.shares_gpus and run.vision.decoder.on_gpu):
            batches.decode_ahead()
    pending = begin_rollouts(run, prompts, step=step, seen=seen)
    batches.decode_ahead()  # on an engine's GPUs not before: decoding would take turns with the copies of weights
    with run.timer("rollout"):
        groups = run.sampler.finish(pending)
        run.sampler.release()
    return score(run, groups), dropped


def score(run: Run, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
    with run.timer("reward"):
        return score_groups(
            groups,
            weights=run.config.reward.weights,
            overlong_buffer=run.config.reward.overlong_buffer,
            max_response_tokens=run.config.data.max_response_tokens,
        )


def only_with_spread(
    scored: Sequence[ScoredGroup], dropped: Sequence[Dropped]
) -> tuple[list[ScoredGroup], list[Dropped]]:
    flat = [item.group.prompt.sample.sample_id for item in scored if not has_spread(item)]
    lost = [Dropped(sample_id=name, stage="group", reason="all responses have the same accuracy") for name in flat]
    return [item for item in scored if has_spread(item)], [*dropped, *lost]


def count_everywhere(run: Run, scored: Sequence[ScoredGroup]) -> int:
    counts = sum_over({"groups": float(len(scored))}, group=run.layout.dp, device=run.layout.device)
    return int(counts["groups"])


def trim_to_batch(
    run: Run, scored: list[ScoredGroup], dropped: list[Dropped]
) -> tuple[list[ScoredGroup], list[Dropped]]:
    """Keep the first grpo.batch_size groups of all replicas; the rest is a counted drop."""
    places, size = places_of(run, scored), run.config.grpo.batch_size
    extra = [item.group.prompt.sample.sample_id for item, place in zip(scored, places, strict=True) if place >= size]
    lost = [Dropped(sample_id=name, stage="group", reason="the refilled batch is full") for name in extra]
    return [item for item, place in zip(scored, places, strict=True) if place < size], [*dropped, *lost]


def places_of(run: Run, scored: Sequence[ScoredGroup]) -> list[int]:
    """Place of each of this replica's groups among those of all replicas (collective over these).

    By round of sampling, then as the samples came: the same at any DP size.
    """
    everywhere = gather_objects([item.round for item in scored], group=run.layout.dp)
    order = sorted((number, rank, index) for rank, part in enumerate(everywhere) for index, number in enumerate(part))
    place_of = {index: place for place, (_, rank, index) in enumerate(order) if rank == run.layout.dp_rank}
    return [place_of[index] for index in range(len(scored))]


def pack_updates(run: Run, scored: Sequence[ScoredGroup]) -> list[list[PolicyBatch]]:
    """Packs of each optimizer update of this rollout batch. Advantages see the rewards of all replicas.

    The updates take the groups by turns, data.questions_per_video at a time, in order of their place in the batch: the
    same groups however many replicas share it, and of one round as many from each replica. Updates without a group are
    left out, but for one when there is no group at all.
    """
    grpo, layout = run.config.grpo, run.layout
    rewards = gather_objects([item.rewards_G for item in scored], group=layout.dp)
    before = sum(len(part) for part in rewards[: layout.dp_rank])
    everyone = [rewards_G for part in rewards for rewards_G in part]
    if sum(map(len, everyone)) > 1:
        advantages = group_advantages(everyone, kind=grpo.advantage)
    else:  # the only response that drops have left: there is nothing to compare it with
        advantages = [torch.zeros(len(rewards_G)) for rewards_G in everyone]
    places, together = places_of(run, scored), run.config.data.questions_per_video
    updates = []
    for update in range(max(1, min(grpo.updates_per_batch, -(-len(everyone) // together)))):
        chosen = [index for index, place in enumerate(places) if place // together % grpo.updates_per_batch == update]
        groups = [scored[index].group for index in chosen]
        mine = [advantages[before + index] for index in chosen]
        share = run.config.mr_sp.mode.name == "shared_prefix"
        updates.append(pack_rollouts(groups, mine, pack_tokens=run.config.data.pack_tokens, share_prefix=share))
    return updates


def add_logprobs(run: Run, updates: Sequence[Sequence[PolicyBatch]]) -> list[list[PolicyBatch]]:
    """Old log-probabilities when a rollout batch feeds several updates, reference ones when there is a KL term.

    With one update the old policy is the current one: the loss takes stop-gradient of its own log-probabilities.
    """

    def logprobs() -> list[list[Tensor]]:
        """Update by update: pipeline stages hold the embeddings of all packs of a call."""
        return [run.trainer.logprobs(tokens_of(update), temperature=temperature(run)) for update in updates]

    old: Sequence[Sequence[Tensor | None]] = [[None] * len(update) for update in updates]
    ref = old
    if run.config.grpo.updates_per_batch > 1:
        old = logprobs()
    if run.config.grpo.kl_coef > 0:
        with run.trainer.reference_weights():
            ref = logprobs()
    return [
        [
            dataclasses.replace(batch, old_logprobs_R=old_R, ref_logprobs_R=ref_R)
            for batch, old_R, ref_R in zip(update, olds, refs, strict=True)
        ]
        for update, olds, refs in zip(updates, old, ref, strict=True)
    ]


def tokens_of(batches: Sequence[PolicyBatch]) -> list:
    return [batch.tokens for batch in batches]


def grpo_loss(run: Run, batches: Sequence[PolicyBatch], settings: PolicyLossSettings) -> LossOf:
    """The loss of each pack, its rows weighted by the global batch."""
    device = run.layout.device
    lens = [batch.tokens.response_lens for batch in batches]
    local = {"tokens": float(sum(map(sum, lens))), "responses": float(sum(map(len, lens)))}
    total = sum_over(local, group=run.layout.dp, device=device)

    def loss_of(index: int, logprobs_R: Tensor, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batches[index]
        weights_R = row_weights(
            lens[index],
            aggregation=run.config.grpo.aggregation,
            max_response_tokens=run.config.data.max_response_tokens,
            total_tokens=int(total["tokens"]),
            total_responses=int(total["responses"]),
        )
        return policy_loss(
            logprobs_R,
            old_logprobs_R=None if batch.old_logprobs_R is None else batch.old_logprobs_R.to(device),
            ref_logprobs_R=None if batch.ref_logprobs_R is None else batch.ref_logprobs_R.to(device),
            sampler_logprobs_R=batch.sampler_logprobs_R.to(device),
            advantages_S=batch.advantages_S.to(device),
            response_R=batch.tokens.response_R.to(device),
            weights_R=weights_R.to(device),
            settings=settings,
        )

    return loss_of


def log_rollouts(
    run: Run, step: int, scored: Sequence[ScoredGroup], stats: Sequence[StepStats], num_dropped: int, *, seconds: float
) -> None:  # fmt: skip
    """Rewards and lengths over all replicas on top of the train step's metrics; a few rollouts to samples.jsonl.

    A step without a response has neither rewards nor lengths.
    """
    names = ("responses", "reward", "response_tokens", "truncated", "policy_lag", "spread", "groups")
    sums = dict.fromkeys(names, 0.0)
    version = run.trainer.num_updates - sum(not item.skipped for item in stats)  # of the weights the step began with
    for item in scored:
        sums["groups"] += 1
        sums["spread"] += float(has_spread(item))
        sums["responses"] += len(item.rewards_G)
        sums["reward"] += float(item.rewards_G.sum())
        sums["response_tokens"] += sum(map(len, item.group.response_ids))
        sums["truncated"] += sum(item.group.truncated)
        sums["policy_lag"] += len(item.rewards_G) * (version - item.group.weights_version)
        for name, column_G in zip(item.part_names, item.parts_GK.T, strict=True):
            sums[f"reward/{name}"] = sums.get(f"reward/{name}", 0.0) + float(column_G.sum())
    sums = merge_sums(gather_objects(sums, group=run.layout.dp))
    groups, responses = sums.pop("groups"), sums.pop("responses")
    spread = sums.pop("spread")
    means: dict[str, float] = {}
    if responses:  # else every sample was dropped: nothing was measured, and zeros would pass for rewards
        means = {name: value / responses for name, value in sums.items()} | {"groups_with_spread": spread / groups}
    merged = merge_updates(stats)
    merged = dataclasses.replace(merged, metrics={**means, **prefill_metrics(run), **merged.metrics})
    run.logger.samples(
        step, [row for item in scored for row in sample_rows(item)][: run.config.logger.samples_per_step]
    )
    log_step(run, run.trainer.step, merged, num_dropped, seconds=seconds)


def merge_updates(stats: Sequence[StepStats]) -> StepStats:
    """Means over the optimizer updates of one rollout batch; tokens add up."""
    count = len(stats)
    metrics = merge_sums([item.metrics for item in stats])
    return StepStats(
        loss=sum(item.loss for item in stats) / count,
        grad_norm=sum(item.grad_norm for item in stats) / count,
        learning_rate=stats[-1].learning_rate,
        skipped=any(item.skipped for item in stats),
        num_tokens=sum(item.num_tokens for item in stats),
        metrics={name: value if name.endswith("_max") else value / count for name, value in metrics.items()},
    )


def sample_rows(item: ScoredGroup) -> list[dict]:
    """One JSON object per response of a group."""
    sample = item.group.prompt.sample
    return [
        {
            "sample_id": sample.sample_id,
            "question": sample.question,
            "answer": sample.answer,
            "response": text,
            "reward": float(item.rewards_G[index]),
            **dict(zip(item.part_names, item.parts_GK[index].tolist(), strict=True)),
            "tokens": len(item.group.response_ids[index]),
            "truncated": item.group.truncated[index],
        }
        for index, text in enumerate(item.group.texts)
    ]
