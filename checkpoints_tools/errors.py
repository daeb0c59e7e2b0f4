"""The one error of the checkpoint tools: a folder, file or tensor that cannot be used, and why."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 8


class ConvertError(ValueError):
    """A checkpoint that cannot be converted or read; the message names tensor and file."""


def raise_all(problems: Sequence[str]) -> None:
    """Raise one ConvertError for all problems found, the first few in full; nothing when there are none."""
    if problems:
        rest = len(problems) - SHOWN
        more = [f"... and {rest} more problems"] if rest > 0 else []
        raise ConvertError("\n".join([*problems[:SHOWN], *more]))
