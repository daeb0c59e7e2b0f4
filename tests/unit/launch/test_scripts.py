"""Launch scripts parse, and their dry run is the command line they stand for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megalong.config.demo_data import load_demo_data
from megalong.config.load import load_config

ROOT = Path(__file__).parents[3]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), *sorted(LAUNCH.glob("*.sbatch")), ROOT / ".ci" / "run"]
TORCHRUN = ["py", "-m", "torch.distributed.run"]


def dry_run(script: str, *args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / script), *args],
        env={"PATH": os.environ["PATH"], "MEGALONG_DRY_RUN": "1", "PYTHON": "py", **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def commands(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def check_recipe_and_overrides(command: list[str], *, task: str) -> None:
    """The words after `-m megalong TASK` are a recipe and overrides that load."""
    at = command.index("megalong")
    assert command[at + 1] == task
    recipe, *overrides = command[at + 2 :]
    load_config(ROOT / recipe, overrides)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_on_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    if script.name != "lib.sh":  # sourced by the others
        assert "\nset -euo pipefail\n" in script.read_text()
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize("task", ["grpo", "sft"])
def test_8_gpu_scripts(task: str, tmp_path: Path) -> None:
    done = dry_run(f"{task}_7b_8xa100.sh", "/ckpt/my model", "train.jsonl", "seed=3", cwd=tmp_path)
    (command,) = commands(done)
    recipe = {"grpo": "grpo_7b_256f.yaml", "sft": "sft_7b.yaml"}[task]
    assert command == [
        *TORCHRUN,
        *("--standalone", "--nproc-per-node", "8", "--max-restarts", "0"),
        *("-m", "megalong", task, f"{LAUNCH}/recipes/{recipe}"),
        *("gpus=8", "model.path=/ckpt/my model", "data.train=train.jsonl", "seed=3"),
    ]
    check_recipe_and_overrides(command, task=task)


def test_8_gpu_script_takes_another_recipe_and_size() -> None:
    done = dry_run("grpo_7b_8xa100.sh", "m", "d", RECIPE="launch/recipes/grpo_7b_512f.yaml", GPUS="4", RESTARTS="3")
    (command,) = commands(done)
    assert command[4:8] == ["--nproc-per-node", "4", "--max-restarts", "3"]
    assert command[8:13] == ["-m", "megalong", "grpo", "launch/recipes/grpo_7b_512f.yaml", "gpus=4"]


def test_the_hour_script_is_the_8_gpu_script_with_another_recipe(tmp_path: Path) -> None:
    recipe = f"{LAUNCH}/recipes/grpo_qwen2_5_vl_3b_1h.yaml"
    (command,) = commands(dry_run("grpo_qwen2_5_vl_1h_8xa100.sh", "a model", "d", "seed=3", cwd=tmp_path, GPUS="4"))
    assert command == commands(dry_run("grpo_7b_8xa100.sh", "a model", "d", "seed=3", RECIPE=recipe, GPUS="4"))[0]
    check_recipe_and_overrides(command, task="grpo")


def test_8_gpu_script_leaves_gpus_to_engines() -> None:
    (command,) = commands(dry_run("grpo_7b_8xa100.sh", "m", "d", "parallel.tp=2", ENGINE_GPUS="2"))
    assert command[4:6] == ["--nproc-per-node", "6"]
    overrides = command[12:]
    assert overrides == [
        *("gpus=6", "model.path=m", "data.train=d"),
        *("rollout.placement=disaggregated", "rollout.engines_per_node=2", "parallel.tp=2"),
    ]
    check_recipe_and_overrides(command, task="grpo")


@pytest.mark.parametrize("as_first_process", [False, True])
def test_sigterm_at_a_script_is_the_run_s(as_first_process: bool, tmp_path: Path) -> None:
    """Also at the first process of a container, which no signal ends that it does not handle."""
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(
        f"#!/bin/bash\ntrap 'echo ended >> {log}; exit 7' TERM\necho $$ > {log}\n"
        "for _ in {1..300}; do sleep 0.1; done\n"
    )
    fake.chmod(0o755)
    container = ["unshare", "--pid", "--fork", "--kill-child"] if as_first_process else []
    if container and subprocess.run([*container, "true"], check=False, capture_output=True).returncode:
        pytest.skip("may not make a namespace of processes")
    process = subprocess.Popen(
        [*container, "bash", str(LAUNCH / "grpo_7b_8xa100.sh"), "m", "d"],
        env={"PATH": os.environ["PATH"], "PYTHON": str(fake)},
    )
    try:
        while not log.exists() or not log.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        run = process.pid
        if as_first_process:
            assert log.read_text() == "1\n"
            (run,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(run, signal.SIGTERM)
        assert process.wait(timeout=20) == 7
    finally:
        process.kill()
    assert log.read_text().splitlines()[1:] == ["ended"]


@pytest.mark.parametrize(
    ("visible", "gpus", "seen"),
    [(None, "4", "0,1,2,3"), ("4,5,6,7", "2", "4,5"), ("GPU-a,GPU-b", "2", "GPU-a,GPU-b"), ("3,1", "4", "3,1")],
)
@pytest.mark.parametrize("script", ["grpo_7b_8xa100.sh", "sft_7b_8xa100.sh", "demo.sh"])
def test_a_run_sees_the_gpus_it_may_use_alone(
    script: str, visible: str | None, gpus: str, seen: str, tmp_path: Path
) -> None:
    """An engine would take a free one beyond them."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" >> {tmp_path}/seen\n')
    fake.chmod(0o755)
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    out = tmp_path / "out"
    out.mkdir()
    done = dry_run(script, "m", "d", MEGALONG_DRY_RUN="0", PYTHON=str(fake), OUT=str(out), GPUS=gpus, **given)
    assert done.returncode == 0, done.stderr
    assert set((tmp_path / "seen").read_text().split()) == {seen}


