"""FLOPs of a step by part, over all processes."""

from __future__ import annotations

from megalong.config import costs
from megalong.config.model_shape import ModelShape
from megalong.config.plan_engine import samples_by_vllm
from megalong.config.plan_lengths import Lengths, options_per_pack
from megalong.config.plan_videos import sharing
from megalong.config.tree import RunConfig, keeps_embeddings
from megalong.config.validate import TEXT_TOKENS, Task


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
    config: RunConfig, task: Task, shape: ModelShape, *, lengths: Lengths, batch_size: int, videos: int, shared: bool
) -> dict[str, int]:
    """FLOPs of one step by part, of a check none. `shared=False`: log-probability and training passes repeat the
    prompt. videos: of the batch, each encoded once where embeddings are kept, prefilled once by vLLM, and computed once
    in a pack."""
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
        prefill = costs.forward_flops(shape, costs.whole_work(tokens=lengths.prompt, pairs=own, rows=1))
        parts["rollout: prefill, once per prompt"] = prefill
        parts["rollout: decode"] = costs.decode_flops(shape, **size)
    if task == "grpo" and config.grpo.updates_per_batch > 1:
        parts["old log-probabilities"] = one_pass
    if task == "grpo" and config.grpo.kl_coef > 0:
        parts["reference log-probabilities"] = one_pass
    if task == "eval" and config.eval.likelihood:
        again = -(-lengths.group // options_per_pack(config, lengths.prompt, lengths.response)) - 1
        parts["likelihood of the options"] = one_pass + again * prefill
    if task != "eval":
        parts["forward and backward"] = costs.train_flops(
            shape, work, recompute=config.model.recompute, mlp_chunks=config.model.mlp_chunks
        )
    flops = {name: batch_size * value for name, value in parts.items()}
    if videos < batch_size and keeps_embeddings(config):
        flops["vision: encode every frame once"] = videos * parts["vision: encode every frame once"]
    if videos < batch_size and samples_by_vllm(config, task):
        pairs = TEXT_TOKENS * lengths.prompt - TEXT_TOKENS * (TEXT_TOKENS - 1) // 2
        question = costs.forward_flops(shape, costs.whole_work(tokens=TEXT_TOKENS, pairs=pairs, rows=1))
        flops["rollout: prefill, once per prompt"] = videos * prefill + (batch_size - videos) * question
    # A pack that has no room for all of a video's questions has the others in the next one.
    packed = videos * -(-sharing(config, task) // lengths.questions)
    if shared and packed < batch_size:
        again = costs.forward_flops(shape, costs.video_work(lengths.prompt - TEXT_TOKENS))
        for name in ("old log-probabilities", "reference log-probabilities"):
            if name in flops:
                flops[name] -= (batch_size - packed) * again
        again = costs.train_flops(
            shape, costs.video_work(lengths.prompt - TEXT_TOKENS), recompute=config.model.recompute,
            mlp_chunks=config.model.mlp_chunks,
        )  # fmt: skip
        flops["forward and backward"] -= (batch_size - packed) * again
    return flops
