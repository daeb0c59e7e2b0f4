"""The command line: what the user gave wrongly ends in one message on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalong.__main__ import FAILURES, PLANNED, main
from megalong.failures import MISTAKES

LINE = {"id": "1", "problem": "How many?", "answer": "<answer>3</answer>", "problem_type": "numerical", "videos": []}
RECIPE = """
model: {{path: {model}, dtype: float32, layer_spec: local, recompute: none}}
data: {{train: {folder}/train.jsonl, max_prompt_tokens: 400, max_response_tokens: 16, thinking: false}}
video: {{num_frames: 2, cache_gib: 0.1, frame_cache_gib: 0.1}}
rollout: {{engine: embedded, group_size: 2}}
sft: {{steps: 1, batch_size: 1}}
grpo: {{steps: 1, batch_size: 1}}
checkpoint: {{save_every: 0}}
logger: {{run_dir: {folder}/run, tensorboard: false}}
"""


@pytest.fixture
def recipe(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text(json.dumps(LINE) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_checkpoint, folder=tmp_path))
    return path


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line and return its one line on stderr."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"megalong {arguments[0]}: ")
    return lines[0]


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(
        verb in text
        for verb in ("sft", "grpo", "eval", "check-sync", "cache-embeddings", "plan", "make-demo-data", "report")
    )


@pytest.mark.parametrize("arguments", [[], ["train"], ["sft"], ["plan", "r.yaml", "--task", "dpo"]])
def test_misuse_prints_the_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: megalong" in capsys.readouterr().err


def test_help_and_plan_import_no_torch(recipe: Path) -> None:
    code = (
        "import sys; from megalong.__main__ import main; main(['plan', sys.argv[1]]); "
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_plan_takes_every_verb_that_works_on_a_model(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for task in PLANNED:
        assert main(["plan", str(recipe), "eval.manifest=e.jsonl", "video.cache_dir=d", "--task", task]) == 0
        assert "tower and projector weights" in capsys.readouterr().out
    assert "set video.cache_dir" in failure(capsys, "plan", str(recipe), "--task", "cache-embeddings")


@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_plan_prints_the_recipe_and_its_costs(recipe: Path, capsys: pytest.CaptureFixture[str], task: str) -> None:
    assert main(["plan", str(recipe), "video.num_frames=3", "--task", task]) == 0
    text = capsys.readouterr().out
    assert "num_frames: 3" in text
    assert "forward and backward" in text
    assert ("rollout: decode" in text) is (task == "grpo")


def test_plan_refuses_a_misspelt_reward(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "plan", str(recipe), "reward.weights.acuracy=1")
    assert "unknown key reward.weights.acuracy; did you mean reward.weights.accuracy?" in line
    assert main(["plan", str(recipe), "reward.weights.acuracy=1", "--task", "sft"]) == 0  # which reads no rewards


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_plan_says_what_vllm_cannot_cut(recipe: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    asked = ["gpus=4", "grpo.batch_size=4", f"rollout.engine={engine}", "rollout.engine_tp=16"]
    assert main(["plan", str(recipe), *asked]) == 2
    message = capsys.readouterr().err
    assert f"rollout.engine={engine}" in message
    assert "rollout.engine_tp=16 does not divide the model's 4 attention heads; choose a divisor of 4" in message
    assert main(["plan", str(recipe), *asked, "rollout.engine=embedded"]) == 0


CONFIG_ERRORS = {
    "misspelt key": (["grpo.stpes=3"], r"override 'grpo.stpes=3': unknown key grpo.stpes; did you mean grpo.steps?"),
    "unknown section": (["gropo.steps=3"], "did you mean grpo.steps?"),
    "wrong type": (["grpo.steps=many"], "grpo.steps must be an integer, got 'many'"),
    "wrong choice": (["grpo.advantage=ppo"], "grpo.advantage must be one of grpo, dr_grpo, rloo, reinforce_pp"),
    "no value": (["grpo.steps"], "expected section.key=value"),
    "out of bounds": (["grpo.steps=0"], "grpo.steps"),
    "too many processes asked for": (["parallel.tp=2"], "parallel.tp=2"),
    "prompt that cannot fit": (["data.max_prompt_tokens=10"], "data.max_prompt_tokens=10"),
    "misspelt reward": (
        ["reward.weights.acuracy=1"],
        "unknown key reward.weights.acuracy; did you mean reward.weights.accuracy?",
    ),
    "no model folder": (["model.path=/nowhere/model"], "/nowhere/model"),
    "cached embeddings of a trained tower": (["model.train_tower=true"], "video.cache_embeddings"),
}


CACHE_ERRORS = {
    "no folder": ([], "set video.cache_dir"),
    "a trained tower": (["model.train_tower=true", "video.cache_dir=d"], "model.train_tower=true makes stale"),
    "a GPU tier without a GPU": (["video.cache_dir=d", "video.cache_gpu_gib=1"], "video.cache_gpu_gib=1 needs a GPU"),
    "no manifest": (["video.cache_dir=d", "data.train=no.jsonl"], "no.jsonl: no such file"),
}


@pytest.mark.parametrize(("overrides", "message"), CACHE_ERRORS.values(), ids=CACHE_ERRORS.keys())
def test_cache_embeddings_errors(
    recipe: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in failure(capsys, "cache-embeddings", str(recipe), *overrides)


def test_cache_embeddings_of_a_folder_that_cannot_be_used(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for verb in ("cache-embeddings", "sft"):
        line = failure(capsys, verb, str(recipe), f"video.cache_dir={tmp_path}/file")
        assert line.endswith("file cannot be made: File exists")


@pytest.mark.parametrize("verb", ["sft", "grpo", "eval"])
def test_a_run_folder_that_cannot_be_used(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    (tmp_path / "file").write_text("")
    below = "/eval/train" if verb == "eval" else ""
    reasons = {f"{tmp_path}/file": "Not a directory" if below else "File exists", "/proc/megalong": "No such file"}
    for folder, reason in reasons.items():
        line = failure(capsys, verb, str(recipe), f"logger.run_dir={folder}", f"eval.manifest={tmp_path}/train.jsonl")
        assert f"logger.run_dir={folder}{below} cannot be made or written to: {reason}" in line


@pytest.mark.parametrize(("overrides", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS.keys())
def test_configuration_errors(
    recipe: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert message in failure(capsys, "grpo", str(recipe), *overrides)
    assert not (recipe.parent / "run").exists(), "nothing is written before the configuration is known to be right"


def test_a_recipe_that_cannot_be_read_is_in_the_summary_of_torchrun(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe.parent / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert "grpo.steps?" in failure(capsys, "grpo", str(recipe), "grpo.stpes=3")
    assert "did you mean grpo.steps?" in file.read_text()


def test_plan_names_the_families_before_it_looks_for_sizes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "plan", str(recipe), "gpus=1", "model.path=gone", "model.family=qwen2_5_v")
    assert "model.family='qwen2_5_v' is not known; one of ['longvila'," in line


def test_overrides_may_stand_behind_an_option(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "video.num_frames=3", "--task", "eval", "eval.manifest=e.jsonl"]) == 0
    text = capsys.readouterr().out
    assert "num_frames: 3" in text
    assert "manifest: e.jsonl" in text
    for wrong in (["plan", str(recipe), "--tsk", "eval"], ["report", str(recipe), "seed=3"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_a_demo_is_not_made_over_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "data.yaml"
    recipe.write_text("questions: {train_sft: 8, train_rl: 4, heldout: 2}\n")
    mine = {"model": "model/config.json", "heldout": "data/heldout.jsonl", "train": "data/train_sft.jsonl"}
    for name, file in mine.items():
        (path := tmp_path / name / file).parent.mkdir(parents=True)
        path.write_text("mine")
        line = failure(capsys, "make-demo-data", str(recipe), f"folder={tmp_path / name}")
        assert f"{path} is no demo's and would be overwritten" in line
        assert path.read_text() == "mine"
    (tmp_path / "file").write_text("")
    line = failure(capsys, "make-demo-data", str(recipe), f"folder={tmp_path}/file")
    assert "file cannot be made: File exists; choose another folder" in line


def test_make_demo_data_takes_a_recipe_and_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "data.yaml"
    recipe.write_text("questions: {train_sft: 8, train_rl: 4, heldout: 2}\n")
    made: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        "megalong.demo.make_demo", lambda config: made.append((config.folder, config.seed, config.questions.train_rl))
    )
    folder = tmp_path / "demo"
    assert main(["make-demo-data", str(recipe), f"folder={folder}", "seed=7", "questions.train_rl=3"]) == 0
    assert made == [(str(folder), 7, 3)]
    assert "folder has no value" in failure(capsys, "make-demo-data", str(recipe))
    line = failure(capsys, "make-demo-data", str(recipe), f"folder={folder}", "video.min_seconds=3")
    assert "unknown key video.min_seconds; did you mean videos.min_seconds?" in line
    assert not folder.exists()


def test_several_problems_are_listed_together(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", str(recipe), "grpo.steps=0", "rollout.temperature=-1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "megalong grpo: 2 problems in the configuration:"
    assert [line[:2] for line in lines[1:]] == ["- ", "- "]


def test_recipe_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no.yaml: cannot read the recipe" in failure(capsys, "sft", str(tmp_path / "no.yaml"))


def test_recipe_without_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("logger: {run_dir: x}\n")
    assert "model.path has no value" in failure(capsys, "sft", str(recipe))


MANIFESTS = {
    "bad JSON": ('{"id": "1",', "bad JSON"),
    "no answer": (json.dumps({key: value for key, value in LINE.items() if key != "answer"}), "'answer'"),
    "unknown problem type": (json.dumps({**LINE, "problem_type": "essay"}), "problem_type 'essay' is unknown"),
    "truth that is no number": (json.dumps({**LINE, "answer": "<answer>red</answer>"}), "answer 'red' cannot be read"),
    "empty": ("", "empty"),
}


@pytest.mark.parametrize(("content", "message"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifest_errors(recipe: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    (recipe.parent / "train.jsonl").write_text(content)
    line = failure(capsys, "grpo", str(recipe))
    assert message in line
    assert "train.jsonl" in line


def test_manifest_that_is_not_there(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gone.jsonl: no such file" in failure(capsys, "grpo", str(recipe), "data.train=gone.jsonl")


@pytest.mark.parametrize(
    ("verb", "key"), [("sft", "data.train"), ("grpo", "data.train"), ("eval", "eval.manifest")], ids=str
)
def test_no_manifest_at_all(recipe: Path, capsys: pytest.CaptureFixture[str], verb: str, key: str) -> None:
    recipe.write_text(recipe.read_text().replace(f"train: {recipe.parent}/train.jsonl, ", ""))
    line = failure(capsys, verb, str(recipe))
    assert "needs a manifest to" in line
    assert line.endswith(f": set {key}")


def test_the_configuration_is_checked_before_a_manifest_is_read(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, bad in (("sft", "sft.steps=0"), ("grpo", "grpo.steps=0"), ("eval", "eval.num_samples=0")):
        manifests = ["data.train=gone.jsonl", "eval.manifest=gone.jsonl"]
        assert f"{bad} must be at least 1" in failure(capsys, verb, str(recipe), *manifests, bad)


def test_wandb_refuses_before_anything_is_built(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.UsageError("No API key configured.")

    def build(*_: object, **__: object) -> None:
        pytest.fail("the model is built, or other processes are waited for, before W&B was asked")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr("megalong.run.make_layout", build)
    monkeypatch.setattr("megalong.run.build_model", build)
    for verb in ("sft", "grpo", "eval"):
        places = [f"eval.manifest={recipe.parent}/train.jsonl", f"logger.run_dir={recipe.parent}/{verb}"]
        line = failure(capsys, verb, str(recipe), "logger.wandb=true", *places)
        assert "logger.wandb=true, but W&B does not start the run (No API key configured.)" in line


@pytest.mark.parametrize("verb", ["sft", "grpo", "eval", "cache-embeddings"])
def test_videos_that_are_all_elsewhere_are_missed_before_anything_is_built(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    manifest = recipe.parent / "train.jsonl"
    rows = [{**LINE, "id": str(number), "videos": [f"{number}.mp4"]} for number in range(20)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = "eval" if verb == "eval" else "data"
    asked = [f"{section}.video_dir={tmp_path}/films", "video.cache_dir=d"]
    asked += [f"eval.manifest={manifest}"] if verb == "eval" else []
    line = failure(capsys, verb, str(recipe), *asked)
    assert f"{manifest}: none of its first 16 videos is there, {tmp_path}/films/0.mp4 for one" in line
    assert f"{section}.video_dir={tmp_path}/films" in line


UNREADABLE = (
    (
        "sft",
        ["sft.steps=2"],
        "step 2, skipped as 2 in a row: every sample was dropped, dropped.jsonl of the run folder says why; relative "
        "video paths start from data.video_dir",
    ),
    (
        "grpo",
        ["grpo.dynamic_sampling=true", "grpo.dynamic_sampling_max_batches=2"],
        "step 1: 2 batches of 1 prompts gave no group with both right and wrong answers, dropped.jsonl of the run "
        "folder says why; where samples cannot be used, look at data.video_dir",
    ),
)


@pytest.mark.parametrize(("verb", "overrides", "message"), UNREADABLE)
def test_a_run_whose_videos_cannot_be_read_says_where_the_reasons_are(
    recipe: Path, verb: str, overrides: list[str], message: str
) -> None:
    (recipe.parent / "train.jsonl").write_text(json.dumps({**LINE, "videos": ["torn.mp4"]}) + "\n")
    (recipe.parent / "torn.mp4").write_text("no video")
    command = [sys.executable, "-m", "megalong", verb, str(recipe), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "torn.mp4" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"megalong {verb}: {message}")
    rows = [json.loads(line) for line in (recipe.parent / "run" / "dropped.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == ({1, 2} if verb == "sft" else {1})  # that of the end, too
    assert all("torn.mp4" in row["reason"] for row in rows)


def test_chain_of_thought_needs_reasoning(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "sft", str(recipe), "data.thinking=true")
    assert "1 of 1 samples have no reasoning (first: '1')" in line


def test_report_of_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "none") in failure(capsys, "report", str(tmp_path / "none"))


# ---- errors that need the model: one other process runs all of them


def truncate_weights(model: Path) -> None:
    file = model / "vision_tower" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def widen_llm(model: Path) -> None:
    file = model / "llm" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 64}))


def remove_projector_weights(model: Path) -> None:
    (model / "mm_projector" / "model.safetensors").unlink()


def leave_alone(_: Path) -> None:
    """The model folder is good."""


MODEL_ERRORS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "truncated weights": (truncate_weights, [], "vision_tower/model.safetensors: not a whole safetensors file"),
    "sizes that differ": (widen_llm, [], "mlp.gate_proj.weight' is [48, 32], but the sizes in config.json"),
    "no projector": (remove_projector_weights, [], "mm_projector: neither model.safetensors nor"),
    "init_from nowhere": (leave_alone, ["model.init_from=/nowhere"], "model.init_from=/nowhere: neither a megatron"),
    "init_from a run": (leave_alone, ["model.init_from={empty_run}"], "/empty_run/checkpoints is there: try that"),
    "init_from a model": (leave_alone, ["model.init_from={model}"], "neither a megatron checkpoint nor a folder with"),
    "init_from an empty step": (leave_alone, ["model.init_from={torn}"], "torn/step_00000003: not a megatron"),
    "resume a torn checkpoint": (leave_alone, ["logger.run_dir={torn_run}"], "step_00000003: not a megatron"),
    "offload without a GPU": (
        leave_alone,
        ["model.offload_activations=true", "model.recompute=full"],
        "model.offload_activations=true needs a GPU",
    ),
    "offloaded states without a GPU": (leave_alone, ["optimizer.offload=true"], "optimizer.offload=true needs a GPU"),
    "te without a GPU": (leave_alone, ["model.layer_spec=te"], "model.layer_spec=te needs a GPU"),
    "unknown family": (leave_alone, ["model.family=llama"], "model.family='llama' is not known; one of ['longvila', "),
    "vllm": (leave_alone, ["rollout.engine=vllm"], "rollout.engine=vllm"),
}  # fmt: skip

CHILD = """
import contextlib, io, json, sys
from megalong.__main__ import main
from megalong.parallel.layout import destroy_layout
results = []
for arguments in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(arguments)
    destroy_layout()
    results.append((code, errors.getvalue()))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def model_failures(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    commands = []
    for change, overrides, _ in MODEL_ERRORS.values():
        folder = tmp_path_factory.mktemp("case")
        model = Path(shutil.copytree(tiny_checkpoint, folder / "model"))
        change(model)
        (folder / "train.jsonl").write_text(json.dumps(LINE) + "\n")
        (folder / "recipe.yaml").write_text(RECIPE.format(model=model, folder=folder))
        for torn in (folder / "torn", folder / "torn_run" / "checkpoints"):
            (torn / "step_00000003").mkdir(parents=True)
        (folder / "empty_run" / "checkpoints").mkdir(parents=True)
        places = {
            "model": model,
            "torn": folder / "torn",
            "torn_run": folder / "torn_run",
            "empty_run": folder / "empty_run",
        }
        commands.append(["grpo", str(folder / "recipe.yaml"), *(text.format(**places) for text in overrides)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD], input=json.dumps(commands), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(MODEL_ERRORS, results, strict=True))


@pytest.mark.parametrize("name", MODEL_ERRORS)
def test_model_and_checkpoint_errors(model_failures: dict[str, tuple[int, str]], name: str) -> None:
    code, errors = model_failures[name]
    last = errors.splitlines()[-1]
    assert code == 2
    assert "Traceback" not in errors
    assert last.startswith("megalong grpo: ")
    assert MODEL_ERRORS[name][2] in last


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_errors_whose_message_says_it_all_have_no_traceback(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise type(kind.__name__, (kind,), {"__init__": Exception.__init__, "__str__": Exception.__str__})("it failed")

    monkeypatch.setattr("megalong.grpo.train_grpo", fail)
    assert main(["grpo", str(recipe)]) == (1 if kind.__name__ in FAILURES else 2)
    assert capsys.readouterr().err.splitlines()[-1] == "megalong grpo: it failed"
