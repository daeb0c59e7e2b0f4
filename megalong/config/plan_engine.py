"""What a vLLM rollout engine will need of its GPUs, on GPUs of its own or beside the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config import costs
from megalong.config.model_shape import ModelShape
from megalong.config.tree import MEMORY_SHARE, EnginePlacement, RolloutConfig, RolloutEngine, RunConfig
from megalong.config.validate import Task

SAMPLING: tuple[Task, ...] = ("grpo", "eval", "check-sync")
ENGINE_BUCKET = "bucket of weights for a colocated engine"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlan:
    """Bytes on each GPU of one engine."""

    gpus: int  # rollout.engine_tp
    per_node: int  # disaggregated: rollout.engines_per_node
    processes: int  # training processes, each on a GPU
    shares: dict[EnginePlacement, float]  # of a GPU's memory, for each placement that the run may take
    memory: dict[str, int]
    trainer: int  # what the trainer holds at most on a GPU while the engine is awake
    sleeps: bool  # a colocated engine, while the trainer works

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    def problem(self, placement: EnginePlacement, *, card: int) -> str:
        """Why it does not fit on cards of so many bytes; "" when it does."""
        share = self.shares[placement] * card
        if self.memory_total > share:
            return "too small a share: raise rollout.memory_share or rollout.engine_tp"
        if placement is EnginePlacement.colocated and share + self.trainer > card:
            what, sleep = ("states", "") if self.sleeps else ("peak", ", set rollout.sleep=true")
            return f"no room beside the trainer's {what}: lower rollout.memory_share{sleep} or spread the trainer"
        return ""


def samples_embedded(config: RunConfig, task: Task) -> bool:
    """That vLLM is installed is assumed."""
    engine = config.rollout.engine
    chosen = engine is RolloutEngine.auto and not config.gpus
    return task in SAMPLING and (engine is RolloutEngine.embedded or chosen)


def samples_by_vllm(config: RunConfig, task: Task) -> bool:
    """On GPUs: without them it is not planned."""
    return task in SAMPLING and config.gpus > 0 and not samples_embedded(config, task)


def placements(rollout: RolloutConfig) -> list[EnginePlacement]:
    """Those that the run may take."""
    if rollout.placement is not EnginePlacement.auto:
        return [rollout.placement]
    if rollout.steps_off_policy:
        return [EnginePlacement.disaggregated]
    return [EnginePlacement.disaggregated, EnginePlacement.colocated]


def bucket_memory(rollout: RolloutConfig, shape: ModelShape, *, element: int) -> dict[str, int]:
    """The buffer through which weights go to a colocated engine: it stays on the GPU of the process that drives it."""
    if EnginePlacement.colocated not in placements(rollout):
        return {}
    return {ENGINE_BUCKET: costs.bucket_bytes(shape, element=element)}


def plan_engine(
    rollout: RolloutConfig,
    shape: ModelShape,
    *,
    prompt: int,
    response: int,
    group: int,
    element: int,
    processes: int,
    trainer: int,
) -> EnginePlan:
    """Weights / engine_tp (norms, whole on every rank, are not worth a line), keys and values of one group, whose
    responses share the prompt's, and what a step of prefill_tokens rows holds of one layer: the residual stream, the
    norm's output, an input and an output (4 x hidden), and gate, up and product of the MLP. With deepstack, also what
    the first layers add to those rows.

    A key-value head that several ranks share is kept by each. trainer: bytes, see EnginePlan.
    """
    tp = rollout.engine_tp
    kv_heads = max(1, shape.kv_heads // tp)
    kv = costs.kv_bytes_per_token(shape, element=element) // shape.kv_heads * kv_heads
    memory = {
        "LLM weights": element * -(-costs.llm_params(shape) // tp),
        "keys and values of a group": kv * costs.shared_tokens(prompt, response, group),
        f"a layer on {rollout.prefill_tokens:,} tokens": rollout.prefill_tokens
        * element
        * (4 * shape.hidden + 3 * shape.ffn // tp),
    }
    deepstack = shape.vision.embed_width - shape.hidden if shape.vision else 0
    if deepstack:
        memory["deepstack embeddings of a step"] = rollout.prefill_tokens * element * deepstack
    shares = {placement: rollout.memory_share or MEMORY_SHARE[placement] for placement in placements(rollout)}
    return EnginePlan(
        gpus=tp, per_node=rollout.engines_per_node, processes=processes, shares=shares, memory=memory, trainer=trainer,
        sleeps=rollout.sleep,
    )  # fmt: skip
