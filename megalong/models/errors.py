"""The one exception for what a model folder or a training checkpoint holds."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used: which file, which key or tensor, and what was expected."""
