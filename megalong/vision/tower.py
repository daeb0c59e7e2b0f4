"""The vision tower on decoded frames, a few at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalong.records import FrameSelection
from megalong.vision.settings import VisionSettings


def run_tower(encoder: nn.Module, frames_FHWC: Tensor, settings: VisionSettings, *, step: int) -> Tensor:
    """[F / step * tokens per step, D'] of frames of one size, settings.tower_batch_frames at a time.

    step: frames that the tower takes together. settings.recompute: what a batch computes is computed again in its
    backward.
    """
    batch = max(step, settings.tower_batch_frames // step * step)
    again = settings.recompute and torch.is_grad_enabled()
    run = partial(checkpoint, encoder, use_reentrant=False) if again else encoder
    return torch.cat([run(part) for part in frames_FHWC.split(batch)]).flatten(0, 1)


def encode_nothing(encoder: nn.Module, selection: FrameSelection, *, step: int) -> Tensor:
    """[0, D']: a blank step of which nothing is kept. The tower takes no empty batch, and the embeddings must need a
    gradient here when they do on the other ranks, which meet this one in the collectives of the backward."""
    device = next(encoder.parameters()).device
    blank_FHWC = torch.zeros((step, selection.height, selection.width, 3), dtype=torch.uint8, device=device)
    return encoder(blank_FHWC).flatten(0, 1)[:0]
