"""Pixels of the Qwen-VL families: sizes of frames, normalisation and the order of patches, as the stock processors.

Source: Qwen2VLImageProcessor, Qwen2VLVideoProcessor and Qwen3VLVideoProcessor of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelLimits:
    """What a processor's JSON says about the pixels of a picture or a video."""

    min_pixels: int  # `size.shortest_edge`, or min_pixels in older files
    max_pixels: int  # `size.longest_edge`, or max_pixels in older files
    mean: tuple[float, float, float]  # of the three channels, pixels in 0..1
    std: tuple[float, float, float]


def fit_to_pixels(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) near the given one, both multiples of factor, height * width within the limits where possible.

    Raises ValueError when one side is more than 200 times the other.
    """
    longer, shorter = max(height, width), min(height, width)
    if longer > MAX_ASPECT_RATIO * shorter:
        raise ValueError(f"a picture of {height} x {width} pixels: one side is over {MAX_ASPECT_RATIO} times the other")
    # Python rounds halves to even, and the stock processors do the same.
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def patches(
    frames_FHWC: Tensor, *, limits: PixelLimits, patch_size: int, merge_size: int, frames_per_step: int
) -> Tensor:
    """Normalised patches [steps * H/patch * W/patch, 3 * frames_per_step * patch^2] float32 of uint8 frames.

    Rows: step by step, blocks of merge x merge patches row by row, and the patches of a block row by row. Columns:
    channel, frame of the step, pixel row, pixel column. An odd last frame is repeated to fill its step.
    """
    missing = -len(frames_FHWC) % frames_per_step
    if missing:
        frames_FHWC = torch.cat((frames_FHWC, frames_FHWC[-1:].expand(missing, -1, -1, -1)))
    frames, height, width, channels = frames_FHWC.shape
    block = patch_size * merge_size
    if height % block or width % block:
        raise ValueError(f"frames of {height} x {width} pixels, expected multiples of {block}")
    # Rescale and normalisation in one step, which is how the processors round.
    mean_3 = torch.tensor(limits.mean, device=frames_FHWC.device) * 255
    std_3 = torch.tensor(limits.std, device=frames_FHWC.device) * 255
    pixels_FHWC = (frames_FHWC.float() - mean_3) / std_3
    tiles = pixels_FHWC.reshape(
        frames // frames_per_step, frames_per_step,
        height // block, merge_size, patch_size,
        width // block, merge_size, patch_size, channels,
    )  # fmt: skip
    return tiles.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(
        frames // frames_per_step * (height // patch_size) * (width // patch_size),
        channels * frames_per_step * patch_size * patch_size,
    )
