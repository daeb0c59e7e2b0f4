"""Contradictions of a configuration, all found before any work starts and reported in one error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from omegaconf import OmegaConf

from megalong.config.errors import ConfigError
from megalong.config.model_shape import ModelShape
from megalong.config.placement import head_problems
from megalong.config.tree import (
    SHARDED,
    AdvantageKind,
    FrameSampling,
    Recompute,
    RolloutEngine,
    RunConfig,
)
from megalong.config.validate_attention import attention_problems, likelihood_problems
from megalong.config.validate_rollout import off_policy_problems, vllm_problems

Task = Literal["sft", "grpo", "eval", "check-sync", "cache-embeddings"]
TRAINING: tuple[Task, ...] = ("sft", "grpo")

TEXT_TOKENS = 256
"""Room for the system prompt, the question and the chat markers beside a video's tokens."""

GROUP_RELATIVE = (AdvantageKind.grpo, AdvantageKind.dr_grpo, AdvantageKind.rloo)


def validate(config: RunConfig, *, task: Task, world_size: int, model: ModelShape) -> None:
    """Check the sections `task` reads against each other, the number of processes and the model's sizes.

    Raises ConfigError with every problem found; each names its keys, their values and what to change.
    """
    problems = [*_out_of_bounds(config, task), *_missing(config, task)]
    problems += _length_problems(config, task, model=model)
    problems += _cache_problems(config, task, model=model)
    if task != "cache-embeddings":  # each process works alone, whatever the layout of the training
        problems += _parallel_problems(config, world_size=world_size, model=model)
    if task in ("sft", "grpo", "check-sync"):
        problems += attention_problems(config, model=model)
    if task in TRAINING:
        problems += _training_problems(config, task, world_size=world_size)
        problems += _vision_problems(config, model=model)
    if task == "grpo":
        problems += _grpo_problems(config)
    if task in ("grpo", "eval", "check-sync") and config.rollout.engine is RolloutEngine.vllm:
        problems += vllm_problems(config, training=task != "eval", world_size=world_size, model=model)
    problems += _evaluation_problems(config, task)
    if problems:
        raise ConfigError(problems)


def frames_per_video(config: RunConfig) -> int:
    """The most frames one video may contribute."""
    video = config.video
    return video.max_frames if video.sampling is FrameSampling.fps else video.num_frames


def prompt_tokens(config: RunConfig, model: ModelShape) -> int:
    """LLM positions of a one-video prompt at the most frames: frames * tokens per frame + TEXT_TOKENS.

    Without vision: as many as data.max_prompt_tokens allows.
    """
    if model.vision is None:
        return config.data.max_prompt_tokens
    return frames_per_video(config) * model.vision.tokens_per_frame + TEXT_TOKENS


@dataclass(frozen=True, slots=True)
class _Bound:
    """low <= value <= high; `above` makes the lower end exclusive, `below` the upper."""

    key: str
    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        low_ok = value > self.low if self.above else value >= self.low
        high_ok = value < self.high if self.below else value <= self.high
        return low_ok and high_ok and math.isfinite(value)

    def __str__(self) -> str:
        text = f"{'more than' if self.above else 'at least'} {self.low:.12g}"
        if self.high == math.inf:
            return text
        return f"{text} and {'less than' if self.below else 'at most'} {self.high:.12g}"


