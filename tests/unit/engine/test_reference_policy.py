"""The reference policy of GRPO's KL: the weights as they were, tower and projector included where they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalong.config.tree import Dtype, LearningRateSchedule, ModelConfig, OptimizerConfig, Recompute
from megalong.data.packing import GroupTokens, pack_groups
from megalong.engine.build import build_model
from megalong.engine.trainer import Trainer
from megalong.records import MEDIA_TOKEN, FrameSelection, Prompt, Sample

SAMPLE = Sample(
    sample_id="1", question="q", answer="A", videos=("v",), problem_type="open-ended", category="c", reasoning="",
    subtitles="",
)  # fmt: skip


@pytest.mark.parametrize(("llm", "vision"), [(True, False), (True, True), (False, True)])
def test_reference_logprobs_are_those_before_training(
    tiny_checkpoint: Path, layout: object, llm: bool, vision: bool
) -> None:
    config = ModelConfig(
        path=str(tiny_checkpoint), dtype=Dtype.float32, recompute=Recompute.none, train_llm=llm, train_tower=vision,
        train_projector=vision,
    )  # fmt: skip
    model = build_model(config, layout, sequence_parallel=False)
    size = model.spec.vision.image_size
    frames_FHWC = torch.randint(
        0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )

    def embeddings(chosen: Sequence[FrameSelection]) -> Tensor:
        return torch.cat([model.vision(frames_FHWC).flatten(0, 1) for _ in chosen])

    places = 2 * model.spec.vision.embeds_per_step
    ids = (5, *[MEDIA_TOKEN] * places, 6, 7)
    selection = FrameSelection(path="v", frames=(0, 1), seconds=(0.0, 1.0), height=size, width=size)
    prompt = Prompt(
        sample=SAMPLE, ids_P=ids, selections=(selection,), positions_P=torch.arange(len(ids)), next_position=len(ids)
    )
    packs = [pack_groups([GroupTokens(prompt=prompt, responses=((8, 9, 4), (10, 11)))])]
    settings = OptimizerConfig(lr=0.02, warmup_steps=0, schedule=LearningRateSchedule.constant)
    trainer = Trainer(model, layout, settings, total_steps=9, embeddings=embeddings)

    def logprobs() -> Tensor:
        return trainer.logprobs(packs, temperature=1.0)[0]

    trainer.keep_reference()
    before = logprobs()
    encoded = embeddings([selection]).detach()
    for _ in range(2):
        trainer.train_step(packs, lambda _, logprobs_R, __: (-logprobs_R.sum(), {}), temperature=1.0)
    after = logprobs()
    assert (after - before).abs().max() > 0.05
    assert torch.equal(embeddings([selection]), encoded) is not vision
    with trainer.reference_weights():
        assert torch.equal(logprobs(), before)
        assert torch.equal(embeddings([selection]), encoded)
    assert torch.equal(logprobs(), after)
