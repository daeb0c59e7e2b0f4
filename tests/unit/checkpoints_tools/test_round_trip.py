"""Hugging Face -> Megatron -> Hugging Face gives every bit back, and both sides load where they should."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch
from harness import run_world
from safetensors.torch import load_file
from tiny_checkpoints import all_tensors, edit_weights, split_llm
from transformers import Qwen2ForCausalLM, SiglipVisionModel

from checkpoints_tools.compare import verify
from checkpoints_tools.convert import hf_to_megatron, megatron_to_hf
from checkpoints_tools.describe import describe
from checkpoints_tools.export import with_dtype
from megalong.config.tree import Dtype, ModelConfig, OptimizerConfig, Recompute
from megalong.engine.build import build_model
from megalong.engine.checkpoint import load_weights, save_checkpoint
from megalong.engine.trainer import Trainer
from megalong.engine.weights_io import export_weights
from megalong.parallel.layout import ParallelLayout, make_layout
from megalong.records import tensor_checksums


def make_variant(hf: Path, *, dtype: torch.dtype, tied: bool, prefix: bool) -> None:
    for file in hf.rglob("*.safetensors"):
        edit_weights(
            file,
            lambda tensors: {
                (name if prefix else name.removeprefix("vision_model.")): tensor.to(dtype)
                for name, tensor in tensors.items()
                if not (tied and name == "lm_head.weight")
            },
        )
    config = json.loads((hf / "llm/config.json").read_text())
    (hf / "llm/config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "prefix"), [(False, True), (True, False)])
def test_round_trip_gives_back_every_bit_and_every_other_file(
    hf: Path, tmp_path: Path, dtype: torch.dtype, tied: bool, prefix: bool
) -> None:
    make_variant(hf, dtype=dtype, tied=tied, prefix=prefix)
    assert hf_to_megatron(hf, tmp_path / "megatron").dtypes == (str(dtype).removeprefix("torch."),)
    done = megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    # Tower block 2 of 3 (16 tensors) and post_layernorm (2).
    assert (done.tensors, done.carried_tensors) == (68 - tied, 18)
    before, after = all_tensors(hf), all_tensors(tmp_path / "back")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor, after[name]), name
    others = sorted(
        str(path.relative_to(hf)) for path in hf.rglob("*") if path.is_file() and path.suffix[1:5] != "safe"
    )
    assert "modeling_vila.py" in others
    assert filecmp.cmpfiles(hf, tmp_path / "back", others, shallow=False) == (others, [], [])
    assert len(others) + 3 == len([path for path in (tmp_path / "back").rglob("*") if path.is_file()])


def test_export_loads_in_stock_classes_and_keeps_the_shards_of_like(hf: Path, tmp_path: Path) -> None:
    split_llm(hf)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    index = json.loads((tmp_path / "back/llm/model.safetensors.index.json").read_text())
    source = json.loads((hf / "llm/model.safetensors.index.json").read_text())
    assert index["weight_map"] == source["weight_map"]
    llm_bytes = sum(tensor.nbytes for name, tensor in all_tensors(hf).items() if name.startswith("llm/"))
    assert index["metadata"] == {"total_size": llm_bytes, "note": "kept"}
    for kind, sub in ((Qwen2ForCausalLM, "llm"), (SiglipVisionModel, "vision_tower")):
        model, info = kind.from_pretrained(tmp_path / "back" / sub, output_loading_info=True)
        assert {name: set(found) for name, found in info.items() if found} == {}
        want = kind.from_pretrained(hf / sub).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, want[name]), name


def test_shard_size_cuts_every_folder_anew(hf: Path, megatron: Path, tmp_path: Path) -> None:
    megatron_to_hf(megatron, hf, tmp_path / "back", shard_bytes=10_000)
    for sub in ("llm", "vision_tower"):
        index = json.loads((tmp_path / "back" / sub / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        count = len(files)
        assert count > 1
        assert files == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for file in files:
            tensors = load_file(tmp_path / "back" / sub / file)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 10_000
    assert not (tmp_path / "back/llm/model.safetensors").exists()
    assert verify(hf, tmp_path / "back").equal


def test_dtype_casts_the_model_and_nothing_else(hf: Path, tmp_path: Path) -> None:
    hf_to_megatron(hf, tmp_path / "megatron", dtype=torch.bfloat16)
    done = megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    assert done.notes[0] == "llm/config.json says dtype float32, the tensors are bfloat16"
    before, after = all_tensors(hf), all_tensors(tmp_path / "back")
    for name, tensor in before.items():
        carried = "layers.2." in name and "vision" in name or "post_layernorm" in name
        assert torch.equal(after[name], tensor if carried else tensor.to(torch.bfloat16)), name
    assert not verify(hf, tmp_path / "megatron").equal
    assert verify(hf, tmp_path / "megatron", dtype=torch.bfloat16).equal


def test_an_export_that_is_cast_says_so_in_its_configs(hf: Path, megatron: Path, tmp_path: Path) -> None:
    done = megatron_to_hf(megatron, hf, tmp_path / "back", dtype=torch.bfloat16)
    assert done.notes == ()
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "back/llm").dtype == torch.bfloat16
    assert SiglipVisionModel.from_pretrained(tmp_path / "back/vision_tower").dtype == torch.bfloat16
    for sub in ("", "llm", "vision_tower", "mm_projector"):
        before, after = (json.loads((root / sub / "config.json").read_text()) for root in (hf, tmp_path / "back"))
        assert after.keys() == before.keys()
        for name in before.keys() - {"dtype", "torch_dtype", "model_dtype"}:
            assert after[name] == before[name]
    assert json.loads((tmp_path / "back/config.json").read_text())["model_dtype"] == "torch.bfloat16"


def test_dtypes_of_nested_configs_change_and_nothing_else_does() -> None:
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "names": [{"dtype": "x"}]}, "size": 3}
    assert with_dtype(config, "torch.bfloat16") == {
        "dtype": "bfloat16",
        "text_config": {"torch_dtype": "bfloat16", "names": [{"dtype": "bfloat16"}]},
        "size": 3,
    }
    assert with_dtype({"dtype": None, "model_dtype": 1}, "torch.float32") == {"dtype": None, "model_dtype": 1}


def test_dry_run_writes_nothing(hf: Path, megatron: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    planned = hf_to_megatron(hf, tmp_path / "out", dry_run=True)
    assert planned.num_bytes == 4 * sum(
        tensor.numel()
        for name, tensor in all_tensors(hf).items()
        if "post_layernorm" not in name and not ("layers.2." in name and "vision" in name)
    )
    assert megatron_to_hf(megatron, hf, tmp_path / "out", dry_run=True).weight_files[0] == "llm/model.safetensors"
    assert sorted(tmp_path.rglob("*")) == before


def make_trainer(path: Path, layout: ParallelLayout) -> Trainer:
    config = ModelConfig(
        path=str(path), dtype=Dtype.float32, recompute=Recompute.none, train_tower=True, train_projector=True
    )
    model = build_model(config, layout, sequence_parallel=False)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7)
    return Trainer(model, layout, OptimizerConfig(lr=1e-3), total_steps=1, embeddings=lambda selections: None)


def exported(trainer: Trainer, *, bucket_bytes: int = 1 << 30) -> dict[str, torch.Tensor]:
    """Every tensor in the bucket and with the checksum that it is said to have, and once."""
    table = trainer.model.weight_table()
    done: dict[str, torch.Tensor] = {}
    for bucket in export_weights(trainer.model, table, trainer.layout, bucket_bytes=bucket_bytes):
        assert torch.equal(bucket.checksums_n, tensor_checksums(bucket.tensors.values()))
        assert len(bucket.tensors) == 1 or sum(tensor.nbytes for tensor in bucket.tensors.values()) <= bucket_bytes
        assert not done.keys() & bucket.tensors.keys()
        done.update({name: tensor.clone() for name, tensor in bucket.tensors.items()})
    return done


def test_init_from_loads_the_conversion_in_one_process(hf: Path, megatron: Path, layout: ParallelLayout) -> None:
    trainer = make_trainer(hf, layout)
    load_weights(megatron, trainer)
    assert_same_tensors(exported(trainer), hf)


def assert_same_tensors(got: dict[str, torch.Tensor], hf: Path, *, count: int = 68) -> None:
    assert len(got) == count
    want = {name.replace("/model.safetensors:", "/"): tensor for name, tensor in all_tensors(hf).items()}
    for name, tensor in got.items():
        assert torch.equal(tensor, want[name]), name


def load_change_and_save(hf: Path, megatron: Path, out: Path, tp: int, pp: int) -> list[dict[str, torch.Tensor]]:
    """On each rank of a replica: the weights after loading, and after a change that was saved."""
    trainer = make_trainer(hf, make_layout(tp=tp, cp=1, pp=pp, seed=1))
    load_weights(megatron, trainer)
    loaded = exported(trainer)
    with torch.no_grad():
        for param in trainer.model.parameters():
            param.mul_(1.5)
    save_checkpoint(out, trainer, extra={}, keep=1)
    return [loaded, exported(trainer, bucket_bytes=10_000)]


@pytest.mark.parametrize(("tp", "pp", "tied"), [(2, 1, False), (1, 2, False), (1, 2, True), (2, 2, False)])
def test_conversion_loads_at_any_split_and_its_checkpoint_exports(
    hf: Path, tmp_path: Path, tp: int, pp: int, tied: bool
) -> None:
    count = 68 - tied
    make_variant(hf, dtype=torch.float32, tied=tied, prefix=True)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron, run = tmp_path / "megatron", tmp_path / "run"
    results = run_world(tp * pp, load_change_and_save, hf, megatron, run, tp, pp, folder=tmp_path / "world")
    for loaded, changed in results:
        assert_same_tensors(loaded, hf, count=count)
        assert changed.keys() == loaded.keys()
        assert all(torch.equal(changed[name], 1.5 * loaded[name]) for name in loaded)
    megatron_to_hf(run, hf, tmp_path / "back")  # the newest step of the folder
    assert_same_tensors(results[0][1], tmp_path / "back", count=count)
    assert describe(run, checksum=False).family == "longvila"
    checked = verify(run, tmp_path / "back")
    assert checked.equal
    assert (checked.compared, checked.outside) == (count, 18)
    by_key = verify(run, megatron)
    # The odd vocabulary is padded where tensor parallelism cuts it.
    padded = ["padding of the vocabulary? give --like" in difference for difference in by_key.differences]
    assert any(padded) == (tp > 1)
    # Scaled by 1.5, so every tensor differs; with --like the padded ones are compared too.
    assert len(verify(run, megatron, like=hf).differences) == count


def make_3x3_with_all_configs_inside(hf: Path) -> None:
    """A 3 x 3 projector, pooled frames, and the parts' configurations in config.json, one of them as text."""
    shapes = {1: (144,), 2: (48, 144), 4: (48,), 5: (32, 48), 7: (32, 32)}
    parts = {f"layers.{place}": shape for place, shape in shapes.items()}
    edit_weights(
        hf / "mm_projector/model.safetensors",
        lambda _: (
            {f"{name}.weight": torch.randn(shape) for name, shape in parts.items()}
            | {f"{name}.bias": torch.randn(shape[0]) for name, shape in parts.items()}
        ),
    )
    tower = json.loads((hf / "vision_tower/config.json").read_text())
    (hf / "vision_tower/config.json").unlink()
    (hf / "mm_projector/config.json").unlink()
    config = json.loads((hf / "config.json").read_text())
    config["vision_tower_cfg"] = tower
    config["mm_projector_cfg"] = json.dumps({"mm_projector_type": "mlp_downsample_3x3_fix", "note": ""})
    config["video_encoder"] = json.dumps({"_target_": "TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]})
    (hf / "config.json").write_text(json.dumps(config))


def test_3x3_projector_pooled_frames_and_configs_in_one_file(hf: Path, tmp_path: Path) -> None:
    make_3x3_with_all_configs_inside(hf)
    assert hf_to_megatron(hf, tmp_path / "megatron").tensors == 68 + 4
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back")
    before, after = all_tensors(hf), all_tensors(tmp_path / "back")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
