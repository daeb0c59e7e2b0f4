"""Every flag of every verb has an effect that a test sees: layouts, pickles, full disks."""

from __future__ import annotations

import errno
import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from tiny_checkpoints import all_tensors, split_llm

from checkpoints_tools.cli import build_parser, main
from checkpoints_tools.compare import verify
from checkpoints_tools.convert import hf_to_megatron, megatron_to_hf
from checkpoints_tools.errors import ConvertError
from checkpoints_tools.safetensors_files import SafetensorsFile

FLAGS = {
    "hf-to-megatron": "--hf --out --tp --pp --dtype --dry-run --allow-pickle --json",
    "megatron-to-hf": "--megatron --like --out --shard-gb --dtype --dry-run --allow-pickle --json",
    "verify": "--like --dtype --allow-pickle --json",
    "inspect": "--no-checksum --allow-pickle --json",
}
"""A flag that is added here has a test in this folder."""


def test_the_flags_are_these() -> None:
    verbs = next(action for action in build_parser()._actions if action.dest == "verb").choices
    found = {
        verb: {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
        for verb, parser in verbs.items()
    }
    assert found == {verb: set(flags.split()) for verb, flags in FLAGS.items()}


def test_a_layout_is_checked_and_recorded(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "out"), "--tp", "4", "--pp", "2", "--json"]
    assert main([*argv, "--dry-run"]) == 0
    vocab = json.loads((hf / "llm/config.json").read_text())["vocab_size"]
    want = {"tp": 4, "pp": 2, "vocab_rows": -(-vocab // 4) * 4}
    assert want["vocab_rows"] > vocab
    assert json.loads(capsys.readouterr().out)["checked_layout"] == want
    assert main(argv) == 0
    assert dist_checkpointing.load_common_state_dict(str(tmp_path / "out"))["checked_layout"] == want
    # The files do not depend on it.
    hf_to_megatron(hf, tmp_path / "plain")
    assert verify(tmp_path / "plain", tmp_path / "out").equal


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, "--tp=3 does not divide the model's 4 attention heads"),
        ({"tp": 8}, "--tp=8 does not divide the model's 4 attention heads"),
        ({"pp": 4}, "--pp=4 does not divide the model's 2 layers"),
        ({"tp": 0}, "--tp 0 --pp 1: expected positive numbers"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(hf: Path, tmp_path: Path, layout: dict[str, int], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        hf_to_megatron(hf, tmp_path / "out", **layout)
    assert not list(tmp_path.glob("out*"))


def pickle_weights(hf: Path, *, sharded: bool) -> None:
    """Rewrite every weight file as torch.save would have it."""
    if sharded:
        split_llm(hf)
    for file in sorted(hf.rglob("*.safetensors")):
        torch.save(load_file(file), file.with_name(file.name.replace("model", "pytorch_model", 1)).with_suffix(".bin"))
        file.unlink()
    index = hf / "llm/model.safetensors.index.json"
    if sharded:
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (hf / "llm/pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_need_the_flag_and_become_safetensors(
    hf: Path, demo: Path, tmp_path: Path, sharded: bool, capsys: pytest.CaptureFixture
) -> None:
    pickle_weights(hf, sharded=sharded)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    argv = ["hf-to-megatron", "--hf", str(hf), "--out", str(megatron)]
    assert main(argv) == 2
    assert "or give --allow-pickle, which lets nothing but tensors in" in capsys.readouterr().err
    assert main([*argv, "--allow-pickle"]) == 0
    argv = ["megatron-to-hf", "--megatron", str(megatron), "--like", str(hf), "--out", str(back), "--allow-pickle"]
    assert main(argv) == 0
    assert not list(back.rglob("pytorch_model*"))
    assert len(list((back / "llm").glob("model*.safetensors"))) == 1 + sharded
    assert verify(demo, back).equal
    assert main(["verify", str(hf), str(back), "--allow-pickle"]) == 0
    capsys.readouterr()
    checksums = []
    for folder in (hf, back):
        assert main(["inspect", str(folder), "--allow-pickle", "--json"]) == 0
        checksums.append(json.loads(capsys.readouterr().out)["checksum"])
    assert checksums[0] == checksums[1]


class RunsCode:
    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('code was run')",))


def as_code(file: Path) -> None:
    torch.save({"a": RunsCode()}, file)


def as_plain_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(RunsCode()))


def as_list(file: Path) -> None:
    torch.save([torch.zeros(1)], file)


def as_number(file: Path) -> None:
    torch.save({"model.norm.weight": 3}, file)


def as_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


PICKLES = {
    as_code: r"pytorch_model\.bin: not a complete file of nothing but tensors",
    as_plain_pickle: r"pytorch_model\.bin: not a complete file of nothing but tensors",
    as_list: r"pytorch_model\.bin: holds a list, expected a mapping",
    as_number: r"pytorch_model\.bin: 'model\.norm\.weight' is no plain tensor but a int",
    as_half: r"pytorch_model\.bin: not a complete file of nothing but tensors",
}


@pytest.mark.parametrize("spoil", PICKLES, ids=lambda case: case.__name__)
def test_bad_pickles(hf: Path, tmp_path: Path, spoil: object) -> None:
    pickle_weights(hf, sharded=False)
    spoil(hf / "llm/pytorch_model.bin")
    with pytest.raises(ConvertError, match=PICKLES[spoil]):
        hf_to_megatron(hf, tmp_path / "out", allow_pickle=True)
    assert not list(tmp_path.glob("out*"))


def test_both_kinds_of_weights_are_refused(hf: Path, tmp_path: Path) -> None:
    shutil.copy(hf / "llm/model.safetensors", tmp_path / "kept")
    pickle_weights(hf, sharded=False)
    shutil.move(tmp_path / "kept", hf / "llm/model.safetensors")
    with pytest.raises(ConvertError, match=r"llm: both safetensors and pytorch_model\.bin are there"):
        hf_to_megatron(hf, tmp_path / "out", allow_pickle=True)


def convert_with_small_files(argv: list[str], limit: int) -> int:
    """The kernel refuses to let a file grow over the limit, in the middle of a write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def argv_of(direction: str, hf: Path, megatron: Path, out: Path) -> list[str]:
    source = ["--hf", hf] if direction == "hf-to-megatron" else ["--megatron", megatron, "--like", hf]
    return [direction, *map(str, source), "--out", str(out)]


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_write_that_the_system_refuses_leaves_nothing(
    hf: Path, megatron: Path, tmp_path: Path, direction: str, capsys: pytest.CaptureFixture
) -> None:
    argv = argv_of(direction, hf, megatron, tmp_path / "out")
    assert convert_with_small_files(argv, 100_000) == 2
    assert f"--out {tmp_path / 'out'}: " in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert main(argv) == 0
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_full_disk_is_said_in_one_line(
    hf: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsFile, "put", full)
    assert main(argv_of("megatron-to-hf", hf, megatron, tmp_path / "out")) == 2
    want = f"megalong-convert megatron-to-hf: --out {tmp_path / 'out'}: No space left on device; nothing was left there"
    assert capsys.readouterr().err.strip().endswith(want)
    assert not list(tmp_path.glob("out*"))


def test_every_verb_prints_json(hf: Path, megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = {
        "hf-to-megatron": ["--hf", hf, "--out", tmp_path / "a"],
        "megatron-to-hf": ["--megatron", megatron, "--like", hf, "--out", tmp_path / "b", "--shard-gb", "0.00001"],
        "verify": [megatron, megatron, "--like", hf, "--dtype", "bf16"],
        "inspect": [megatron, "--no-checksum"],
    }
    shown = {}
    for verb, argv in runs.items():
        assert main([verb, *map(str, argv), "--json"]) == 0
        shown[verb] = json.loads(capsys.readouterr().out)
    assert shown["hf-to-megatron"]["tensors"] == shown["megatron-to-hf"]["tensors"] == shown["verify"]["compared"] == 68
    assert len(shown["megatron-to-hf"]["weight_files"]) > 10
    assert shown["inspect"]["family"] == "longvila"


def test_float32_and_bf16_exports(hf: Path, megatron: Path, tmp_path: Path) -> None:
    before = all_tensors(hf)
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        megatron_to_hf(megatron, hf, out, dtype=dtype)
        after = all_tensors(out)
        name = "llm/model.safetensors:lm_head.weight"
        assert torch.equal(after[name], before[name].to(dtype))
