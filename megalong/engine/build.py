"""Build the model of a run: sizes from the checkpoint folder, weights from it, parallel as the layout says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from megalong.attention.core import PackCoreAttention
from megalong.attention.kernels import kernel_problem
from megalong.config.errors import ConfigError
from megalong.config.tree import Dtype, LayerSpec, ModelConfig, OptimizerConfig, Recompute
from megalong.engine.weights_io import CheckpointReader, load_hf_weights
from megalong.models.chat import check_added_tokens
from megalong.models.families import FAMILIES, Family
from megalong.models.gpt import transformer_config
from megalong.models.policy import PolicyModel
from megalong.parallel.host_tensors import CudaHostCopies, HostCopies
from megalong.parallel.layout import ParallelLayout
from megalong.parallel.offload import CudaCopies, Offload

TORCH_DTYPE = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16}


def family_of(config: ModelConfig) -> Family:
    """The family's entry. Raises ConfigError naming the known ones."""
    if config.family not in FAMILIES:
        raise ConfigError(f"model.family={config.family!r} is not known; one of {sorted(FAMILIES)}")
    return FAMILIES[config.family]


def build_model(
    config: ModelConfig, layout: ParallelLayout, *, sequence_parallel: bool, load: bool = True
) -> PolicyModel:
    """The model on this rank's device with the weights of config.path, frozen where config says so.

    load=False: weights are left as they were allocated, and config.path needs no more than its JSON files.
    """
    family = family_of(config)
    on_gpu = layout.device.type == "cuda"
    spec = family.read_spec(Path(config.path))
    check_added_tokens(spec.path / family.weight_folders[0], vocab=spec.gpt.vocab)
    use_te = config.layer_spec is LayerSpec.te or (config.layer_spec is LayerSpec.auto and on_gpu)
    if use_te and not on_gpu:
        raise ConfigError("model.layer_spec=te needs a GPU; set model.layer_spec=local or auto")
    if config.offload_activations and not on_gpu:
        raise ConfigError("model.offload_activations=true needs a GPU to move activations from; set it to false")
    if problem := kernel_problem(config.attention.value, device=layout.device, dtype=TORCH_DTYPE[config.dtype]):
        raise ConfigError(problem)
    megatron = transformer_config(
        spec.gpt,
        tp=layout.tp_size,
        cp=layout.context.size,
        pp=layout.pp_size,
        sequence_parallel=sequence_parallel,
        dtype=TORCH_DTYPE[config.dtype],
        recompute=config.recompute is not Recompute.none,
        on_gpu=on_gpu,
    )
    core_attention = partial(PackCoreAttention, kernel=config.attention.value, context=layout.context)
    model = family.build(megatron, spec, use_te=use_te, core_attention=core_attention).to(layout.device)
    model.llm.slice_mlps(config.mlp_chunks)
    if config.offload_activations:
        model.llm.offload = Offload(CudaCopies(layout.device))
    if load:
        load_hf_weights(model, model.weight_table(), CheckpointReader(spec.path, family.weight_folders), layout)
    model.freeze(llm=config.train_llm, projector=config.train_projector, tower=config.train_tower)
    return model


def build_encoder(config: ModelConfig, layout: ParallelLayout) -> tuple[nn.Module, Any]:
    """The vision side alone, frozen, on this process's device with the weights of config.path; and the family's spec.

    The same module, with the same weights, as build_model's `vision`.
    """
    family = family_of(config)
    spec = family.read_spec(Path(config.path))
    encoder = family.vision.encoder(spec).to(TORCH_DTYPE[config.dtype]).to(layout.device)
    table = family.weight_table(spec, encoder, use_te=False)
    own = [entry for entry in table if entry.megatron.startswith("vision.")]
    reader = CheckpointReader(spec.path, family.weight_folders)
    load_hf_weights(nn.ModuleDict({"vision": encoder}), own, reader, layout)
    return encoder.requires_grad_(False), spec


def wrap_for_gradients(model: PolicyModel) -> DistributedDataParallel:
    """Megatron's gradient buffers: float32 `main_grad` per trainable parameter, summed over data-parallel ranks.

    Parameters in float64, which tests use to tell rounding from a defect, have gradients in float64.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.config.params_dtype != torch.float64,
        overlap_grad_reduce=False,
        use_distributed_optimizer=False,
    )
    return DistributedDataParallel(model.config, settings, model)


def check_states(config: OptimizerConfig, layout: ParallelLayout) -> None:
    """Raise ConfigError for optimizer states that this device cannot have."""
    if config.offload and layout.device.type != "cuda":
        raise ConfigError("optimizer.offload=true needs a GPU to move states from; set it to false")


def state_copies(config: OptimizerConfig, layout: ParallelLayout) -> HostCopies | None:
    """How the optimizer's states get to the device and back; None: they live there."""
    check_states(config, layout)
    return CudaHostCopies(layout.device) if config.offload else None
