"""The typed config tree. Defaults live here and nowhere else; YAML recipes and `a.b=c` override them.

Imports no torch: `megalong plan` runs on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Dtype(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class LayerSpec(Enum):
    auto = "auto"  # te on a GPU, local on a CPU
    local = "local"
    te = "te"


class AttentionKernel(Enum):
    auto = "auto"  # the fastest that takes the device and dtype, and is correct there
    plain = "plain"
    cpu_flash = "cpu_flash"
    flash = "flash"  # FlashAttention-2 as torch ships it
    cudnn = "cudnn"  # as torch calls it
    flash_attn_2 = "flash_attn_2"  # the package flash-attn
    flash_attn_3 = "flash_attn_3"  # the package flash-attn-3
    flash_attn_4 = "flash_attn_4"  # the package flash-attn-4
    te = "te"  # Transformer Engine's cuDNN attention, for sequences that stand alone


class Recompute(Enum):
    none = "none"
    keep_attention = "keep_attention"  # attention outputs stay, the rest of each layer is computed again
    full = "full"


MrSpMode = Enum(
    "MrSpMode",
    {
        "none": "none",  # every response a sequence of its own on one rank, videos encoded anew in every pass
        "stage1": "stage1",  # frames shared out and embeddings reused; sequences whole, dealt to the cp ranks
        "stage1+2": "stage1+2",  # the paper's MR-SP: sequences also sharded over the cp ranks
        "shared_prefix": "shared_prefix",  # the responses of a group share one prefix, sharded over the cp ranks
    },
)
SHARDED = ("stage1+2", "shared_prefix")
"""Modes in which context-parallel ranks share the tokens of a pack; in the others each has packs of its own."""


class FrameSampling(Enum):
    uniform = "uniform"
    fps = "fps"


class VideoDecoder(Enum):
    auto = "auto"  # on a GPU: nvcodec, else dali, whichever is installed, but pyav for small videos; else pyav
    pyav = "pyav"
    nvcodec = "nvcodec"  # PyNvVideoCodec on the GPU's NVDEC engines
    dali = "dali"  # DALI on the GPU's NVDEC engines


class LearningRateSchedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Aggregation(Enum):
    token = "token"  # mean over all response tokens of the global batch
    sequence = "sequence"  # mean over responses of the mean over their tokens
    constant = "constant"  # sum over tokens / (responses * max_response_tokens), as Dr.GRPO


class AdvantageKind(Enum):
    grpo = "grpo"  # (r - mean) / (std + 1e-6) within the group
    dr_grpo = "dr_grpo"  # r - mean within the group
    rloo = "rloo"  # r - mean of the others
    reinforce_pp = "reinforce_pp"  # (r - batch mean) / (batch std + 1e-6)


class RatioLevel(Enum):
    token = "token"
    sequence = "sequence"  # GSPO


class KlEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class RolloutEngine(Enum):
    auto = "auto"  # vllm on a GPU where it is installed and has the model (not for sft); embedded otherwise
    embedded = "embedded"  # transformers in the training process
    vllm = "vllm"


class EnginePlacement(Enum):
    auto = "auto"  # disaggregated where the training processes of a node leave GPUs, colocated otherwise
    disaggregated = "disaggregated"  # GPUs of their own, behind those of the training processes; weights by NCCL
    colocated = "colocated"  # the trainer's GPUs: awake to sample alone, but for rollout.sleep; weights by CUDA IPC


MEMORY_SHARE = {EnginePlacement.disaggregated: 0.9, EnginePlacement.colocated: 0.4}
"""rollout.memory_share=0: of a GPU of the engine's own, of one that the trainer works on."""


@dataclass
class ModelConfig:
    family: str = "longvila"
    path: str = MISSING
    """Hugging Face checkpoint folder (for longvila: config.json, llm/, vision_tower/, mm_projector/; for the others a
    stock one: config.json, tokenizer and safetensors side by side)."""
    init_from: str | None = None
    """Megatron checkpoint folder whose weights replace those of `path` (for example SFT's, before GRPO)."""
    dtype: Dtype = Dtype.bfloat16
    layer_spec: LayerSpec = LayerSpec.auto
    attention: AttentionKernel = AttentionKernel.auto
    recompute: Recompute = Recompute.keep_attention
    mlp_chunks: int = 0
    """Slices of rows in which each layer's MLP runs, to be computed again one by one in the backward. 1: whole. 0: of
    at most 16,384 rows, or whole with recompute=none."""
    offload_activations: bool = False
    """What recomputation keeps of a pack (layer inputs, and attention outputs) waits for its backward in pinned host
    memory. Needs a GPU, and recompute=keep_attention or full."""
    train_llm: bool = True
    train_projector: bool = False
    train_tower: bool = False
    """Unless recompute=none, the backward runs the tower again, video.tower_batch_frames at a time."""