_BOUNDS: tuple[_Bound, ...] = (
    _Bound("seed", 0, 2**32, below=True),  # what numpy takes
    _Bound("gpus", 0),
    _Bound("model.mlp_chunks", 0),
    _Bound("parallel.tp", 1),
    _Bound("parallel.cp", 1),
    _Bound("parallel.pp", 1),
    _Bound("parallel.timeout_minutes", 0),
    _Bound("video.num_frames", 1),
    _Bound("video.fps", 0, above=True),
    _Bound("video.max_frames", 1),
    _Bound("video.max_frame_pixels", 0),
    _Bound("video.max_video_tokens", 0),
    _Bound("video.tower_batch_frames", 1),
    _Bound("video.cache_gpu_gib", 0),
    _Bound("video.cache_gib", 0, above=True),
    _Bound("video.cache_dir_gib", 0, above=True),
    _Bound("video.frame_cache_gib", 0, above=True),
    _Bound("data.max_prompt_tokens", 1),
    _Bound("data.max_response_tokens", 1),
    _Bound("data.pack_tokens", 1),
    _Bound("data.seed", 0),
    _Bound("data.questions_per_video", 1),
    _Bound("data.decode_workers", 1),
    _Bound("eval.every", 0),
    _Bound("eval.num_samples", 1),
    _Bound("eval.temperature", 0),
    _Bound("eval.batch_prompts", 1),
    _Bound("logger.samples_per_step", 0),
)
_TRAINING_BOUNDS: tuple[_Bound, ...] = (
    _Bound("optimizer.lr", 0, above=True),
    _Bound("optimizer.beta1", 0, 1, below=True),
    _Bound("optimizer.beta2", 0, 1, below=True),
    _Bound("optimizer.eps", 0, above=True),
    _Bound("optimizer.weight_decay", 0),
    _Bound("optimizer.clip_grad", 0),
    _Bound("optimizer.warmup_steps", 0),
    _Bound("optimizer.min_lr", 0),
    _Bound("optimizer.max_skipped_in_a_row", 1),
    _Bound("checkpoint.save_every", 0),
    _Bound("checkpoint.keep", 1),
)
_SFT_BOUNDS: tuple[_Bound, ...] = (_Bound("sft.steps", 1), _Bound("sft.batch_size", 1))
_GRPO_BOUNDS: tuple[_Bound, ...] = (
    _Bound("grpo.steps", 1),
    _Bound("grpo.batch_size", 1),
    _Bound("grpo.updates_per_batch", 1),
    _Bound("grpo.clip_low", 0, 1, above=True, below=True),
    _Bound("grpo.clip_high", 0, above=True),
    _Bound("grpo.kl_coef", 0),
    _Bound("grpo.dynamic_sampling_max_batches", 1),
    _Bound("grpo.tis_cap", 0),
    _Bound("reward.overlong_buffer", 0),
)
_ROLLOUT_BOUNDS: tuple[_Bound, ...] = (
    _Bound("rollout.group_size", 1),
    # At temperature 0 all responses of a group are equal and there is nothing to learn from.
    _Bound("rollout.temperature", 0, above=True),
    _Bound("rollout.top_p", 0, 1, above=True),
    _Bound("rollout.top_k", 0),
    _Bound("rollout.steps_off_policy", 0, 1),
    _Bound("rollout.batch_prompts", 1),
    _Bound("rollout.engine_tp", 1),
    _Bound("rollout.engines_per_node", 1),
    _Bound("rollout.memory_share", 0, 1),
    _Bound("rollout.prefill_tokens", 1),
    _Bound("rollout.max_sequences", 1),
)


def _value(config: RunConfig, key: str) -> Any:
    return OmegaConf.select(cast(Any, config), key)


def _out_of_bounds(config: RunConfig, task: Task) -> Iterator[str]:
    bounds = _BOUNDS
    if task in TRAINING:
        bounds += _TRAINING_BOUNDS + (_SFT_BOUNDS if task == "sft" else _GRPO_BOUNDS)
    if task in ("grpo", "eval", "check-sync") or (task == "sft" and config.rollout.engine is RolloutEngine.vllm):
        bounds += _ROLLOUT_BOUNDS
    for bound in bounds:
        value = _value(config, bound.key)
        if not bound.holds(value):
            yield f"{bound.key}={value:.12g} must be {bound}"


def _missing(config: RunConfig, task: Task) -> Iterator[str]:
    if task not in ("eval", "check-sync") and OmegaConf.is_missing(cast(Any, config.data), "train"):
        yield f"data.train has no value; {task} needs a manifest to train on: set data.train"


