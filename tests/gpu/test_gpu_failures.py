"""Failures on real GPUs: no memory left, a rank or an engine killed, a rank that hangs while another waits in NCCL."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from faulty_runs import command_line
from harness import DemoWorld, World, make_demo_world
from launched import kill_engine, run_script

from megalong.metrics import read_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
PLAIN = ("model.attention=plain", "video.decoder=pyav")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> DemoWorld:
    return make_demo_world(tmp_path_factory.mktemp("demo"))


def test_out_of_memory_says_how_much_there_is_and_what_to_change(demo: DemoWorld, tmp_path: Path) -> None:
    overrides = ("sft.steps=3", *PLAIN)
    fault = "real_gpu_out_of_memory_in_step@2"
    world = World(1, command_line, demo, tmp_path / "run", "sft", overrides, fault, folder=tmp_path)
    assert world.exit_codes() == [1], world.log()
    (line,) = [line for line in world.log().splitlines() if line.startswith("megalong")]
    assert line.startswith("megalong sft: rank 0, phase 'train': the GPU is out of memory; of ")
    assert "Tried to allocate" in line
    assert "model.recompute=full (now none), lower data.pack_tokens=1100" in line
    total = torch.cuda.mem_get_info()[1] / (1 << 30)
    # Little is taken: what is too much is one tensor.
    assert re.search(rf"of {total:.1f} GiB, tensors take 0\.\d \(at most 0\.\d so far\)", line)


@two_gpus
def test_a_rank_killed_under_nccl_starts_again(demo: DemoWorld, tmp_path: Path) -> None:
    """Those that wait for it in NCCL are ended by torchrun, after 20 s here."""
    run_dir = tmp_path / "run"
    args = [str(demo.folder / "model"), str(demo.rl), *demo.overrides(run_dir, task="grpo"), *PLAIN]
    settings = {"RESTARTS": "1", "GPUS": "2", "RECIPE": str(demo.recipe), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
    more = ("grpo.steps=20", "checkpoint.save_every=1")
    settings |= {"CUDA_VISIBLE_DEVICES": "0,1"}
    code, log = run_script("grpo_7b_8xa100.sh", *args, *more, folder=tmp_path, victim=1, **settings)
    assert code == 0, log[-8000:]
    assert "exitcode: -9" in log
    assert log.count("step 1 | loss") == 1  # it did not start over
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == list(range(1, 21))


@two_gpus
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_killed_engine_ends_the_attempt_and_the_next_one_starts_another(demo: DemoWorld, tmp_path: Path) -> None:
    gpus = {"GPUS": "2", "ENGINE_GPUS": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    log = kill_engine(demo, tmp_path, *PLAIN, "model.dtype=bfloat16", steps=60, **gpus)
    assert "GPUs 1, exit code -9" in log


@two_gpus
def test_a_rank_that_hangs_ends_with_its_stacks_and_so_does_the_one_that_waits_in_nccl(
    demo: DemoWorld, tmp_path: Path
) -> None:
    overrides = ("sft.steps=3", "parallel.timeout_minutes=1", *PLAIN)
    world = World(
        2, command_line, demo, tmp_path / "run", "sft", overrides, "hang_last_rank_in_step@2", folder=tmp_path
    )
    assert world.exit_codes() == [3, 3], world.log()
    stacks = [(tmp_path / "run" / f"stuck_rank{rank}.txt").read_text() for rank in range(2)]
    assert "in hang\n" in stacks[1]
    assert "in hang\n" not in stacks[0]
    assert all(text.startswith("phase 'train' for ") and "in train_step\n" in text for text in stacks)
