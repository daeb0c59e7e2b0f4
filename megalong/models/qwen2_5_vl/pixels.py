"""Pixels of the Qwen-VL families: sizes of frames, normalisation and the order of patches, as the stock processors.

Source: Qwen2VLImageProcessor, Qwen2VLVideoProcessor and Qwen3VLVideoProcessor of transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalong.config.qwen_vl_shape import PixelRule, TowerShape

MAX_ASPECT_RATIO = 200


def fit_to_pixels(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) near the given one, both multiples of factor, height * width within the limits where possible.

    Raises ValueError when one side is more than 200 times the other.
    """
    _check_aspect(height, width)
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


def fit_video_to_pixels(
    size: tuple[int, int, int], *, factor: int, frames_per_step: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The same for a video as a whole (Qwen3-VL): size is (frames, height, width), the limits are of all frames.

    Raises ValueError when one side is more than 200 times the other.
    """
    num_frames, height, width = size
    if min(height, width) < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
    _check_aspect(height, width)
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    counted = round(num_frames / frames_per_step) * frames_per_step
    if counted * tall * wide > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif counted * tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def _check_aspect(height: int, width: int) -> None:
    longer, shorter = max(height, width), min(height, width)
    if longer > MAX_ASPECT_RATIO * shorter:
        raise ValueError(f"a picture of {height} x {width} pixels: one side is over {MAX_ASPECT_RATIO} times the other")


def patches(frames_FHWC: Tensor, *, rule: PixelRule, tower: TowerShape) -> Tensor:
    """Normalised patches [steps * H/patch * W/patch, 3 * frames_per_step * patch^2] float32 of uint8 frames.

    Rows: step by step, blocks of merge x merge patches row by row, and the patches of a block row by row. Columns:
    channel, frame of the step, pixel row, pixel column. The last frame is repeated to fill its step.
    """
    per_step, patch, merge = tower.frames_per_step, tower.patch_size, tower.merge_size
    missing = -len(frames_FHWC) % per_step
    if missing:
        frames_FHWC = torch.cat((frames_FHWC, frames_FHWC[-1:].expand(missing, -1, -1, -1)))
    frames, height, width, channels = frames_FHWC.shape
    if height % tower.block or width % tower.block:
        raise ValueError(f"frames of {height} x {width} pixels, expected multiples of {tower.block}")
    # Rescale and normalisation in one step, which is how the processors round.
    mean_3 = torch.tensor(rule.mean, device=frames_FHWC.device) * 255
    std_3 = torch.tensor(rule.std, device=frames_FHWC.device) * 255
    pixels_FHWC = (frames_FHWC.float() - mean_3) / std_3
    tiles = pixels_FHWC.reshape(
        frames // per_step, per_step, height // tower.block, merge, patch, width // tower.block, merge, patch, channels
    )
    return tiles.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(
        frames // per_step * (height // patch) * (width // patch), channels * per_step * patch**2
    )
