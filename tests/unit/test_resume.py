"""A model is known wherever it is, and one run at a time writes a run folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megalong import resume
from megalong.config.errors import ConfigError
from megalong.config.load import load_config, save_config
from megalong.metrics import notices_shown
from megalong.resume import Origin, changed_settings, fingerprint, lock_folder, origin_of, resumed_origin


def test_a_run_folder_is_held_by_one_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    with lock_folder(run_dir):
        with pytest.raises(
            ConfigError, match=rf"logger\.run_dir={run_dir} is written by process {os.getpid()} of .*end"
        ):
            lock_folder(run_dir)
        lock_folder(tmp_path / "runs" / "b").close()
    lock_folder(run_dir).close()


def test_a_run_folder_that_cannot_be_made_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"logger\.run_dir=.*/file cannot be made or written to: File exists"):
        lock_folder(tmp_path / "file")


def test_a_model_is_the_same_where_it_has_moved_and_another_with_other_weights(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    assert fingerprint(moved) == fingerprint(tiny_checkpoint)
    file = next(moved.rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(moved) != fingerprint(tiny_checkpoint)


def test_settings_that_changed_since_the_last_start_are_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: m}}\nlogger: {{run_dir: {tmp_path}}}\n")
    assert changed_settings(load_config(recipe)) == [], "a first start"
    save_config(load_config(recipe), tmp_path / "config.yaml")
    assert changed_settings(load_config(recipe)) == []
    changed = ["optimizer.lr=0.1", "model.init_from=a", "data.train=t"]
    want = ["model.init_from=a (was None)", "optimizer.lr=0.1 (was 1e-06)"]
    assert changed_settings(load_config(recipe, changed)) == want
    (tmp_path / "config.yaml").write_text("sft: {steps: 3}\n")
    assert changed_settings(load_config(recipe)) == ["sft.steps=100 (was 3)"]
    for damaged in (b"{", b"- a\n", b"\xff\xfe"):
        (tmp_path / "config.yaml").write_bytes(damaged)
        assert changed_settings(load_config(recipe)) == []


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_process_reads_what_changed(
    is_main: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {tiny_checkpoint}}}\ndata: {{train: t}}\nlogger: {{run_dir: {tmp_path}}}\n")
    config, read = load_config(recipe), []
    origin = origin_of(config, "sft")
    monkeypatch.setattr(resume, "read_extra", lambda _: origin.to_extra())
    monkeypatch.setattr(resume, "changed_settings", lambda config: read.append(config) or ["sft.steps=100 (was 3)"])
    with notices_shown(is_main=is_main):
        assert resumed_origin(tmp_path, config, "sft", keeps_reference=False) == origin
    assert len(read) == is_main
    assert ("goes on with other settings: sft.steps=100 (was 3)" in capsys.readouterr().err) is is_main


@pytest.mark.parametrize("says", [True, False], ids=["origin", "no origin"])
def test_a_step_between_the_rounds_of_grpo_is_refused(
    says: bool, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rounds would pass the last step, and leave out all that follows that one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{path: {tiny_checkpoint}}}\ndata: {{train: t}}\nlogger: {{run_dir: {tmp_path}}}\n")
    config = load_config(recipe, ["grpo.updates_per_batch=4"])
    origins = {task: origin_of(config, task) for task in ("grpo", "sft")}

    def resumed(step: int, task: str) -> Origin:
        monkeypatch.setattr(resume, "read_extra", lambda _: origins[task].to_extra() if says else {})
        return resumed_origin(tmp_path / f"step_{step:08d}", config, task, keeps_reference=False)

    with pytest.raises(ConfigError, match=r"step_00000006: step 6 is no multiple of grpo\.updates_per_batch=4, .*set "):
        resumed(6, "grpo")
    assert resumed(8, "grpo") == origins["grpo"]
    assert resumed(6, "sft") == origins["sft"]
