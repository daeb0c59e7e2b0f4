"""Any packs of groups, under any split and mode, train like their responses as sequences of their own on one process.

Loss, metrics and all gradients in float64, those of the video embeddings, the projector and the tower included. The
same without processes, for more lengths, is tests/parity/test_shared_prefix.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

import pytest
import tiny_vl
import torch
from harness import DemoWorld, run_world
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from recorded_runs import Recorded, assert_equal_runs, is_tower_key_bias, recording
from torch import Tensor

from megalong.config.tree import SHARDED, Dtype, MrSpMode, OptimizerConfig
from megalong.data.packing import pack_rollouts
from megalong.engine.build import TORCH_DTYPE
from megalong.grpo import grpo_loss, loss_settings, temperature, tokens_of
from megalong.metrics import PhaseTimer
from megalong.models.names import canonical
from megalong.parallel.collectives import gather_objects
from megalong.parallel.layout import make_layout
from megalong.records import FrameSelection, PolicyBatch, RolloutGroup
from megalong.run import Run, make_ready, open_run, read_samples
from megalong.videos import frame_chooser
from megalong.vision.encode import VisionStage

BASE = (
    "model.train_tower=true", "model.train_projector=true", "video.cache_embeddings=false", "video.num_frames=6",
    "data.thinking=false", "grpo.kl_coef=0.1",
)  # fmt: skip
FAMILIES = ("longvila", "qwen2_5_vl", "qwen3_vl")  # 1-D RoPE; M-RoPE in sections; interleaved, with deepstack
STEPS = (1, 3)
"""Tower steps of each video: with one, most ranks have no frame; three cannot be dealt evenly."""
ASKED = ("what is shown", "where does it end, and why")
LONGER = 1.1
"""A share that makes a response longer than its prompt."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A split and a mode of config.parallel and config.mr_sp."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    cp_a2a: int = 0
    sequence_parallel: bool = False
    mode: str = "shared_prefix"

    @property
    def size(self) -> int:
        return self.tp * self.cp * self.pp

    @property
    def overrides(self) -> tuple[str, ...]:
        names = ("tp", "cp", "pp", "cp_a2a", "sequence_parallel")
        return (*(f"parallel.{name}={getattr(self, name)}" for name in names), f"mr_sp.mode={self.mode}")


LAYOUTS = {
    "alone": Layout(),
    "tp2_sp": Layout(tp=2, sequence_parallel=True),
    "cp2": Layout(cp=2),  # rows for heads
    "cp2_ring": Layout(cp=2, cp_a2a=1),
    "pp2": Layout(pp=2),
    "cp2_none": Layout(cp=2, mode="none"),
    "cp2_stage1": Layout(cp=2, mode="stage1"),
    "cp2_stage1+2": Layout(cp=2, mode="stage1+2"),
    "cp4": Layout(cp=4),  # two rings of two
    "tp2_cp2_sp": Layout(tp=2, cp=2, sequence_parallel=True),
    "cp2_pp2": Layout(cp=2, pp=2),
}
"""Each trains all of CASES."""
EVERY_LAYOUT = [
    Layout(tp=tp, cp=cp, pp=pp, cp_a2a=a2a, sequence_parallel=sp, mode=mode)
    for tp, cp, pp, a2a, sp, mode in product((1, 2, 4), (1, 2, 4), (1, 2), (0, 1), (False, True), MrSpMode.__members__)
    if tp * cp * pp in (2, 4) and (cp > tp or a2a == 0) and (tp > 1 or not sp) and (pp == 1 or mode in SHARDED)
]
"""All that hypothesis chooses from."""


@dataclass(frozen=True)
class Question:
    """A prompt, and its group's responses: their lengths as shares of the prompt's, on top of one token."""

    video: int | None  # which; None: text alone
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """The batch of an optimizer step. Questions about one video share it where they share a pack."""

    questions: tuple[Question, ...]
    pack_tokens: int = 10_000


@dataclass(frozen=True)
class Trial:
    family: str
    layout: Layout
    case: Case


CASES = {
    "one": Case((Question(0, (LONGER,)),)),
    "one token": Case((Question(1, (0.0,)),)),
    "four, text": Case((Question(None, (0.0, LONGER, 0.2, 0.0)),)),
    "eight": Case((Question(1, (0.0, 0.1, LONGER, 0.3, 0.0, 0.05, 0.6, 0.2)),)),
    "four and eight, one video": Case((Question(0, (0.0, 0.3, LONGER, 0.1)), Question(0, (0.2,) * 8))),
}
"""By how many responses share each prompt."""
DRAWN = 24
"""Trials in layouts, and of lengths, that hypothesis chooses."""
NAMED = [Trial(*parts) for parts in product(FAMILIES, LAYOUTS.values(), CASES.values())]


