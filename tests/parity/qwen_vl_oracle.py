"""What the parity tests of the Qwen-VL families share: small videos, the stock model as oracle, and the comparisons.

The oracle gets ids, pixels and grids as its own processor would make them, one [prompt | response] at a time; its
forward places the tower's output, computes M-RoPE positions and runs the stock layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny_vl
import torch
from harness import forward_pack, make_builder, run_world
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from megalong.attention.shard import shard_tokens
from megalong.config.tree import Dtype, ModelConfig, OptimizerConfig, Recompute
from megalong.data.packing import GroupTokens, pack_groups
from megalong.data.sequence import SequenceBuilder
from megalong.engine.build import build_model
from megalong.engine.trainer import Trainer
from megalong.models.families import FAMILIES
from megalong.models.names import canonical
from megalong.parallel.layout import ParallelLayout, make_layout
from megalong.records import MEDIA_TOKEN, FrameSelection, Sample, TokenBatch

STOCK = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
TOLERANCE = 1e-4
BLOCK = 2 * tiny_vl.PATCH


@dataclass(frozen=True, kw_only=True)
class Video:
    """Random frames and when they are shown; a picture is a video of one frame."""

    name: str
    num_frames: int
    rows: int  # blocks
    columns: int
    distance: float = 0.1  # seconds between frames
    picture: bool = False

    @property
    def selection(self) -> FrameSelection:
        frames = [*range(self.num_frames), *[self.num_frames - 1] * (self.num_frames % 2)]
        return FrameSelection(
            path=self.name,
            frames=tuple(frames),
            seconds=tuple(self.distance * frame for frame in frames),
            height=self.rows * BLOCK,
            width=self.columns * BLOCK,
        )

    def pixels(self) -> Tensor:
        """[F, H, W, 3] uint8."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        shape = (self.num_frames, self.rows * BLOCK, self.columns * BLOCK, 3)
        frames_FHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return frames_FHWC[list(self.selection.frames)]


FILM = Video(name="film", num_frames=8, rows=3, columns=5)
SHORT = Video(name="short", num_frames=2, rows=4, columns=2)
ODD = Video(name="odd", num_frames=5, rows=2, columns=3)
FRAME = Video(name="frame", num_frames=1, rows=3, columns=2)
PICTURE = Video(name="picture", num_frames=1, rows=5, columns=3, picture=True)
LONG = Video(name="long", num_frames=64, rows=3, columns=4, distance=1 / 60)  # 31 steps of 1/15 tick: 2 ticks
HOUR = Video(name="hour", num_frames=64, rows=2, columns=2, distance=2.0)


