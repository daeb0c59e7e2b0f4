"""The benchmarks of training steps run from end to end at a tiny size and agree with themselves."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_world

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_all(folder: Path) -> None:
    """The main of each script that trains or attends, one after another in this process."""
    sys.path.insert(0, str(BENCHMARKS))
    installed = ["prefix_grouper"] if find_spec("prefix_grouper") else []
    for name, options in {
        "b1_attention": ["--calls", "--baselines", "repeated", "repeated_fa2", *installed],
        "b2_train_step": ["--prefix", "48"],
        "b10_offload": [],
        "figure1": ["--gpus", "1", "--frames", "4"],
        "b7_scaling": ["--gpus", "1", "--prefix", "48", "--kinds", "shared", "sequence"],
        "b7_stock": ["--gpus", "1", "--kinds", "stock"],
        "longest": ["--gpus", "1", "--tp", "1", "--frames", "4"],
    }.items():
        script = importlib.import_module(name.replace("b7_stock", "b7_scaling"))
        plot = [] if name == "longest" else ["--plot", str(folder / f"{name}.png")]
        script.main(["--tiny", "--responses", "4", "--json", str(folder / f"{name}.json"), *plot, *options])


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("benchmarks")
    run_world(1, run_all, folder, folder=folder / "world")
    plots = {path.stem for path in folder.glob("*.png") if path.stat().st_size > 0}
    assert plots == {"b1_attention", "b2_train_step", "b10_offload", "figure1", "b7_scaling", "b7_stock"}
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def rows(records: dict[str, dict]) -> dict[str, list[dict]]:
    return {name: record["rows"] for name, record in records.items()}


def test_each_record_says_what_it_was_measured_with(records):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    assert {record["device"] for record in records.values()} == {device}
    assert {record["torch"] for record in records.values()} == {torch.__version__}


def test_b1_times_what_it_compared(rows):
    (row,) = rows["b1_attention"]
    assert max(row["shared_error"], row["repeated_error"]) < 1e-5
    timed = {name.removesuffix("_ms") for name in row if name.endswith("_ms")}
    installed = {"prefix_grouper"} if find_spec("prefix_grouper") else set()
    assert timed == {"shared", "repeated", "repeated_fa2"} | installed
    assert max(row[f"{name}_gap"] for name in timed) < 1e-5
    assert min(row[f"{name}_ms"] for name in timed) > 0
    assert [call["call"] for call in row["calls"]] == ["prefix", "responses on the prefix", "responses"]
    assert min(call[name] for call in row["calls"] for name in ("forward_ms", "backward_ms")) > 0


def test_b1_gives_flex_attention_the_mask_of_the_group():
    """On a CPU it has no backward and reads no blocks: its output, and the blocks against the library's own."""
    from torch.nn.attention.flex_attention import create_block_mask

    b1 = importlib.import_module("b1_attention")
    group = b1.Group(prefix=300, lens=(130, 1, 200, 3), heads=4, kv_heads=2, width=16)
    with torch.no_grad():
        parts = group.tensors(dtype=torch.float32)
        (ours,), (theirs,) = (b1.FORMS[name](parts, group, "plain") for name in ("shared", "flex"))
    torch.testing.assert_close(theirs, ours)
    made = b1.block_mask(group)
    want = create_block_mask(made.mask_mod, None, None, group.tokens, group.tokens, device="cpu", BLOCK_SIZE=b1.BLOCK)
    assert torch.equal(made.to_dense(), want.to_dense())
    for counts, places in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        ours, theirs = ((getattr(mask, counts)[0, 0], getattr(mask, places)[0, 0]) for mask in (made, want))
        assert torch.equal(ours[0], theirs[0])
        for row, count in enumerate(ours[0].tolist()):
            assert torch.equal(ours[1][row, :count], theirs[1][row, :count])
    assert 0 < int(made.full_kv_num_blocks.sum()) < int(made.to_dense().sum())


