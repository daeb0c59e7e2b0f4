"""What runs inside the processes of the equality tests: train, and keep all that must not depend on the layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import DemoWorld
from torch import Tensor

from megalong import grpo, run
from megalong.config.tree import Dtype
from megalong.engine.build import TORCH_DTYPE
from megalong.engine.pipeline import PackRunner
from megalong.engine.trainer import Trainer
from megalong.grpo import train_grpo
from megalong.parallel.collectives import gather_objects
from megalong.parallel.split import shard_range
from megalong.records import ScoredGroup, StepStats
from megalong.sft import train_sft

TIED = "model.path={tied}"
"""The demo's other checkpoint, whose embedding is the output head as well."""
VARIANTS = {
    "sft": ("sft", ()),
    # One sample to a pack, and activations made again in the backward pass.
    "sft_split": ("sft", ("data.pack_tokens=1", "model.recompute=full")),
    # Some ranks have no frame at all.
    "sft_one_frame": ("sft", ("video.num_frames=1", "sft.batch_size=2", "sft.steps=2")),
    "sft_vision_only": ("sft", ("model.train_llm=false",)),
    "sft_tied": ("sft", (TIED,)),
    "grpo": ("grpo", ("grpo.updates_per_batch=2",)),
    "grpo_split": ("grpo", ("grpo.updates_per_batch=2", "data.pack_tokens=1")),
    "grpo_one_update": ("grpo", ("grpo.steps=3", "model.recompute=full", "grpo.aggregation=token")),
    "grpo_vision": (
        "grpo",
        ("model.train_tower=true", "model.train_projector=true", "video.cache_embeddings=false"),
    ),
}
"""Name -> task and overrides."""
PAIRED = ("data.train={pairs}", "data.questions_per_video=2")
EXACT = {f"{name}_float64": VARIANTS[name] for name in ("sft", "sft_one_frame", "sft_tied", "grpo", "grpo_vision")} | {
    # Two questions about a video share it in a pack, and, what must be the same, do not.
    "pairs_float64": ("grpo", PAIRED),
    "pairs_apart_float64": ("grpo", (*PAIRED, "data.pack_tokens=1")),
}
"""Again in float64, where any difference beyond 1e-10 is a defect: no sum in another order makes one."""


@dataclass(kw_only=True)
class Recorded:
    """One run. Weights and gradients have Hugging Face names and whole shapes."""

    stats: list[StepStats] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first update, before clipping
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the last update
    sampled: list[list[ScoredGroup]] = field(default_factory=list)  # by rollout batch, over all replicas
    frames_encoded: int = 0  # by this rank
    embeddings: list[int] = field(default_factory=list)  # rows that this rank got in each pass over a pack with videos


def record_all(
    demo: DemoWorld,
    folder: Path,
    parallel: Sequence[str],
    rollouts: dict[str, list[list[ScoredGroup]]],
    names: Sequence[str],
) -> dict[str, Recorded]:
    """The named variants under one layout. `rollouts` of a variant replace what a GRPO run samples itself."""
    done = {}
    # Groups are made once: every one of them keeps threads, and there are dozens.
    layouts = mock.patch.object(run, "make_layout", lru_cache(run.make_layout))
    layouts.start()
    for name in names:
        task, overrides = {**VARIANTS, **EXACT}[name]
        overrides = [override.format(tied=demo.tied, pairs=demo.pairs) for override in overrides]
        config = demo.config(folder / name, *overrides, *parallel, task=task)
        recorded = Recorded()
        wide = mock.patch.dict(TORCH_DTYPE, {Dtype.float32: torch.float64}) if name in EXACT else nullcontext()
        with wide, recording(recorded, rollouts.get(name)):
            (train_sft if task == "sft" else train_grpo)(config)
        done[name] = recorded
    layouts.stop()
    return done


