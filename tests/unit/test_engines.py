"""Which GPUs each process's engine gets, and how weights reach it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from megalong import engines
from megalong.config.errors import ConfigError
from megalong.config.tree import EnginePlacement, RolloutConfig, RunConfig
from megalong.engines import place_engine
from megalong.rollout.transfer import Transport

GPUS = ("4", "5", "6", "7", "GPU-a", "GPU-b", "GPU-c", "GPU-d")  # as CUDA_VISIBLE_DEVICES may name them

Placed = list[tuple[str, ...] | None]


def placed(placement: str, *, gpus: int, processes: int, tp: int = 1, count: int = 1) -> tuple[Placed, Transport]:
    """GPUs of the engine of each process of a node, and the transport."""
    rollout = RolloutConfig(placement=EnginePlacement[placement], engine_tp=tp, engines_per_node=count)
    found = [place_engine(rollout, GPUS[:gpus], local_rank=rank, local_size=processes) for rank in range(processes)]
    (transport,) = {how for _, how in found}
    return [devices for devices, _ in found], transport


def test_disaggregated_engines_take_the_gpus_behind_the_training_processes() -> None:
    assert placed("disaggregated", gpus=8, processes=6) == ([("GPU-c",), *[None] * 5], Transport.nccl)
    assert placed("disaggregated", gpus=8, processes=4, tp=2, count=2) == (
        [("GPU-a", "GPU-b"), ("GPU-c", "GPU-d"), None, None],
        Transport.nccl,
    )
    assert placed("disaggregated", gpus=2, processes=1) == ([("5",)], Transport.nccl)


def test_colocated_engines_share_the_processes_gpus() -> None:
    assert placed("colocated", gpus=4, processes=4) == ([("4",), ("5",), ("6",), ("7",)], Transport.ipc)
    assert placed("colocated", gpus=4, processes=4, tp=2) == ([("4", "5"), None, ("6", "7"), None], Transport.ipc)
    # GPUs that no process is on stay unused.
    assert placed("colocated", gpus=8, processes=2, tp=2) == ([("4", "5"), None], Transport.ipc)


def test_auto_is_disaggregated_where_an_engine_fits_behind_the_processes() -> None:
    assert placed("auto", gpus=8, processes=8) == placed("colocated", gpus=8, processes=8)
    assert placed("auto", gpus=8, processes=7) == placed("disaggregated", gpus=8, processes=7)
    assert placed("auto", gpus=8, processes=6, tp=2) == ([("GPU-c", "GPU-d"), *[None] * 5], Transport.nccl)
    assert placed("auto", gpus=8, processes=6, tp=3)[1] is Transport.ipc
    assert placed("auto", gpus=0, processes=2, tp=2) == ([(), ()], Transport.file)


REFUSED = {
    "no GPU left": (
        ("disaggregated", {"gpus": 4, "processes": 4}),
        "1 engines (rollout.engines_per_node) of 1 GPUs (rollout.engine_tp) do not fit into the 0 GPUs",
    ),
    "engines wider than what is left": (("disaggregated", {"gpus": 8, "processes": 5, "tp": 4}), "into the 3 GPUs"),
    "auto with room for one of two": (("auto", {"gpus": 8, "processes": 6, "tp": 2, "count": 2}), "into the 2 GPUs"),
    "more engines than processes": (
        ("disaggregated", {"gpus": 8, "processes": 2, "count": 3}),
        "rollout.engines_per_node=3 is more than the 2 training processes of a node",
    ),
    "engines across the node's edge": (
        ("colocated", {"gpus": 8, "processes": 6, "tp": 4}),
        "rollout.engine_tp=4: it does not divide the 6 processes",
    ),
    "processes that see one GPU each": (
        ("colocated", {"gpus": 1, "processes": 4}),
        "a process sees 1 GPU(s) (CUDA_VISIBLE_DEVICES) and its node has 4 training processes",
    ),
}


@pytest.mark.parametrize(("asked", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_engines_that_do_not_fit_are_refused(asked: tuple[str, dict[str, int]], message: str) -> None:
    placement, sizes = asked
    with pytest.raises(ConfigError, match=re.escape(message)):
        placed(placement, **sizes)


@pytest.mark.parametrize(
    ("gpus", "engine", "message"),
    [
        (2, "vllm", "but rollout.placement=auto puts the engines on its GPUs here; leave rollout.engine_tp GPUs"),
        (0, "auto", "but rollout.engine=auto takes the embedded engine here"),
    ],
)
def test_an_engine_that_shares_the_trainer_s_gpus_cannot_sample_ahead(
    gpus: int, engine: str, message: str, monkeypatch: pytest.MonkeyPatch, layout: object, tiny_checkpoint: Path
) -> None:
    """What validate() cannot know: where `auto` leads. Evaluations of the same recipe wait for their samples."""
    config = OmegaConf.structured(RunConfig)
    overrides = [f"rollout.engine={engine}", "rollout.steps_off_policy=1", f"model.path={tiny_checkpoint}"]
    config.merge_with_dotlist([*overrides, "model.dtype=float32", "logger.run_dir=r"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(engines, "_gpu_names", lambda device: list(GPUS[:gpus]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(
        ConfigError, match=re.escape(f"rollout.steps_off_policy=1 samples while the trainer works, {message}")
    ):
        engines.build_engine(config, layout, task="grpo", eos_id=0)
    if gpus == 0:
        assert engines.build_engine(config, layout, task="check-sync", eos_id=0) is not None


def test_gpus_are_called_what_the_environment_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-x")
    assert engines._gpu_names(torch.device("cuda")) == ["2", "GPU-x"]
    assert engines._gpu_names(torch.device("cpu")) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert engines._gpu_names(torch.device("cuda")) == ["0", "1", "2"]