def _parallel_problems(config: RunConfig, *, world_size: int, model: ModelShape) -> Iterator[str]:
    tp, cp, pp = config.parallel.tp, config.parallel.cp, config.parallel.pp
    if min(tp, cp, pp) < 1:
        return
    replica = tp * cp * pp
    split = f"parallel.tp={tp} x parallel.cp={cp} x parallel.pp={pp}"
    if world_size % replica:
        yield (
            f"{world_size} processes cannot be split into replicas of {split} = {replica}; "
            "start a multiple of that (torchrun --nproc-per-node N) or change the three"
        )
    if config.gpus and config.gpus != world_size and config.gpus % replica:
        yield f"gpus={config.gpus} is not a multiple of {split} = {replica}; change gpus or the three"
    yield from split_problems(model, tp=tp, pp=pp)
    yield from _deepstack_problems(model, pp=pp)
    a2a = config.parallel.cp_a2a
    if a2a < 0 or (a2a and (cp % a2a or max(1, model.kv_heads // tp) % a2a)):
        yield (
            f"parallel.cp_a2a={a2a} must divide parallel.cp={cp} and the {max(1, model.kv_heads // tp)} key-value "
            "heads of a tensor-parallel rank; set it to 0 to have it chosen"
        )
    if pp > 1 and config.mr_sp.mode.name not in SHARDED:
        yield (
            f"mr_sp.mode={config.mr_sp.mode.name} deals whole sequences to the ranks in turn, which parallel.pp={pp} "
            "cannot; set parallel.pp=1 or another mode"
        )
    if config.parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel=true needs parallel.tp > 1, which is 1; turn it off or raise parallel.tp"


def split_problems(model: ModelShape, *, tp: int, pp: int) -> Iterator[str]:
    """Why the model's sizes cannot be cut over tp and pp ranks; nothing when they can."""
    yield from head_problems(model, key="parallel.tp", size=tp)
    if model.layers % pp:
        yield f"parallel.pp={pp} does not divide the model's {model.layers} layers; choose a divisor"


def _deepstack_problems(model: ModelShape, *, pp: int) -> Iterator[str]:
    levels = model.vision.embed_width // model.hidden - 1 if model.vision else 0
    if model.layers // pp < levels:
        yield (
            f"parallel.pp={pp} leaves {model.layers // pp} layers to the first stage, which adds {levels} levels of "
            "vision embeddings; lower it"
        )


def _length_problems(config: RunConfig, task: Task, *, model: ModelShape) -> Iterator[str]:
    data, frames = config.data, frames_per_video(config)
    key = "video.max_frames" if config.video.sampling is FrameSampling.fps else "video.num_frames"
    needed = prompt_tokens(config, model)
    vision = model.vision
    if vision and frames < vision.frames_per_step:
        yield f"{key}={frames} is less than the {vision.frames_per_step} frames the model takes at a time; raise it"
    if vision and needed > data.max_prompt_tokens:
        fitting = (data.max_prompt_tokens - TEXT_TOKENS) // vision.tokens_per_frame
        lower = f"lower {key} to {fitting} or " if fitting >= vision.frames_per_step else ""
        yield (
            f"{key}={frames} at {vision.tokens_per_frame} tokens per frame and {TEXT_TOKENS} for text makes prompts of "
            f"{needed} tokens, over data.max_prompt_tokens={data.max_prompt_tokens}; {lower}raise "
            f"data.max_prompt_tokens to {needed}"
        )
    if vision and not model.mrope:
        for name in ("max_frame_pixels", "max_video_tokens"):
            if getattr(config.video, name) > 0:
                yield (
                    f"video.{name}={getattr(config.video, name)} has no effect: model.family={config.model.family} has "
                    "frames of one size; set it to 0"
                )
    longest = data.max_prompt_tokens + data.max_response_tokens
    if longest > model.max_positions and not model.mrope:  # there the positions are a video's: see build_prompts
        yield (
            f"data.max_prompt_tokens={data.max_prompt_tokens} + data.max_response_tokens={data.max_response_tokens} = "
            f"{longest} is over the model's {model.max_positions} positions; lower data.max_prompt_tokens to "
            f"{max(0, model.max_positions - data.max_response_tokens)} or lower data.max_response_tokens"
        )
    if task == "grpo" and config.reward.overlong_buffer > data.max_response_tokens:
        yield (
            f"reward.overlong_buffer={config.reward.overlong_buffer} is longer than "
            f"data.max_response_tokens={data.max_response_tokens}; lower it"
        )


def _cache_problems(config: RunConfig, task: Task, *, model: ModelShape) -> Iterator[str]:
    video, folder = config.video, f"video.cache_dir={config.video.cache_dir}"
    if task == "cache-embeddings" and model.vision is None:
        yield f"megalong cache-embeddings has nothing to do: model.family={config.model.family} has no vision"
    if video.cache_dir is None:
        if task == "cache-embeddings":
            yield "megalong cache-embeddings needs a folder to fill: set video.cache_dir"
        return
    for name in ("train_tower", "train_projector"):
        if getattr(config.model, name):
            yield f"{folder} would keep embeddings that model.{name}=true makes stale; set video.cache_dir=null"
            return
    if not video.cache_embeddings:
        yield f"{folder} needs video.cache_embeddings=true; set it, or video.cache_dir=null"
    if config.mr_sp.mode.name == "none":
        yield f"{folder} is not read with mr_sp.mode=none, which encodes anew in every pass; set video.cache_dir=null"


def _training_problems(config: RunConfig, task: Task, *, world_size: int) -> Iterator[str]:
    model, optimizer = config.model, config.optimizer
    vision = [name for name in ("train_tower", "train_projector") if getattr(model, name)]
    if not model.train_llm and not vision:
        yield "model.train_llm, model.train_projector and model.train_tower are all false; nothing would be trained"
    if vision and config.video.cache_embeddings:
        yield (
            f"video.cache_embeddings=true would reuse embeddings that model.{vision[0]}=true makes stale; "
            "set video.cache_embeddings=false"
        )
    if vision and task == "grpo" and config.grpo.updates_per_batch > 1:
        yield (
            f"grpo.updates_per_batch={config.grpo.updates_per_batch} with model.{vision[0]}=true: the "
            "embeddings of the rollout would be stale after the first update; set grpo.updates_per_batch=1"
        )
    if model.offload_activations and model.recompute is Recompute.none:
        yield (
            "model.offload_activations=true moves what recomputation keeps, but model.recompute=none computes nothing "
            "again; set model.recompute=keep_attention or full, or turn the offload off"
        )
    steps, updates = (config.sft.steps, 1) if task == "sft" else (config.grpo.steps, config.grpo.updates_per_batch)
    if optimizer.warmup_steps > steps * updates:  # a step of the optimizer is an update
        many = f" x grpo.updates_per_batch={updates}" if updates > 1 else ""
        yield f"optimizer.warmup_steps={optimizer.warmup_steps} is more than {task}.steps={steps}{many}; lower it"
    if config.data.questions_per_video > 1 and not config.data.shuffle:
        yield (
            f"data.questions_per_video={config.data.questions_per_video} arranges a shuffled order, and data.shuffle="
            "false keeps the manifest's; set data.shuffle=true or data.questions_per_video=1"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr={optimizer.min_lr:g} is more than optimizer.lr={optimizer.lr:g}; lower it"
    yield from _batch_problems(config, task, world_size=world_size)


def _vision_problems(config: RunConfig, *, model: ModelShape) -> Iterator[str]:
    for name in ("train_tower", "train_projector"):
        if model.vision is None and getattr(config.model, name):
            yield f"model.{name}=true, but model.family={config.model.family} has no vision; set it to false"


def _batch_problems(config: RunConfig, task: Task, *, world_size: int) -> Iterator[str]:
    replica = config.parallel.tp * config.parallel.cp * config.parallel.pp
    updates = config.grpo.updates_per_batch if task == "grpo" else 1
    batch = config.sft.batch_size if task == "sft" else config.grpo.batch_size
    if min(replica, updates, batch, config.data.questions_per_video) < 1 or world_size % replica:
        return
    dp = world_size // replica
    if batch % updates:
        yield (
            f"grpo.updates_per_batch={updates} does not divide grpo.batch_size={batch}; every update takes the same "
            "number of prompts: choose a divisor"
        )
    elif (batch // updates) % dp:
        share = f"{task}.batch_size={batch}" + (f" / grpo.updates_per_batch={updates}" if updates > 1 else "")
        yield (
            f"{share} is not a multiple of the {dp} replicas that {world_size} processes make; every replica takes the "
            f"same number per step: make {task}.batch_size a multiple of {updates * dp}"
        )
    elif updates > 1 and (batch // updates // dp) % config.data.questions_per_video:
        yield (
            f"data.questions_per_video={config.data.questions_per_video} does not divide the {batch // updates // dp} "
            "prompts that a replica takes for an update of grpo.updates_per_batch; choose a divisor, or 1"
        )


def _grpo_problems(config: RunConfig) -> Iterator[str]:
    weights = {str(name): weight for name, weight in config.reward.weights.items()}
    if not any(weights.values()):
        yield f"reward.weights={weights} gives every response a reward of 0; set at least one weight"
    for name, weight in weights.items():
        if not math.isfinite(weight):
            yield f"reward.weights.{name}={weight} must be a finite number"
    advantage, group = config.grpo.advantage, config.rollout.group_size
    if advantage in GROUP_RELATIVE and group < 2:
        yield (
            f"rollout.group_size={group} with grpo.advantage={advantage.name}: it compares the responses of a group, "
            "so it needs at least 2; raise rollout.group_size or use grpo.advantage=reinforce_pp"
        )
    elif group * config.grpo.batch_size < 2:
        yield f"grpo.advantage={advantage.name} compares the responses of a batch, which has one; raise grpo.batch_size"
    if config.grpo.dynamic_sampling and (group < 2 or not weights.get("accuracy")):
        yield (
            f"grpo.dynamic_sampling=true keeps groups whose accuracy varies: none with rollout.group_size={group} and "
            f"reward.weights={weights}; take groups of at least 2 and an accuracy, or turn dynamic sampling off"
        )
    if config.rollout.steps_off_policy:
        yield from off_policy_problems(config)


def _evaluation_problems(config: RunConfig, task: Task) -> Iterator[str]:
    if task in ("cache-embeddings", "check-sync"):
        return
    asked = [
        key
        for key, on in (
            ("megalong eval", task == "eval"),
            ("eval.at_start=true", config.eval.at_start),
            ("eval.at_end=true", config.eval.at_end),
            (f"eval.every={config.eval.every}", config.eval.every > 0),
        )
        if on
    ]
    if asked and config.eval.manifest is None:
        yield f"{asked[0]} needs a manifest to evaluate on: set eval.manifest"
    if asked and config.eval.num_samples > 1 and config.eval.temperature == 0:
        yield (
            f"eval.num_samples={config.eval.num_samples} with eval.temperature=0 (greedy) gives equal samples; "
            "set eval.num_samples=1 or raise eval.temperature"
        )
    if asked:
        yield from likelihood_problems(config)
