"""Steps of tiny models split over 2 and 4 GPUs, under NCCL, against the same step on one GPU.

In float64, where a difference beyond rounding is a defect, in float32 without TF32, and in bfloat16 with Transformer
Engine's layers where they are installed. LAYOUTS_ON_CPU=1 runs the same over gloo on a machine without GPUs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import tiny_vl
import torch
from harness import DemoWorld, World, make_demo_world
from recorded_runs import Recorded, assert_equal_runs, recording, unequal
from torch import Tensor

from megalong import run
from megalong.config.tree import Dtype
from megalong.engine.build import TORCH_DTYPE
from megalong.grpo import train_grpo
from megalong.parallel.layout import destroy_layout
from megalong.sft import train_sft

logger = logging.getLogger(__name__)
ON_CPU = os.environ.get("LAYOUTS_ON_CPU") == "1"
DEVICES = 4 if ON_CPU else torch.cuda.device_count()
SECONDS = 1500 if ON_CPU else 240
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICES < 2, reason=f"needs 2 or 4 CUDA GPUs, there are {DEVICES}"),
]

LAYOUTS = {
    "tp2_sp": (2, ("parallel.tp=2", "parallel.sequence_parallel=true")),
    "cp2": (2, ("parallel.cp=2", "model.recompute=keep_attention")),
    "cp2_ring": (2, ("parallel.cp=2", "parallel.cp_a2a=1")),
    "pp2": (2, ("parallel.pp=2",)),
    "dp2": (2, ()),
    "cp4": (4, ("parallel.cp=4", "parallel.cp_a2a=2")),  # two rings of two
    "tp2_pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
}
"""Name -> number of GPUs and overrides."""
WITH_TE = not ON_CPU and find_spec("transformer_engine") is not None
PRECISIONS = {
    "float64": (),  # TORCH_DTYPE says what float32 is
    "float32": (),
    "bfloat16": ("model.dtype=bfloat16", f"model.layer_spec={'te' if WITH_TE else 'local'}"),
}
Job = tuple[str, str, str]
"""Family, task, precision."""
EVERYWHERE: list[Job] = [("longvila", "sft", precision) for precision in PRECISIONS]
SHARED_PREFIX: list[Job] = [("longvila", "grpo", "float64"), ("longvila", "grpo", "float32")]
QWEN_VL: list[Job] = [(family, "sft", precision) for family in tiny_vl.WRITERS for precision in ("float64", "float32")]
JOBS = {
    **dict.fromkeys(LAYOUTS, EVERYWHERE),
    "tp2_sp": [*EVERYWHERE, *SHARED_PREFIX, *QWEN_VL],
    "cp2": [*EVERYWHERE, *SHARED_PREFIX, *QWEN_VL],
    "cp2_ring": [*EVERYWHERE, *SHARED_PREFIX],
    "cp4": [*EVERYWHERE, *SHARED_PREFIX],
    "alone": [*EVERYWHERE, *SHARED_PREFIX, *QWEN_VL],
}
TRAIN = {"sft": train_sft, "grpo": train_grpo}
Results = dict[Job, Recorded]


def record_jobs(
    worlds: Mapping[str, DemoWorld], folder: Path, jobs: Iterable[Job], overrides: tuple[str, ...],
    rollouts: Mapping[Job, list],
) -> Results:  # fmt: skip
    """One step of each job on this rank; GRPO trains on `rollouts` where there are any."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Groups are made once.
    with mock.patch.object(run, "make_layout", lru_cache(run.make_layout)):
        done = {job: record(worlds[job[0]], folder / "-".join(job), job, overrides, rollouts) for job in jobs}
    destroy_layout()
    return done


def record(
    world: DemoWorld, folder: Path, job: Job, overrides: Iterable[str], rollouts: Mapping[Job, list]
) -> Recorded:
    _, task, precision = job
    steps = (f"{task}.steps=1", "video.decoder=pyav")
    config = world.config(folder, *steps, *PRECISIONS[precision], *overrides, task=task)
    wide = mock.patch.dict(TORCH_DTYPE, {Dtype.float32: torch.float64}) if precision == "float64" else nullcontext()
    recorded = Recorded()
    with wide, recording(recorded, rollouts.get(job)):
        TRAIN[task](config)
    return recorded


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DemoWorld]:
    tiny = {family: tiny_vl.make_world(tmp_path_factory.mktemp(family), family=family) for family in tiny_vl.WRITERS}
    return {"longvila": make_demo_world(tmp_path_factory.mktemp("longvila")), **tiny}


