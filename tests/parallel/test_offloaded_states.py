"""Runs whose optimizer states live in host memory, or move there and back between checkpoints, lose no bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import DemoWorld, run_world
from host_copies import LateCopies
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor

from megalong.engine import trainer as training
from megalong.engine.checkpoint import complete_checkpoints
from megalong.metrics import read_jsonl
from megalong.parallel import host_tensors
from megalong.parallel.layout import destroy_layout, make_layout
from megalong.sft import train_sft

LEGS = (("parallel.tp=2", "parallel.sequence_parallel=true"), ("parallel.pp=2",), (), ("parallel.cp=2",))
"""Each trains one step more, from the checkpoint of the one before: TP2, PP2, DP2, CP2."""
RUNS = {"never": (False,) * 4, "always": (True,) * 4, "first": (True, False) * 2, "then": (False, True) * 2}
"""Name -> whether each leg keeps its states in host memory."""
DTYPES = {
    "float32": (),
    "bfloat16": ("model.dtype=bfloat16", "model.layer_spec=local"),
}


def train(demo: DemoWorld, folder: Path, overrides: Sequence[str]) -> dict[str, list[int]]:
    """All runs on this rank: bytes moved in each leg, [] where states stay."""
    done: dict[str, list[int]] = {}
    for name, offloads in RUNS.items():
        for step, (layout, offload) in enumerate(zip(LEGS, offloads, strict=True), start=1):
            copies = LateCopies() if offload else None
            config = demo.config(folder / name, *overrides, *layout, f"sft.steps={step}", task="sft")
            with (
                mock.patch.object(host_tensors, "PIECE_BYTES", 1024),
                mock.patch.object(training, "state_copies", lambda *_, copies=copies: copies),
            ):
                train_sft(config)
            parallel_state.destroy_model_parallel()
            done.setdefault(name, []).extend(copies.moved if copies else [])
    return done


def saved_tensors(demo: DemoWorld, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Whole tensors of the last checkpoint of every run."""
    make_layout(tp=1, cp=1, pp=1, seed=1)
    newest = {name: complete_checkpoints(folder / name / "checkpoints")[-1] for name in RUNS}
    assert {path.name for path in newest.values()} == {f"step_{len(LEGS):08d}"}
    states = {name: dist_checkpointing.load_plain_tensors(str(path)) for name, path in newest.items()}
    destroy_layout()
    return {
        name: {key: value for key, value in state.items() if isinstance(value, Tensor)}
        for name, state in states.items()
    }


@pytest.fixture(scope="module")
def results(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> object:
    """By dtype: the folder of its runs, what moved by rank, and what was saved."""

    @cache
    def of(dtype: str) -> tuple[Path, list[dict], dict[str, dict[str, Tensor]]]:
        folder = tmp_path_factory.mktemp(dtype)
        moved = run_world(2, train, demo, folder, DTYPES[dtype], folder=folder / "processes")
        (saved,) = run_world(1, saved_tensors, demo, folder, folder=folder / "reader")
        return folder, moved, saved

    return of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "never"])
def test_checkpoints_and_steps_are_those_of_states_on_the_device(name: str, dtype: str, results: object) -> None:
    folder, moved, saved = results(dtype)
    got, want = saved[name], saved["never"]
    assert got.keys() == want.keys()
    kinds = {key.split(".")[1] for key in want if key.startswith("optimizer.")}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key
    ours, theirs = (read_jsonl(folder / run / "metrics.jsonl") for run in (name, "never"))
    assert [row["step"] for row in ours] == list(range(1, len(LEGS) + 1))
    for row, expected in zip(ours, theirs, strict=True):
        assert row["loss"] == expected["loss"]
        assert row["grad_norm"] == expected["grad_norm"]
        assert not row["skipped"]
    for rank in moved:
        assert len(rank[name]) == 2 * sum(RUNS[name])
        assert min(rank[name]) > 0
        assert rank["never"] == []
