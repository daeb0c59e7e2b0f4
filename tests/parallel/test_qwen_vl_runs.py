"""Two steps of SFT and of GRPO through the real loops on tiny videos: one process, and several that share the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_vl
import torch
from harness import DemoWorld, run_world
from megatron.core import parallel_state
from recorded_runs import Recorded, assert_equal_runs, recording

from megalong.config.tree import Dtype
from megalong.engine.build import TORCH_DTYPE
from megalong.grpo import train_grpo
from megalong.records import ScoredGroup
from megalong.sft import train_sft

TASKS = {"sft": train_sft, "grpo": train_grpo}
LAYOUTS = {
    "tp2_sp": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    # Deepstack behind layers that are computed again, with their MLPs in slices.
    "cp2": (2, ("parallel.cp=2", "model.recompute=keep_attention", "model.mlp_chunks=3")),
    "pp2": (2, ("parallel.pp=2",)),
    "cp2_none": (2, ("parallel.cp=2", "mr_sp.mode=none")),
    "cp2_stage1": (2, ("parallel.cp=2", "mr_sp.mode=stage1")),
    "cp2_stage1+2": (2, ("parallel.cp=2", "mr_sp.mode=stage1+2")),
    "cp4": (4, ("parallel.cp=4",)),  # two rings of two
    "tp2_cp2_sp": (4, ("parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true")),
    "cp2_pp2": (4, ("parallel.cp=2", "parallel.pp=2")),
}
"""Name -> number of processes and overrides."""


def record_families(
    worlds: dict[str, DemoWorld], folder: Path, layouts: dict[str, tuple[str, ...]],
    rollouts: dict[str, list[list[ScoredGroup]]],
) -> dict[tuple[str, str, str], Recorded]:  # fmt: skip
    """(family, layout, task) -> what a run gave, in float64: whatever differs beyond 1e-10 is a defect."""
    TORCH_DTYPE[Dtype.float32] = torch.float64
    done = {}
    for family, world in worlds.items():
        for layout, overrides in layouts.items():
            for task, train in TASKS.items():
                recorded = Recorded()
                given = rollouts.get(family) if task == "grpo" else None
                with tiny_vl.float64_towers(), recording(recorded, given):
                    train(world.config(folder / family / layout / task, *overrides, task=task))
                parallel_state.destroy_model_parallel()
                done[family, layout, task] = recorded
    return done


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DemoWorld]:
    return {family: tiny_vl.make_world(tmp_path_factory.mktemp(family), family=family) for family in tiny_vl.WRITERS}


@pytest.fixture(scope="module")
def alone(worlds: dict[str, DemoWorld], tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("alone")
    return run_world(1, record_families, worlds, folder, {"alone": ()}, {}, folder=folder)[0]


@pytest.fixture(scope="module")
def split(worlds: dict[str, DemoWorld], alone: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """By layout and rank; GRPO trains on the rollouts of one process."""
    rollouts = {family: alone[family, "alone", "grpo"].sampled for family in worlds}
    done = {}
    for size in (2, 4):
        folder = tmp_path_factory.mktemp(f"split{size}")
        chosen = {name: overrides for name, (processes, overrides) in LAYOUTS.items() if processes == size}
        ranks = run_world(size, record_families, worlds, folder, chosen, rollouts, folder=folder)
        done |= dict.fromkeys(chosen, ranks)
    return done


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", tiny_vl.WRITERS)
def test_a_run_learns_in_every_part(family: str, task: str, alone: dict, worlds: dict[str, DemoWorld]) -> None:
    recorded: Recorded = alone[family, "alone", task]
    assert len(recorded.stats) == 2
    assert all(0 < stats.grad_norm < 100 and not stats.skipped for stats in recorded.stats)
    moved = {
        name
        for name, gradient in recorded.gradients.items()
        if float(gradient.abs().max()) > 1e-9 and not torch.equal(gradient, recorded.weights[name])
    }
    language = {name for name in recorded.weights if "visual." not in name}
    assert moved == (set(recorded.weights) if task == "sft" else language)
    assert recorded.frames_encoded > 0


@pytest.mark.parametrize("family", tiny_vl.WRITERS)
def test_the_sampler_s_logprobs_are_the_trainer_s(family: str, alone: dict) -> None:
    """Embeddings, M-RoPE positions of prompt and response, and synced weights agree, after an update too."""
    for stats in alone[family, "alone", "grpo"].stats:
        assert stats.metrics["sampler_gap_max"] < 1e-5
    lengths = {
        len(ids)
        for batch in alone[family, "alone", "grpo"].sampled
        for scored in batch
        for ids in scored.group.response_ids
    }
    assert len(lengths) > 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", tiny_vl.WRITERS)
def test_processes_train_like_one(
    family: str, layout: str, task: str, alone: dict, split: dict[str, list[dict]]
) -> None:
    repeats = any(override.startswith("mr_sp.mode=") for override in LAYOUTS[layout][1])
    for rank in split[layout]:
        got, want = rank[family, layout, task], alone[family, "alone", task]
        assert_equal_runs(got, want, exact=True, same_tokens=task == "sft" or not repeats)


@pytest.mark.parametrize("family", tiny_vl.WRITERS)
def test_sequence_parallel_processes_share_the_embeddings(
    family: str, alone: dict, split: dict[str, list[dict]]
) -> None:
    """Every row of a video, with its deepstack levels, is on the one rank whose slice of the sequence has its place."""
    parts = [rank[family, "tp2_sp", "sft"].embeddings for rank in split["tp2_sp"]]
    assert [sum(rows) for rows in zip(*parts, strict=True)] == alone[family, "alone", "sft"].embeddings
    assert all(min(rows) > 0 for rows in zip(*parts, strict=True))


@pytest.mark.parametrize("family", tiny_vl.WRITERS)
def test_two_processes_share_the_frames(family: str, alone: dict, split: dict[str, list[dict]]) -> None:
    """Five frames, the last one twice, are three steps of two frames: each rank encodes some, none both."""
    for layout in ("tp2_sp", "cp2", "pp2", "cp2_stage1", "cp2_stage1+2"):
        shares = [rank[family, layout, "grpo"].frames_encoded for rank in split[layout]]
        assert min(shares) > 0
        assert sum(shares) == alone[family, "alone", "grpo"].frames_encoded
        assert all(share % 2 == 0 for share in shares)
