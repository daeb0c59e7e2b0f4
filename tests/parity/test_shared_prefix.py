"""Any group behind one shared prefix trains like its responses as sequences of their own, in float64.

One process, through the trainer: the loss and the gradients of the language model, the video embeddings, the projector
and the tower. The kernels alone are in tests/unit/attention, the layouts in tests/parallel/test_equal_layouts.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import tiny_vl
import torch
from harness import make_builder
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_vl_oracle import BLOCK, FILM, FRAME, ODD, SHORT, Video
from torch import Tensor

from megalong.attention.shard import PackShard
from megalong.config.tree import Dtype, ModelConfig, OptimizerConfig
from megalong.data.packing import GroupTokens, pack_groups
from megalong.data.sequence import SequenceBuilder
from megalong.engine.build import TORCH_DTYPE, build_model
from megalong.engine.trainer import Trainer
from megalong.models.longvila.demo_checkpoint import DemoModelSize
from megalong.parallel.layout import ParallelLayout
from megalong.records import FrameSelection, Prompt, Sample, TokenBatch

LIMIT = 1e-10
SIDE = DemoModelSize().image // BLOCK
SQUARE = Video(name="square", num_frames=2, rows=SIDE, columns=SIDE)
OTHER = Video(name="other", num_frames=3, rows=SIDE, columns=SIDE)
VIDEOS = {
    "longvila": ((), (SQUARE,), (SQUARE, OTHER)),  # 1-D RoPE
    "qwen2_5_vl": ((), (FILM,), (SHORT, ODD)),  # M-RoPE in sections
    "qwen3_vl": ((), (FRAME,), (ODD, SHORT)),  # interleaved M-RoPE, deepstack
}
"""Family -> what a question may be about."""
SHARES = (0.0, 0.05, 0.3, 1.1)
"""Length of a response as a share of its prompt's, on top of one token."""


@dataclass(kw_only=True)
class Subject:
    """A model whose every part is trained."""

    trainer: Trainer
    builder: SequenceBuilder
    embeds: list[Tensor] = field(default_factory=list)  # of every pass since the last clear()

    def prompt(self, videos: Sequence[Video], *, question: str) -> Prompt:
        sample = Sample(
            sample_id="s", question=question, answer="A", videos=tuple(video.name for video in videos),
            problem_type="open-ended", category="c", reasoning="", subtitles="",
        )  # fmt: skip
        return self.builder.prompt(sample, [video.selection for video in videos])

    def run(self, packs: Sequence[TokenBatch]) -> tuple[float, dict[str, Tensor]]:
        """Sum of the losses; gradients by name, those of the video embeddings added up over the passes."""
        self.trainer.ddp.zero_grad_buffer()
        self.embeds.clear()

        def finish(index: int, shard: PackShard, hidden_rD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_R, _ = self.trainer.score(packs[index], shard, hidden_rD, temperature=0.7)
            loss = (weights_of(packs[index].targets_R) * (logprobs_R + 0.1 * logprobs_R.square())).sum()
            return loss, {"loss": loss}

        done = self.trainer.runner.run(packs, finish, backward=True)
        gradients = {name: parameter.main_grad.clone() for name, parameter in self.trainer.trainable}
        if self.embeds:
            gradients["video embeddings"] = torch.stack([embeds.grad for embeds in self.embeds]).sum(0)
        return sum(float(of_pack["loss"]) for of_pack in done), gradients


def weights_of(targets_R: Tensor) -> Tensor:
    """Of each row of the loss, by its token: the same in any pack."""
    return (targets_R % 7 - 2.5).double()


def make_subject(folder: Path, layout: ParallelLayout, *, family: str) -> Subject:
    config = ModelConfig(
        family=family, path=str(folder), dtype=Dtype.float32, train_projector=True, train_tower=True
    )  # fmt: skip
    with mock.patch.dict(TORCH_DTYPE, {Dtype.float32: torch.float64}):
        model = build_model(config, layout, sequence_parallel=False)
    frames = {video.name: video.pixels() for chosen in VIDEOS[family] for video in chosen}
    seen: list[Tensor] = []

    def embeddings(chosen: Sequence[FrameSelection]) -> Tensor:
        embeds_ND = torch.cat([model.vision(frames[item.path]).flatten(0, 1) for item in chosen])
        embeds_ND.retain_grad()
        seen.append(embeds_ND)
        return embeds_ND

    trainer = Trainer(model, layout, OptimizerConfig(), total_steps=1, embeddings=embeddings)
    return Subject(trainer=trainer, builder=make_builder(folder, family), embeds=seen)


@pytest.fixture(scope="module", params=VIDEOS)
def subject(
    request: pytest.FixtureRequest, layout: ParallelLayout, tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Subject]:  # fmt: skip
    family = request.param
    written = tiny_vl.WRITERS.get(family)
    folder = written(tmp_path_factory.mktemp(family)) if written else tiny_checkpoint
    with tiny_vl.float64_towers():
        yield make_subject(folder, layout, family=family)


@pytest.mark.parametrize("group_size", [1, 4, 8])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_shared_prefix_trains_like_separate_sequences(subject: Subject, group_size: int, data: st.DataObject) -> None:
    """One or two questions about the same videos, each with its group."""
    videos = data.draw(st.sampled_from(VIDEOS[subject.trainer.model.family]), label="videos")
    shares = st.lists(st.sampled_from(SHARES), min_size=group_size, max_size=group_size)
    questions = data.draw(st.lists(shares, min_size=1, max_size=2), label="lengths by question")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    groups = []
    for index, lengths in enumerate(questions):
        prompt = subject.prompt(videos, question=f"what is shown {index}" + " and again" * index)
        counts = [1 + int(share * len(prompt.ids_P)) for share in lengths]
        responses = [torch.randint(0, 250, (count,), generator=generator).tolist() for count in counts]
        groups.append(GroupTokens(prompt=prompt, responses=tuple(map(tuple, responses))))
    assert_equal_to_separate(subject, groups)


def test_one_token_beside_responses_longer_than_the_prefix(subject: Subject) -> None:
    prompt = subject.prompt((), question="what is shown")
    counts = (1, len(prompt.ids_P) + 9, 2 * len(prompt.ids_P), 1)
    assert_equal_to_separate(
        subject, [GroupTokens(prompt=prompt, responses=tuple(tuple(range(count)) for count in counts))]
    )


def assert_equal_to_separate(subject: Subject, groups: Sequence[GroupTokens]) -> None:
    shared = pack_groups(groups)
    alone = [
        pack_groups([GroupTokens(prompt=group.prompt, responses=(response,))])
        for group in groups
        for response in group.responses
    ]
    if any(len(group.responses) > 1 for group in groups):
        assert len(shared.ids_T) < sum(len(pack.ids_T) for pack in alone)
    loss, gradients = subject.run([shared])
    want_loss, want = subject.run(alone)
    assert loss == pytest.approx(want_loss, rel=LIMIT)
    assert gradients.keys() == want.keys()
    assert ("video embeddings" in want) == bool(shared.selections)
    for name, gradient in want.items():
        assert gradient.dtype == torch.float64
        moved = name.startswith("llm.") or bool(shared.selections)
        assert not moved or gradient.abs().max() > 0, f"{name} has no gradient to compare"
        limit = LIMIT * max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )
