"""FLOPs of a step by part, over all processes."""

from __future__ import annotations

from megalong.config import costs
from megalong.config.model_shape import ModelShape
from megalong.config.plan_lengths import Lengths, options_per_pack
from megalong.config.tree import RunConfig, keeps_embeddings
from megalong.config.validate import Task


def _encodings(config: RunConfig, task: Task, lengths: Lengths) -> int:
    """How often a frame goes through the tower in a step, over all ranks: by every pass where nothing is kept, there
    with each copy of its prompt, and with mr_sp.mode=none on every tensor-parallel rank."""
    if keeps_embeddings(config) or task == "eval":
        return 1
    grpo = config.grpo
    passes = 1 if task == "sft" else 1 + (grpo.updates_per_batch > 1) + (grpo.kl_coef > 0)
    copies = lengths.group // lengths.responses
    ranks = config.parallel.tp if config.mr_sp.mode.name == "none" else 1
    return copies * passes * ranks + (task == "grpo")  # once for the sampler


def step_flops(
    config: RunConfig, task: Task, shape: ModelShape, *, lengths: Lengths, batch_size: int, shared: bool
) -> dict[str, int]:
    """FLOPs of one step by part, of a check none. `shared=False`: log-probability and training passes repeat the
    prompt."""
    if task == "check-sync":
        return {}
    size = {"prompt": lengths.prompt, "response": lengths.response, "group": lengths.group}
    work = (costs.shared_work if shared else costs.repeated_work)(**size)
    one_pass = costs.forward_flops(shape, work)
    parts = {}
    if shape.vision:
        times = _encodings(config, task, lengths)
        name = "vision: encode every frame once" if times == 1 else f"vision: encode every frame {times} times"
        parts[name] = times * lengths.frames * shape.vision.frame_flops
    if task == "cache-embeddings":
        return parts
    if task != "sft":
        own = lengths.prompt * (lengths.prompt + 1) // 2
        parts["rollout: prefill, once per prompt"] = costs.forward_flops(
            shape, costs.whole_work(tokens=lengths.prompt, pairs=own, rows=1)
        )
        parts["rollout: decode"] = costs.decode_flops(shape, **size)
    if task == "grpo" and config.grpo.updates_per_batch > 1:
        parts["old log-probabilities"] = one_pass
    if task == "grpo" and config.grpo.kl_coef > 0:
        parts["reference log-probabilities"] = one_pass
    if task == "eval" and config.eval.likelihood:
        again = -(-lengths.group // options_per_pack(config, lengths.prompt, lengths.response)) - 1
        parts["likelihood of the options"] = one_pass + again * parts["rollout: prefill, once per prompt"]
    if task != "eval":
        parts["forward and backward"] = costs.train_flops(
            shape, work, recompute=config.model.recompute, mlp_chunks=config.model.mlp_chunks
        )
    return {name: batch_size * value for name, value in parts.items()}