@cache
def drawn() -> list[Trial]:
    """What hypothesis makes of layouts and lengths, the same in every process: worlds are started once for all."""
    batches: list[list[Trial]] = []
    shares = st.sampled_from((1, 4, 8)).flatmap(
        lambda size: st.lists(st.sampled_from((0.0, 0.05, 0.3, LONGER)), min_size=size, max_size=size).map(tuple)
    )
    questions = st.lists(st.builds(Question, st.sampled_from((0, 1, None)), shares), min_size=1, max_size=2)
    cases = st.builds(Case, questions.map(tuple), st.sampled_from((10_000, 1)))
    places = st.sampled_from([*product(FAMILIES, EVERY_LAYOUT)])
    count = {"min_size": DRAWN, "max_size": DRAWN}

    # The first batch has the simplest case everywhere.
    @settings(max_examples=2, phases=[Phase.generate], derandomize=True, database=None, deadline=None)
    @given(st.lists(places, unique=True, **count), st.lists(cases, **count))
    def keep(chosen: list[tuple[str, Layout]], cases: list[Case]) -> None:
        batches.append([Trial(*place, case) for place, case in zip(chosen, cases, strict=True)])

    keep()
    return batches[-1]


def record_trials(
    worlds: dict[str, DemoWorld], folder: Path, trials: Sequence[Trial], separate: bool
) -> dict[Trial, Recorded]:
    """On one rank of the trials' split, in float64. separate: every response is a sequence, and a pack, of its own."""
    done = {}
    cases: dict[tuple[str, Layout], list[Trial]] = {}
    for trial in trials:
        cases.setdefault((trial.family, trial.layout), []).append(trial)
    # Groups are made once: every one of them keeps threads.
    with (
        mock.patch("megalong.run.make_layout", cache(make_layout)),
        mock.patch.dict(TORCH_DTYPE, {Dtype.float32: torch.float64}),
        tiny_vl.float64_towers(),
    ):
        for number, ((family, layout), together) in enumerate(cases.items()):
            config = worlds[family].config(folder / str(number), *BASE, *layout.overrides, task="grpo")
            with open_run(config, task="grpo", timer=PhaseTimer()) as run:
                run.trainer.settings = OptimizerConfig(lr=0.0)  # the checkpoint's weights for every trial
                done |= {trial: train(run, trial.case, separate=separate) for trial in together}
    return done


def train(run: Run, case: Case, *, separate: bool) -> Recorded:
    groups = make_groups(run, case)
    generator = torch.Generator().manual_seed(1)
    batches = pack_rollouts(
        groups,
        [torch.randn(len(group.response_ids), generator=generator) for group in groups],
        pack_tokens=1 if separate else case.pack_tokens,
        share_prefix=run.config.mr_sp.mode.name == "shared_prefix",
    )
    batches = [with_logprobs(batch) for batch in batches]
    recorded = Recorded()
    with recording(recorded, None), recording_embeddings(recorded, run):
        run.trainer.train_step(
            tokens_of(batches), grpo_loss(run, batches, loss_settings(run.config)), temperature=temperature(run)
        )
    run.release_videos()
    return recorded


def make_groups(run: Run, case: Case) -> list[RolloutGroup]:
    """As a rollout would have left them; their videos are decoded."""
    manifest = run.config.data.train
    samples = read_samples(run.config, manifest=manifest, video_dir=None, thinking_targets=False)[: len(STEPS)]
    selections, _ = run.vision.select(samples, frame_chooser(run.config, run.vision.videos))
    prompts = []
    for asked, question in zip(ASKED, case.questions, strict=False):
        sample, videos = dataclasses.replace(samples[0], question=asked, videos=()), []
        if question.video is not None:
            sample = dataclasses.replace(samples[question.video], question=asked)
            frames = STEPS[question.video] * run.vision.videos.frames_per_step
            videos = [first_frames(selections[path], frames) for path in sample.videos]
        prompts.append(run.builder.prompt(sample, videos))
    ready, dropped = make_ready(run, prompts)
    if dropped:
        raise AssertionError(f"{dropped}: nothing here may be left out")
    generator = torch.Generator().manual_seed(2)
    groups = []
    for prompt, question in zip(ready, case.questions, strict=True):
        lengths = [1 + int(share * len(prompt.ids_P)) for share in question.shares]
        responses = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]
        groups.append(
            RolloutGroup(
                prompt=prompt,
                response_ids=tuple(map(tuple, responses)),
                logprobs=tuple(tuple(-6.5 + token % 8 / 4 for token in response) for response in responses),
                texts=("",) * len(responses),
                truncated=(False,) * len(responses),
                weights_version=0,
            )
        )
    return groups


def first_frames(selection: FrameSelection, count: int) -> FrameSelection:
    return dataclasses.replace(selection, frames=selection.frames[:count], seconds=selection.seconds[:count])


def with_logprobs(batch: PolicyBatch) -> PolicyBatch:
    """Old and reference policies that differ from the current one, so that ratios, clipping and KL all count."""
    sampler_R = batch.sampler_logprobs_R
    return dataclasses.replace(batch, old_logprobs_R=sampler_R, ref_logprobs_R=sampler_R - 0.5)


