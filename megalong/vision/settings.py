"""How Stage 1 decodes, encodes and stores."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config.tree import VideoDecoder


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSettings:
    """Plain values of the stage."""

    tower_batch_frames: int  # frames per forward of the tower
    frozen: bool  # embeddings may be kept from step to step
    recompute: bool  # keep a trained tower's frames alone for the backward, which then runs it again
    share_frames: bool  # Stage 1: each rank of a replica encodes its share of the frames; False: every rank all of them
    embed_gpu_bytes: int
    embed_host_bytes: int
    embed_folder: str | None  # of the disk store
    embed_folder_bytes: int
    frame_store_bytes: int
    decode_workers: int
    decoder: VideoDecoder = VideoDecoder.auto
