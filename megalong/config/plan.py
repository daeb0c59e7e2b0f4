"""What a run will need, from its configuration and the model's sizes alone: layout, lengths, memory, FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megalong.config import costs
from megalong.config.errors import ConfigError
from megalong.config.load import config_yaml
from megalong.config.model_shape import ModelShape, VisionShape
from megalong.config.plan_engine import EnginePlan, bucket_memory, plan_engine, samples_by_vllm, samples_embedded
from megalong.config.plan_flops import step_flops
from megalong.config.plan_lengths import Lengths, check_prompts, lengths_of
from megalong.config.plan_videos import GIB, VideoPlan, plan_videos, sharing, video_bytes, videos_of
from megalong.config.shapes import SHIPPED_SHAPES, check_family, read_model_shape
from megalong.config.tree import Dtype, MrSpMode, Recompute, RunConfig, keeps_embeddings
from megalong.config.validate import TRAINING, Task
from megalong.config.validate_attention import a2a_ranks, takes_plain
from megalong.config.validate_rollout import vllm_problems

GPU_STORE = "embedding store (video.cache_gpu_gib)"
RUNTIME_BYTES = 6 * GIB
"""CUDA contexts of the trainer and of its decoding process, NCCL buffers, allocator slack, a sleeping sampler; a CPU
process has none of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the processes are split: world_size = dp * replica, replica = tp * cp * pp."""

    world_size: int
    dp: int
    tp: int
    cp: int
    a2a: int  # of the cp ranks, those that trade rows for heads
    pp: int
    sequence_parallel: bool

    @property
    def replica(self) -> int:
        return self.tp * self.cp * self.pp

    @property
    def ring(self) -> int:
        """Of the cp ranks, those that gather keys."""
        return self.cp // self.a2a


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Memory in bytes on a process of the fullest pipeline stage, FLOPs of one step over all processes, by part."""

    task: Task
    config_text: str
    note: str  # "" or where the model's sizes come from, and what is not planned
    layout: Layout
    lengths: Lengths
    batch_size: int
    memory: dict[str, int]
    stages: tuple[int, ...]  # bytes in total on a process of each pipeline stage
    videos: VideoPlan | None  # None: no vision
    host_activations: int  # bytes of pinned host memory for offloaded activations, per process
    host_states: int  # bytes of pinned host memory for offloaded optimizer states, on the process that has most
    flops: dict[str, int]
    engine: EnginePlan | None  # None: no vLLM engine
    flops_repeated: int  # the same step with every response carrying its own prompt
    timeout_minutes: float  # parallel.timeout_minutes

    @property
    def memory_total(self) -> int:
        return sum(self.memory.values())

    @property
    def flops_total(self) -> int:
        return sum(self.flops.values())


def shape_for_planning(config: RunConfig) -> tuple[ModelShape, str]:
    """Sizes of model.path, or those that ship for the family when that folder does not exist, and a note that says so.

    Only a configuration with gpus > 0 is planned with the shipped sizes: a CPU run is never of such a model.
    """
    path, family = Path(config.model.path), config.model.family
    check_family(family)
    if path.exists():
        return read_model_shape(path, family=family, video=config.video), ""
    if not config.gpus:
        raise ConfigError(f"model.path={path} does not exist; make or fetch the checkpoint, or set model.path")
    folder = SHIPPED_SHAPES.get(family)
    if folder is None or not folder.is_dir():
        raise ConfigError(f"model.path={path} does not exist, and no sizes of {family} ship; set model.path")
    shipped = folder.relative_to(folder.parents[2])
    note = f"model.path={path} does not exist: planned with the sizes in {shipped}"
    return read_model_shape(folder, family=family, video=config.video), note


def planned_processes(config: RunConfig) -> int:
    """Processes to plan for: `gpus`, or those of one replica when it is 0."""
    parallel = config.parallel
    return config.gpus or parallel.tp * parallel.cp * parallel.pp