@contextmanager
def recording(recorded: Recorded, rollouts: list[list[ScoredGroup]] | None) -> Iterator[None]:
    """Fill `recorded` from the run inside this context; the run writes no checkpoint."""
    train_step, finish_gradients, sample_groups = Trainer.train_step, Trainer._finish_gradients, grpo.sample_groups
    embed = PackRunner._embed

    def step_and_record(trainer: Trainer, *args: object, **settings: object) -> StepStats:
        recorded.stats.append(train_step(trainer, *args, **settings))
        return recorded.stats[-1]

    def finish_and_record(trainer: Trainer) -> None:
        finish_gradients(trainer)
        if not recorded.gradients:
            recorded.gradients = exported(trainer, gradients=True)

    def embed_and_record(runner: PackRunner, turn: object) -> Tensor | None:
        embeds_nD = embed(runner, turn)
        if embeds_nD is not None:
            recorded.embeddings.append(len(embeds_nD))
        return embeds_nD

    def sample_and_record(this: run.Run, *args: object, **settings: object) -> tuple[list[ScoredGroup], list]:
        scored, dropped = sample_groups(this, *args, **settings)
        everywhere = [group for part in gather_objects(scored, group=this.layout.dp) for group in part]
        recorded.sampled.append(everywhere)
        given = everywhere if rollouts is None else rollouts[len(recorded.sampled) - 1]
        first, last = shard_range(len(given), this.layout.dp_rank, this.layout.dp_size)
        return given[first:last], dropped

    def keep_weights(this: run.Run, _: object) -> None:
        recorded.weights = exported(this.trainer)
        recorded.frames_encoded = this.vision.frames_encoded

    with (
        mock.patch.object(Trainer, "train_step", step_and_record),
        mock.patch.object(Trainer, "_finish_gradients", finish_and_record),
        mock.patch.object(PackRunner, "_embed", embed_and_record),
        mock.patch.object(grpo, "sample_groups", sample_and_record),
        mock.patch.object(run.Run, "save", keep_weights),
    ):
        yield


def exported(trainer: Trainer, *, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of the trainer's weights, or of the gradients of what is trained in their place."""
    kept = {name: param.data for name, param in trainer.trainable}
    try:
        if gradients:
            for _, param in trainer.trainable:
                param.data = param.main_grad
        return {name: tensor.clone() for bucket in trainer.export_weights() for name, tensor in bucket.tensors.items()}
    finally:
        for name, param in trainer.trainable:
            param.data = kept[name]


def unequal(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], *, limit: float, power: float = torch.inf
) -> dict[str, float]:
    """Tensors whose difference is more than `limit` of their own size, and how much; power: which norm is the size."""
    assert tensors.keys() == expected.keys()
    gaps = {}
    for name, tensor in tensors.items():
        # No key bias changes what a softmax without rotation gives: its gradient is rounding, and so is its change.
        scale = 0.1 if is_tower_key_bias(name) else float(expected[name].flatten().norm(power))
        gaps[name] = float((tensor - expected[name]).flatten().norm(power)) / (scale or 1.0)
    return {name: gap for name, gap in gaps.items() if gap > limit}


def is_tower_key_bias(name: str) -> bool:
    return name.startswith("vision_tower/") and name.endswith("k_proj.bias")


def assert_equal_runs(recorded: Recorded, expected: Recorded, *, exact: bool = False, same_tokens: bool = True) -> None:
    limit = 1e-10 if exact else 1e-5
    assert len(recorded.stats) == len(expected.stats)
    for ours, theirs in zip(recorded.stats, expected.stats, strict=True):
        # A GRPO loss is a difference of terms near 1, which are themselves rounded; other sequences than the
        # reference's round otherwise. In float64 (exact) no layout may hide behind that.
        rounding = 1e-12 if exact else 2 * torch.finfo(torch.float32).eps
        assert ours.loss == pytest.approx(theirs.loss, rel=limit, abs=rounding if same_tokens else limit / 10)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=limit)
        assert not same_tokens or ours.num_tokens == theirs.num_tokens
        # A ratio or a KL of float32 is the exponential of a difference of log-probabilities around -6.
        assert ours.metrics == pytest.approx(theirs.metrics, rel=limit if exact else 1e-4, abs=limit)
    assert unequal(recorded.gradients, expected.gradients, limit=limit) == {}
    # Adam divides an element by its own gradients, so one whose gradient is rounding moves by rounding: in float32 an
    # element may differ by more than 1e-5 of the largest (one process differs from float64 as much), a tensor may not.
    power = torch.inf if exact else 2
    assert unequal(recorded.weights, expected.weights, limit=limit, power=power) == {}
