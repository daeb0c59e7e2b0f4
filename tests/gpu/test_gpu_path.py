"""The GPU path on the tiny LongVILA: Transformer Engine layers in bf16 against the CPU-tested float32 layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megalong.data.sequence import THINKING_TEMPLATE
    from megalong.models.longvila.demo_checkpoint import make_demo_checkpoint

    folder = tmp_path_factory.mktemp("model")
    make_demo_checkpoint(folder, texts=[THINKING_TEMPLATE, "which box is red? A. left B. right"], seed=1)
    return folder


def build(checkpoint: Path, layout, *, dtype: str, spec: str, recompute: str = "none"):
    from megalong.config.tree import Dtype, LayerSpec, ModelConfig, OptimizerConfig, Recompute
    from megalong.engine.build import build_model
    from megalong.engine.trainer import Trainer

    config = ModelConfig(
        path=str(checkpoint), dtype=Dtype[dtype], layer_spec=LayerSpec[spec], recompute=Recompute[recompute],
        train_tower=True, train_projector=True,
    )  # fmt: skip
    model = build_model(config, layout, sequence_parallel=False)
    generator = torch.Generator().manual_seed(0)
    side = model.spec.vision.image_size
    frames_FHWC = torch.randint(0, 255, (3, side, side, 3), dtype=torch.uint8, generator=generator).cuda()

    def embeddings(selections):
        return torch.cat([model.vision(frames_FHWC).flatten(0, 1)] * len(selections))

    return Trainer(model, layout, OptimizerConfig(lr=1e-3), total_steps=10, embeddings=embeddings)


def make_pack(trainer, checkpoint: Path):
    from harness import make_builder

    from megalong.data.packing import GroupTokens, pack_groups
    from megalong.records import FrameSelection, Sample

    builder = make_builder(checkpoint, "longvila", thinking=True)
    side = trainer.model.spec.vision.image_size
    sample = Sample(
        sample_id="a", question="which box is red? A. left B. right", answer="B", videos=("v",),
        problem_type="multiple choice", category="spatial", reasoning="the box is right", subtitles="",
    )  # fmt: skip
    selection = FrameSelection(path="v", frames=(0, 1, 2), seconds=(0.0, 1.0, 2.0), height=side, width=side)
    prompt, target = builder.prompt(sample, [selection]), builder.target(sample)
    return pack_groups([GroupTokens(prompt=prompt, responses=(target, target[:3], target[2:]))])


def nll(_, logprobs_R, __):
    return -logprobs_R.mean(), {}


def test_te_bf16_agrees_with_local_float32(checkpoint, layout):
    reference = build(checkpoint, layout, dtype="float32", spec="local")
    pack = make_pack(reference, checkpoint)
    want_R = reference.logprobs([pack], temperature=1.0)[0]
    for recompute in ("none", "full"):
        trainer = build(checkpoint, layout, dtype="bfloat16", spec="te", recompute=recompute)
        got_R = trainer.logprobs([pack], temperature=1.0)[0]
        assert (got_R - want_R).abs().max() < 0.1
        assert (got_R - want_R).abs().mean() < 0.02


def test_te_float32_train_steps_agree_with_local(checkpoint, layout):
    local = build(checkpoint, layout, dtype="float32", spec="local")
    te = build(checkpoint, layout, dtype="float32", spec="te", recompute="full")
    pack = make_pack(local, checkpoint)
    for _ in range(3):
        want, got = (trainer.train_step([pack], nll, temperature=1.0) for trainer in (local, te))
        assert got.loss == pytest.approx(want.loss, rel=2e-3)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=2e-2)


def test_bf16_learns_and_exports_what_it_holds(checkpoint, layout):
    trainer = build(checkpoint, layout, dtype="bfloat16", spec="te")
    pack = make_pack(trainer, checkpoint)
    losses = [trainer.train_step([pack], nll, temperature=1.0).loss for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    exported = {name: tensor for bucket in trainer.export_weights() for name, tensor in bucket.tensors.items()}
    held = dict(trainer.model.named_parameters())
    assert torch.equal(exported["llm/model.norm.weight"], held["llm.decoder.final_layernorm.weight"])
    assert exported["llm/model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_checkpoint_resumes_bit_exactly_on_gpu(checkpoint, layout, tmp_path):
    from megalong.engine.checkpoint import load_checkpoint, save_checkpoint

    trainer = build(checkpoint, layout, dtype="bfloat16", spec="te")
    pack = make_pack(trainer, checkpoint)
    trainer.train_step([pack], nll, temperature=1.0)
    path = save_checkpoint(tmp_path, trainer, extra={"sampler": 7}, keep=2)
    want = [trainer.train_step([pack], nll, temperature=1.0) for _ in range(2)]
    other = build(checkpoint, layout, dtype="bfloat16", spec="te")
    assert load_checkpoint(path, other) == {"sampler": 7}
    got = [other.train_step([pack], nll, temperature=1.0) for _ in range(2)]
    assert [(s.loss, s.grad_norm) for s in got] == [(s.loss, s.grad_norm) for s in want]
