"""Which weights an update of the sampler holds: its own, frozen ones once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megalong.config.tree import Dtype, OptimizerConfig, Recompute, RunConfig
from megalong.engine.build import build_model
from megalong.engine.trainer import Trainer
from megalong.run import Run


@pytest.mark.parametrize("llm", [False, True])
def test_an_update_holds_what_the_sampler_has_and_training_changes(
    tiny_checkpoint: Path, layout: object, llm: bool
) -> None:
    config = RunConfig()
    config.model.path, config.model.dtype, config.model.recompute = str(tiny_checkpoint), Dtype.float32, Recompute.none
    config.model.train_llm, config.model.train_projector = llm, True
    model = build_model(config.model, layout, sequence_parallel=False)
    trainer = Trainer(model, layout, OptimizerConfig(), total_steps=9, embeddings=lambda chosen: None)
    updates: list[list[str]] = []
    sampler = SimpleNamespace(
        needs_weights=False,
        load_weights=lambda buckets, version: updates.append([name for bucket in buckets for name in bucket.tensors]),
    )
    run = Run(
        config=config, layout=layout, trainer=trainer, vision=None, builder=None, sampler=sampler, logger=None,
        timer=None, origin=None, resumed={},
    )  # fmt: skip
    for trainer.num_updates in (0, 1, 2):
        run.sync_weights()
    sampler.needs_weights = True  # it slept, and threw them away
    run.sync_weights()
    everything = [name for entry in model.weight_table() for name in entry.hf]
    own = [name for name in everything if name.startswith("llm/")]
    assert len(own) < len(everything)
    assert updates == [own, own if llm else [], own if llm else [], own]
    assert [name for bucket in trainer.export_weights() for name in bucket.tensors] == everything
