"""The vision stage that a configuration asks for, and how it chooses frames."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalong.config.errors import ConfigError
from megalong.config.tree import Recompute, RunConfig, keeps_embeddings
from megalong.data.video import VideoIndex, select_frames
from megalong.data.video_layout import VideoLayout
from megalong.engine.build import family_of
from megalong.models.chat import ChatTokens
from megalong.parallel.layout import ParallelLayout
from megalong.records import FrameSelection
from megalong.vision.encode import VisionStage
from megalong.vision.settings import VisionSettings

logger = logging.getLogger(__name__)

GIB = 1 << 30


def check_store(config: RunConfig) -> None:
    """Raise ConfigError for an embedding store that this machine cannot have. Makes video.cache_dir."""
    video = config.video
    if video.cache_gpu_gib and not torch.cuda.is_available():
        raise ConfigError(f"video.cache_gpu_gib={video.cache_gpu_gib:g} needs a GPU; set it to 0")
    if video.cache_dir is not None:
        try:
            Path(video.cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"video.cache_dir={video.cache_dir} cannot be made: {error.strerror}") from error


def open_vision(
    config: RunConfig, layout: ParallelLayout, encoder: nn.Module | None, *, spec: Any, tokens: ChatTokens
) -> VisionStage:
    """The vision stage of the encoder (None without vision), which has its weights already."""
    family = family_of(config.model)
    videos = None if family.vision is None else family.vision.layout(spec, tokens, config.video)
    vision = VisionStage(encoder, layout, vision_settings(config), videos=videos)
    if encoder is not None:
        logger.info("videos are decoded by %s (video.decoder=%s)", vision.decoder.settings, config.video.decoder.name)
    return vision


def vision_settings(config: RunConfig) -> VisionSettings:
    video = config.video
    return VisionSettings(
        tower_batch_frames=video.tower_batch_frames,
        frozen=keeps_embeddings(config),
        recompute=config.model.train_tower and config.model.recompute is not Recompute.none,
        share_frames=config.mr_sp.mode.name != "none",
        embed_gpu_bytes=int(video.cache_gpu_gib * GIB),
        embed_host_bytes=int(video.cache_gib * GIB),
        embed_folder=video.cache_dir,
        embed_folder_bytes=int(video.cache_dir_gib * GIB),
        frame_store_bytes=int(video.frame_cache_gib * GIB),
        decode_workers=config.data.decode_workers,
        decoder=video.decoder,
    )


def frame_chooser(config: RunConfig, videos: VideoLayout) -> Callable[[VideoIndex], FrameSelection]:
    """What chooses the frames of a file."""
    video = config.video
    return partial(
        select_frames,
        sampling=video.sampling,
        num_frames=video.num_frames,
        fps=video.fps,
        max_frames=video.max_frames,
        layout=videos,
    )
