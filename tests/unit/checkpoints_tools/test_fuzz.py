"""Whatever an index, a safetensors header or a checkpoint's metadata says: a ConvertError, or a whole result."""

from __future__ import annotations

import json
import pickle
import pickletools
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoints import split_llm

from checkpoints_tools.errors import ConvertError
from checkpoints_tools.hf_folder import HfFolder
from checkpoints_tools.megatron_folder import MegatronFolder, check_checkpoint
from checkpoints_tools.places import Blueprint, check_folder, read_blueprint
from megalong.engine.weights_io import CheckpointReader
from megalong.models.errors import CheckpointError

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["llm/model.norm.weight", "../config.json", "/etc/passwd", "model.safetensors", "", ".", "a/b"])


@pytest.fixture(scope="module")
def blueprint(demo: Path) -> Blueprint:
    return read_blueprint(demo)


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(demo, tmp_path_factory.mktemp("fuzz") / "hf"))


@pytest.fixture(scope="module")
def sharded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("fuzz_sharded") / "hf"))
    split_llm(copy)
    return copy


def accepts(check: Callable[[], object]) -> bool:
    """Whether it passes; anything but the two documented errors is a failure of the test."""
    try:
        check()
    except (ConvertError, CheckpointError):
        return False
    return True


def read_all(hf: Path, blueprint: Blueprint) -> None:
    """All that a conversion reads before it writes, and the tensors; nothing but the whole model is accepted."""
    tensors = HfFolder(hf, blueprint.folders)
    check_folder(tensors, blueprint)
    assert len(tensors.tensors) == 86
    for tensor in tensors.tensors.values():
        assert tuple(tensors.read(tensor).shape) == tensor.shape


@FEW
@given(data=st.data())
def test_index_files(sharded: Path, blueprint: Blueprint, data: st.DataObject) -> None:
    index = sharded / "llm/model.safetensors.index.json"
    good = index.read_text()
    content = json.loads(good)
    weight_map = content["weight_map"]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(weight_map)) | NAMES | st.text(max_size=5))
        weight_map[name] = data.draw(
            JSON | NAMES | st.sampled_from(sorted({str(file) for file in weight_map.values()}))
        )
    whole = data.draw(st.sampled_from(["map", "whole", "text"]))
    text = {
        "map": lambda: json.dumps(content),
        "whole": lambda: json.dumps(data.draw(JSON)),
        "text": lambda: good[: data.draw(st.integers(0, len(good) - 2))],
    }[whole]()
    try:
        index.write_text(text, encoding="utf-8", errors="surrogatepass")
        taken = accepts(lambda: read_all(sharded, blueprint))
        assert taken == (whole == "map" and json.loads(text)["weight_map"] == json.loads(good)["weight_map"])
        accepts(lambda: CheckpointReader(sharded, blueprint.folders).read("llm/model.norm.weight"))
    finally:
        index.write_text(good)


@FEW
@given(data=st.data())
def test_safetensors_headers(folder: Path, blueprint: Blueprint, data: st.DataObject) -> None:
    file = folder / "mm_projector/model.safetensors"
    good = file.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    header[name][field] = data.draw(
        JSON | st.lists(st.integers(-1, 2**66), max_size=3) | st.sampled_from(["F16", "BF16", "F32", "F4", "U64"])
    )
    encoded = json.dumps(header).encode(errors="surrogatepass")
    stated = data.draw(st.just(len(encoded)) | st.integers(0, 2**64 - 1))
    try:
        file.write_bytes(struct.pack("<Q", stated) + encoded + good[8 + length :])
        taken = accepts(lambda: read_all(folder, blueprint))
        assert not taken or header == json.loads(good[8 : 8 + length])
        accepts(lambda: CheckpointReader(folder, blueprint.folders).read(f"mm_projector/{name}"))
    finally:
        file.write_bytes(good)


@FEW
@given(data=st.data())
def test_bytes_of_safetensors_files(folder: Path, blueprint: Blueprint, data: st.DataObject) -> None:
    """A header's bytes changed or the file cut: never anything but an error, or tensors of the right shapes."""
    file = folder / "mm_projector/model.safetensors"
    good = file.read_bytes()
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(bytes(bad[: data.draw(st.just(len(bad)) | st.integers(0, len(bad) - 1))]))
        accepts(lambda: read_all(folder, blueprint))
    finally:
        file.write_bytes(good)


@FEW
@given(data=st.data())
def test_megatron_metadata(demo_megatron: Path, blueprint: Blueprint, data: st.DataObject) -> None:
    """The pickle with bytes changed, opcodes and all: nothing outside the folder is read, nothing is run."""
    file = demo_megatron / ".metadata"
    good = file.read_bytes()
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    bad = bytes(bad[: data.draw(st.just(len(bad)) | st.integers(0, len(bad) - 1))])

    def read() -> None:
        checkpoint = MegatronFolder(demo_megatron)
        check_checkpoint(checkpoint, blueprint)
        for place in blueprint.places:
            assert tuple(checkpoint.read_place(place).shape) == place.model_shape

    try:
        file.write_bytes(bad)
        accepts(read)
    finally:
        file.write_bytes(good)
    assert accepts(read)


@FEW
@given(content=JSON)
def test_descriptions_of_checkpoints(demo_megatron: Path, content: object) -> None:
    file = demo_megatron / "metadata.json"
    good = file.read_text()
    try:
        file.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
        assert not accepts(lambda: MegatronFolder(demo_megatron))
    finally:
        file.write_text(good)


def test_metadata_is_a_pickle_that_the_fuzzing_reaches(demo_megatron: Path) -> None:
    opcodes = [opcode.name for opcode, _, _ in pickletools.genops((demo_megatron / ".metadata").read_bytes())]
    assert "REDUCE" in opcodes or "NEWOBJ" in opcodes
    assert pickle.loads((demo_megatron / ".metadata").read_bytes()).state_dict_metadata
