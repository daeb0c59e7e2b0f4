"""Every recipe loads, validates and plans; what the names promise holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalong.config.demo_data import load_demo_data
from megalong.config.load import load_config, save_config
from megalong.config.longvila_shape import read_longvila_shape
from megalong.config.model_shape import ModelShape
from megalong.config.plan import GIB, plan, planned_processes, shape_for_planning
from megalong.config.plan_text import BUDGETS_GIB, render
from megalong.config.tree import Aggregation, KlEstimator, LayerSpec, RolloutEngine
from megalong.config.validate import Task, validate
from megalong.models.longvila.demo_checkpoint import make_demo_checkpoint

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "launch" / "recipes"
DEMO_DATA = "demo_data.yaml"
NAMES = sorted(path.name for path in RECIPES.glob("*.yaml") if path.name != DEMO_DATA)
HOURS = ["grpo_7b_3600f.yaml", "grpo_qwen2_5_vl_3b_1h.yaml"]
SEVEN_B = [name for name in NAMES if "7b" in name and name not in HOURS]
DEMO = [name for name in NAMES if name.startswith("demo")]


def task_of(name: str) -> Task:
    return "sft" if "sft" in name else "grpo"


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_checkpoint(tmp_path_factory.mktemp("demo") / "model", texts=["a red ball moves left"] * 4)


def test_every_recipe_is_covered() -> None:
    assert set(NAMES) == {*SEVEN_B, *HOURS, *DEMO, "grpo_qwen_math.yaml"}
    assert {"base_7b.yaml", "grpo_7b_256f.yaml", "grpo_7b_512f.yaml", "grpo_7b_dapo.yaml", "sft_7b.yaml"} == set(
        SEVEN_B
    )
    assert set(DEMO) == {"demo_sft.yaml", "demo_grpo.yaml"}


def test_demo_data_is_what_the_training_stages_read() -> None:
    data = load_demo_data(RECIPES / DEMO_DATA)
    sft, grpo = (load_config(RECIPES / f"demo_{stage}.yaml") for stage in ("sft", "grpo"))
    assert sft.model.path == grpo.model.path == f"{data.folder}/model"
    assert sft.data.train == f"{data.folder}/data/train_sft.jsonl"
    assert grpo.data.train == f"{data.folder}/data/train_rl.jsonl"
    assert sft.eval.manifest == grpo.eval.manifest == f"{data.folder}/data/heldout.jsonl"


@pytest.mark.parametrize("name", SEVEN_B)
def test_7b_recipes_fit_8_gpus_of_80_gb(name: str) -> None:
    config = load_config(RECIPES / name)
    shape, note = shape_for_planning(config)
    assert note.endswith("launch/shapes/longvila_7b")
    validate(config, task=task_of(name), world_size=planned_processes(config), model=shape)
    result = plan(config, task_of(name), shape, note=note)
    assert (result.layout.world_size, result.layout.tp, result.layout.dp) == (8, 4, 2)
    assert result.lengths.tokens_per_frame == 257
    assert result.memory_total < BUDGETS_GIB["80 GB (A100, H100)"] * GIB
    assert "does NOT fit" not in render(result)


@pytest.mark.parametrize(
    ("name", "shipped", "tokens", "replicas"),
    [
        ("grpo_7b_3600f.yaml", "longvila_7b", 3600 * 257, 1),
        ("grpo_qwen2_5_vl_3b_1h.yaml", "qwen2_5_vl_3b", 3600 * 64, 2),
    ],
)
def test_an_hour_at_one_frame_a_second_fits_8_gpus_of_80_gb(
    name: str, shipped: str, tokens: int, replicas: int
) -> None:
    config = load_config(RECIPES / name)
    shape, note = shape_for_planning(config)
    assert note.endswith(f"launch/shapes/{shipped}")
    validate(config, task="grpo", world_size=planned_processes(config), model=shape)
    result = plan(config, "grpo", shape, note=note)
    assert (result.layout.world_size, result.layout.dp) == (8, replicas)
    assert result.lengths.frames * result.lengths.tokens_per_frame == tokens
    assert result.lengths.copies_per_pack == 1
    assert result.memory_total < BUDGETS_GIB["80 GB (A100, H100)"] * GIB
    text = render(result)
    assert "colocated on 80 GB" in text
    assert "raise it" not in text  # the longest phase, at an A100's peak, against parallel.timeout_minutes
    assert "does NOT fit" not in text


def test_text_recipe_plans_without_vision_and_fits_8_gpus_of_80_gb() -> None:
    config = load_config(RECIPES / "grpo_qwen_math.yaml")
    shape, note = shape_for_planning(config)
    assert note.endswith("launch/shapes/qwen2_5_7b")
    validate(config, task="grpo", world_size=planned_processes(config), model=shape)
    result = plan(config, "grpo", shape, note=note)
    assert (result.layout.world_size, result.layout.tp, result.layout.dp) == (8, 4, 2)
    assert (result.lengths.shared, result.lengths.copies_per_pack) == (2048 + 8 * 4096, 1)
    assert result.memory_total < BUDGETS_GIB["80 GB (A100, H100)"] * GIB
    assert result.videos is None
    assert not any(word in render(result).split("# parallel")[1] for word in ("frame", "embedding", "tower"))


@pytest.mark.parametrize("name", DEMO)
@pytest.mark.parametrize("world_size", [1, 2])
def test_demo_recipes_suit_the_demo_model(name: str, world_size: int, demo_model: Path) -> None:
    config = load_config(RECIPES / name, [f"model.path={demo_model}"])
    shape: ModelShape = read_longvila_shape(demo_model)
    validate(config, task=task_of(name), world_size=world_size, model=shape)
    result = plan(config, task_of(name), shape)
    assert result.memory_total < 4 * GIB
    assert "total per CPU process" in render(result)


def test_7b_grpo_settings() -> None:
    config = load_config(RECIPES / "grpo_7b_256f.yaml")
    assert (config.grpo.clip_low, config.grpo.clip_high, config.grpo.kl_coef) == (0.2, 0.28, 0.01)
    assert config.grpo.kl_estimator is KlEstimator.k3
    assert (config.optimizer.lr, config.rollout.group_size, config.video.num_frames) == (1e-6, 8, 256)
    assert dict(config.reward.weights) == {"accuracy": 0.9, "format": 0.1}
    assert (config.model.layer_spec, config.rollout.engine) == (LayerSpec.te, RolloutEngine.auto)
    assert config.parallel.sequence_parallel is True
    longer = load_config(RECIPES / "grpo_7b_512f.yaml")
    assert (longer.video.num_frames, longer.grpo.steps) == (512, config.grpo.steps)


def test_dapo_differs_from_grpo_only_where_it_says(tmp_path: Path) -> None:
    config = load_config(RECIPES / "grpo_7b_dapo.yaml")
    assert (config.grpo.kl_coef, config.grpo.aggregation) == (0.0, Aggregation.token)
    assert config.grpo.dynamic_sampling is True
    undo = [
        "grpo.kl_coef=0.01",
        "grpo.aggregation=sequence",
        "grpo.dynamic_sampling=false",
        "reward.overlong_buffer=0",
        "logger.run_dir=runs/grpo_7b_256f",
    ]
    assert load_config(RECIPES / "grpo_7b_dapo.yaml", undo) == load_config(RECIPES / "grpo_7b_256f.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_recipe_loads_as_itself(name: str, tmp_path: Path) -> None:
    config = load_config(RECIPES / name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_demo_stages_agree_on_model_and_held_out_questions() -> None:
    sft, grpo = (load_config(RECIPES / f"demo_{stage}.yaml") for stage in ("sft", "grpo"))
    assert sft.model.path == grpo.model.path
    assert sft.eval.manifest == grpo.eval.manifest
    assert grpo.model.init_from == f"{sft.logger.run_dir}/checkpoints"
    assert (sft.eval.at_start, sft.eval.at_end, grpo.eval.at_end) == (True, True, True)
