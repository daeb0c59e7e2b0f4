"""Vision side of qwen2_5_vl: transformers' windowed tower and merger, on frames of any size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megalong.models.json_files import load_json
from megalong.models.qwen2_5_vl.pixels import patches
from megalong.models.qwen2_5_vl.spec import Qwen25VlSpec


class VisionEncoder(nn.Module):
    """uint8 frames to LLM-space embeddings, one row of them per step of frames_per_step frames.

    Attention, windowed and full, stays inside a step: frames can be split over ranks at any step.
    """

    def __init__(self, spec: Qwen25VlSpec) -> None:
        super().__init__()
        self.tower, self.rule = spec.tower, spec.video
        self.settings = f"qwen2_5_vl {spec.tower} {spec.video.mean} {spec.video.std} {written_vision_config(spec.path)}"
        config = Qwen2_5_VLConfig.from_pretrained(spec.path).vision_config
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)

    @property
    def projector(self) -> nn.Module:
        """What stands between the tower's blocks and the LLM."""
        return self.visual.merger

    def forward(self, frames_FHWC: Tensor) -> Tensor:
        """frames_FHWC: [F, H, W, 3] uint8 RGB, H and W multiples of spec.tower.block; an odd last frame counts twice.

        Returns [steps, H/block * W/block, D] in the parameters' dtype.
        """
        tower = self.tower
        rows = patches(frames_FHWC, rule=self.rule, tower=tower)
        steps = -(-len(frames_FHWC) // tower.frames_per_step)
        height, width = (side // tower.patch_size for side in frames_FHWC.shape[1:3])
        grid_13 = torch.tensor([[steps, height, width]], device=frames_FHWC.device)
        embeds_ND = self.visual(rows.to(self.visual.dtype), grid_thw=grid_13).pooler_output
        return embeds_ND.reshape(steps, -1, embeds_ND.shape[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return keep_float32_buffers(self, lambda: super(VisionEncoder, self)._apply(fn, recurse))


def written_vision_config(path: Path) -> str:
    """What config.json says about the tower, in one spelling."""
    return json.dumps(load_json(path / "config.json")["vision_config"], sort_keys=True)


def keep_float32_buffers(module: nn.Module, change: Callable[[], nn.Module]) -> nn.Module:
    """Run `change` (a cast or a move of `module`), and give its float32 buffers back their values.

    The buffers are rotary frequencies: cast to bfloat16 with the weights, they would turn by wrong angles.
    """
    before = {name: buffer for name, buffer in module.named_buffers() if buffer.dtype == torch.float32}
    changed = change()
    for name, buffer in before.items():
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        setattr(holder, last, buffer.to(getattr(holder, last).device))
    return changed