@pytest.fixture(scope="module")
def alone(worlds: dict[str, DemoWorld], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """On one GPU, the families side by side."""
    started = []
    for family in worlds:
        folder, jobs = tmp_path_factory.mktemp("alone"), [job for job in JOBS["alone"] if job[0] == family]
        started.append(World(1, record_jobs, worlds, folder, jobs, (), {}, folder=folder))
    return {job: recorded for world in started for job, recorded in world.results(timeout=SECONDS)[0].items()}


@pytest.fixture(scope="module")
def split(
    worlds: dict[str, DemoWorld],
    alone: Results,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Callable[[str], list[Results]]:
    """By rank: the jobs of a layout. Those that were asked for run side by side, on a CPU as many ranks at a time."""
    asked = {item.callspec.params["layout"] for item in request.session.items if "split" in item.fixturenames}
    rollouts = {job: recorded.sampled for job, recorded in alone.items() if job[1] == "grpo"}

    @cache
    def start(sizes: tuple[int, ...]) -> dict[str, World]:
        started = {}
        for name, (size, overrides) in LAYOUTS.items():
            if size in sizes and size <= DEVICES and name in asked:
                folder = tmp_path_factory.mktemp(name)
                started[name] = World(size, record_jobs, worlds, folder, JOBS[name], overrides, rollouts, folder=folder)
        return started

    @cache
    def over(layout: str) -> list[Results]:
        sizes = (LAYOUTS[layout][0],) if ON_CPU else (2, 4)
        return start(sizes)[layout].results(timeout=SECONDS)

    return over


CASES = [
    pytest.param(
        layout, job, id=f"{layout}-{'-'.join(job)}",
        marks=pytest.mark.skipif(LAYOUTS[layout][0] > DEVICES, reason=f"needs {LAYOUTS[layout][0]} CUDA GPUs"),
    )
    for layout in LAYOUTS
    for job in JOBS[layout]
]  # fmt: skip


@pytest.mark.parametrize(("layout", "job"), CASES)
def test_gpus_train_like_one(layout: str, job: Job, alone: Results, split: Callable[[str], list[Results]]) -> None:
    family, task, precision = job
    for rank, results in enumerate(split(layout)):
        got, want = results[job], alone[job]
        logger.info("%s %s rank %d: %s", layout, job, rank, gaps(got, want))
        if precision == "bfloat16":
            exact = alone[family, task, "float32"]
            assert got.stats[0].loss == pytest.approx(exact.stats[0].loss, rel=1e-2)
            # Sums in another order round otherwise, but no further from float32.
            assert distance(got.gradients, exact.gradients) < 1.5 * distance(want.gradients, exact.gradients)
        else:
            assert_equal_runs(got, want, exact=precision == "float64")


def gaps(got: Recorded, want: Recorded) -> str:
    name, largest = max(unequal(got.gradients, want.gradients, limit=-1).items(), key=lambda item: item[1])
    return (
        f"loss {got.stats[0].loss:.6f}, {abs(got.stats[0].loss - want.stats[0].loss):.1e} off; gradients "
        f"{distance(got.gradients, want.gradients):.1e} of their norm off, {name} {largest:.1e} of its largest"
    )


def distance(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of all gradients together, in parts of their norm."""
    assert gradients.keys() == expected.keys()
    pairs = [(gradients[name].double(), expected[name].double()) for name in expected]
    return float(sum((ours - want).square().sum() for ours, want in pairs).sqrt()) / float(
        sum(want.square().sum() for _, want in pairs).sqrt()
    )


def test_what_is_compared_is_not_zero(alone: Results) -> None:
    for recorded in alone.values():
        (stats,) = recorded.stats
        assert 0 < stats.grad_norm < 100
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in recorded.gradients.values())
    single, double = (alone["longvila", "sft", precision] for precision in ("float32", "float64"))
    assert 0 < distance(single.gradients, double.gradients) < 1e-5  # no TF32, which is 1e-3 off