class Oracle:
    """The stock model; what a prompt of ours is for it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.model = STOCK[family].from_pretrained(folder, attn_implementation="eager")
        self.spec = FAMILIES[family].read_spec(folder)
        self.has_ticks = family == "qwen2_5_vl"

    def logits(self, ids: Sequence[int], videos: Sequence[Video], positions: Tensor | None = None) -> Tensor:
        """[T, V] of one sequence."""
        config = self.model.config
        ids_1T = torch.tensor([list(ids)])
        places = torch.nonzero(ids_1T[0] == MEDIA_TOKEN)[:, 0]
        at, kinds_1T = 0, torch.zeros_like(ids_1T)
        for video in videos:
            count = len(video.selection.frames) // 2 * video.rows * video.columns
            token, kind = (config.image_token_id, 1) if video.picture else (config.video_token_id, 2)
            ids_1T[0, places[at : at + count]] = token
            kinds_1T[0, places[at : at + count]] = kind
            at += count
        inputs: dict[str, Tensor] = {}
        for suffix, name, kind in (("", "image", True), ("_videos", "video", False)):
            chosen = [video for video in videos if video.picture == kind]
            if chosen:
                inputs[f"pixel_values{suffix}"] = torch.cat([self.pixels(video) for video in chosen])
                inputs[f"{name}_grid_thw"] = torch.tensor(
                    [[len(video.selection.frames) // 2, 2 * video.rows, 2 * video.columns] for video in chosen]
                )
        if self.has_ticks and "video_grid_thw" in inputs:
            inputs["second_per_grid_ts"] = torch.tensor([2 * video.distance for video in videos if not video.picture])
        if positions is not None:
            inputs["position_ids"] = positions[:, None]
        return self.model(input_ids=ids_1T, mm_token_type_ids=kinds_1T, **inputs).logits[0]

    def pixels(self, video: Video) -> Tensor:
        """Patches in the stock order, written out as slices (tests/unit/models has the stock processor itself)."""
        mean, std = (torch.tensor(getattr(self.spec.video, name)) for name in ("mean", "std"))
        pixels_FCHW = ((video.pixels() / 255 - mean) / std).permute(0, 3, 1, 2)
        p = tiny_vl.PATCH
        return torch.stack([
            pixels_FCHW[step : step + 2, :, top : top + p, left : left + p].transpose(0, 1).flatten()
            for step in range(0, len(pixels_FCHW), 2)
            for block_top in range(0, video.rows * BLOCK, BLOCK)
            for block_left in range(0, video.columns * BLOCK, BLOCK)
            for top in (block_top, block_top + p)
            for left in (block_left, block_left + p)
        ])  # fmt: skip


def group(builder: SequenceBuilder, videos: Sequence[Video], lens: Sequence[int], *, seed: int = 0) -> GroupTokens:
    name = "+".join(video.name for video in videos)
    sample = Sample(
        sample_id=name, question=f"what is shown in {name}", answer="A", videos=tuple(video.name for video in videos),
        problem_type="open-ended", category="c", reasoning="", subtitles="",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    responses = tuple(tuple(torch.randint(0, 250, (length,), generator=generator).tolist()) for length in lens)
    return GroupTokens(prompt=builder.prompt(sample, [video.selection for video in videos]), responses=responses)


def make_trainer(
    folder: Path, layout: ParallelLayout, videos: Sequence[Video], *, family: str,
    recompute: Recompute = Recompute.none, sequence_parallel: bool = False, lr: float = 1e-6,
) -> Trainer:  # fmt: skip
    config = ModelConfig(
        family=family, path=str(folder), dtype=Dtype.float32, recompute=recompute, train_projector=True,
        train_tower=True,
    )  # fmt: skip
    model = build_model(config, layout, sequence_parallel=sequence_parallel)
    frames = {video.name: video.pixels() for video in videos}

    def embeddings(
        chosen: Sequence[FrameSelection], wanted: Sequence[Tensor] | None = None, *,
        returns: Sequence[bool] | None = None,
    ) -> Tensor:  # fmt: skip
        """Every rank encodes all frames itself and takes the rows it needs; some give their gradient back."""
        whole_ND = torch.cat([model.vision(frames[item.path]).flatten(0, 1) for item in chosen])
        if wanted is None:
            return whole_ND
        rows_ND = whole_ND[wanted[layout.replica_rank]]
        return rows_ND if returns[layout.replica_rank] else rows_ND.detach().requires_grad_()

    return Trainer(model, layout, OptimizerConfig(lr=lr), total_steps=1, embeddings=embeddings)


Pack = list[tuple[list[Video], list[int]]]
"""Groups: their videos and the lengths of their responses."""
PACKS: dict[str, Pack] = {
    "text only": [([], [3, 1, 6])],
    "picture": [([PICTURE], [4])],
    "one frame": [([FRAME], [5])],
    "video": [([FILM], [6, 2])],
    "64 frames": [([LONG], [3])],
    "ragged pack": [([FILM], [2, 9, 1]), ([], [2]), ([SHORT, ODD], [4, 4]), ([PICTURE, FRAME], [1])],
}


def compare_gradients(model: torch.nn.Module, stock: torch.nn.Module, *, has_vision: bool) -> None:
    """Every tensor of the table, relative to that tensor's largest gradient."""
    parameters = dict(model.named_parameters())
    want = {canonical(name): parameter.grad for name, parameter in stock.named_parameters()}
    for entry in model.weight_table():
        got = entry.join([parameters[entry.megatron].main_grad])
        for name, gradient in zip(map(canonical, entry.hf), got, strict=True):
            expected = want.pop(name)
            if name.startswith("visual.") and not has_vision:
                assert expected is None
                assert gradient.abs().max() == 0
                continue
            scale = expected.abs().max()
            assert scale > 0, f"the oracle has no gradient for {name}"
            error = (gradient - expected).abs().max() / scale
            assert error < TOLERANCE, f"gradient of {name} is off by {error:.1e}"
    assert not want


