"""Contradictions of the attention kernel: packs that one for sequences that stand alone is not made for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalong.config.model_shape import ModelShape
from megalong.config.tree import AttentionKernel, ParallelConfig, RunConfig

ALONE = "model.attention=te computes sequences that stand alone"


def a2a_ranks(parallel: ParallelConfig, model: ModelShape) -> int:
    """Of the context-parallel ranks, how many trade rows for heads; the others are a ring, and gather keys."""
    return parallel.cp_a2a or math.gcd(parallel.cp, max(1, model.kv_heads // parallel.tp))


def attention_problems(config: RunConfig, *, model: ModelShape) -> Iterator[str]:
    """What the attention kernel cannot compute of a training's packs."""
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


def likelihood_problems(config: RunConfig) -> Iterator[str]:
    """Options are compared behind the response that they share, whatever mr_sp.mode says."""
    if config.model.attention is AttentionKernel.te and config.eval.likelihood:
        yield (
            f"{ALONE}, but eval.likelihood=true packs the options of a question behind their shared prefix; set "
            "model.attention=auto or eval.likelihood=false"
        )
