"""Names of tensors in checkpoint files: one spelling of what different versions of transformers wrote differently."""

from __future__ import annotations

SPELLINGS = (
    # SigLIP in LongVILA's layout, before and after transformers 5.20.
    ("vision_tower/vision_model.", "vision_tower/"),
    # Qwen2.5-VL: the modules' names of transformers from 4.52 on, the files' names of published checkpoints.
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
)


def canonical(full_name: str) -> str:
    """`<folder>/<name>`, or `<name>` in a stock checkpoint, in the one spelling that names are compared in."""
    for written, ours in SPELLINGS:
        if full_name.startswith(written):
            return ours + full_name.removeprefix(written)
    return full_name
