"""Sizes of a LongVILA-layout checkpoint, read from its JSON files alone: no torch, no weights, none of its code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.config.errors import ConfigError
from megalong.config.json_part import Part, parse_json, read_json
from megalong.config.model_shape import ModelShape, VisionShape, llm_shape

DOWNSAMPLE_OF_PROJECTOR = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class SiglipShape:
    """Sizes of the SigLIP tower and the projector; counts unless said."""

    hidden: int
    layers: int
    """Layers in the checkpoint; `layers_run` are run."""
    heads: int
    ffn: int
    image_size: int
    """Pixels, square."""
    patch_size: int
    select_layer: int
    """Negative index into the tower's hidden states (0 is the embedding); -2 leaves the last layer out."""
    downsample: int
    """Side of the square of patches that becomes one token."""
    llm_hidden: int
    pool: tuple[int, int, int] = (1, 1, 1)
    """Frames, rows and columns of the projector's tokens that are averaged into one (TSPVideoEncoder)."""

    @property
    def frames_per_step(self) -> int:
        return self.pool[0]

    @property
    def patches_per_side(self) -> int:
        # The patch convolution has no padding: a last, partial patch is not seen.
        return self.image_size // self.patch_size

    @property
    def embeds_per_side(self) -> int:
        """Side of the square of the projector's tokens of a frame; an odd side of patches is padded."""
        return math.ceil(self.patches_per_side / self.downsample)

    @property
    def embeds_per_step(self) -> int:
        """Tokens of frames_per_step frames, pooled; the newline behind them is not counted."""
        return (self.embeds_per_side // self.pool[1]) * (self.embeds_per_side // self.pool[2])

    @property
    def layers_run(self) -> int:
        return self.layers + 1 + self.select_layer


def read_longvila_shape(path: str | Path) -> ModelShape:
    """Read config.json, llm/, vision_tower/ and mm_projector/config.json of a LongVILA-layout folder.

    `llm_cfg` and its siblings may be a mapping (also as a JSON string), a sub-folder's name (also when
    absent), or a path on the machine that trained it, then the sub-folder of the same last name is read.
    Raises ConfigError naming the file and the key.
    """
    folder = Path(path)
    top = read_json(folder / "config.json")
    if "llm_cfg" not in top and not (folder / "llm").is_dir():  # a stock checkpoint, and the default family
        raise ConfigError(
            f"{folder / 'config.json'}: model_type is {top.get('model_type')!r}, and neither llm_cfg nor a folder llm/ "
            "is there, as model.family=longvila expects; set model.family or model.path"
        )
    return llm_shape(checkpoint_part(folder, top, "llm"), vision=vision_shape(read_siglip_shape(path)))


def read_siglip_shape(path: str | Path) -> SiglipShape:
    """The vision side of the same folder."""
    folder = Path(path)
    top, top_file = read_json(folder / "config.json"), folder / "config.json"
    tower, projector = checkpoint_part(folder, top, "vision_tower"), checkpoint_part(folder, top, "mm_projector")
    shape = SiglipShape(
        hidden=tower.size("hidden_size"),
        layers=tower.size("num_hidden_layers"),
        heads=tower.size("num_attention_heads"),
        ffn=tower.size("intermediate_size"),
        image_size=tower.size("image_size"),
        patch_size=tower.size("patch_size"),
        select_layer=_select_layer(top, top_file),
        downsample=_downsample(projector),
        llm_hidden=checkpoint_part(folder, top, "llm").size("hidden_size"),
        pool=_pool(top, top_file),
    )
    _check(shape, tower=tower, top_file=top_file)
    return shape


def vision_shape(shape: SiglipShape) -> VisionShape:
    """The numbers that planning reads."""
    wide, per_step = shape.downsample**2 * shape.hidden, shape.frames_per_step
    return VisionShape(
        tokens_per_frame=-(-(shape.embeds_per_step + 1) // per_step),  # a newline follows every step
        embeds_per_frame=-(-shape.embeds_per_step // per_step),
        embed_width=shape.llm_hidden,
        frames_per_step=1,  # a last frame is repeated to fill its step
        tower_params=tower_params(shape),
        largest_tower_param=shape.hidden * max(shape.ffn, 3 * shape.patch_size**2, shape.patches_per_side**2),
        projector_params=projector_params(shape),
        largest_projector_param=max(wide, shape.llm_hidden) * shape.llm_hidden,
        frame_bytes=3 * shape.image_size**2,
        frame_flops=frame_flops(shape),
        # 8 width-sized and 2 ffn-sized per patch.
        frame_elements=shape.patches_per_side**2 * (8 * shape.hidden + 2 * shape.ffn),
        tower_layers=shape.layers_run,
    )


def tower_params(shape: SiglipShape) -> int:
    """SigLIP without its pooling head: patch convolution, positions, every layer, the last norm."""
    width, ffn = shape.hidden, shape.ffn
    embeddings = (3 * shape.patch_size**2 + 1) * width + shape.patches_per_side**2 * width
    per_layer = 4 * (width * width + width) + 2 * width * ffn + ffn + width + 4 * width
    return embeddings + shape.layers * per_layer + 2 * width


def projector_params(shape: SiglipShape) -> int:
    """Space-to-depth MLP: norm and two linears for 2x2; two norms and three linears for 3x3."""
    wide, hidden = shape.downsample**2 * shape.hidden, shape.llm_hidden
    last = hidden * hidden + hidden
    if shape.downsample == 2:
        return 2 * wide + wide * hidden + hidden + last
    narrow = 3 * shape.hidden
    return 2 * wide + wide * narrow + narrow + 2 * narrow + narrow * hidden + hidden + last


def frame_flops(shape: SiglipShape) -> int:
    """Forward of one frame through the tower's layers that are run and the projector."""
    width, ffn = shape.hidden, shape.ffn
    patches = shape.patches_per_side**2
    layer = 2 * patches * (4 * width * width + 2 * width * ffn) + 4 * patches * patches * width
    convolution = 2 * patches * 3 * shape.patch_size**2 * width
    return shape.layers_run * layer + convolution + 2 * shape.embeds_per_side**2 * projector_params(shape)


def checkpoint_part(folder: Path, top: dict[str, Any], name: str) -> Part:
    """The configuration of "llm", "vision_tower" or "mm_projector", from wherever config.json (`top`) says it is."""
    key, top_file = f"{name}_cfg", folder / "config.json"
    given = top.get(key, name)
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = parse_json(given, where=f"{top_file}: {key}")
    if isinstance(given, dict):
        # Some checkpoints leave a stub here that only points at the folder.
        if set(given) - {"model_type", "_name_or_path", "architectures"}:
            return Part(given, f"{top_file}: {key}")
        given = given.get("_name_or_path", name)
    if not isinstance(given, str) or not given:
        raise ConfigError(f"{top_file}: {key} is {given!r}, expected a mapping, a sub-folder name or a path")
    file = folder / given / "config.json"
    if Path(given).is_absolute() or ".." in Path(given).parts or not file.is_file():
        file = folder / Path(given).name / "config.json"
    return Part(read_json(file, asked_by=f"{top_file}: {key}={given!r}"), str(file))


def _select_layer(top: dict[str, Any], top_file: Path) -> int:
    value = top.get("mm_vision_select_layer")
    if type(value) is not int or value >= 0:
        raise ConfigError(f"{top_file}: mm_vision_select_layer is {value!r}, expected a negative integer such as -2")
    return value


def _downsample(projector: Part) -> int:
    kind = projector.values.get("mm_projector_type")
    if kind not in DOWNSAMPLE_OF_PROJECTOR:
        known = ", ".join(DOWNSAMPLE_OF_PROJECTOR)
        raise ConfigError(f"{projector.where}: mm_projector_type is {kind!r}, expected one of {known}")
    return DOWNSAMPLE_OF_PROJECTOR[kind]


def _pool(top: dict[str, Any], top_file: Path) -> tuple[int, int, int]:
    """What video_encoder (a mapping, also as JSON text) says; the basic encoder, also when absent, does not pool."""
    where = f"{top_file}: video_encoder"
    encoder = top.get("video_encoder") or {}
    if isinstance(encoder, str):
        encoder = parse_json(encoder, where=where)
    if not isinstance(encoder, dict):
        raise ConfigError(f"{where} is {encoder!r}, expected a mapping")
    target = str(encoder.get("_target_", "BasicVideoEncoder"))
    kind = target.rpartition(".")[2]
    if kind not in ("BasicVideoEncoder", "TSPVideoEncoder"):
        raise ConfigError(f"{where}._target_ is {target!r}, expected a BasicVideoEncoder or a TSPVideoEncoder")
    for key, only in (("start_tokens", None), ("end_tokens", "\n"), ("sep_tokens", None)):
        if encoder.get(key, only) != only:
            raise ConfigError(f"{where}.{key} is {encoder[key]!r}; only {only!r} is supported")
    if str(encoder.get("embed_time", False)) != "False":
        raise ConfigError(f"{where}.embed_time is {encoder['embed_time']!r}; embeddings of time are not supported")
    if kind == "BasicVideoEncoder":
        return (1, 1, 1)
    sizes = encoder.get("pool_sizes", [[8, 1, 1]])  # what VILA's own code has where the key is absent
    match sizes:
        case [[int(frames), int(rows), int(columns)]] if min(frames, rows, columns) > 0:
            return (frames, rows, columns)
    raise ConfigError(
        f"{where}.pool_sizes is {sizes!r}, expected one [frames, rows, columns]; several scales are not supported"
    )


def _check(shape: SiglipShape, *, tower: Part, top_file: Path) -> None:
    problems = []
    if shape.image_size < shape.patch_size:
        problems.append(f"{tower.where}: image_size={shape.image_size} is smaller than patch_size={shape.patch_size}")
    if shape.layers_run < 1:
        problems.append(
            f"{top_file}: mm_vision_select_layer={shape.select_layer} leaves no layer of the tower's {shape.layers}"
        )
    elif any(shape.embeds_per_side % size for size in shape.pool[1:]):
        problems.append(
            f"{top_file}: video_encoder.pool_sizes {list(shape.pool)} do not divide the {shape.embeds_per_side} x "
            f"{shape.embeds_per_side} tokens of a frame"
        )
    if problems:
        raise ConfigError(problems)
