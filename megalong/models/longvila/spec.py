"""The longvila family: what a checkpoint folder says about its sizes, tokens and chat format.

Layout: config.json, llm/, vision_tower/, mm_projector/ (the VILA 2.0 layout of LongVILA-R1-7B). Sizes are read,
never assumed; no code of the checkpoint is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalong.models.errors import CheckpointError
from megalong.models.gpt_shape import GptShape, read_gpt_shape
from megalong.models.json_files import load_json, parse_json, require_sizes

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
    config = load_json(path / "config.json")
    llm = _sub_config(path, config, "llm")
    tower = _sub_config(path, config, "vision_tower")
    projector = _sub_config(path, config, "mm_projector")
    require_sizes(
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


def _sub_config(path: Path, config: dict, name: str) -> dict:
    """`<name>_cfg` may be a dict, a JSON string, a sub-folder name or a training machine's absolute path."""
    value = config.get(f"{name}_cfg")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_json(value, where=f"{path}/config.json: {name}_cfg")
    if isinstance(value, dict) and "model_type" in value and len(value) > 2:
        return value
    return load_json(path / name / "config.json")
