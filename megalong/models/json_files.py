"""Reading a checkpoint folder's JSON: every error names the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalong.config.errors import ConfigError
from megalong.config.json_part import read_json
from megalong.models.errors import CheckpointError


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        return read_json(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def require_sizes(values: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raise CheckpointError unless every key is there and a positive integer."""
    for key in keys:
        if key not in values:
            raise CheckpointError(f"{where}: key {key!r} is missing")
        if type(values[key]) is not int or values[key] < 1:
            raise CheckpointError(f"{where}: {key} is {values[key]!r}, expected a positive integer")
