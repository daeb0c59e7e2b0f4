"""Contradictions of the attention kernel: packs that one for sequences that stand alone is not made for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalong.config.model_shape import ModelShape
from megalong.config.tree import AttentionKernel, Dtype, ParallelConfig, RunConfig

ALONE = "model.attention=te computes sequences that stand alone"


def a2a_ranks(parallel: ParallelConfig, model: ModelShape) -> int:
    """Of the context-parallel ranks, how many trade rows for heads; the others are a ring, and gather keys."""
    return parallel.cp_a2a or math.gcd(parallel.cp, max(1, model.kv_heads // parallel.tp))


def takes_plain(config: RunConfig) -> bool:
    """Whether attention makes whole score matrices: on GPUs no other kernel takes float32."""
    if config.model.attention is AttentionKernel.auto:
        return config.gpus > 0 and config.model.dtype is Dtype.float32
    return config.model.attention is AttentionKernel.plain


def attention_problems(config: RunConfig, *, model: ModelShape) -> Iterator[str]:
    """What the attention kernel cannot compute of a training's packs."""
    yield from _kernel_problems(config)
    if config.model.attention is not AttentionKernel.te or config.parallel.tp < 1:
        return
    if config.mr_sp.mode.name == "shared_prefix":
        yield (
            f"{ALONE}, but mr_sp.mode=shared_prefix merges the outputs of several calls; set mr_sp.mode=stage1+2 or "
            "model.attention=auto"
        )
    cp, kv_heads = config.parallel.cp, max(1, model.kv_heads // config.parallel.tp)
    if config.mr_sp.mode.name == "stage1+2" and a2a_ranks(config.parallel, model) < cp:
        yield (
            f"{ALONE}, but parallel.cp={cp} over parallel.cp_a2a={config.parallel.cp_a2a} ({kv_heads} key-value heads "
            "per tensor-parallel rank) cuts them over a ring; set parallel.cp to a divisor of the heads and "
            "parallel.cp_a2a=0, or model.attention=auto"
        )


def _kernel_problems(config: RunConfig) -> Iterator[str]:
    """As attention.kernels.kernel_problem: before a process is started."""
    kernel, dtype = config.model.attention, config.model.dtype
    if not config.gpus or kernel in (AttentionKernel.auto, AttentionKernel.plain):
        return
    if kernel is AttentionKernel.cpu_flash:
        yield f"model.attention=cpu_flash does not run on GPUs (gpus={config.gpus}); set model.attention=auto"
    elif dtype is Dtype.float32:
        yield (
            f"model.attention={kernel.name} takes no float32 (model.dtype=float32); set model.dtype=bfloat16, or for "
            "short sequences model.attention=plain, which holds whole score matrices"
        )


def likelihood_problems(config: RunConfig) -> Iterator[str]:
    """Options are compared behind the response that they share, whatever mr_sp.mode says."""
    if config.model.attention is AttentionKernel.te and config.eval.likelihood:
        yield (
            f"{ALONE}, but eval.likelihood=true packs the options of a question behind their shared prefix; set "
            "model.attention=auto or eval.likelihood=false"
        )
