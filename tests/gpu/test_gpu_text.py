"""Text families with Transformer Engine layers (QKV bias, query and key norms) against the local float32 layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
}


def build(folder: Path, layout, *, family: str, dtype: str, spec: str):
    from megalong.config.tree import Dtype, LayerSpec, ModelConfig, OptimizerConfig, Recompute
    from megalong.engine.build import build_model
    from megalong.engine.trainer import Trainer

    config = ModelConfig(
        family=family, path=str(folder), dtype=Dtype[dtype], layer_spec=LayerSpec[spec], recompute=Recompute.none
    )
    model = build_model(config, layout, sequence_parallel=False)
    return Trainer(model, layout, OptimizerConfig(lr=1e-3), total_steps=10, embeddings=lambda _: None)


def make_pack():
    from megalong.data.packing import GroupTokens, pack_groups
    from megalong.records import Prompt, Sample

    sample = Sample(
        sample_id="a", question="", answer="", videos=(), problem_type="", category="", reasoning="", subtitles=""
    )
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(0, 96, (length,), generator=generator).tolist()) for length in (40, 30, 7, 12)]
    prompt = Prompt(sample=sample, ids_P=ids[0], selections=(), positions_P=torch.arange(40), next_position=40)
    return pack_groups([GroupTokens(prompt=prompt, responses=tuple(ids[1:]))])


def nll(_, logprobs_R, __):
    return -logprobs_R.mean(), {}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_te_layers_agree_with_local_ones(tmp_path: Path, layout, family: str) -> None:
    from qwen_checkpoints import write_qwen

    write_qwen(tmp_path, family, **SIZES)
    pack = make_pack()
    local = build(tmp_path, layout, family=family, dtype="float32", spec="local")
    want_R = local.logprobs([pack], temperature=1.0)[0]
    got_R = build(tmp_path, layout, family=family, dtype="bfloat16", spec="te").logprobs([pack], temperature=1.0)[0]
    assert (got_R - want_R).abs().max() < 0.2
    assert (got_R - want_R).abs().mean() < 0.05
    te = build(tmp_path, layout, family=family, dtype="float32", spec="te")
    for _ in range(3):
        want, got = (trainer.train_step([pack], nll, temperature=1.0) for trainer in (local, te))
        assert got.loss == pytest.approx(want.loss, rel=2e-3)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=2e-2)
