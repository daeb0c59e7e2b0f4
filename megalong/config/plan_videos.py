"""What the videos of a step take in the stores of decoded frames and of embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalong.config.model_shape import VisionShape
from megalong.config.plan_engine import placements
from megalong.config.tree import EnginePlacement, MrSpMode, RunConfig, keeps_embeddings
from megalong.config.validate import TRAINING, Task

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPlan:
    """Bytes, per process unless said. A step's are of its longest videos, when `sharing` samples share each."""

    sharing: int  # data.questions_per_video, of training
    embeddings: int  # of one video, over all ranks of a replica
    handover: int  # of those of the prompts that a replica's vLLM engines are given at a time
    host_store: int  # host memory that the embedding store may fill; 0: nothing is kept
    gpu_store: int  # GPU memory that it may fill before that
    step_store: int  # of both, what a step needs
    disk_store: int  # disk that video.cache_dir may fill, for all processes; 0: there is none
    frame_store: int  # host memory that decoded frames may fill
    step_frames: int  # what all frames of a step take: they are decoded ahead as far as there is room
    least_frames: int  # what must have room

    @property
    def store_fits(self) -> bool:
        return self.step_store <= self.host_store + self.gpu_store

    @property
    def frames_fit(self) -> bool:
        return self.least_frames <= self.frame_store


def video_bytes(vision: VisionShape, *, frames: int, element: int) -> int:
    """Of the embeddings of one video."""
    return frames * vision.embeds_per_frame * vision.embed_width * element


def sharing(config: RunConfig, task: Task) -> int:
    """Samples of a step that share a video, where every video has data.questions_per_video of them."""
    return config.data.questions_per_video if task in TRAINING else 1


def videos_of(prompts: int, *, together: int) -> int:
    """Most videos that a share of so many prompts is about. Shares begin at multiples of their size, and videos, of
    which each has `together` prompts, at multiples of that."""
    return -(-(prompts + together - math.gcd(prompts, together)) // together)


def _handed_over(config: RunConfig, *, prompts: int, together: int, replica: int) -> int:
    """Videos that the engines of a replica are given, at most: again where equal shares part a video's prompts."""
    rollout = config.rollout
    engines = {
        EnginePlacement.disaggregated: rollout.engines_per_node,
        EnginePlacement.colocated: max(1, replica // rollout.engine_tp),
    }
    most = max(engines[placement] for placement in placements(rollout))
    parted = videos_of(prompts, together=together) + most - 1
    if prompts % most == 0:
        parted = min(parted, most * videos_of(prompts // most, together=together))
    return min(prompts, parted)


def plan_videos(
    config: RunConfig, task: Task, vision: VisionShape, *, frames: int, element: int, prompts: int, replica: int
) -> VideoPlan:
    """prompts: of a replica, whose videos are in memory at a time. frames: of the longest video."""
    together = sharing(config, task)
    videos = videos_of(prompts, together=together)
    handed_over = _handed_over(config, prompts=prompts, together=together, replica=replica)
    embeddings = video_bytes(vision, frames=frames, element=element)
    kept = keeps_embeddings(config)
    # Videos of a step stay in memory, and those of the step that is being sampled for.
    batches = 1 + config.rollout.steps_off_policy if task == "grpo" else 1
    # Where nothing is shared every rank decodes all frames.
    sharers = 1 if config.mr_sp.mode is MrSpMode.none else replica
    of_rank = -(-frames // vision.frames_per_step // sharers) * vision.frames_per_step * vision.frame_bytes
    # Pinned host memory comes in powers of two.
    share = 1 << (-(-embeddings // replica) - 1).bit_length()
    return VideoPlan(
        sharing=together,
        embeddings=embeddings,
        handover=0 if task in ("sft", "cache-embeddings") else embeddings * handed_over,
        host_store=round(config.video.cache_gib * GIB) if kept else 0,
        gpu_store=round(config.video.cache_gpu_gib * GIB) if kept else 0,
        step_store=batches * videos * share if kept else 0,
        disk_store=round(config.video.cache_dir_gib * GIB) if kept and config.video.cache_dir else 0,
        frame_store=round(config.video.frame_cache_gib * GIB),
        step_frames=videos * of_rank,
        # Where embeddings are kept, frames are let go as they are encoded.
        least_frames=of_rank if kept else batches * videos * of_rank,
    )