def check_engine(config: RunConfig, task: Task, shape: ModelShape) -> None:
    """Raise ConfigError where rollout.engine=auto will take vLLM, and that cannot sample for the run."""
    if not samples_by_vllm(config, task):
        return
    problems = list(
        vllm_problems(
            config, training=task in ("grpo", "check-sync"), world_size=planned_processes(config), model=shape
        )
    )
    if problems:
        raise ConfigError(problems)


def plan(config: RunConfig, task: Task, shape: ModelShape, *, note: str = "") -> Plan:
    """Work out the plan of a configuration that `validate` accepts."""
    layout = _layout(config, task, shape)
    lengths = lengths_of(config, task, shape, dp=layout.dp, cp=layout.cp)
    check = check_prompts(config.parallel) * layout.dp
    batch_size = {"sft": config.sft.batch_size, "grpo": config.grpo.batch_size, "check-sync": check}.get(task, 1)
    stages = [_memory(config, task, shape, layout=layout, lengths=lengths, stage=stage) for stage in range(layout.pp)]
    totals = tuple(sum(memory.values()) for memory in stages)
    together = sharing(config, task) if shape.vision else 1
    videos = min(batch_size, layout.dp * videos_of(-(-batch_size // layout.dp), together=together))
    flops_of = partial(step_flops, config, task, shape, lengths=lengths, batch_size=batch_size, videos=videos)
    return Plan(
        task=task,
        config_text=config_yaml(config),
        note=note,
        layout=layout,
        lengths=lengths,
        batch_size=batch_size,
        memory=max(stages, key=lambda memory: sum(memory.values())),
        stages=totals,
        videos=_videos(config, task, shape, layout=layout, lengths=lengths, batch_size=batch_size),
        host_activations=_host_activations(config, shape, layout=layout, lengths=lengths) if task in TRAINING else 0,
        host_states=_host_states(config, shape, layout=layout) if task in TRAINING else 0,
        flops=flops_of(shared=not lengths.repeats),
        engine=_engine(config, task, shape, layout=layout, lengths=lengths, peak=max(totals)),
        flops_repeated=sum(flops_of(shared=False).values()),
        timeout_minutes=config.parallel.timeout_minutes,
    )


def _layout(config: RunConfig, task: Task, shape: ModelShape) -> Layout:
    parallel, world_size = config.parallel, planned_processes(config)
    if task == "cache-embeddings":  # each process has videos of its own
        return Layout(world_size=world_size, dp=world_size, tp=1, cp=1, a2a=1, pp=1, sequence_parallel=False)
    return Layout(
        world_size=world_size,
        dp=world_size // (parallel.tp * parallel.cp * parallel.pp),
        tp=parallel.tp,
        cp=parallel.cp,
        a2a=a2a_ranks(parallel, shape),
        pp=parallel.pp,
        sequence_parallel=parallel.sequence_parallel,
    )


def _videos(
    config: RunConfig, task: Task, shape: ModelShape, *, layout: Layout, lengths: Lengths, batch_size: int
) -> VideoPlan | None:
    if not shape.vision:
        return None
    prompts = config.eval.batch_prompts if task == "eval" else -(-batch_size // layout.dp)
    return plan_videos(
        config, task, shape.vision, frames=lengths.frames, element=_element(config), prompts=prompts,
        replica=layout.replica,
    )  # fmt: skip


def _memory(
    config: RunConfig, task: Task, shape: ModelShape, *, layout: Layout, lengths: Lengths, stage: int
) -> dict[str, int]:
    """Bytes on a process of a pipeline stage. S = tokens of a pack / cp; activations are an upper estimate.

    weights 2 B (bfloat16) or 4 B per parameter of the rank; the reference policy again those that are trained;
    gradients 4 B; float32 master and both moments 12 B (8 B when the weights are float32 themselves) of the parameters
    this rank owns, dealt whole over dp * cp ranks, or the pieces of them that visit when they are offloaded; the tower
    and projector whole on every rank; kept activations for every layer of the stage and S, as many times as packs are
    under way in the stage, pp on the first and one on the last, or those of two layers when they are offloaded; one
    live layer for S, and the keys of the whole pack where a ring gathers them.
    The buffer for a colocated engine's weights is counted where the run may have one (bucket_memory).
    Embeddings lie on the first stage, with sequence parallel those of S / tp rows, all of which may be vision tokens,
    and with pp > 1 those of all packs of a step; those of an evaluation, prompt by prompt, on the ranks that drive
    engines. An evaluation computes a forward only with eval.likelihood.
    """
    if task == "cache-embeddings":
        return _encoder_memory(config, task, shape, layout=layout, lengths=lengths)
    element = _element(config)
    memory = _standing_memory(config, task, shape, layout=layout, stage=stage)
    forwards = task != "eval" or config.eval.likelihood
    if shape.vision:
        of_video = video_bytes(shape.vision, frames=lengths.frames, element=element)
        of_pack = lengths.on_rank(of_video * lengths.pack // lengths.longest, cp=layout.cp)
        if layout.sequence_parallel:
            rows = -(-lengths.on_rank(lengths.pack, cp=layout.cp) // layout.tp)
            of_pack = min(of_pack, rows * shape.vision.embed_width * element)
        if task not in TRAINING:
            memory["vision embeddings of a prompt, for its engine"] = of_video
        if forwards and layout.pp == 1:
            memory["vision embeddings of a pack"] = of_pack
        elif forwards and stage == 0:
            memory["vision embeddings of all packs"] = lengths.packs * of_pack
        memory |= _tower_memory(config, task, shape.vision, layout=layout, lengths=lengths)
    if forwards:
        memory |= _activation_memory(config, task, shape, layout=layout, lengths=lengths, stage=stage)
    if samples_embedded(config, task):
        kv = costs.kv_bytes_per_token(shape, element=element)
        asked = {"eval": 1, "check-sync": check_prompts(config.parallel)}.get(task, config.grpo.batch_size // layout.dp)
        prompts = min(config.rollout.batch_prompts, asked)
        memory["embedded sampler: weights"] = element * costs.llm_params(shape)
        memory["embedded sampler: keys and values"] = kv * prompts * lengths.repeated
    return memory


def _encoder_memory(
    config: RunConfig, task: Task, shape: ModelShape, *, layout: Layout, lengths: Lengths
) -> dict[str, int]:
    """Of a process that encodes whole videos, one at a time; frames, and embeddings, are put together from parts."""
    vision, element = shape.vision, _element(config)
    of_video = lengths.frames * vision.frame_bytes + video_bytes(vision, frames=lengths.frames, element=element)
    memory = {"tower and projector weights": element * (vision.tower_params + vision.projector_params)}
    memory |= _tower_memory(config, task, vision, layout=layout, lengths=lengths)
    memory["a video's frames and embeddings, twice"] = 2 * of_video
    return memory | _fixed_memory(config, shape)


def _fixed_memory(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    memory = {}
    if shape.vision and config.video.cache_gpu_gib and keeps_embeddings(config):
        memory[GPU_STORE] = round(config.video.cache_gpu_gib * GIB)
    if config.gpus:
        memory["runtime: context, NCCL, sleeping sampler"] = RUNTIME_BYTES
    return memory


def _standing_memory(config: RunConfig, task: Task, shape: ModelShape, *, layout: Layout, stage: int) -> dict[str, int]:
    """What stays on a process between steps, and while an engine beside it samples."""
    memory = _weight_memory(config, task, shape, layout=layout, stage=stage)
    if samples_by_vllm(config, task):
        memory |= bucket_memory(config.rollout, shape, element=_element(config))
    return memory | _fixed_memory(config, shape)


def _weight_memory(config: RunConfig, task: Task, shape: ModelShape, *, layout: Layout, stage: int) -> dict[str, int]:
    """Weights, reference, gradients and optimizer states of one rank."""
    element = _element(config)
    on_rank = costs.llm_params_per_rank(shape, tp=layout.tp, pp=layout.pp, stage=stage)
    memory = {"LLM weights": element * on_rank}
    trained = _trained(config, shape, layout=layout, stage=stage)
    if vision := shape.vision:
        memory["tower and projector weights"] = element * (vision.tower_params + vision.projector_params)
    if task not in TRAINING:
        return memory
    params = sum(part for _, part in trained)
    if task == "grpo" and config.grpo.kl_coef > 0:
        memory["reference policy weights"] = element * params
    memory["gradients (float32)"] = 4 * params
    if config.optimizer.offload:
        largest = max(size for size, part in trained if part)
        memory["optimizer: pieces of offloaded states"] = costs.state_buffer_bytes(element=element, largest=largest)
    else:
        memory["optimizer: master and moments"] = _state_bytes(config, shape, layout=layout, stage=stage)
    return memory


def _trained(config: RunConfig, shape: ModelShape, *, layout: Layout, stage: int) -> list[tuple[int, int]]:
    """(largest parameter, parameters) of the LLM, tower and projector on a rank; no parameters where frozen."""
    on_rank = costs.llm_params_per_rank(shape, tp=layout.tp, pp=layout.pp, stage=stage)
    # The embedding or the head; on a stage between them gate and up projection are the largest.
    largest = costs.head_params(shape) if stage in (0, layout.pp - 1) else 2 * shape.hidden * shape.ffn
    trained = [(largest // layout.tp, on_rank if config.model.train_llm else 0)]
    if vision := shape.vision:
        trained += [
            (vision.largest_tower_param, vision.tower_params if config.model.train_tower else 0),
            (vision.largest_projector_param, vision.projector_params if config.model.train_projector else 0),
        ]
    return trained


def _state_bytes(config: RunConfig, shape: ModelShape, *, layout: Layout, stage: int) -> int:
    """Optimizer states of the rank of a stage that owns most."""
    trained = _trained(config, shape, layout=layout, stage=stage)
    params, largest = sum(part for _, part in trained), max(size for size, part in trained if part)
    owned = costs.optimizer_params_per_rank(params, shards=layout.dp * layout.cp, largest=largest)
    return costs.state_bytes_per_param(element=_element(config)) * owned


def _host_states(config: RunConfig, shape: ModelShape, *, layout: Layout) -> int:
    if not config.optimizer.offload:
        return 0
    return max(_state_bytes(config, shape, layout=layout, stage=stage) for stage in range(layout.pp))


def _tower_memory(
    config: RunConfig, task: Task, vision: VisionShape, *, layout: Layout, lengths: Lengths
) -> dict[str, int]:
    """What a layer of the tower holds of a batch of frames; trained, what all of them do; and when nothing is computed
    again, of all frames of a pack that the rank encodes."""
    of_layer = vision.frame_elements * _element(config)
    batch = min(config.video.tower_batch_frames, lengths.frames)
    if task not in TRAINING or not config.model.train_tower:
        return {"tower on one batch of frames": batch * of_layer}
    if config.model.recompute is not Recompute.none:
        return {"trained tower on one batch of frames": batch * of_layer * vision.tower_layers}
    frames = -(-lengths.frames * lengths.pack // lengths.longest) * (lengths.packs if layout.pp > 1 else 1)
    if config.mr_sp.mode is not MrSpMode.none:
        # Where sequences are whole, the frames of all context-parallel ranks' packs are shared out together.
        frames = -(-frames * (1 if lengths.sharded else layout.cp) // layout.replica)
    return {"trained tower on a pack's frames": frames * of_layer * vision.tower_layers}


def _activation_memory(
    config: RunConfig, task: Task, shape: ModelShape, *, layout: Layout, lengths: Lengths, stage: int
) -> dict[str, int]:
    """Of a forward and backward; of eval.likelihood and check-sync a forward, which holds half of a layer and keeps
    nothing."""
    tokens, element, model = lengths.on_rank(lengths.pack, cp=layout.cp), _element(config), config.model
    live = costs.live_bytes_per_token(shape, element=element, tp=layout.tp, sequence_parallel=layout.sequence_parallel)
    mlp = costs.mlp_bytes_per_row(shape, element=element, tp=layout.tp)
    slices = costs.mlp_slices(tokens, chunks=model.mlp_chunks, recompute=model.recompute is not Recompute.none)
    if task not in TRAINING:
        live, mlp = live // 2, mlp // 2
        forward = "one layer of eval.likelihood" if task == "eval" else "one layer of the trainer's forward"
        memory = {f"{forward}, without its MLP": live * tokens}
    else:
        of_layer, layers = _kept_activations(config, shape, layout=layout, lengths=lengths, stage=stage)
        layers = min(layers, costs.OFFLOAD_DEVICE_LAYERS) if model.offload_activations else layers
        memory = {
            f"kept activations (recompute {model.recompute.name})": of_layer * layers,
            "one layer in backward, without its MLP": live * tokens,
        }
    if lengths.sharded and layout.ring > 1:
        of_token = costs.gathered_bytes_per_token(
            shape, element=element, tp=layout.tp, a2a=layout.a2a, train=task in TRAINING
        )
        memory[f"its keys gathered over a ring of {layout.ring}"] = of_token * lengths.pack
    if takes_plain(config):
        ring, a2a = (layout.ring, layout.a2a) if lengths.sharded else (1, 1)
        pairs = lengths.longest_call(ring=ring)
        memory["its scores (plain attention)"] = costs.score_bytes(shape, tp=layout.tp, a2a=a2a, pairs=pairs)
    memory[f"its MLP in {slices} slice(s)"] = mlp * -(-tokens // slices)
    if stage == layout.pp - 1:
        rows = max(lengths.copies_per_pack, lengths.questions) * lengths.responses * lengths.response
        trains = task in TRAINING and model.train_llm
        memory["logits of a chunk of rows"] = costs.logits_bytes(shape, tp=layout.tp, rows=rows, train=trains)
    return memory


def _kept_activations(
    config: RunConfig, shape: ModelShape, *, layout: Layout, lengths: Lengths, stage: int
) -> tuple[int, int]:
    """Bytes that a layer keeps of a pack on a process of the stage, and how many layers and packs of it do."""
    kept = costs.kept_bytes_per_token(
        shape, element=_element(config), tp=layout.tp, sequence_parallel=layout.sequence_parallel,
        recompute=config.model.recompute, sliced_mlp=config.model.mlp_chunks > 1,
    )  # fmt: skip
    under_way = min(layout.pp - stage, lengths.packs)
    return kept * lengths.on_rank(lengths.pack, cp=layout.cp), shape.layers // layout.pp * under_way


def _host_activations(config: RunConfig, shape: ModelShape, *, layout: Layout, lengths: Lengths) -> int:
    """Bytes of kept activations in the host memory of a process of the first stage, which keeps most."""
    if not config.model.offload_activations:
        return 0
    of_layer, layers = _kept_activations(config, shape, layout=layout, lengths=lengths, stage=0)
    return of_layer * layers


def _element(config: RunConfig) -> int:
    return 4 if config.model.dtype is Dtype.float32 else 2


def _engine(
    config: RunConfig, task: Task, shape: ModelShape, *, layout: Layout, lengths: Lengths, peak: int
) -> EnginePlan | None:
    """The vLLM engine of a run on GPUs, beside what the fullest pipeline stage keeps, or takes when it never sleeps."""
    if not samples_by_vllm(config, task):
        return None
    of_stages = (_standing_memory(config, task, shape, layout=layout, stage=stage) for stage in range(layout.pp))
    kept = max(sum(memory.values()) for memory in of_stages)
    return plan_engine(
        config.rollout, shape, prompt=lengths.prompt, response=lengths.response, group=lengths.group,
        element=_element(config), processes=layout.world_size, trainer=kept if config.rollout.sleep else peak,
    )  # fmt: skip
