"""verify, inspect, exit codes and interruption, through the command line's entry."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import edit_weights, split_llm

from checkpoints_tools import convert, export
from checkpoints_tools.building import building
from checkpoints_tools.cli import main
from checkpoints_tools.convert import hf_to_megatron
from checkpoints_tools.direct_files import tensor_bytes
from checkpoints_tools.errors import ConvertError
from checkpoints_tools.hf_folder import HfFolder

GATE = "model.layers.1.mlp.gate_proj.weight"


def flip_bit(tensors: dict[str, torch.Tensor], name: str = GATE) -> dict[str, torch.Tensor]:
    tensors[name].view(torch.int32)[3, 5] ^= 1
    return tensors


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, dict]:
    code = main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_verify_names_the_tensor_of_one_flipped_bit(
    hf: Path, demo: Path, megatron: Path, tmp_path: Path, capsys
) -> None:
    equal = {"equal": True, "compared": 86, "num_bytes": 4 * parameters(demo), "differences": [], "outside": 0}
    assert run(capsys, "verify", hf, demo) == (0, equal)
    edit_weights(hf / "llm/model.safetensors", flip_bit)
    code, result = run(capsys, "verify", hf, demo)
    assert code == 1
    assert len(result["differences"]) == 1
    assert result["differences"][0].startswith(f"llm/{GATE}: 1 of 2048 elements differ, the first at [3, 5]: ")
    code, result = run(capsys, "verify", megatron, hf)
    assert (code, result["compared"], result["outside"]) == (1, 68, 18)
    assert [difference.partition(":")[0] for difference in result["differences"]] == [f"llm/{GATE}"]
    hf_to_megatron(hf, tmp_path / "flipped")
    code, result = run(capsys, "verify", megatron, tmp_path / "flipped")
    assert code == 1
    key = "llm.decoder.layers.mlp.linear_fc1.weight"
    assert result["differences"][0].startswith(f"{key}: 1 of 8192 elements differ, the first at [1, 3, 5]: ")
    assert run(capsys, "verify", megatron, megatron)[0] == 0


def test_verify_tells_nan_and_signed_zero_apart(hf: Path, demo: Path, capsys) -> None:
    def put(value: float):
        return lambda tensors: {**tensors, GATE: tensors[GATE].index_fill(0, torch.tensor([0]), value)}

    other = Path(shutil.copytree(hf, hf.with_name("other")))
    for mine, theirs, code in ((0.0, -0.0, 1), (float("nan"), float("nan"), 0)):
        edit_weights(hf / "llm/model.safetensors", put(mine))
        edit_weights(other / "llm/model.safetensors", put(theirs))
        assert run(capsys, "verify", hf, other)[0] == code


def test_verify_reports_a_tensor_on_one_side_only(hf: Path, demo: Path, capsys) -> None:
    edit_weights(hf / "llm/model.safetensors", lambda tensors: {n: t for n, t in tensors.items() if n != GATE})
    code, result = run(capsys, "verify", hf, demo)
    assert (code, result["differences"]) == (1, [f"llm/{GATE}: only in {demo}"])


def parameters(folder: Path) -> int:
    return sum(tensor.numel() for file in folder.rglob("*.safetensors") for tensor in load_file(file).values())


def test_inspect_of_both_kinds(hf: Path, megatron: Path, capsys) -> None:
    code, result = run(capsys, "inspect", hf)
    assert (code, result["kind"], result["family"], result["tensors"]) == (0, "hf", "longvila", 86)
    assert result["parameters"] == parameters(hf)
    assert result["dtypes"] == {"float32": 86}
    assert (result["sizes"]["gpt"]["layers"], result["sizes"]["vision"]["select_layer"]) == (2, -2)
    row = {"name": f"llm/{GATE}", "shape": [64, 32], "dtype": "float32"}
    assert row in result["listing"]
    split_llm(hf)
    assert run(capsys, "inspect", hf)[1]["checksum"] == result["checksum"]  # files do not matter
    edit_weights(hf / "llm/model-00001-of-00002.safetensors", lambda tensors: flip_bit(tensors, "lm_head.weight"))
    assert run(capsys, "inspect", hf)[1]["checksum"] != result["checksum"]

    code, result = run(capsys, "inspect", megatron)
    assert (code, result["kind"], result["family"], result["optimizer_tensors"]) == (0, "megatron", "longvila", 0)
    vocab = json.loads((hf / "llm/config.json").read_text())["vocab_size"]
    assert result["sizes"] == {"vocab_rows": vocab, "hidden": 32, "tied": False, "layers": 2, "ffn": 64}
    tower = load_file(hf / "vision_tower/model.safetensors")
    unused = sum(t.numel() for n, t in tower.items() if "layers.2." in n or "post_layernorm" in n)
    assert result["parameters"] == parameters(hf) - unused
    assert run(capsys, "inspect", megatron, "--no-checksum")[1]["checksum"] is None


def test_a_megatron_folder_is_inspected_without_megatron_core(megatron: Path) -> None:
    """Which would take most of the time."""
    code = (
        "import sys\nfrom checkpoints_tools.cli import main\n"
        f"assert main(['inspect', {str(megatron)!r}]) == 0\n"
        "assert not {'megatron.core', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "family: longvila\n" in done.stdout


def test_checksum_is_the_documented_one(hf: Path, capsys) -> None:
    total = 0
    folder = HfFolder(hf, ("llm", "vision_tower", "mm_projector"))
    for name, tensor in sorted(folder.tensors.items()):
        crc = zlib.crc32(tensor_bytes(folder.read(tensor)))
        total = zlib.crc32(f"{name}{list(tensor.shape)}torch.float32{crc:08x}".encode(), total)
    assert run(capsys, "inspect", hf)[1]["checksum"] == f"{total:08x}"


def test_text_output_and_error_codes(hf: Path, tmp_path: Path, capsys) -> None:
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "out")]) == 0
    assert "family: longvila\ntensors: 68\n" in capsys.readouterr().out
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"megalong-convert hf-to-megatron: --out {tmp_path / 'out'}: exists already; give another folder or remove it\n"
    )
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err
    (run := tmp_path / "run" / "checkpoints").mkdir(parents=True)
    export = ["--like", str(hf), "--out", str(tmp_path / "export")]
    assert main(["megatron-to-hf", "--megatron", str(run.parent), *export]) == 2
    assert f"{run} is there: try that" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "not a Hugging Face checkpoint folder" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_terminated_conversion_leaves_nothing(
    hf: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, direction: str, number: int
) -> None:
    calls, before = [], signal.getsignal(number)

    def terminated(self: object, *args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 5:
            assert (tmp_path / "out.partial").is_dir()
            os.kill(os.getpid(), number)
        return original(self, *args)

    if direction == "hf-to-megatron":
        owner, argv = convert.HfFolder, ["--hf", hf]
    else:
        owner, argv = export.MegatronFolder, ["--megatron", megatron, "--like", hf]
    name = "read" if direction == "hf-to-megatron" else "read_place"
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, terminated)
    assert main([direction, *map(str, argv), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == f"megalong-convert {direction}: interrupted, nothing was written\n"
    assert not list(tmp_path.glob("out*"))
    assert len(calls) < 10
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("moment", ["flush", "removal"])
def test_signals_while_a_folder_is_finished_or_removed(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, moment: str
) -> None:
    """Ctrl-C during the last flushes removes the folder; more of it does not stop the removal."""

    def flush(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)

    def remove(path: Path, *, ignore_errors: bool) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        rmtree(path, ignore_errors=ignore_errors)

    rmtree = shutil.rmtree
    monkeypatch.setattr("checkpoints_tools.building._flush_one", flush)
    if moment == "removal":
        monkeypatch.setattr(shutil, "rmtree", remove)
    assert main(["hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "megalong-convert hf-to-megatron: interrupted, nothing was written\n"
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_import_ends_with_the_same_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A module may turn the exception into another one."""

    def importing(args: object) -> tuple[int, dict]:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("checkpoints_tools.cli._run", importing)
    assert main(["inspect", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "megalong-convert inspect: interrupted, nothing was written\n"


def die_while_building(out: Path) -> None:
    with building(out) as (partial, _):
        (partial / "metadata.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_conversion_is_cleared_by_the_next(hf: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=die_while_building, args=(tmp_path / "out",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]
    hf_to_megatron(hf, tmp_path / "out")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_two_conversions_to_one_target_do_not_meet(hf: Path, tmp_path: Path) -> None:
    with building(tmp_path / "out"), pytest.raises(ConvertError, match="another conversion is writing there"):
        hf_to_megatron(hf, tmp_path / "out")


def test_no_room_is_said_before_anything_is_written(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ConvertError, match=r"needs 0\.0 GB, but .* has 0\.0 GB free"):
        hf_to_megatron(hf, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
