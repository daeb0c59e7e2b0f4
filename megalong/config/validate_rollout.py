"""Contradictions of the rollout settings: what an engine cannot sample for training, and what cannot sample ahead."""

from __future__ import annotations

from collections.abc import Iterator

from megalong.config.model_shape import ModelShape
from megalong.config.placement import colocated_problems, head_problems
from megalong.config.tree import EnginePlacement, RolloutEngine, RunConfig


def vllm_problems(config: RunConfig, *, training: bool, world_size: int, model: ModelShape) -> Iterator[str]:
    """Why vLLM cannot sample for this run, whatever the node; rollout.engine=auto is checked when it has taken vLLM.

    training: the log-probabilities of what is sampled are read.
    """
    rollout, parallel = config.rollout, config.parallel
    if min(rollout.engine_tp, parallel.tp, parallel.cp, parallel.pp) < 1:
        return
    cut = [name for name, off in (("top_p", 1.0), ("top_k", 0)) if getattr(rollout, name) != off]
    if training and cut and rollout.temperature != 1:
        yield (
            f"{takes_vllm(config)}, with rollout.temperature={rollout.temperature:g} and "
            f"rollout.{cut[0]}={getattr(rollout, cut[0])}: vLLM reports log-probabilities either at temperature 1 or "
            "after the cut, and the trainer's are at the temperature and before it; change one of the two"
        )
    if rollout.prefill_tokens < rollout.max_sequences:
        yield (
            f"{takes_vllm(config)}: a step of rollout.prefill_tokens={rollout.prefill_tokens} tokens has none for each "
            f"of rollout.max_sequences={rollout.max_sequences} responses; raise the one or lower the other"
        )
    problems = [*head_problems(model, key="rollout.engine_tp", size=rollout.engine_tp)]
    if rollout.placement is EnginePlacement.colocated:
        problems += colocated_problems(rollout, parallel, world_size=world_size)
    yield from (f"{takes_vllm(config)}: {problem}" for problem in problems)


def takes_vllm(config: RunConfig) -> str:
    """That vLLM samples, and why."""
    if config.rollout.engine is RolloutEngine.vllm:
        return "rollout.engine=vllm"
    return "rollout.engine=auto takes vLLM, where there are GPUs and it is installed"


def off_policy_problems(config: RunConfig) -> Iterator[str]:
    """What sampling for the next step cannot be combined with; engines.py refuses where `auto` leads to the same."""
    rollout, setting = config.rollout, f"rollout.steps_off_policy={config.rollout.steps_off_policy}"
    if config.grpo.tis_cap == 0:
        yield f"{setting} trains on responses of older weights, and grpo.tis_cap=0 corrects for none; set it, to 2 say"
    if rollout.engine is RolloutEngine.embedded or rollout.placement is EnginePlacement.colocated:
        here = "engine=embedded" if rollout.engine is RolloutEngine.embedded else "placement=colocated"
        yield (
            f"{setting} samples while the trainer works, and with rollout.{here} both are on the same device; set it "
            "to 0, or take rollout.engine=vllm and rollout.placement=disaggregated"
        )
    if config.grpo.dynamic_sampling:
        yield f"{setting} begins one batch a step and grpo.dynamic_sampling=true more when needed; turn one of them off"
