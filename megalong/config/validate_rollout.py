"""Contradictions of the rollout settings: what an engine cannot sample for training, and what cannot sample ahead."""

from __future__ import annotations

from collections.abc import Iterator

from megalong.config.tree import EnginePlacement, RolloutEngine, RunConfig


def vllm_problems(config: RunConfig) -> Iterator[str]:
    """What vLLM cannot sample for training; rollout.engine=auto is checked when it has taken vLLM."""
    rollout = config.rollout
    cut = [name for name, off in (("top_p", 1.0), ("top_k", 0)) if getattr(rollout, name) != off]
    if cut and rollout.temperature != 1:
        yield (
            f"rollout.engine={rollout.engine.name} takes vLLM, with rollout.temperature={rollout.temperature:g} and "
            f"rollout.{cut[0]}={getattr(rollout, cut[0])}: vLLM reports log-probabilities either at temperature 1 or "
            "after the cut, and the trainer's are at the temperature and before it; change one of the two"
        )


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