@dataclass
class ParallelConfig:
    tp: int = 1
    cp: int = 1
    pp: int = 1
    cp_a2a: int = 0
    """Of the cp ranks, how many trade rows for heads; the others gather keys. 0: as many as key-value heads allow."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence (needs tp > 1)."""
    timeout_minutes: float = 30
    """A phase (start, data, rollout, train, checkpoint, a batch of an evaluation ..) that lasts longer is stuck: the
    process writes its stacks and ends. Collectives wait 5 minutes more. 0: no limit."""


@dataclass
class MrSpConfig:
    mode: MrSpMode = MrSpMode.shared_prefix
    """What a training pass shares. All modes give the same loss and gradients; the others are there to compare with."""


@dataclass
class VideoConfig:
    sampling: FrameSampling = FrameSampling.uniform
    num_frames: int = 256
    """uniform: this many frames, or all of a shorter file."""
    fps: float = 2.0
    """fps: one frame every 1/fps seconds..."""
    max_frames: int = 8192
    """...and at most this many, then spread uniformly."""
    max_frame_pixels: int = 0
    """Most pixels of a frame, for families whose frames keep their shape; 0: what the checkpoint's processor says."""
    max_video_tokens: int = 0
    """Most vision tokens of a video, shared out evenly over its frames (each has one at least), for the same families.
    0: what the checkpoint's processor allows (of 3,600 frames Qwen2.5-VL's allows 115,200, 32 a frame)."""
    decoder: VideoDecoder = VideoDecoder.auto
    """What decodes; a file that the GPU does not take is decoded by PyAV, logged and counted. Not counted are the small
    videos that auto leaves to PyAV: those of which, from the keyframe of each group of pictures to its last chosen
    frame, at most 32 million pixels must be decoded (15 frames of 1080p, 416 of 320 x 240)."""
    tower_batch_frames: int = 64
    """Frames per forward of the vision tower."""
    cache_embeddings: bool = True
    """Keep a video's embeddings between steps. Must be off when the tower or the projector is trained."""
    cache_gpu_gib: float = 0.0
    """Memory of the GPU for the embedding store; what does not fit goes to host memory. Needs a GPU."""
    cache_gib: float = 16.0
    """Host-memory budget of the embedding store, pinned on a GPU; the least recently used go first, to cache_dir."""
    cache_dir: str | None = None
    """Folder of embeddings on disk, for any number of runs and any parallel layout: read from, and written to when host
    memory is full; `megalong cache-embeddings` fills it. Entries are found by the video's content (size, and three
    samples of a MiB), its frames and their size, the decoder (which `auto` stands for, but not its version; a file that
    it refuses is PyAV's under its name), and the tower's weights, settings and dtype. `megalong plan` says what a video
    takes; to empty it, delete the folder."""
    cache_dir_gib: float = 1024.0
    """Most of what is in cache_dir, whoever wrote it: the least recently used files go first. Each process that writes
    counts anew after every 1/64 of it. `megalong cache-embeddings` deletes nothing that it has found or made itself: it
    ends with an error when that does not fit."""
    frame_cache_gib: float = 16.0
    """Host-memory budget of decoded frames (this rank's share of each video, uint8), those decoded ahead included. It
    must hold a video's for a frozen tower, whose embeddings are kept, else a step's; with room for more, those of the
    next step are decoded while this one trains."""


@dataclass
class DataConfig:
    train: str = MISSING
    video_dir: str | None = None
    """Folder that relative video paths start from; default: the manifest's folder."""
    shuffle: bool = True
    seed: int = 1
    questions_per_video: int = 1
    """Questions about the same video that come side by side, where it has as many: the video is then decoded, encoded,
    prefilled (vLLM) and, with mr_sp.mode=shared_prefix and room in a pack, computed in training once for all. Best a
    divisor of a replica's share of the batch; with grpo.updates_per_batch, of its share of an update. 1: any order."""
    thinking: bool = True
    """Ask for <think>..</think><answer>..</answer>; false sends the bare question."""
    max_prompt_tokens: int = 131072
    max_response_tokens: int = 2048
    pack_tokens: int = 131072
    """Tokens per micro-batch; groups are packed up to this, a larger group gets a pack of its own."""
    decode_workers: int = 4
    """Threads that decode videos of this rank."""


@dataclass
class SftConfig:
    steps: int = 100
    batch_size: int = 32
    """Samples per optimizer step, over all replicas."""