def test_b2_compares_before_it_times(rows):
    error = {row["form"]: row["gradient"] for row in rows["b2_train_step"] if "gradient" in row}
    assert error["shared, float32"] < 1e-5
    assert max(error[f"{form}, bfloat16"] for form in ("shared", "repeated", "hf")) < 2e-2
    timed = {(row["kind"], row["form"]): row["seconds"] for row in rows["b2_train_step"] if "seconds" in row}
    assert set(timed) == {(kind, form) for kind in ("step", "logprobs") for form in ("shared", "repeated", "hf")}
    assert min(timed.values()) > 0


def test_the_four_modes_of_figure_1_take_the_same_step(rows):
    found = rows["figure1"]
    assert [row["mode"] for row in found] == ["shared_prefix", "stage1+2", "stage1", "none"]
    for row in found:
        assert row["status"] == "measured"
        assert row["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=5e-3)
        assert row["mean_nll"] == pytest.approx(found[0]["mean_nll"], rel=1e-3)
        assert row["seconds"] == pytest.approx(sum(row["phases"].values()))
    # Four copies of the prompt cost more than one.
    assert all(row["flops"] > 2 * found[0]["flops"] for row in found[1:])


def test_b3_draws_what_it_wrote(tmp_path):
    """Its kernels need a GPU; its file and its plot do not."""
    b3 = importlib.import_module("b3_logprob")
    rows = [
        {"name": name, "kind": kind, "ms": 10.0, "spread_ms": (9.0, 11.0), "tflops": 500.0, "extra_gb": 0.5}
        for kind in ("forward", "both")
        for name in ("ours", "eager")
    ]
    b3.plot({**b3.header((8, 4, 16), absent={}), "rows": rows}, tmp_path / "b3.png")
    assert (tmp_path / "b3.png").stat().st_size > 0


def test_b3_gives_the_form_of_verl_the_gradients_of_eager(monkeypatch):
    b3 = importlib.import_module("b3_logprob")
    monkeypatch.setattr(b3, "VERL_CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    hidden_RD, weight_VD = (torch.randn(count, 16, generator=generator).requires_grad_() for count in (8, 50))
    parts = (hidden_RD, weight_VD, torch.randint(50, (8,), generator=generator))
    want, got = b3.results(b3.eager, parts), b3.results(b3.VerlChunks.apply, parts)
    assert set(got) == {"grad_hidden", "grad_weight", "logprob", "entropy"}
    for name, value in got.items():
        torch.testing.assert_close(value, want[name])


def time_blind_responses(folder: Path) -> None:
    """figure1 on one mode, in which the responses do not see their prompt."""
    sys.path.insert(0, str(BENCHMARKS))
    bench = importlib.import_module("steps").Bench
    right = bench.packs

    def packs(self, case, *, mode):
        found = right(self, case, mode=mode)
        if mode != "shared_prefix":
            return found
        blind = [tuple(dataclasses.replace(part, parent=-1) for part in pack.tokens.segments) for pack in found]
        return [
            dataclasses.replace(pack, tokens=dataclasses.replace(pack.tokens, segments=segments))
            for pack, segments in zip(found, blind, strict=True)
        ]

    bench.packs = packs
    options = ["--gpus", "1", "--responses", "4", "--frames", "4", "--json", str(folder / "figure1.json")]
    with pytest.raises(SystemExit, match=r"stage1\+2 full and shared_prefix keep_attention differ: .*nothing is timed"):
        importlib.import_module("figure1").main(["--tiny", "--modes", "shared_prefix", *options])


def test_a_mode_that_takes_another_step_is_not_timed(tmp_path):
    run_world(1, time_blind_responses, tmp_path, folder=tmp_path / "world")
    assert not (tmp_path / "figure1.json").exists()


def test_b7_runs_plain_sequences_on_two_gpus_and_on_the_most():
    b7 = importlib.import_module("b7_scaling")
    parser = importlib.import_module("sessions").timing_options("")
    found = {}
    for gpus in ([1], [1, 2], [1, 2, 4], [4]):
        args = parser.parse_args(["--tiny"])
        vars(args).update(gpus=gpus, prefix=None, tp=1, cp_a2a=1, kinds=["sequence", "stock"])
        found[tuple(gpus)] = [
            (session["gpus"], point["kind"]) for session in b7.sessions(args) for point in session["points"]
        ]
    both = lambda *gpus: [(count, kind) for count in gpus for kind in ("sequence", "stock")]  # noqa: E731
    assert found == {(1,): both(1), (1, 2): both(2), (1, 2, 4): both(2, 4), (4,): both(4)}


def time_a_ring(folder: Path) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    importlib.import_module("b7_ring").main(["--tiny", "--json", str(folder / "ring.json")])


def test_b7_ring_compares_both_ways_before_it_times_them(tmp_path):
    run_world(2, time_a_ring, tmp_path, folder=tmp_path / "world")
    (row,) = json.loads((tmp_path / "ring.json").read_text())["rows"]
    assert (row["world"], row["prefix"]) == (2, 96)
    assert 0 < row["gap"] < 1e-12  # float64, by other sums
    assert min(row[f"{name}_ms"] for name in ("keys", "queries", "exchange")) > 0


def test_b7_and_longest_measure_their_points(rows):
    assert [(row["kind"], row["status"]) for row in rows["b7_scaling"]] == [
        ("shared", "measured"),
        ("sequence", "measured"),
    ]
    (row,) = rows["longest"]
    assert {"vision", "forward", "backward", "optimizer"} <= set(row["phases"])
    assert len(row["peak_gb"]) == 1


def test_b7_puts_stock_megatron_beside_the_same_sequence(rows, tmp_path):
    """Its model is megatron-core's own: the log-probabilities of ours are checked by it."""
    b7 = importlib.import_module("b7_scaling")
    (stock,), ours = rows["b7_stock"], rows["b7_scaling"][1]
    assert stock["status"] == "measured"
    assert stock["case"] == ours["case"]
    assert stock["logprobs"] == pytest.approx(ours["logprobs"], abs=2e-2)
    (line,) = b7.compare([ours, stock])
    assert "as fast as stock megatron-core" in line
    (line,) = b7.compare([stock, {**stock, "world": 4}])  # its gradients are of each GPU alone
    assert "gradient norm" not in line
    with pytest.raises(SystemExit, match="log-probabilities differ"):
        b7.compare([ours, {**stock, "logprobs": stock["logprobs"][::-1]}])


def test_b10_times_what_it_compared(rows):
    forms = ["kept", "offload", "save_on_cpu"]
    checks, timed = rows["b10_offload"][:3], rows["b10_offload"][3:]
    assert [row["form"] for row in checks] == [row["form"] for row in timed] == forms
    assert max(row["gradient"] for row in checks) < 1e-6  # a CPU adds up in one order
    for row in timed:
        assert row["status"] == "measured"
        assert row["grad_norm"] == pytest.approx(timed[0]["grad_norm"], rel=1e-6)
    assert {"slower" in row for row in timed} == {True, False}
    # 4 layers, 96 + 4 * 8 tokens: input and output of 256 numbers, and a sum for each of 8 heads.
    assert timed[0]["kept_gb"] == pytest.approx(4 * 128 * (2 * 256 * 2 + 8 * 4) / 1e9)


def test_b11_reads_the_numbers_of_the_frames_and_writes_its_rows(tmp_path, capsys):
    script = importlib.import_module("b11_decode")
    script.main([str(tmp_path), "--tiny", "--decoders", "small", "pyav", "--limit", "4"])
    names = ["pyav1", "pyav1", f"pyav{min(16, os.cpu_count() or 1)}", "pyav1"]
    rows = json.loads((tmp_path / "b11_decode.json").read_text())["rows"]
    assert [row["name"] for row in rows] == names
    assert [row["timed"] for row in rows[2:]] == ["4 s of 8, scaled", "1 s of 8, scaled"]
    assert min(row["seconds"] for row in rows) > 0
    frames = np.stack([script.board(number, width=64, height=64)[..., None].repeat(3, 2) for number in (3, 5)])
    selection = script.choose(tmp_path / "8s_gop250_crf32.mp4", np.array([63, 64]))
    script.check("wrapped", selection, 0, frames[:1], clip_frames=60)
    with pytest.raises(SystemExit, match=r"1 wrong frames, at \[1\]: \[5\]"):
        script.check("wrong", selection, 0, frames, clip_frames=60)


def test_b4_times_what_equals_the_definition(tmp_path):
    script = importlib.import_module("b4_decode_attention")
    script.main(["--tiny", "--json", str(tmp_path / "b4.json"), "--heads", "14/2", "7/1"])
    rows = json.loads((tmp_path / "b4.json").read_text())["rows"]
    forms = ["sdpa", "sdpa batched", "shared, torch"]
    assert [(row["heads"], row["prefix"], row["form"]) for row in rows] == [
        (heads, prefix, form) for prefix in (64, 160) for heads in ("14/2", "7/1") for form in forms
    ]
    assert max(row["error"] for row in rows) < 1e-2
    # 8 responses of 21 tokens behind 64, keys and values of 2 heads of 128 numbers of 2 bytes.
    assert rows[0]["bound_us"] == pytest.approx(8 * (64 + 21) * 1024 / 4.3e6)
    assert rows[2]["bound_us"] == pytest.approx((64 + 8 * 21) * 1024 / 4.3e6)
    shape = script.Shape(heads=14, kv_heads=2, width=128, prefix=32, responses=2, length=5)
    layer = script.Layer(shape, device=torch.device("cpu"), seed=0)
    own_only = script.Layer(dataclasses.replace(shape, prefix=0), device=torch.device("cpu"), seed=0)
    with pytest.raises(SystemExit, match="wrong: relative error"):
        script.check("wrong", script.sdpa(own_only)(), script.definition(layer))


def test_b5_compares_encoders_of_the_same_weights(tmp_path):
    script = importlib.import_module("b5_encode")
    script.main(["--tiny", "--json", str(tmp_path / "b5.json"), "--rounds", "1"])
    first, *rows = json.loads((tmp_path / "b5.json").read_text())["rows"]
    assert first["errors"]["ours, hf"] < 1e-2
    assert max(first["errors"].values()) < 3e-2
    assert [row["form"] for row in rows] == [
        "hf, 64 frames", "hf, 8 frames", "ours, 64 frames", "ours, 8 frames", "ours, 8 frames, from host"
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1
    assert all(row["frames_per_s"] == pytest.approx(12 / row["seconds"]) for row in rows)
    make_folder = importlib.import_module("steps").make_folder
    hf = script.HfEncoder(script.read_spec(make_folder(tmp_path / "other", layers=1, tiny=True) / "model")).to(
        torch.bfloat16
    )
    with pytest.raises(SystemExit, match="wrong: relative error"):  # other weights
        script.check(hf, {"wrong": copy.deepcopy(hf).apply(shuffle)}, script.random_frames(1, 56, torch.device("cpu")))


def shuffle(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.weight.data = module.weight.data.flip(0)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_rollout_times_the_other_ways_after_it_checked_them(tmp_path):
    """On a CPU: without vLLM's own weight transfer and cascade attention, which need GPUs."""
    command = [sys.executable, str(BENCHMARKS / "rollout.py"), "--tiny", "--baselines", "--json", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--overrides", "rollout.memory_share=0.1"], capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (row,) = json.loads((tmp_path / "out").read_text())["rows"]
    assert row["apart_cached_tokens"] == 0
    assert row["prefill_1_tokens"] == 1100
    assert row["prefill_8_tokens"] < 2 * 1100  # the other seven compute what is behind the last full block
    assert max(row["gap, a prefill of its own"], row["gap, prompt_embeds"]) < 0.01
    assert row["sync, one by one, ratio"] == pytest.approx(row["sync, one by one, s"] / row["sync_s"])
    stages = [line.partition("] ")[2] for line in done.stderr.splitlines() if line.startswith("[") and " s] " in line]
    assert stages[:4] == ["model", "engine start", "checks", "gap between the log-probabilities"]
    assert stages[-1] == "done"


def test_a_long_request_repeats_its_random_embeddings():
    script = importlib.import_module("rollout")
    request = script.request_of(5600, media=5376, width=8, vocab=50, group=2, seed=1, dtype=torch.bfloat16)
    request.check(group_size=2)
    assert len(request.ids_P) == 5600
    assert torch.equal(request.embeds_ND[4096:], request.embeds_ND[: 5376 - 4096])
    other = script.request_of(5600, media=5376, width=8, vocab=50, group=2, seed=2, dtype=torch.bfloat16)
    assert not torch.equal(request.embeds_ND, other.embeds_ND)