@contextmanager
def recording_embeddings(recorded: Recorded, run: Run) -> Iterator[None]:
    """Beside the gradients of weights, those of each video's embeddings: sums over all passes and ranks."""
    vision, encode = run.vision, VisionStage._encode_local
    made: list[tuple[Sequence[FrameSelection], Tensor]] = []

    def encode_and_keep(stage: VisionStage, selections: Sequence[FrameSelection]) -> Tensor:
        embeds_nD = encode(stage, selections)
        embeds_nD.retain_grad()
        made.append((selections, embeds_nD))
        return embeds_nD

    with mock.patch.object(VisionStage, "_encode_local", encode_and_keep):
        yield
    mine: dict[str, Tensor] = {}
    for selections, embeds_nD in made:
        if embeds_nD.grad is None:  # of a rank that gives none back
            continue
        spans = [tuple(vision._rows(item, (0, last)) for last in vision._share(item)) for item in selections]
        parts = embeds_nD.grad.split([stop - start for start, stop in spans])
        for item, (start, _), part_nD in zip(selections, spans, parts, strict=True):
            rows = vision._rows(item, (0, len(item.frames)))
            whole_ND = mine.setdefault(
                f"embeddings of {Path(item.path).name}", part_nD.new_zeros(rows, part_nD.shape[1])
            )
            whole_ND[start : start + len(part_nD)] += part_nD
    for of_rank in gather_objects(mine, group=run.layout.world):
        for name, grad_ND in of_rank.items():
            recorded.gradients[name] = recorded.gradients.get(name, 0) + grad_ND


@pytest.fixture(scope="module")
def worlds(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, DemoWorld]:
    return {"longvila": demo} | {
        family: tiny_vl.make_world(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES[1:]
    }


@pytest.fixture(scope="module")
def separate(worlds: dict[str, DemoWorld], tmp_path_factory: pytest.TempPathFactory) -> dict[Trial, Recorded]:
    """What each trial must equal: every response as a sequence of its own, on one process."""
    folder = tmp_path_factory.mktemp("separate")
    one = Layout(mode="none")
    wanted = {trial: dataclasses.replace(trial, layout=one) for trial in (*NAMED, *drawn())}
    trials = list(dict.fromkeys(wanted.values()))
    done = run_world(1, record_trials, worlds, folder, trials, True, folder=folder)[0]
    return {trial: done[its] for trial, its in wanted.items()}


@pytest.fixture(scope="module")
def together(worlds: dict[str, DemoWorld], tmp_path_factory: pytest.TempPathFactory) -> dict[Trial, list[Recorded]]:
    """By rank. A split has a world of its own: the threads of another's groups, which stay, would slow it down."""
    splits: dict[Layout, list[Trial]] = {}
    for trial in dict.fromkeys((*NAMED, *drawn())):
        splits.setdefault(dataclasses.replace(trial.layout, mode="any"), []).append(trial)
    done = {}
    for split, trials in splits.items():
        folder = tmp_path_factory.mktemp("together")
        ranks = run_world(split.size, record_trials, worlds, folder, trials, False, folder=folder)
        done |= {trial: [rank[trial] for rank in ranks] for trial in trials}
    return done


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_train_like_separate_sequences(
    family: str, layout: str, case: str, separate: dict[Trial, Recorded], together: dict[Trial, list[Recorded]]
) -> None:
    trial = Trial(family, LAYOUTS[layout], CASES[case])
    assert_equal(together[trial], separate[trial])
    shares = trial.layout.mode == "shared_prefix" and not case.startswith("one")
    counts = {recorded.stats[0].num_tokens for recorded in together[trial]}
    alone = separate[trial].stats[0].num_tokens
    assert max(counts) < 0.7 * alone if shares else counts == {alone}


def test_any_lengths_train_so_in_any_layout(
    separate: dict[Trial, Recorded], together: dict[Trial, list[Recorded]]
) -> None:
    for trial in drawn():
        try:
            assert_equal(together[trial], separate[trial])
        except AssertionError as error:
            error.add_note(str(trial))
            raise


def assert_equal(ranks: Sequence[Recorded], want: Recorded) -> None:
    for recorded in ranks:
        assert {gradient.dtype for gradient in recorded.gradients.values()} == {torch.float64}
        assert_equal_runs(recorded, want, exact=True, same_tokens=False)


def test_what_is_compared_is_there(separate: dict[Trial, Recorded]) -> None:
    """A loss, and gradients: of the video embeddings and all of the vision side only where there is a video."""
    for trial, recorded in separate.items():
        videos = {question.video for question in trial.case.questions} - {None}
        assert abs(recorded.stats[0].loss) > 1e-3
        assert sum(name.startswith("embeddings of") for name in recorded.gradients) == len(videos)
        sizes = {
            name: float(gradient.abs().max())
            for name, gradient in recorded.gradients.items()
            if not is_tower_key_bias(name)
        }
        vision = {name for name in sizes if not canonical(name).startswith(("llm/", "lm_head.", "model."))}
        assert {name for name, size in sizes.items() if size < 1e-6} == (set() if videos else vision)