@pytest.mark.parametrize("script", ["grpo_7b_8xa100.sh", "grpo_qwen2_5_vl_1h_8xa100.sh"])
@pytest.mark.parametrize(("gpus", "engines", "left"), [("8", "8", "0"), ("4", "8", "-4"), ("0", "0", "0")])
def test_engines_leave_a_gpu_to_the_trainer(script: str, gpus: str, engines: str, left: str) -> None:
    done = dry_run(script, "m", "d", GPUS=gpus, ENGINE_GPUS=engines)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"{LAUNCH}/{script}: ENGINE_GPUS={engines} leaves {left} of GPUS={gpus} to the trainer, which needs "
        "at least 1; lower ENGINE_GPUS or raise GPUS\n"
    )


@pytest.mark.parametrize(
    ("name", "variable", "value", "lowest"),
    [
        ("demo", "GPUS", "all", 0),
        ("demo", "GPUS", "-1", 0),
        ("demo", "RESTARTS", "x", 0),
        ("grpo_7b_8xa100", "GPUS", "all", 0),
        ("grpo_7b_8xa100", "ENGINE_GPUS", "half", 0),
        ("grpo_7b_8xa100", "ENGINE_GPUS", "-1", 0),
        ("sft_7b_8xa100", "GPUS", "0", 1),
        ("sft_7b_8xa100", "GPUS", "all", 1),
        ("sft_7b_8xa100", "RESTARTS", "-1", 0),
    ],
)
def test_a_variable_that_is_no_number_ends_a_script_before_its_first_command(
    name: str, variable: str, value: str, lowest: int
) -> None:
    done = dry_run(f"{name}.sh", "m", "d", **{variable: value})
    assert (done.returncode, done.stdout) == (2, "")
    wanted = f"{variable}={value} must be a whole number of at least {lowest}; change it\n"
    assert done.stderr == f"{LAUNCH}/{name}.sh: {wanted}"


@pytest.mark.parametrize("script", ["grpo_7b_8xa100.sh", "grpo_qwen2_5_vl_1h_8xa100.sh", "sft_7b_8xa100.sh"])
def test_missing_arguments_print_the_usage(script: str) -> None:
    done = dry_run(script, "only-a-model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"/{script} MODEL_PATH DATA [section.key=value ...]" in done.stderr


@pytest.mark.parametrize(
    ("args", "model", "data", "rest"),
    [
        ([], "runs/demo/model", "runs/demo/data/train_rl.jsonl", []),
        (["grpo.steps=2", "seed=3"], "runs/demo/model", "runs/demo/data/train_rl.jsonl", ["grpo.steps=2", "seed=3"]),
        (["m", "d.jsonl", "grpo.steps=2"], "m", "d.jsonl", ["grpo.steps=2"]),
    ],
)
def test_tiny_cpu_script(args: list[str], model: str, data: str, rest: list[str]) -> None:
    (command,) = commands(dry_run("grpo_tiny_cpu.sh", *args))
    words = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "0", "-m", "megalong", "grpo")
    assert command[:11] == [*TORCHRUN, *words]
    assert command[12:] == [f"model.path={model}", f"data.train={data}", "logger.run_dir=runs/tiny_grpo", *rest]
    check_recipe_and_overrides(command, task="grpo")