def check_pack(
    folder: Path, layout: ParallelLayout, pack: Pack, *, family: str, recompute: Recompute = Recompute.none
) -> None:
    """Log-probabilities, entropies and every gradient of a pack against one stock forward per response."""
    oracle, builder = Oracle(folder, family), make_builder(folder, family)
    videos = [video for chosen, _ in pack for video in chosen]
    trainer = make_trainer(folder, layout, videos, family=family, recompute=recompute)
    groups = [group(builder, chosen, lens, seed=index) for index, (chosen, lens) in enumerate(pack)]
    trainer.ddp.zero_grad_buffer()
    got_R, entropy_R = forward_pack(trainer, pack_groups(groups), temperature=1.0)
    rows = []
    for item, (chosen, _) in zip(groups, pack, strict=True):
        for response in item.responses:
            prompt = item.prompt.ids_P
            logits = oracle.logits((*prompt, *response), chosen)[len(prompt) - 1 : -1]
            rows.append((logits.log_softmax(-1), torch.tensor(response)))
    whole_RV, targets_R = (torch.cat(parts) for parts in zip(*rows, strict=True))
    want_R = whole_RV.gather(1, targets_R[:, None])[:, 0]
    torch.testing.assert_close(got_R, want_R, rtol=TOLERANCE, atol=1e-5)
    torch.testing.assert_close(entropy_R, -(whole_RV.exp() * whole_RV).sum(-1), rtol=TOLERANCE, atol=1e-5)
    weights_R = torch.linspace(-1, 2, len(want_R)) / len(want_R)
    (got_R * weights_R).sum().backward()
    (want_R * weights_R).sum().backward()
    compare_gradients(trainer.model, oracle.model, has_vision=bool(videos))


def check_vocabulary_rows(
    folder: Path, layout: ParallelLayout, videos: Sequence[Video], *, family: str, with_positions: bool
) -> GroupTokens:
    """Whole rows of log-probabilities against the stock model, which is given our positions or makes its own."""
    oracle = Oracle(folder, family)
    item = group(make_builder(folder, family), videos, [4])
    trainer = make_trainer(folder, layout, videos, family=family)
    tokens = pack_groups([item])
    with torch.no_grad():
        embeds_ND = trainer.runner.embeddings(tokens.selections)
        hidden_RD = trainer.model(shard_tokens(tokens, layout.context, part=(0, 1)), embeds_ND)
        got_RV = (hidden_RD @ trainer.model.llm.head_weight.T).log_softmax(-1)
        positions = tokens.positions_T if with_positions else None
        logits = oracle.logits((*item.prompt.ids_P, *item.responses[0]), videos, positions=positions)
    want_RV = logits[len(item.prompt.ids_P) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(got_RV, want_RV, rtol=TOLERANCE, atol=1e-5)
    return item


def ragged_pack(folder: Path, family: str) -> tuple[list[Video], TokenBatch]:
    pack, builder = PACKS["ragged pack"], make_builder(folder, family)
    groups = [group(builder, chosen, lens, seed=index) for index, (chosen, lens) in enumerate(pack)]
    return [video for chosen, _ in pack for video in chosen], pack_groups(groups)


def logprobs_of_stages(folder: Path, family: str) -> Tensor:
    """On one of two pipeline stages."""
    videos, tokens = ragged_pack(folder, family)
    trainer = make_trainer(folder, make_layout(tp=1, cp=1, pp=2, seed=1), videos, family=family)
    return trainer.logprobs([tokens], temperature=1.0)[0]


def check_stages(folder: Path, layout: ParallelLayout, *, family: str, out: Path) -> None:
    """Positions, and what the first layers add, reach the pipeline stages that need them."""
    videos, tokens = ragged_pack(folder, family)
    want_R = make_trainer(folder, layout, videos, family=family).logprobs([tokens], temperature=1.0)[0]
    assert tokens.positions_T.shape[0] == 3
    for got_R in run_world(2, logprobs_of_stages, folder, family, folder=out):
        torch.testing.assert_close(got_R, want_R, rtol=1e-5, atol=1e-6)