@dataclass
class RolloutConfig:
    engine: RolloutEngine = RolloutEngine.auto
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    steps_off_policy: int = 0
    """0: on-policy, a step trains on responses of the weights that it starts from. 1: the engines sample for the next
    step while this one trains, so responses are of the weights of one step before. Needs vLLM beside the trainer
    (disaggregated), and grpo.tis_cap; not with grpo.dynamic_sampling, which samples until a batch is full."""
    batch_prompts: int = 8
    """Prompts that one generate call of the embedded engine takes together."""
    placement: EnginePlacement = EnginePlacement.auto
    """vllm: which GPUs its engines have."""
    engine_tp: int = 1
    """vllm: tensor-parallel GPUs of an engine."""
    engines_per_node: int = 1
    """vllm, disaggregated: engines on each node, driven by as many of its training processes. (Colocated, there
    are as many as the node's GPUs make.)"""
    memory_share: float = 0.0
    """vllm: share of a GPU's memory for weights, keys and values; 0: 0.9 disaggregated, 0.4 colocated."""
    sleep: bool = True
    """vllm, colocated: between two rollouts the engine gives its memory back, which takes some seconds of every step.
    false: it keeps rollout.memory_share of the GPUs while the trainer works, too."""
    prefill_tokens: int = 16384
    """vllm: most tokens of one step of an engine; long prompts are prefilled in pieces of this many."""
    max_sequences: int = 256
    """vllm: most responses an engine samples at a time."""
    cuda_graphs: bool = True
    """vllm: capture the decoding steps. Starting takes some seconds longer."""


@dataclass
class RewardConfig:
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 0.9, "format": 0.1})
    """Reward function name -> weight; names are keys of megalong.rewards.functions.REWARDS."""
    overlong_buffer: int = 0
    """DAPO soft penalty: from 0 to -1 over the last `overlong_buffer` tokens before the limit; 0: off."""


@dataclass
class GrpoConfig:
    steps: int = 100
    """Rollout batches. The log, checkpoint.save_every and eval.every count updates: updates_per_batch of each."""
    batch_size: int = 32
    """Prompts per rollout batch, over all replicas."""
    updates_per_batch: int = 1
    """Optimizer steps that share one rollout batch (more than 1 needs an old-logprob pass)."""
    advantage: AdvantageKind = AdvantageKind.grpo
    ratio: RatioLevel = RatioLevel.token
    clip_low: float = 0.2
    clip_high: float = 0.28
    aggregation: Aggregation = Aggregation.sequence
    kl_coef: float = 1e-2
    kl_estimator: KlEstimator = KlEstimator.k3
    dynamic_sampling: bool = False
    """DAPO: drop groups whose accuracy has no spread and refill the batch."""
    dynamic_sampling_max_batches: int = 20
    tis_cap: float = 0.0
    """Truncated importance sampling between sampler and trainer: weight min(pi_old/pi_sampler, cap); 0: off. It also
    corrects for the older weights of rollout.steps_off_policy=1."""


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    clip_grad: float = 1.0
    warmup_steps: int = 0
    schedule: LearningRateSchedule = LearningRateSchedule.constant
    min_lr: float = 0.0
    max_skipped_in_a_row: int = 5
    """Stop when this many steps in a row, or all of a shorter run, had a non-finite loss or gradient, or no sample that
    could be used."""
    offload: bool = False
    """Master copies and moments (12 bytes a parameter, 8 of a float32 one) live in pinned host memory and visit the GPU
    in pieces for each update, which gives equal bits and takes as long as the copies there, beside those back. Needs a
    GPU."""


@dataclass
class CheckpointConfig:
    save_every: int = 100
    """Steps between checkpoints; 0: only at the end and on SIGTERM."""
    keep: int = 2
    resume: bool = True
    """Continue from the latest complete checkpoint of the run folder, if there is one; false: refuse such a folder."""


@dataclass
class EvalConfig:
    manifest: str | None = None
    video_dir: str | None = None
    at_start: bool = False
    at_end: bool = False
    every: int = 0
    num_samples: int = 1
    temperature: float = 0.0
    """0: greedy."""
    batch_prompts: int = 32
    likelihood: bool = False
    """Also answer multiple-choice questions by the option the model finds the most likely: behind its own reasoning, up
    to <answer>, `X</answer>` for each letter X of the options. Any model answers that way, and one that knows nothing
    is near chance. One more forward pass over the prompts."""


@dataclass
class LoggerConfig:
    run_dir: str = MISSING
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "megalong"
    samples_per_step: int = 8
    """Rollouts written to samples.jsonl each step."""


@dataclass
class RunConfig:
    """A run: `megalong sft|grpo|eval|plan RECIPE` reads the sections it needs."""

    seed: int = 1
    gpus: int = 0
    """Processes the launch starts: set by the launch scripts, read by `megalong plan`. 0: CPU."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    mr_sp: MrSpConfig = field(default_factory=MrSpConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def keeps_embeddings(config: RunConfig) -> bool:
    """Whether a video's embeddings serve all passes of a step, and later steps; else every pass makes its own."""
    trained = config.model.train_tower or config.model.train_projector
    return config.video.cache_embeddings and config.mr_sp.mode.name != "none" and not trained