def test_slurm_script(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[01-04]" ] && printf "gpu01\\ngpu02\\n"\n')
    scontrol.chmod(0o755)
    spooled = tmp_path / "slurm_script"  # Slurm runs a copy from its own folder
    shutil.copy(LAUNCH / "slurm_multi_node.sbatch", spooled)
    slurm = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "gpu[01-04]",
        "SLURM_JOB_ID": "77",
    }
    args = ("grpo", "launch/recipes/grpo_7b_512f.yaml", "/ckpt", "train.jsonl", "grpo.batch_size=64")
    (command,) = commands(dry_run(str(spooled), *args, **slurm))
    at = command.index("--rdzv-id") + 1
    assert re.fullmatch(r"77-\d{10}", command[at])  # a launch's own, for all nodes
    command[at] = "77"
    assert command == [
        *("srun", "--kill-on-bad-exit=1", *TORCHRUN, "--nnodes", "4", "--nproc-per-node", "8", "--max-restarts", "0"),
        *("--rdzv-id", "77", "--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu01:29500"),
        *("-m", "megalong", "grpo", "launch/recipes/grpo_7b_512f.yaml", "gpus=32"),
        *("model.path=/ckpt", "data.train=train.jsonl", "grpo.batch_size=64"),
    ]
    check_recipe_and_overrides(command, task="grpo")
    # As many processes as Slurm gave GPUs; fewer where that was asked for; never more.
    for given, asked, processes in (("4", None, "4"), ("8", "4", "4"), (None, "2", "2")):
        gpus = {"SLURM_GPUS_ON_NODE": given, "GPUS_PER_NODE": asked}
        gpus = {name: value for name, value in gpus.items() if value is not None}
        (command,) = commands(dry_run(str(spooled), *args, **slurm, **gpus))
        assert command[command.index("--nproc-per-node") + 1] == processes
        assert f"gpus={4 * int(processes)}" in command
        assert (command[2:4] == ["env", "CUDA_VISIBLE_DEVICES=0,1,2,3"]) == (asked == "4")
    # Some of them for engines; one at least trains.
    (command,) = commands(dry_run(str(spooled), *args, **slurm, SLURM_GPUS_ON_NODE="8", ENGINE_GPUS="2"))
    assert command[command.index("--nproc-per-node") + 1] == "6"
    assert command[-6:] == [
        *("gpus=24", "model.path=/ckpt", "data.train=train.jsonl"),
        *("rollout.placement=disaggregated", "rollout.engines_per_node=2", "grpo.batch_size=64"),
    ]
    check_recipe_and_overrides(command, task="grpo")
    done = dry_run(str(spooled), *args, **slurm, GPUS_PER_NODE="4", ENGINE_GPUS="4")
    assert done.returncode == 2
    assert "ENGINE_GPUS=4 leaves 0 of GPUS_PER_NODE=4 to the trainer" in done.stderr
    for given, asked in (("4", "8"), ("8", "0"), ("8", "eight")):
        done = dry_run(str(spooled), *args, **slurm, SLURM_GPUS_ON_NODE=given, GPUS_PER_NODE=asked)
        assert done.returncode == 2
        assert f"GPUS_PER_NODE={asked} is how many GPUs to use" in done.stderr
        assert f"from 1 to the {given} GPUs that Slurm gave: change it, or sbatch --gpus-per-node" in done.stderr


def test_demo_runs_four_commands_with_one_seed_and_folder() -> None:
    done = dry_run("demo.sh", "grpo.steps=2", SEED="5", OUT="/tmp/elsewhere")
    words = [command for command in commands(done) if command[0] != "=="]
    remove, data, sft, grpo, report = words
    assert remove == ["rm", "-rf", "/tmp/elsewhere/sft", "/tmp/elsewhere/grpo"]
    assert data[:4] == ["py", "-m", "megalong", "make-demo-data"]
    made = load_demo_data(ROOT / data[4], data[5:])
    assert (made.folder, made.seed) == ("/tmp/elsewhere", 5)
    assert report == ["py", "-m", "megalong", "report", "/tmp/elsewhere"]
    for task, command in (("sft", sft), ("grpo", grpo)):
        words = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "0", "-m", "megalong")
        assert command[:10] == [*TORCHRUN, *words]
        check_recipe_and_overrides(command, task=task)
        assert {"seed=5", "data.seed=5", "model.path=/tmp/elsewhere/model", "grpo.steps=2"} < set(command)
        assert f"logger.run_dir=/tmp/elsewhere/{task}" in command
        # Nothing of the recipe's own folder is left.
        recipe, *overrides = command[command.index(task) + 1 :]
        config = load_config(ROOT / recipe, overrides)
        paths = (config.model.path, config.data.train, config.eval.manifest, config.logger.run_dir)
        assert all(str(path).startswith("/tmp/elsewhere/") for path in paths)
    assert "model.init_from=/tmp/elsewhere/sft/checkpoints" in grpo
    assert not Path("/tmp/elsewhere").exists()


def test_demo_notes_the_seconds_of_each_stage(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    done = dry_run("demo.sh", MEGALONG_DRY_RUN="0", PYTHON=str(fake), OUT=str(out))
    assert done.returncode == 0, done.stderr
    seconds = json.loads((out / "seconds.json").read_text())
    assert list(seconds) == ["data", "sft", "grpo"]
    assert all(0 <= value < 20 for value in seconds.values())


def test_demo_stops_at_the_first_failing_stage(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *"megalong sft"*) exit 3;; esac\n')
    fake.chmod(0o755)
    done = dry_run("demo.sh", MEGALONG_DRY_RUN="0", PYTHON=str(fake), OUT=str(tmp_path / "out"))
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["== data", "== sft"]
