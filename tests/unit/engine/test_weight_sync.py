"""Which weights an update of the sampler holds: its own, frozen ones once."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megalong.config.tree import Dtype, OptimizerConfig, Recompute, RunConfig
from megalong.engine import weights_io
from megalong.engine.build import build_model
from megalong.engine.trainer import Trainer
from megalong.models.weights import Rows
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


def test_a_bucket_is_gone_before_what_has_no_room_in_it_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one of two tensor-parallel ranks; the third matrix is a bucket of its own."""
    rows = (6, 6, 40, 6, 6, 6)
    model = nn.ModuleDict({str(at): nn.Linear(8, count, bias=False) for at, count in enumerate(rows)})
    table = [Rows(megatron=f"{at}.weight", hf=(str(at),)) for at in range(len(rows))]
    made: list[weakref.ref] = []
    alive: list[int] = []

    def gather(out: Tensor, local: Tensor, *, group: object) -> None:
        alive.append(sum(ref() is not None for ref in made))
        out.copy_(torch.cat((local, local)))

    monkeypatch.setattr(weights_io.dist, "all_gather_into_tensor", gather)
    split = SimpleNamespace(pp_size=1, pp_rank=0, tp_size=2, tp=None)
    found = []
    for bucket in weights_io.export_weights(model, table, split, bucket_bytes=2 * 2 * 6 * 8 * 4):
        made += map(weakref.ref, bucket.tensors.values())
        found.append(list(bucket.tensors))
        del bucket
    assert found == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    assert alive == [0] * len(rows)
