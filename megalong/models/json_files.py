"""Reading a checkpoint folder's JSON: every error names the file and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalong.models.errors import CheckpointError


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: file not found; the checkpoint needs it (set model.path)")
    return parse_json(path.read_text(encoding="utf-8"), where=str(path))


def parse_json(text: str, *, where: str) -> dict[str, Any]:
    """The JSON object in a text. Raises CheckpointError."""
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(loaded).__name__}")
    return loaded


def require_sizes(values: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raise CheckpointError unless every key is there and a positive integer."""
    for key in keys:
        if key not in values:
            raise CheckpointError(f"{where}: key {key!r} is missing")
        if type(values[key]) is not int or values[key] < 1:
            raise CheckpointError(f"{where}: {key} is {values[key]!r}, expected a positive integer")
