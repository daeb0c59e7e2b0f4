"""The one place that makes megatron-core run on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import schedules
from torch import Tensor


def enable_megatron_on_cpu() -> None:
    """Point megatron-core's device and RNG look-ups at the CPU. Call once per process, before groups are made.

    megatron-core allocates on `torch.cuda.current_device()` and forks CUDA RNG states around
    tensor-parallel regions. Dropout is off in everything megalong trains, so an RNG tracker whose
    fork does nothing (megatron's own inference tracker) changes no result.
    """
    if torch.cuda.is_available():
        raise RuntimeError("enable_megatron_on_cpu() called on a machine with a GPU; it would move tensors off it")
    torch.cuda.current_device = lambda: torch.device("cpu")
    # megatron-core 0.19 asks for the stream only to wait for CUDA-graph events, of which there are none here.
    torch.cuda.current_stream = lambda: None
    torch.cuda.synchronize = lambda *_: None  # dist_checkpointing waits for copies to the host
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # a tied head on the last pipeline stage is moved by this
    schedules.torch = _TorchOfSchedules()
    # Activation recomputation saves and restores the GPU's RNG state; nothing here draws from one.
    tensor_parallel.random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    tensor_parallel.random._set_cuda_rng_state = lambda *_, **__: None
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


class _TorchOfSchedules:
    """`torch` as megatron's pipeline schedules see it: they make their token counter on device "cuda" by name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.zeros(*size, **options)
