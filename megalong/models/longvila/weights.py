"""The weight table of longvila. Hugging Face names are `<folder>/<tensor name in that folder's files>`."""

from __future__ import annotations

from megalong.models.longvila.spec import LongVilaSpec
from megalong.models.longvila.tower import VisionEncoder
from megalong.models.weights import Entry, Replicated, decoder_table

LLM, TOWER, PROJECTOR = "llm/", "vision_tower/", "mm_projector/"


def weight_table(spec: LongVilaSpec, vision: VisionEncoder, *, use_te: bool) -> list[Entry]:
    """Every tensor of the model, LLM first. Tower and projector are replicated over tensor-parallel ranks."""
    table = decoder_table(
        spec.gpt, use_te=use_te, megatron_prefix="llm.", hf_prefix=f"{LLM}model.", head_name=f"{LLM}lm_head.weight"
    )
    for name in vision.state_dict():
        folder, inner = TOWER, f"vision_model.{name}"
        if name.startswith("projector."):
            folder, inner = PROJECTOR, name.removeprefix("projector.")
        table.append(Replicated(megatron=f"vision.{name}", hf=(folder + inner,)))
    return table
