"""Parts of a checkpoint's JSON files, read with messages that name the file and the key. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Part:
    """One part's configuration and where it was found, for messages."""

    values: dict[str, Any]
    where: str

    def size(self, key: str, *, default: int | None = None) -> int:
        """A positive integer; null and absent keys take the default, if there is one."""
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or value < 1:
            found = "is absent" if self.values.get(key) is None else f"is {value!r}"
            raise ConfigError(f"{self.where}: {key} {found}, expected a positive integer")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected true or false")
        return value


def read_json(file: Path, *, asked_by: str = "model.path") -> dict[str, Any]:
    """The JSON object in a file; asked_by: the setting or key that names it. Raises ConfigError."""
    if asked_by == "model.path" and not file.parent.is_dir():
        raise ConfigError(
            f"model.path={file.parent} is no folder; expected that of a Hugging Face checkpoint on this machine, its "
            "name on the Hub is not enough: download it and set model.path to its folder"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot read ({error.strerror}); named by {asked_by}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start})") from error
    return parse_json(text, where=str(file))


def parse_json(text: str, *, where: str) -> dict[str, Any]:
    """The JSON object in a text. Raises ConfigError."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(values).__name__}")
    return values
