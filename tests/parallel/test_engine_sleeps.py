"""A rollout engine on the trainer's GPUs is awake to take weights and to sample, and at no other time."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import DemoWorld, run_world
from torch import Tensor

from megalong import grpo
from megalong import run as run_module
from megalong.config.tree import RunConfig
from megalong.engine.trainer import Trainer
from megalong.engines import build_engine
from megalong.evaluating import evaluate
from megalong.grpo import train_grpo
from megalong.records import ScoredGroup, WeightBucket
from megalong.rollout.engine import Request, RolloutEngine, Sampled, Sampling
from megalong.sft import train_sft
from megalong.vision import encode


class Sleeper:
    """Another engine, which loses its weights when it falls asleep. Awake when it is made, as vLLM is."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self.awake, self.needs_weights, self.shares_gpus = engine, True, False, True
        self.room: Tensor | None = None

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def counts(self) -> dict[str, float]:
        return self.engine.counts

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        self.engine.weights.version = -1  # the same version may come again
        self.engine.load_weights(buckets, version=version)
        self.awake, self.needs_weights = True, False

    def embeds_room(self, rows: int) -> Tensor:
        """As vLLM's: the same memory again."""
        if self.room is None or len(self.room) < rows:
            self.room = torch.empty(rows, self.engine.model.config.hidden_size, dtype=self.engine.model.dtype)
        return self.room[:rows]

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        if self.needs_weights:
            raise AssertionError("asked to sample without weights")
        self.engine.begin(requests, sampling=sampling)

    def finish(self) -> list[list[Sampled]]:
        return self.engine.finish()

    def release(self) -> None:
        self.awake, self.needs_weights = False, True

    @property
    def asleep(self) -> bool:
        return not self.awake

    def close(self) -> None:
        self.engine.close()


def half_have_spread(item: ScoredGroup) -> bool:
    """Responses of random weights have none."""
    return zlib.crc32(item.group.prompt.sample.sample_id.encode()) % 2 == 0


def watched(task: str, demo: DemoWorld, run_dir: Path, overrides: tuple[str, ...]) -> Counter[str]:
    """How often the trainer did what it needs its memory for; raises when the engine was awake meanwhile."""
    seen: Counter[str] = Counter()
    made: list[Sleeper] = []

    def build(*args: Any, **rest: Any) -> Sleeper:
        made.append(Sleeper(build_engine(*args, **rest)))
        return made[-1]

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*args: Any, **rest: Any) -> Any:
            seen[function.__name__] += 1
            if made[-1].awake:
                raise AssertionError(f"the engine is awake in {function.__name__}")
            return function(*args, **rest)

        return guard

    tasks: dict[str, Callable[[RunConfig], Any]] = {"sft": train_sft, "grpo": train_grpo, "eval": evaluate}
    config = demo.config(run_dir, *overrides, f"eval.manifest={demo.rl}", task="sft" if task == "sft" else "grpo")
    with (
        mock.patch.object(run_module, "build_engine", build),
        mock.patch.object(grpo, "has_spread", half_have_spread),
        mock.patch.object(encode, "run_tower", guarded(encode.run_tower)),
        mock.patch.object(Trainer, "logprobs", guarded(Trainer.logprobs)),
        mock.patch.object(Trainer, "train_step", guarded(Trainer.train_step)),
    ):
        tasks[task](config)
    return seen


EVALUATIONS = ("eval.batch_prompts=3", "eval.likelihood=true", "checkpoint.save_every=0")
TASKS = {
    "sft": ("sft.steps=2", "eval.at_start=true", "eval.every=1", *EVALUATIONS),
    # Every video is encoded anew: a step may sample several batches.
    "grpo": (
        "grpo.steps=2", "grpo.dynamic_sampling=true", "grpo.dynamic_sampling_max_batches=5", "grpo.batch_size=2",
        "video.cache_gib=0.001", "eval.at_start=true", "eval.every=1", *EVALUATIONS,
    ),
    "eval": EVALUATIONS,
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_engine_sleeps_while_the_trainer_works(task: str, demo: DemoWorld, tmp_path: Path) -> None:
    (seen,) = run_world(1, watched, task, demo, tmp_path / "run", TASKS[task], folder=tmp_path)
    assert seen["run_tower"] > 2
    assert seen["logprobs"] > 2
    assert (seen["train_step"] > 1) is (task != "eval")
