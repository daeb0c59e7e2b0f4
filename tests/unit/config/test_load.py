"""load_config: merging, parents, overrides, and errors that name key and source."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf.errors import ReadonlyConfigError

from megalong.config.errors import ConfigError
from megalong.config.load import known_keys, load_config, save_config
from megalong.config.tree import Dtype, KlEstimator, Recompute

MINIMAL = "model: {path: m}\nlogger: {run_dir: r}\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_recipe_values_override_defaults_and_the_rest_stays(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", MINIMAL + "grpo: {clip_high: 0.3}\noptimizer: {lr: 2e-6}\nseed: 7\n")
    config = load_config(recipe, [])
    assert (config.grpo.clip_high, config.grpo.clip_low, config.seed) == (0.3, 0.2, 7)
    assert config.optimizer.lr == 2e-6
    assert config.model.dtype is Dtype.bfloat16


def test_overrides_come_last_and_are_typed(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", MINIMAL + "grpo: {clip_high: 0.3}\n")
    overrides = ["grpo.clip_high=0.4", "model.recompute=none", "grpo.kl_estimator=k1", "optimizer.lr=1e-5"]
    config = load_config(recipe, [*overrides, "eval.manifest=null", "grpo={steps: 3, batch_size: 4}"])
    assert config.grpo.clip_high == 0.4
    assert config.model.recompute is Recompute.none
    assert config.grpo.kl_estimator is KlEstimator.k1
    assert config.optimizer.lr == 1e-5
    assert config.eval.manifest is None
    assert (config.grpo.steps, config.grpo.batch_size) == (3, 4)


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", MINIMAL)
    assert load_config(recipe, ["data.train=runs/lr=1/train.jsonl"]).data.train == "runs/lr=1/train.jsonl"


def test_parents_are_relative_to_the_child_and_apply_in_order(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", MINIMAL + "seed: 1\nparallel: {tp: 2}\ngrpo: {steps: 10}\n")
    write(tmp_path, "sub/mid.yaml", "base: ../root.yaml\nseed: 2\ngrpo: {batch_size: 16}\n")
    leaf = write(tmp_path, "sub/deeper/leaf.yaml", "base: ../mid.yaml\nseed: 3\n")
    config = load_config(leaf, [])
    assert (config.seed, config.parallel.tp, config.grpo.steps, config.grpo.batch_size) == (3, 2, 10, 16)


def test_parents_in_a_circle_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    b = write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(b, [])


def test_a_mapping_replaces_reward_weights_and_a_dotted_override_adds_one(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", MINIMAL + "reward: {weights: {accuracy: 1.0}}\n")
    assert dict(load_config(recipe, []).reward.weights) == {"accuracy": 1.0}
    config = load_config(recipe, ["reward.weights.format=0.5"])
    assert dict(config.reward.weights) == {"accuracy": 1.0, "format": 0.5}


def test_misspelt_key_in_a_parent_names_the_parent_and_the_nearest_key(tmp_path: Path) -> None:
    parent = write(tmp_path, "parent.yaml", MINIMAL + "grpo: {clip_hihg: 0.3}\n")
    child = write(tmp_path, "child.yaml", "base: parent.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load_config(child, [])
    assert str(caught.value) == f"{parent}: unknown key grpo.clip_hihg; did you mean grpo.clip_high?"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("grpo.batchsize=4", "grpo.batch_size"),
        ("gropo.batch_size=4", "grpo.batch_size"),
        ("optimizer.group_size=4", "rollout.group_size"),
        ("lr=1", "optimizer.lr"),
        ("modle.path=x", "model.path"),
        ("sede=3", "seed"),
    ],
)
def test_misspelt_override_names_the_override_and_the_nearest_key(tmp_path: Path, override: str, nearest: str) -> None:
    recipe = write(tmp_path, "r.yaml", MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    key = override.partition("=")[0]
    assert str(caught.value) == f"override '{override}': unknown key {key}; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.tp=two", "parallel.tp must be an integer, got 'two'"),
        ("parallel.tp=2.5", "parallel.tp must be an integer, got 2.5"),
        ("parallel.tp=true", "parallel.tp must be an integer, got True"),
        ("optimizer.lr=fast", "optimizer.lr must be a number, got 'fast'"),
        ("data.shuffle=perhaps", "data.shuffle must be true or false, got 'perhaps'"),
        ("grpo.kl_estimator=k9", "grpo.kl_estimator must be one of k1, k2, k3, got 'k9'"),
        ("model.dtype=float16", "model.dtype must be one of float32, bfloat16, got 'float16'"),
        ("seed=null", "seed must be an integer, got None"),
        ("reward.weights={accuracy: high}", "reward.weights must be a mapping of names to numbers"),
        ("reward.weights.accuracy=high", "reward.weights.accuracy must be a number, got 'high'"),
        ("grpo=3", "grpo is a section, expected a mapping, got 3"),
        ("seed.x=3", "unknown key seed.x; seed is a single value"),
        ("grpo.steps", "expected section.key=value"),
        ("data.train={a", "not valid YAML"),
    ],
)
def test_wrong_value_names_override_key_and_expectation(tmp_path: Path, override: str, expected: str) -> None:
    recipe = write(tmp_path, "r.yaml", MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    assert str(caught.value).startswith(f"override '{override}': ")
    assert expected in str(caught.value)


def test_missing_values_are_all_named(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", "seed: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [])
    assert [p.split(": ")[1].split(" ")[0] for p in caught.value.problems] == ["model.path", "logger.run_dir"]


@pytest.mark.parametrize("text", ["- a\n- b\n", "grpo: {steps: 1\n", "seed: 1\nseed: 2\n"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    recipe = write(tmp_path, "r.yaml", text)
    with pytest.raises(ConfigError, match="r.yaml: "):
        load_config(recipe, [])


def test_a_recipe_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_bytes("seed: 3 # Gr\u00f6\u00dfe\n".encode("latin-1"))
    for recipe in (tmp_path / "parent.yaml", write(tmp_path, "r.yaml", "base: parent.yaml\n")):
        with pytest.raises(ConfigError) as caught:
            load_config(recipe, [])
        want = f"{tmp_path}/parent.yaml: not UTF-8 text, it holds the byte 0xf6; save the file as UTF-8"
        assert str(caught.value) == want


def test_an_absent_parent_is_named(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", "base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot read the recipe: No such file"):
        load_config(recipe, [])


def test_interpolation_is_resolved_and_checked(tmp_path: Path) -> None:
    recipe = write(tmp_path, "r.yaml", MINIMAL + "data: {video_dir: /v}\neval: {video_dir: '${data.video_dir}'}\n")
    assert load_config(recipe, []).eval.video_dir == "/v"
    with pytest.raises(ConfigError, match="interpolation"):
        load_config(recipe, ["seed=${data.video_dir}"])


def test_the_result_is_read_only(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "r.yaml", MINIMAL), [])
    with pytest.raises(ReadonlyConfigError):
        config.grpo.steps = 5
    assert config.grpo.steps == 100


def test_save_then_load_gives_the_same_configuration(tmp_path: Path) -> None:
    text = "reward: {weights: {accuracy: 1.0}}\nvideo: {fps: 1.5}\ngrpo: {kl_estimator: k2}\n"
    recipe = write(tmp_path, "r.yaml", MINIMAL + text)
    config = load_config(recipe, ["model.init_from=ckpt"])
    target = tmp_path / "run" / "config.yaml"
    save_config(config, target)
    assert load_config(target, []) == config
    assert [file.name for file in target.parent.iterdir()] == ["config.yaml"]


def test_known_keys_are_the_leaves_of_the_tree() -> None:
    keys = known_keys()
    assert keys[:3] == ("seed", "gpus", "model.family")
    assert "reward.weights" in keys
    assert "reward" not in keys
