"""What a LongVILA folder's JSON says about its sizes, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megalong.config.longvila_shape import SiglipShape
from megalong.models.errors import CheckpointError
from megalong.models.gpt_shape import read_gpt_shape
from megalong.models.longvila.spec import read_spec


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def change(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_sizes_of_the_demo_checkpoint(folder: Path) -> None:
    spec = read_spec(folder)
    assert spec.vision == SiglipShape(
        hidden=16, layers=3, heads=2, ffn=24, select_layer=-2, image_size=48, patch_size=8, downsample=2, llm_hidden=32
    )
    assert (spec.vision.embeds_per_step, spec.vision.frames_per_step) == (9, 1)
    assert (spec.gpt.hidden, spec.gpt.layers, spec.gpt.heads, spec.gpt.kv_heads, spec.gpt.head_dim) == (32, 2, 4, 2, 8)
    assert (spec.gpt.ffn, spec.gpt.tied, spec.gpt.rope_scaling) == (48, False, 1.0)


@pytest.mark.parametrize(("image", "patch", "tokens"), [(448, 14, 256), (384, 14, 196), (224, 14, 64), (20, 4, 9)])
def test_tokens_of_a_frame(image: int, patch: int, tokens: int) -> None:
    shape = SiglipShape(
        hidden=8, layers=2, heads=1, ffn=8, select_layer=-2, image_size=image, patch_size=patch, downsample=2,
        llm_hidden=8,
    )  # fmt: skip
    assert shape.embeds_per_step == tokens


TSP = "llava.model.encoders.TSPVideoEncoder"


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("encoder", "pool", "tokens"),
    [
        ({"_target_": "llava.model.encoders.BasicVideoEncoder"}, (1, 1, 1), 9),
        ({"_target_": TSP}, (8, 1, 1), 9),
        ({"_target_": TSP, "pool_sizes": [[4, 3, 1]], "end_tokens": "\n"}, (4, 3, 1), 3),
    ],
)
def test_temporal_pooling(folder: Path, encoder: dict, pool: tuple, tokens: int, as_text: bool) -> None:
    change(folder / "config.json", video_encoder=json.dumps(encoder) if as_text else encoder)
    vision = read_spec(folder).vision
    assert (vision.pool, vision.frames_per_step, vision.embeds_per_step) == (pool, pool[0], tokens)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"_target_": "x.OtherEncoder"}, "_target_ is 'x.OtherEncoder', expected a BasicVideoEncoder or a TSPVideo"),
        ({"_target_": TSP, "pool_sizes": [[8, 1, 1], [1, 2, 2]]}, "several scales are not supported"),
        ({"_target_": TSP, "pool_sizes": [[8, 0, 1]]}, r"pool_sizes is \[\[8, 0, 1\]\]"),
        ({"_target_": TSP, "pool_sizes": [[8, 2, 1]]}, r"\[8, 2, 1\] do not divide the 3 x 3 tokens of a frame"),
        ({"_target_": TSP, "sep_tokens": "\n"}, "video_encoder.sep_tokens is '\\\\n'; only None is supported"),
        ({"_target_": TSP, "embed_time": "True"}, "embeddings of time are not supported"),
        ("{", "video_encoder: not valid JSON"),
        (7, "video_encoder is 7, expected a mapping"),
    ],
)
def test_video_encoders_that_are_refused(folder: Path, encoder: object, message: str) -> None:
    change(folder / "config.json", video_encoder=encoder)
    with pytest.raises(CheckpointError, match=message):
        read_spec(folder)


@pytest.mark.parametrize(
    "form", ["folder name", "mapping", "JSON text", "path of the training machine", "path that leaves the folder"]
)
def test_forms_of_a_sub_config(folder: Path, form: str) -> None:
    want = read_spec(folder)
    values = json.loads((folder / "llm" / "config.json").read_text())
    given = {
        "folder name": "llm",
        "mapping": values,
        "JSON text": json.dumps(values),
        "path of the training machine": "/somewhere/else/llm",
        "path that leaves the folder": "../../llm",
    }[form]
    change(folder / "config.json", llm_cfg=given)
    assert read_spec(folder) == want


BAD = {
    "no root": ("config.json", None, r"config\.json: cannot read \(No such file.*; named by model\.path"),
    "no tower": ("vision_tower/config.json", None, r"vision_tower/config\.json: cannot read \(No such file"),
    "no JSON": ("llm/config.json", "{", r"llm/config\.json: not valid JSON"),
    "no text": ("llm/config.json", '{"a\udcff": 1}', r"llm/config\.json: not UTF-8 text \(byte 3\)"),
    "a list": ("mm_projector/config.json", "[]", r"mm_projector/config\.json: expected a JSON object, got list"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files(folder: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message):
        read_spec(folder)


WRONG = {
    "projector": ("mm_projector/config.json", {"mm_projector_type": "linear"}, "mm_projector_type is 'linear', expec"),
    "selected layer": ("config.json", {"mm_vision_select_layer": -5}, r"mm_vision_select_layer=-5 leaves no layer"),
    "positive layer": ("config.json", {"mm_vision_select_layer": 1}, "mm_vision_select_layer is 1"),
    "text as layer": ("config.json", {"mm_vision_select_layer": "x"}, "mm_vision_select_layer is 'x'"),
    "sub-config text": ("config.json", {"llm_cfg": "{oops"}, r"config\.json: llm_cfg: not valid JSON"),
    "no tower size": ("vision_tower/config.json", {"image_size": None}, "image_size is absent"),
    "no width": ("llm/config.json", {"hidden_size": None}, r"llm/config\.json: hidden_size is absent"),
    "width as text": ("llm/config.json", {"hidden_size": "32"}, "hidden_size is '32', expected a positive integer"),
    "sliding window": ("llm/config.json", {"use_sliding_window": True}, "sliding-window attention is not supported"),
    "rope kind": (
        "llm/config.json",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope type 'yarn' is not supported",
    ),
    "no theta": ("llm/config.json", {"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_values(folder: Path, name: str, changes: dict[str, Any], message: str) -> None:
    change(folder / name, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_spec(folder)


def test_old_rope_keys_and_defaults() -> None:
    shape = read_gpt_shape(
        {
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8,
            "vocab_size": 10, "rope_theta": 1_062_356_830, "rope_scaling": {"type": "linear", "factor": 4},
        },
        where="config.json",
    )  # fmt: skip
    assert (shape.rope_theta, shape.rope_scaling, shape.kv_heads, shape.head_dim) == (1_062_356_830.0, 4.0, 4, 16)
    assert not shape.tied
