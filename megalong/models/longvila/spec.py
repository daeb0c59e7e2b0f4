"""The longvila family: what a checkpoint folder says about its sizes, tokens and chat format.

Layout: config.json, llm/, vision_tower/, mm_projector/ (the VILA 2.0 layout of LongVILA-R1-7B). Sizes are read,
never assumed; no code of the checkpoint is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megalong.models.errors import CheckpointError
from megalong.models.gpt import GptShape

SYSTEM_PROMPT = "You are a helpful assistant"


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """Sizes of the SigLIP tower and the projector behind it."""

    hidden: int
    layers: int  # in the checkpoint; the last -select_layer - 1 of them are not run
    select_layer: int  # index into hidden_states, negative
    image_size: int  # pixels, square
    patch_size: int
    downsample: int  # 2: mlp_downsample and its 2x2 twin

    @property
    def tokens_per_frame(self) -> int:
        """Projector tokens of one frame, without the newline."""
        side = self.image_size // self.patch_size
        return (-(-side // self.downsample)) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LongVilaSpec:
    path: Path
    gpt: GptShape
    vision: VisionShape


PROJECTOR_DOWNSAMPLE = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2}


def read_spec(path: str | Path) -> LongVilaSpec:
    """Read a checkpoint folder's JSON files. Raises CheckpointError naming file and key."""
    path = Path(path)
    config = _load(path / "config.json")
    llm = _sub_config(path, config, "llm")
    tower = _sub_config(path, config, "vision_tower")
    projector = _sub_config(path, config, "mm_projector")
    _require(
        tower, ("hidden_size", "num_hidden_layers", "image_size", "patch_size"), f"{path}/vision_tower/config.json"
    )
    kind = projector.get("mm_projector_type")
    if kind not in PROJECTOR_DOWNSAMPLE:
        raise CheckpointError(
            f"{path}/mm_projector/config.json: mm_projector_type {kind!r} is not one of {sorted(PROJECTOR_DOWNSAMPLE)}"
        )
    select_layer = config.get("mm_vision_select_layer", -2)
    lowest = -tower["num_hidden_layers"] - 1
    if type(select_layer) is not int or not lowest <= select_layer <= -1:
        raise CheckpointError(
            f"{path}/config.json: mm_vision_select_layer is {select_layer!r}, expected {lowest} .. -1, "
            "a layer of the tower"
        )
    vision = VisionShape(
        hidden=tower["hidden_size"],
        layers=tower["num_hidden_layers"],
        select_layer=select_layer,
        image_size=tower["image_size"],
        patch_size=tower["patch_size"],
        downsample=PROJECTOR_DOWNSAMPLE[kind],
    )
    return LongVilaSpec(path=path, gpt=read_gpt_shape(llm, where=str(path / "llm/config.json")), vision=vision)


def read_gpt_shape(llm: dict, *, where: str) -> GptShape:
    """GptShape of a stock Qwen2 config.json. Raises CheckpointError for what the decoder does not implement."""
    _require(llm, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"), where)
    if llm.get("use_sliding_window"):
        raise CheckpointError(f"{where}: use_sliding_window=true is not supported")
    # transformers 5 writes rope_parameters; older checkpoints rope_theta and rope_scaling.
    rope = llm.get("rope_parameters") or {
        "rope_theta": llm.get("rope_theta"),
        **(llm.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported (default or linear)")
    if rope.get("rope_theta") is None:
        raise CheckpointError(f"{where}: rope_theta is missing; it is never guessed")
    heads = llm["num_attention_heads"]
    return GptShape(
        hidden=llm["hidden_size"],
        layers=llm["num_hidden_layers"],
        heads=heads,
        kv_heads=llm.get("num_key_value_heads", heads),
        head_dim=llm.get("head_dim") or llm["hidden_size"] // heads,
        ffn=llm["intermediate_size"],
        vocab=llm["vocab_size"],
        tied=llm.get("tie_word_embeddings", False),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=float(rope.get("factor", 1.0)) if kind == "linear" else 1.0,
        norm_eps=llm.get("rms_norm_eps", 1e-6),
        max_positions=llm.get("max_position_embeddings", 32768),
    )


def _sub_config(path: Path, config: dict, name: str) -> dict:
    """`<name>_cfg` may be a dict, a JSON string, a sub-folder name or a training machine's absolute path."""
    value = config.get(f"{name}_cfg")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _parse(value, where=f"{path}/config.json: {name}_cfg")
    if isinstance(value, dict) and "model_type" in value and len(value) > 2:
        return value
    return _load(path / name / "config.json")


def _load(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"{path}: file not found; a longvila checkpoint needs it (set model.path)")
    return _parse(path.read_text(encoding="utf-8"), where=str(path))


def _parse(text: str, *, where: str) -> dict:
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(loaded).__name__}")
    return loaded


def _require(values: dict, keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if key not in values:
            raise CheckpointError(f"{where}: key {key!r} is missing")
        if type(values[key]) is not int or values[key] < 1:
            raise CheckpointError(f"{where}: {key} is {values[key]!r}, expected a positive integer")
