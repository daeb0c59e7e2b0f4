"""Text families through the whole of SFT, GRPO and evaluation: questions without videos, a stock checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run_world
from megatron.core import parallel_state
from qwen_checkpoints import write_qwen
from safetensors.torch import load_file, save_file

from megalong.__main__ import main
from megalong.config.load import load_config
from megalong.config.plan import plan
from megalong.config.plan_text import render
from megalong.config.shapes import read_model_shape
from megalong.config.validate import validate
from megalong.data.manifest import ManifestError
from megalong.data.sequence import TEXT_THINKING_TEMPLATE
from megalong.metrics import read_jsonl
from megalong.models.longvila.demo_checkpoint import DemoModelSize, train_tokenizer
from megalong.run import read_samples

RECIPE = """
model: {{family: {family}, path: {model}, dtype: float32, layer_spec: local, recompute: none}}
data: {{train: {manifest}, max_prompt_tokens: 200, max_response_tokens: 40, pack_tokens: 600}}
rollout: {{engine: embedded, group_size: 4, batch_prompts: 3}}
# A penalty on length: random weights never earn another reward, and without spread nothing is learnt.
reward: {{weights: {{accuracy: 0.9, format: 0.1}}, overlong_buffer: 20}}
optimizer: {{lr: 3.0e-3, eps: 1.0e-4}}
sft: {{steps: 6, batch_size: 4}}
grpo: {{steps: 2, batch_size: 2, updates_per_batch: 2}}
checkpoint: {{save_every: 0}}
eval: {{manifest: {manifest}, at_end: true}}
logger: {{tensorboard: false}}
"""
FAMILIES = {"qwen2": False, "qwen2_5": True, "qwen3": True}
"""Family -> tied."""


def make_world(folder: Path, family: str, *, tied: bool) -> Path:
    """A manifest of sums, a checkpoint with a tokenizer of its own, and a recipe, which is returned."""
    rows = [
        {"problem": f"What is {a} + {b}?", "answer": f"{a + b}", "problem_type": "numerical", "videos": [],
         "reasoning": f"{a} and {b} make {a + b}."}
        for a, b in ((2, 3), (4, 4), (1, 6), (5, 2))
    ]  # fmt: skip
    folder.mkdir()
    manifest = folder / "sums.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = [TEXT_THINKING_TEMPLATE] * 3 + [f"{row['problem']} {row['reasoning']}" for row in rows]
    tokenizer = train_tokenizer(texts, size=DemoModelSize(vocab=400, max_positions=512))
    write_qwen(folder / "model", family, tokenizer=tokenizer, tie_word_embeddings=tied)
    if not tied:  # a long row for the end token, so that responses end
        file = folder / "model" / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"][tokenizer.convert_tokens_to_ids("<|im_end|>")] *= 4
        save_file(tensors, file, metadata={"format": "pt"})
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(family=family, model=folder / "model", manifest=manifest), encoding="utf-8")
    return recipe


def run_all(recipes: list[Path]) -> list[int]:
    """SFT and then GRPO from its weights, of every recipe in one process. Exit codes."""
    codes = []
    for recipe in recipes:
        run = recipe.parent / "run"
        codes.append(main(["sft", str(recipe), f"logger.run_dir={run}/sft"]))
        parallel_state.destroy_model_parallel()
        weights = f"model.init_from={run}/sft/checkpoints"
        codes.append(main(["grpo", str(recipe), f"logger.run_dir={run}/grpo", weights]))
        parallel_state.destroy_model_parallel()
    return codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder with its run."""
    folder = tmp_path_factory.mktemp("text")
    recipes = {name: make_world(folder / name, name, tied=tied) for name, tied in FAMILIES.items()}
    (codes,) = run_world(1, run_all, list(recipes.values()), folder=folder / "world")
    assert codes == [0] * 6, (folder / "world" / "rank0.log").read_text()[-3000:]
    return {name: recipe.parent / "run" for name, recipe in recipes.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_learns_and_grpo_trains_what_it_samples(runs: dict[str, Path], family: str) -> None:
    losses = [row["loss"] for row in read_jsonl(runs[family] / "sft" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    steps = [row for row in read_jsonl(runs[family] / "grpo" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [2, 4]
    for row in steps:
        assert row["sampler_gap_max"] < 1e-4, "the sampler's log-probabilities are not the trainer's"
        assert row["grad_norm"] > 1e-4
        assert (row["skipped"], row["dropped"]) == (0, 0)
    report = json.loads((runs[family] / "grpo" / "eval_end.json").read_text())
    assert report["overall"]["num_questions"] == 4
    asked = read_jsonl(runs[family] / "grpo" / "samples.jsonl")
    assert all(row["question"].startswith("What is") for row in asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_and_validation_read_the_json_alone(tmp_path: Path, family: str) -> None:
    recipe = make_world(tmp_path / family, family, tied=FAMILIES[family])
    (tmp_path / family / "model" / "model.safetensors").unlink()
    config = load_config(recipe, [f"logger.run_dir={tmp_path}/run"])
    shape = read_model_shape(config.model.path, family=family, video=config.video)
    validate(config, task="grpo", world_size=1, model=shape)
    result = plan(config, "grpo", shape)
    assert (result.lengths.frames, result.lengths.prompt, result.lengths.shared) == (0, 200, 200 + 4 * 40)
    assert not any("vision" in part or "tower" in part for part in (*result.memory, *result.flops))
    text = render(result)
    assert "tokens per prompt" in text
    assert "frame" not in text.split("# lengths")[1]


def test_samples_with_videos_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    recipe = make_world(tmp_path / "w", "qwen3", tied=True)
    manifest = tmp_path / "w" / "sums.jsonl"
    row = json.loads(manifest.read_text().splitlines()[0])
    manifest.write_text(json.dumps({**row, "videos": ["a.mp4"], "id": "one"}), encoding="utf-8")
    config = load_config(recipe, [f"logger.run_dir={tmp_path}/run"])
    with pytest.raises(ManifestError, match=r"1 of 1 samples have videos \(first: 'one'\).*model.family=qwen3 has no"):
        read_samples(config, manifest=config.data.train, video_dir=None, thinking_targets=False)


def test_a_vision_part_cannot_be_trained(tmp_path: Path) -> None:
    recipe = make_world(tmp_path / "w", "qwen2", tied=False)
    config = load_config(recipe, [f"logger.run_dir={tmp_path}/run", "model.train_tower=true"])
    shape = read_model_shape(config.model.path, family="qwen2", video=config.video)
    with pytest.raises(ValueError, match="model.train_tower=true, but model.family=qwen2 has no vision"):
        validate(config, task="sft", world_size=1, model=shape)
