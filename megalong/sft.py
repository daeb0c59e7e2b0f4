"""Chain-of-thought supervised fine-tuning: data, decode, encode, pack, train step."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from megalong.config.tree import Aggregation, RunConfig
from megalong.data.packing import GroupTokens, by_videos, pack_groups, plan_packs
from megalong.engine.trainer import LossOf
from megalong.evaluating import eval_samples, evaluate_before_loop, evaluate_if_due
from megalong.metrics import PhaseTimer, end_table
from megalong.objectives.aggregation import row_weights
from megalong.objectives.sft_loss import sft_loss
from megalong.parallel.collectives import sum_over
from megalong.records import Dropped, Prompt, StepStats, TokenBatch
from megalong.run import PromptBatches, Run, checked_shape, open_run, read_samples
from megalong.timeline import plot_timeline, timeline_row


def train_sft(config: RunConfig, timer: PhaseTimer | None = None) -> None:
    """`megalong sft`: learn the assistant turns of data.train."""
    checked_shape(config, task="sft")
    samples = read_samples(config, manifest=config.data.train, video_dir=config.data.video_dir, thinking_targets=True)
    held_out = eval_samples(config) if config.eval.manifest else []
    with open_run(config, task="sft", timer=timer or PhaseTimer()) as run, run.heeding_sigterm():
        batches = PromptBatches(run, samples, batch_size=config.sft.batch_size)
        total = config.sft.steps
        if held_out:
            evaluate_before_loop(run, held_out, total=total)
        for step in run.steps(total):
            started = time.perf_counter()
            with run.timer("data"):
                prompts, dropped = next(batches)
                batches.decode_ahead()
                packs, too_long = pack_targets(run, prompts)
            num_dropped = run.report_dropped([*dropped, *too_long])  # before a step that may end the run for them
            with run.timer("train"):
                stats = run.trainer.train_step(packs, token_mean_loss(run, packs), temperature=1.0)
            log_step(run, step, stats, num_dropped, seconds=time.perf_counter() - started)
            run.save_if_due(batches)
            if held_out and step < total:
                evaluate_if_due(run, held_out, step=step, total=total)
        run.save(batches)
        if run.trainer.step == total:
            if held_out:
                evaluate_if_due(run, held_out, step=total, total=total)
            if run.layout.is_main:
                plot_timeline(config.logger.run_dir)
                tqdm.write(end_table(config.logger.run_dir))


def pack_targets(run: Run, prompts: Sequence[Prompt]) -> tuple[list[TokenBatch], list[Dropped]]:
    """Prompt and target of each sample, packed; targets over data.max_response_tokens are dropped.

    Questions about the same videos come to stand side by side.
    """
    config = run.config.data
    groups, dropped = [], []
    for prompt in [prompts[index] for index in by_videos(prompts)]:
        target = run.builder.target(prompt.sample)
        if len(target) > config.max_response_tokens:
            reason = f"target of {len(target)} tokens is over data.max_response_tokens={config.max_response_tokens}"
            dropped.append(Dropped(sample_id=prompt.sample.sample_id, stage="target", reason=reason))
        else:
            groups.append(GroupTokens(prompt=prompt, responses=(target,)))
    share = run.config.mr_sp.mode.name == "shared_prefix"
    packs = plan_packs(groups, pack_tokens=config.pack_tokens, share_videos=share)
    return [pack_groups([groups[index] for index in pack], share_videos=share) for pack in packs], dropped


def token_mean_loss(run: Run, packs: Sequence[TokenBatch]) -> LossOf:
    """Negative log-likelihood, mean over the assistant tokens of the global batch."""
    lens = [pack.response_lens for pack in packs]
    local = {"tokens": float(sum(map(sum, lens))), "responses": float(sum(map(len, lens)))}
    total = sum_over(local, group=run.layout.dp, device=run.layout.device)
    weights = [
        row_weights(
            of_pack,
            aggregation=Aggregation.token,
            max_response_tokens=run.config.data.max_response_tokens,
            total_tokens=int(total["tokens"]),
            total_responses=int(total["responses"]),
        ).to(run.layout.device)
        for of_pack in lens
    ]
    return lambda index, logprobs_R, _: (sft_loss(logprobs_R, weights_R=weights[index]), {})


def log_step(run: Run, step: int, stats: StepStats, num_dropped: int, *, seconds: float) -> None:
    """Metrics every task has; run.timer's phases and what stats.metrics holds come on top.

    A step whose samples were all dropped has no loss and no gradient: zeros would pass for measured ones.
    """
    run.logger.timeline(step, timeline_row(run.timer.take_spans(), run.vision.fetches.take_spans()))
    run.logger.log(
        step,
        {
            **({"loss": stats.loss, "grad_norm": stats.grad_norm} if stats.num_tokens else {}),
            "learning_rate": stats.learning_rate,
            "skipped": float(run.trainer.num_skipped),
            "dropped": float(num_dropped),
            "decoded_elsewhere": float(run.report_decoded_elsewhere()),
            "tokens_per_second": stats.num_tokens / seconds,
            **stats.metrics,
            **run.store_metrics(),
            **run.timer.take(),
        },
    )
