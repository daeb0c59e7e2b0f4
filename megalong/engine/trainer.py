"""The training engine: log-probability passes, the train step, reference weights, weight export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from megalong.attention.shard import PackShard
from megalong.config.tree import LearningRateSchedule, OptimizerConfig
from megalong.engine.build import state_copies, wrap_for_gradients
from megalong.engine.optimizer import ShardedAdamW
from megalong.engine.pipeline import Embeddings, PackRunner
from megalong.engine.weights_io import export_weights
from megalong.models.policy import PolicyModel
from megalong.models.weights import Entry, Replicated
from megalong.objectives.logprobs import vocab_parallel_logprobs
from megalong.parallel.collectives import gather_objects, gather_rows, max_over
from megalong.parallel.layout import ParallelLayout
from megalong.records import StepStats, TokenBatch, WeightBucket

LossOf = Callable[[int, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(index of the pack, logprobs_R, entropy_R) -> (loss, sums to log); keys ending in _max are maxima, not sums."""


class TooManySkippedStepsError(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient, or no sample at all."""


def learning_rate(step: int, total_steps: int, settings: OptimizerConfig) -> float:
    """Linear warm-up to lr, then constant, linear or cosine down to min_lr at total_steps. step counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    # Not below 0: past total_steps a linear rate would be negative, and a cosine one would rise again.
    left = max(0.0, 1 - (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
    factor = {
        LearningRateSchedule.constant: 1.0,
        LearningRateSchedule.linear: left,
        LearningRateSchedule.cosine: 0.5 * (1 + math.cos(math.pi * (1 - left))),
    }[settings.schedule]
    return settings.min_lr + (settings.lr - settings.min_lr) * factor


class Trainer:
    """One policy on one layout. Every rank of a replica calls the same methods with the same packs."""

    def __init__(
        self, model: PolicyModel, layout: ParallelLayout, settings: OptimizerConfig, *,
        total_steps: int, embeddings: Embeddings, sharded: bool = True, keep_attention: bool = False,
        trains: bool = True,
    ) -> None:  # fmt: skip
        """trains=False: for log-probabilities alone, without the memory of gradients and optimizer states."""
        if not trains:
            model.requires_grad_(False)
        self.model, self.layout, self.settings = model, layout, settings
        self.total_steps = total_steps
        self.keep_attention = keep_attention  # recomputed layers keep their attention output
        self.ddp = wrap_for_gradients(model)
        self.runner = PackRunner(ddp=self.ddp, layout=layout, embeddings=embeddings, sharded=sharded)
        self.trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        self.optimizer = self._make_optimizer() if trains else None
        self.step = 0  # train steps done, skipped ones included
        self.num_updates = 0
        self.skipped_in_a_row = 0
        self.num_skipped = 0
        self._reference: dict[str, Tensor] = {}

    def _make_optimizer(self) -> ShardedAdamW:
        settings = self.settings
        return ShardedAdamW(
            self.trainable,
            self.layout,
            counted=counted_names(self.model.weight_table(), self.layout),
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            offload=state_copies(settings, self.layout),
        )

    def score(
        self, tokens: TokenBatch, shard: PackShard, hidden_rD: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """logprobs_R and entropy_R of a pack, [R] float32, equal over tensor- and context-parallel ranks."""
        logprobs_r, entropy_r = vocab_parallel_logprobs(
            hidden_rD,
            self.model.llm.head_weight,
            tokens.targets_R[shard.share].to(self.layout.device),
            group=self.layout.tp,
            real_vocab=self.model.llm.real_vocab,
            temperature=temperature,
        )
        if shard.context.size == 1:
            return logprobs_r, entropy_r
        counts = [last - first for first, last in shard.shares]
        both_R2 = gather_rows(torch.stack((logprobs_r, entropy_r), dim=1), counts=counts, group=shard.context.group)
        return both_R2[:, 0], both_R2[:, 1].detach()

    @torch.no_grad()
    def logprobs(self, packs: Sequence[TokenBatch], *, temperature: float) -> list[Tensor]:
        """Log-probabilities under the current weights, [R] float32 on the CPU for each pack; no gradient."""

        def finish(index: int, shard: PackShard, hidden_rD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_R, _ = self.score(packs[index], shard, hidden_rD, temperature=temperature)
            return logprobs_R.sum(), {"logprobs_R": logprobs_R}

        return [of_pack["logprobs_R"] for of_pack in self.runner.run(packs, finish, backward=False)]

    def keep_reference(self) -> None:
        """Remember the current weights as the reference policy of GRPO's KL: tower and projector where trained."""
        self._reference = {name: param.detach().clone() for name, param in self.trainable}

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Run the model, its vision side included, with the reference policy's weights inside this context."""
        if not self._reference:
            raise ValueError("no reference policy: call keep_reference() before training")
        current = {name: param.data for name, param in self.trainable}
        try:
            for name, param in self.trainable:
                param.data = self._reference[name]
            yield
        finally:
            for name, param in self.trainable:
                param.data = current[name]

    def train_step(self, packs: Sequence[TokenBatch], loss_of: LossOf, *, temperature: float) -> StepStats:
        """Forward, loss, backward of every pack, then one optimizer update.

        The update is skipped, and counted, when anything is non-finite or there is no row at all.

        Losses of all packs and replicas are added up, so loss_of weighs its rows by the global batch. Raises
        TooManySkippedStepsError after optimizer.max_skipped_in_a_row skips, or when all steps of a run were skipped.
        """
        self.ddp.zero_grad_buffer()

        def finish(index: int, shard: PackShard, hidden_rD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            tokens = packs[index]
            logprobs_R, entropy_R = self.score(tokens, shard, hidden_rD, temperature=temperature)
            loss, sums = loss_of(index, logprobs_R, entropy_R)
            return loss, {
                "loss": loss,
                "entropy_sum": entropy_R.sum(),
                "rows": torch.tensor(float(len(entropy_R))),
                "num_tokens": torch.tensor(float(len(tokens.ids_T))),
                **sums,
            }

        with self.model.llm.kept_attention() if self.keep_attention else nullcontext():
            done = self.runner.run(packs, finish, backward=True)
        parts = [{name: float(value) for name, value in of_pack.items()} for of_pack in done]
        totals = merge_sums([{"loss": 0.0, "entropy_sum": 0.0, "rows": 0.0, "num_tokens": 0.0}, *parts])
        totals = merge_sums(gather_objects(totals, group=self.layout.dp))
        self._finish_gradients()
        lr = learning_rate(self.step, self.total_steps, self.settings)
        norm = self.optimizer.grad_norm()
        # Without any row (everything was dropped) an update would follow Adam's momentum alone.
        healthy = self._agree(math.isfinite(norm) and math.isfinite(totals["loss"]) and totals["rows"] > 0)
        if healthy:
            clip = self.settings.clip_grad
            self.optimizer.step(lr=lr, grad_scale=min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0)
            self.num_updates += 1
        self.step += 1
        self._count_skip(skipped=not healthy, rows=totals["rows"], loss=totals["loss"], norm=norm)
        rows, entropy_sum = totals.pop("rows"), totals.pop("entropy_sum")
        return StepStats(
            loss=totals.pop("loss"),
            grad_norm=norm,
            learning_rate=lr,
            skipped=not healthy,
            num_tokens=int(totals.pop("num_tokens")),
            metrics={"entropy": entropy_sum / rows, **totals} if rows else totals,
        )

    def export_weights(
        self, *, name_of: Callable[[str], str | None] = str, frozen: bool = True
    ) -> Iterator[WeightBucket]:
        """The weights in Hugging Face names, in buckets (collective over the replica).

        name_of: as EmbeddedEngine's; a weight that it has no name for is left out. frozen=False: those that training
        does not change, too.
        """
        trained = {name for name, _ in self.trainable}
        table = [entry for entry in self.model.weight_table() if frozen or entry.megatron in trained]
        wanted = [entry for entry in table if any(name_of(name) is not None for name in entry.hf)]
        return export_weights(self.model, wanted, self.layout)

    def _finish_gradients(self) -> None:
        """Sum gradients over data-parallel ranks, then those that several ranks of a replica hold only a part of."""
        self.ddp.finish_grad_sync()
        for name, param in self.trainable:
            # A vision parameter saw this rank's frames only; a norm weight under sequence parallelism its tokens only,
            # and a norm of queries or keys its heads only.
            tokens = getattr(param, "sequence_parallel", False) and self.model.config.sequence_parallel
            heads = name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
            if name.startswith("vision."):  # sums over dp and cp are done
                dist.all_reduce(param.main_grad, group=self.layout.model)
            elif tokens or heads:
                dist.all_reduce(param.main_grad, group=self.layout.tp)
        tied = self.model.llm.tied_weight
        if tied is not None and tied.requires_grad:
            dist.all_reduce(tied.main_grad, group=self.layout.tied)

    def _agree(self, healthy: bool) -> bool:
        """True when every rank is healthy: a step that only some ranks skip would leave them with different weights."""
        bad = {"bad": float(not healthy)}
        return not max_over(bad, group=self.layout.world, device=self.layout.device)["bad"]

    def _count_skip(self, *, skipped: bool, rows: float, loss: float, norm: float) -> None:
        if not skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.num_skipped += 1
        if self.skipped_in_a_row < min(self.settings.max_skipped_in_a_row, self.total_steps):
            return
        why = (
            "every sample was dropped, dropped.jsonl of the run folder says why; relative video paths start from "
            "data.video_dir, and lengths are limited by data.max_prompt_tokens and data.max_response_tokens"
        )
        if rows:
            why = (
                f"loss {loss}, gradient norm {norm} here, not finite on some rank; lower optimizer.lr, look at these "
                "steps' rewards and data (samples.jsonl, dropped.jsonl), and resume from the last checkpoint"
            )
        raise TooManySkippedStepsError(f"step {self.step}, skipped as {self.skipped_in_a_row} in a row: {why}")


def counted_names(table: Sequence[Entry], layout: ParallelLayout) -> frozenset[str]:
    """Megatron names whose gradient this rank counts: each tensor on one rank (each shard on its own) of a replica.

    table: of this pipeline stage. What several stages hold counts on the first of them (collective over the stages).
    """
    stages = gather_objects([entry.hf for entry in table], group=layout.pp)
    earlier = {names for stage in stages[: layout.pp_rank] for names in stage}
    return frozenset(
        entry.megatron
        for entry in table
        if entry.hf not in earlier and (layout.tp_rank == 0 or not isinstance(entry, Replicated))
    )


def merge_sums(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Add up each key over the parts; keys ending in _max take the maximum. A part may lack a key."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name.endswith("_max"):
                merged[name] = max(merged.get(name, -math.inf), value)
            else:
                merged[name] = merged.get(name, 0.0) + value
    return merged
