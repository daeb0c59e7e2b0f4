"""The rollout engines of a run: which kind, on which GPUs, driven by which ranks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megalong.config.errors import ConfigError
from megalong.config.tree import MEMORY_SHARE, EnginePlacement, RolloutConfig, RunConfig
from megalong.config.tree import RolloutEngine as EngineChoice
from megalong.config.validate import Task
from megalong.config.validate_rollout import vllm_problems
from megalong.engine.build import TORCH_DTYPE, family_of
from megalong.parallel.collectives import gather_objects
from megalong.parallel.layout import ParallelLayout
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import RolloutEngine
from megalong.rollout.transfer import Transport
from megalong.rollout.vllm_engine import VllmEngine, VllmSettings
from megalong.rollout.vllm_model import MODELS

SHARES = {
    Transport.nccl: MEMORY_SHARE[EnginePlacement.disaggregated],
    Transport.ipc: MEMORY_SHARE[EnginePlacement.colocated],
    Transport.file: 0.2,
}
"""rollout.memory_share=0: the last one is of the host's memory."""


def build_engine(config: RunConfig, layout: ParallelLayout, *, task: Task, eos_id: int) -> RolloutEngine | None:
    """The engine that this rank drives, None when it drives none (collective).

    Raises ConfigError when the engines have no GPUs, or a replica no engine.
    """
    family = family_of(config.model)
    path, dtype = Path(config.model.path), TORCH_DTYPE[config.model.dtype]
    with torch.device("meta"):
        model = family.sampler_model(path, dtype)
    ahead = task == "grpo" and config.rollout.steps_off_policy > 0
    if not _takes_vllm(config, model.config.model_type, task=task, device=layout.device):
        if ahead:
            raise ConfigError([_not_beside_the_trainer("rollout.engine=auto takes the embedded engine here")])
        return EmbeddedEngine(
            family.sampler_model(path, dtype),
            name_of=family.sampler_name,
            eos_id=eos_id,
            device=layout.device,
            batch_prompts=config.rollout.batch_prompts,
        )
    settings = _settings(config, layout, task=task, ahead=ahead)
    has_engine = gather_objects(settings is not None, group=layout.replica)
    if not any(has_engine):
        raise ConfigError(
            [
                f"replica {layout.dp_rank} has no rollout engine: only the first {config.rollout.engines_per_node} "
                "ranks of a node drive one (rollout.engines_per_node); raise it, or make replicas larger"
            ]
        )
    if settings is None:
        return None
    return VllmEngine(model, name_of=family.sampler_name, eos_id=eos_id, settings=settings)


def _takes_vllm(config: RunConfig, model_type: str, *, task: Task, device: torch.device) -> bool:
    choice = config.rollout.engine
    if choice is EngineChoice.vllm:
        problems = []
        if importlib.util.find_spec("vllm") is None:
            problems.append("rollout.engine=vllm, but vLLM is not installed; pip install 'megalong[gpu]'")
        if model_type not in MODELS:
            problems.append(
                f"rollout.engine=vllm has no model for {model_type} (model.family={config.model.family}; it has "
                f"{', '.join(MODELS)}); set rollout.engine=embedded"
            )
        if problems:
            raise ConfigError(problems)
        return True
    if choice is EngineChoice.embedded or device.type != "cuda" or task == "sft":
        return False
    takes = importlib.util.find_spec("vllm") is not None and model_type in MODELS
    if takes and task != "eval" and (problems := list(vllm_problems(config))):
        raise ConfigError(problems)
    return takes


def _not_beside_the_trainer(why: str) -> str:
    return (
        f"rollout.steps_off_policy=1 samples while the trainer works, but {why}; leave rollout.engine_tp GPUs of each "
        "node to vLLM (start fewer processes, rollout.engine=vllm, rollout.placement=disaggregated), or set it to 0"
    )


def _settings(config: RunConfig, layout: ParallelLayout, *, task: Task, ahead: bool) -> VllmSettings | None:
    """Of the engine that this rank drives; None without one. ahead: it must not share the trainer's GPUs."""
    rollout = config.rollout
    local_rank, local_size = (int(os.environ.get(name, default)) for name, default in _LOCAL.items())
    devices, transport = place_engine(rollout, _gpu_names(layout.device), local_rank=local_rank, local_size=local_size)
    if ahead and transport is Transport.ipc:
        raise ConfigError([_not_beside_the_trainer("rollout.placement=auto puts the engines on its GPUs here")])
    if devices is None:
        return None
    temperature = config.eval.temperature if task == "eval" else rollout.temperature
    return VllmSettings(
        devices=devices,
        transport=transport,
        max_tokens=config.data.max_prompt_tokens + config.data.max_response_tokens,
        prefill_tokens=rollout.prefill_tokens,
        max_sequences=rollout.max_sequences,
        memory_share=rollout.memory_share or SHARES[transport],
        cuda_graphs=rollout.cuda_graphs and layout.device.type == "cuda",
        processed_logprobs=temperature not in (0.0, 1.0),
        discard_weights=config.model.train_llm and task != "eval",
        # Shorter than the watchdog's, which would end the run without the engine's log.
        timeout_seconds=0.9 * 60 * (config.parallel.timeout_minutes or 24 * 60),
        log_file=Path(config.logger.run_dir) / f"engine_rank{layout.rank}.log",
        seed=config.seed + layout.rank,
    )


_LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


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
    size, count = rollout.engine_tp, rollout.engines_per_node
    free = names[local_size:]
    apart = rollout.placement is EnginePlacement.disaggregated
    if rollout.placement is EnginePlacement.auto:
        apart = len(free) >= size
    if not apart:
        if len(names) < local_size:
            raise ConfigError(
                f"rollout.engine=vllm, colocated: a process sees {len(names)} GPU(s) (CUDA_VISIBLE_DEVICES) and its "
                f"node has {local_size} training processes, each on one of its own; let every process see all of them, "
                "as torchrun does, or set rollout.engine=embedded"
            )
        if local_size % size:
            raise ConfigError(
                [
                    f"rollout.placement=colocated with rollout.engine_tp={size}: it does not divide the {local_size} "
                    "processes of a node, whose GPUs the engines share"
                ]
            )
        return (tuple(names[local_rank : local_rank + size]) if local_rank % size == 0 else None), Transport.ipc
    if len(free) < size * count:
        raise ConfigError(
            [
                f"rollout.placement=disaggregated: {count} engines (rollout.engines_per_node) of {size} GPUs "
                f"(rollout.engine_tp) do not fit into the {len(free)} GPUs of the node that its {local_size} training "
                "processes leave; start fewer processes or set rollout.placement=colocated"
            ]
        )
    if count > local_size:
        raise ConfigError(
            [
                f"rollout.engines_per_node={count} is more than the {local_size} training processes of a node, each of "
                "which drives at most one; raise rollout.engine_tp instead"
            ]
        )
    at = local_rank * size
    return (tuple(free[at : at + size]) if local_rank < count else None), Transport.nccl
