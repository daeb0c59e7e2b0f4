"""Sizes of a LongVILA-layout checkpoint, read from its JSON files alone: no torch, no weights, none of its code."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.config.errors import ConfigError

SHIPPED_SHAPE = Path(__file__).parents[2] / "launch" / "shapes" / "longvila_7b"
"""JSON-only folder with the sizes of LongVILA-R1-7B, for planning without a checkpoint."""

DOWNSAMPLE_OF_PROJECTOR = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of the LLM, the vision tower and the projector; counts unless said."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    """Rows of the embedding in the checkpoint."""
    tied: bool
    rope_theta: float
    max_positions: int
    vision_hidden: int
    vision_layers: int
    """Layers in the checkpoint; `vision_layers_run` are run."""
    vision_heads: int
    vision_ffn: int
    image_size: int
    """Pixels, square."""
    patch_size: int
    select_layer: int
    """Negative index into the tower's hidden states (0 is the embedding); -2 leaves the last layer out."""
    downsample: int
    """Side of the square of patches that becomes one token."""

    @property
    def patches_per_side(self) -> int:
        # The patch convolution has no padding: a last, partial patch is not seen.
        return self.image_size // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """LLM positions of one frame: the projector's tokens (an odd side is padded) and the newline."""
        return math.ceil(self.patches_per_side / self.downsample) ** 2 + 1

    @property
    def vision_layers_run(self) -> int:
        return self.vision_layers + 1 + self.select_layer


def read_model_shape(path: str | Path) -> ModelShape:
    """Read config.json, llm/, vision_tower/ and mm_projector/config.json of a LongVILA-layout folder.

    `llm_cfg` and its siblings may be a mapping (also as a JSON string), a sub-folder's name (also when
    absent), or a path on the machine that trained it, then the sub-folder of the same last name is read.
    Raises ConfigError naming the file and the key.
    """
    folder = Path(path)
    top, top_file = _read_json(folder / "config.json"), folder / "config.json"
    llm = _part(folder, top, "llm")
    tower = _part(folder, top, "vision_tower")
    projector = _part(folder, top, "mm_projector")
    heads, hidden = llm.size("num_attention_heads"), llm.size("hidden_size")
    shape = ModelShape(
        hidden=hidden,
        layers=llm.size("num_hidden_layers"),
        heads=heads,
        kv_heads=llm.size("num_key_value_heads", default=heads),
        head_dim=llm.size("head_dim", default=hidden // heads),
        ffn=llm.size("intermediate_size"),
        vocab=llm.size("vocab_size"),
        # transformers' Qwen2Config leaves the output head untied unless told; the key is written when it is tied.
        tied=llm.flag("tie_word_embeddings", default=False),
        rope_theta=_rope_theta(llm),
        max_positions=llm.size("max_position_embeddings"),
        vision_hidden=tower.size("hidden_size"),
        vision_layers=tower.size("num_hidden_layers"),
        vision_heads=tower.size("num_attention_heads"),
        vision_ffn=tower.size("intermediate_size"),
        image_size=tower.size("image_size"),
        patch_size=tower.size("patch_size"),
        select_layer=_select_layer(top, top_file),
        downsample=_downsample(projector),
    )
    _check(shape, llm=llm, tower=tower, top_file=top_file)
    return shape


@dataclass(frozen=True, slots=True)
class _Part:
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


def _part(folder: Path, top: dict[str, Any], name: str) -> _Part:
    key, top_file = f"{name}_cfg", folder / "config.json"
    given = top.get(key, name)
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = _parse(given, where=f"{top_file}: {key}")
    if isinstance(given, dict):
        # Some checkpoints leave a stub here that only points at the folder.
        if set(given) - {"model_type", "_name_or_path", "architectures"}:
            return _Part(given, f"{top_file}: {key}")
        given = given.get("_name_or_path", name)
    if not isinstance(given, str) or not given:
        raise ConfigError(f"{top_file}: {key} is {given!r}, expected a mapping, a sub-folder name or a path")
    file = folder / given / "config.json"
    if Path(given).is_absolute() or not file.is_file():
        file = folder / Path(given).name / "config.json"
    return _Part(_read_json(file, asked_by=f"{top_file}: {key}={given!r}"), str(file))


def _read_json(file: Path, *, asked_by: str = "model.path") -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot read ({error.strerror}); named by {asked_by}") from error
    return _parse(text, where=str(file))


def _parse(text: str, *, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(values).__name__}")
    return values


def _rope_theta(llm: _Part) -> float:
    """Flat in files of transformers 4, inside rope_parameters since transformers 5; never guessed."""
    nested = llm.values.get("rope_parameters")
    nested = nested if isinstance(nested, dict) else {}
    theta = llm.values.get("rope_theta", nested.get("rope_theta"))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ConfigError(
            f"{llm.where}: rope_theta (or rope_parameters.rope_theta) is {theta!r}, expected a number > 0"
        )
    return float(theta)


def _select_layer(top: dict[str, Any], top_file: Path) -> int:
    value = top.get("mm_vision_select_layer")
    if type(value) is not int or value >= 0:
        raise ConfigError(f"{top_file}: mm_vision_select_layer is {value!r}, expected a negative integer such as -2")
    return value


def _downsample(projector: _Part) -> int:
    kind = projector.values.get("mm_projector_type")
    if kind not in DOWNSAMPLE_OF_PROJECTOR:
        known = ", ".join(DOWNSAMPLE_OF_PROJECTOR)
        raise ConfigError(f"{projector.where}: mm_projector_type is {kind!r}, expected one of {known}")
    return DOWNSAMPLE_OF_PROJECTOR[kind]


def _check(shape: ModelShape, *, llm: _Part, tower: _Part, top_file: Path) -> None:
    problems = []
    if shape.heads % shape.kv_heads:
        problems.append(
            f"{llm.where}: num_attention_heads={shape.heads} is not a multiple of num_key_value_heads={shape.kv_heads}"
        )
    if shape.image_size < shape.patch_size:
        problems.append(f"{tower.where}: image_size={shape.image_size} is smaller than patch_size={shape.patch_size}")
    if shape.vision_layers_run < 1:
        problems.append(
            f"{top_file}: mm_vision_select_layer={shape.select_layer} leaves no layer of the tower's "
            f"{shape.vision_layers}"
        )
    if problems:
        raise ConfigError(problems)
