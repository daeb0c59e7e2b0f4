"""Settings that save memory change no loss and no gradient: one process, tensor and pipeline parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import DemoWorld, run_world
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP
from recorded_runs import Recorded, recording
from torch import Tensor

from megalong.config import costs
from megalong.config.tree import Dtype
from megalong.engine.build import TORCH_DTYPE
from megalong.models.gpt import PackGpt
from megalong.parallel import offload as offloading
from megalong.parallel.offload import Offload
from megalong.sft import train_sft

TRAIN = ("sft.steps=1", "sft.batch_size=4", "data.pack_tokens=300", "video.num_frames=2")
ROWS = 48
"""What MLP_ROWS is here, for packs of some hundred rows."""
CASES = {
    "whole": ("none", 1),
    "none": ("none", 3),
    "none, automatic": ("none", 0),
    "keep_attention": ("keep_attention", 3),
    "full": ("full", 3),
    "full, automatic": ("full", 0),
    "full, whole": ("full", 1),
    "keep_attention, offloaded": ("keep_attention", 3),
    "full, offloaded": ("full", 1),
}
"""Name -> model.recompute and model.mlp_chunks."""
LAYOUTS = {
    "alone": (),
    "tp2_sp": ("parallel.tp=2", "parallel.sequence_parallel=true"),
    "pp2": ("parallel.pp=2",),
}


@dataclass(kw_only=True)
class Calls:
    """Rows of every call of an MLP, on this rank."""

    forward: list[int] = field(default_factory=list)  # without gradients
    differentiated: list[int] = field(default_factory=list)


class FakeCopies:
    """Stands for the copies between a GPU and the host. What comes back is a copy."""

    def __init__(self) -> None:
        self.moved = [0, 0]  # there, back

    def to_host(self, tensor: Tensor) -> tuple[list[Tensor], None]:
        self.moved[0] += 1
        return [tensor.clone()], None

    def to_device(self, blocks: list[Tensor], like: Tensor, after: None) -> tuple[Tensor, None]:
        self.moved[1] += 1
        return blocks[0].clone(), after

    def wait(self, event: None) -> None:
        pass


def record_cases(demo: DemoWorld, folder: Path, parallel: Sequence[str]) -> dict[str, tuple[Recorded, Calls]]:
    """One float64 train step of every case."""
    done = {}
    for name, (recompute, chunks) in CASES.items():
        overrides = (*TRAIN, *parallel, f"model.recompute={recompute}", f"model.mlp_chunks={chunks}")
        config = demo.config(folder / name, *overrides, task="sft")
        recorded, calls, copies = Recorded(), Calls(), FakeCopies()
        offload = Offload(copies) if name.endswith("offloaded") else None
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(TORCH_DTYPE, {Dtype.float32: torch.float64}))
            stack.enter_context(mock.patch.object(costs, "MLP_ROWS", ROWS))
            stack.enter_context(mock.patch.object(offloading, "DEVICE_LAYERS", 0))
            stack.enter_context(mock.patch.object(PackGpt, "offload", offload))
            stack.enter_context(recording(recorded, None))
            stack.enter_context(counting(calls))
            train_sft(config)
        parallel_state.destroy_model_parallel()
        done[name] = recorded, calls, copies.moved
    return done


@contextmanager
def counting(calls: Calls) -> Iterator[None]:
    forward = MLP.forward

    def count(mlp: MLP, rows: Tensor, *args: object, **kwargs: object) -> object:
        (calls.differentiated if torch.is_grad_enabled() else calls.forward).append(rows.shape[0])
        return forward(mlp, rows, *args, **kwargs)

    with mock.patch.object(MLP, "forward", count):
        yield


@pytest.fixture(scope="module")
def runs(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """Results by layout and rank."""
    done = {}
    for layout, overrides in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(layout)
        done[layout] = run_world(2 if overrides else 1, record_cases, demo, folder, overrides, folder=folder)
    return done


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_whole(case: str, layout: str, runs: dict[str, list[dict]]) -> None:
    want, *_ = runs["alone"][0]["whole"]
    assert len(want.gradients) > 20
    for rank in runs[layout]:
        got, *_ = rank[case]
        assert got.stats[0].loss == pytest.approx(want.stats[0].loss, rel=1e-10)
        assert got.stats[0].grad_norm == pytest.approx(want.stats[0].grad_norm, rel=1e-10)
        assert got.gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            assert gradient.dtype == torch.float64
            limit = 1e-10 * max(float(gradient.abs().max()), 1e-3)
            torch.testing.assert_close(got.gradients[name], gradient, rtol=0, atol=limit, msg=name)


def test_slices_cost_one_more_forward_only_where_nothing_was_recomputed(runs: dict[str, list[dict]]) -> None:
    calls = {case: counted for case, (_, counted, _) in runs["alone"][0].items()}
    rows = sum(calls["whole"].differentiated)
    longest = max(calls["whole"].differentiated)
    assert calls["whole"].forward == []
    assert longest > 3 * ROWS  # automatic slices are several
    assert calls["none, automatic"] == calls["whole"]
    for case in ("none", "keep_attention", "full", "full, automatic", "full, whole"):
        assert sum(calls[case].forward) == sum(calls[case].differentiated) == rows, case
    for case in ("none", "keep_attention", "full"):
        assert max(calls[case].forward + calls[case].differentiated) == -(-longest // 3), case
    assert max(calls["full, automatic"].forward + calls["full, automatic"].differentiated) <= ROWS
    assert max(calls["full, whole"].forward) == longest


def test_gathered_rows_count_for_automatic_slices(runs: dict[str, list[dict]]) -> None:
    """Under sequence parallelism the two ranks' rows go through an MLP together."""
    for rank in runs["tp2_sp"]:
        _, calls, _ = rank["full, automatic"]
        assert max(calls.forward) <= ROWS // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_recomputation_keeps_goes_to_the_host_and_comes_back(layout: str, runs: dict[str, list[dict]]) -> None:
    packs = len(runs["alone"][0]["whole"][1].differentiated) // 2  # of two layers
    layers = 1 if layout == "pp2" else 2
    for rank in runs[layout]:
        moved = {case: counts for case, (*_, counts) in rank.items() if any(counts)}
        assert moved == {
            "keep_attention, offloaded": [3 * layers * packs] * 2,  # input, attention output and its log-sum-exp
            "full, offloaded": [layers * packs] * 2,
        }
