"""Peak memory and time of a training step under what saves them, at 7B width; gradients stay what they are.

`pytest -s` shows the tables.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megalong.records import Segment, TokenBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CONFIG = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 5, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 1024, "tie_word_embeddings": False,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
}  # fmt: skip
"""Four layers of all rows, and the last one."""
TOKENS, RESPONSE, GROUP = 65_536, 512, 4
SETTINGS = {
    "none": ("none", 1, False),
    "full": ("full", 1, False),
    "keep_attention": ("keep_attention", 1, False),
    "keep_attention, slices": ("keep_attention", 0, False),
    "keep_attention, slices, offload": ("keep_attention", 0, True),
    "full, slices, offload": ("full", 0, True),
}
"""Name -> model.recompute, mlp_chunks and offload_activations."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step: its loss, bytes at the peak beyond what lies there between steps, seconds, gradients' gaps."""

    loss: float
    peak: int
    seconds: float
    gaps: dict[str, float]  # by parameter, |difference to `none`| / |none|


def make_pack(prompt: int = TOKENS - GROUP * RESPONSE, group: int = GROUP) -> TokenBatch:
    """A prompt and its responses of random tokens."""
    starts = [prompt + index * RESPONSE for index in range(group)]
    length = prompt + group * RESPONSE
    ids_T = torch.randint(0, CONFIG["vocab_size"], (length,), generator=torch.Generator().manual_seed(1))
    positions = [torch.arange(prompt), *[prompt + torch.arange(RESPONSE)] * group]
    rows = [torch.cat((torch.tensor([prompt - 1]), start + torch.arange(RESPONSE - 1))) for start in starts]
    return TokenBatch(
        ids_T=ids_T,
        positions_T=torch.cat(positions),
        segments=(
            Segment(start=0, length=prompt, parent=-1),
            *(Segment(start=start, length=RESPONSE, parent=0) for start in starts),
        ),
        selections=(),
        rows_R=torch.cat(rows),
        targets_R=ids_T[prompt:],
        response_R=torch.arange(group).repeat_interleave(RESPONSE),
    )


def make_trainer(folder: Path, layout, setting: str):
    from megalong.config.tree import Dtype, LayerSpec, ModelConfig, OptimizerConfig, Recompute
    from megalong.engine.build import build_model
    from megalong.engine.trainer import Trainer

    recompute, mlp_chunks, offload = SETTINGS[setting]
    config = ModelConfig(
        family="qwen2", path=str(folder), dtype=Dtype.bfloat16, layer_spec=LayerSpec.te,
        recompute=Recompute[recompute], mlp_chunks=mlp_chunks, offload_activations=offload,
    )  # fmt: skip
    model = build_model(config, layout, sequence_parallel=False, load=False)
    generator = torch.Generator(layout.device).manual_seed(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(0, 0.02, generator=generator)
            if "norm" in name:
                param.add_(1)
    keep = config.recompute is Recompute.keep_attention
    settings = OptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=0.0)  # every step starts from the same weights
    return Trainer(model, layout, settings, total_steps=10, embeddings=lambda *_: None, keep_attention=keep)


def nll(_: int, logprobs_R: Tensor, __: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return -logprobs_R.mean(), {}


@pytest.fixture(scope="module")
def steps(layout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Step]:
    """The second step under every setting."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    pack, reference, done = make_pack(), {}, {}
    for setting in SETTINGS:
        trainer = make_trainer(folder, layout, setting)
        trainer.train_step([pack], nll, temperature=1.0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        between, began = torch.cuda.memory_allocated(), time.perf_counter()
        stats = trainer.train_step([pack], nll, temperature=1.0)
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() - between
        grads = {name: param.main_grad for name, param in trainer.trainable}
        if not reference:
            reference = {name: grad.clone() for name, grad in grads.items()}
        gaps = {name: float((grads[name] - want).norm() / want.norm()) for name, want in reference.items()}
        done[setting] = Step(loss=stats.loss, peak=peak, seconds=seconds, gaps=gaps)
        del trainer, grads
        gc.collect()
        torch.cuda.empty_cache()
    return done


def test_memory_falls_with_every_setting(steps: dict[str, Step], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{CONFIG['num_hidden_layers']} layers of 7B width, {TOKENS:,} tokens; peak beyond weights and states"]
    for setting, step in steps.items():
        gap = max(step.gaps.values())
        lines.append(f"{setting:<34} {step.peak / 2**30:6.2f} GiB {step.seconds:6.2f} s  gradients within {gap:.1e}")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))
    peak = {setting: step.peak for setting, step in steps.items()}
    rows = TOKENS * 3584 * 2  # bytes of the rows, which is also what a layer's attention output takes
    assert peak["keep_attention"] < peak["none"] - 2 * rows * 10
    # Three layers' outputs wait when the backward of the last layer of all rows has its peak.
    assert 2 * rows < peak["keep_attention"] - peak["full"] < 5 * rows
    # 12 x 18,944 bytes of inner activations a row, for 16,384 of the 65,536 rows.
    assert peak["keep_attention, slices"] < peak["keep_attention"] - 8 * 18_944 * (TOKENS - 16_384)
    # Inputs and outputs of two of the four layers of all rows.
    assert peak["keep_attention, slices, offload"] < peak["keep_attention, slices"] - 3 * rows
    assert peak["full, slices, offload"] < peak["keep_attention, slices, offload"]


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting != "none"])
def test_gradients_agree_within_bfloat16(setting: str, steps: dict[str, Step]) -> None:
    assert steps[setting].loss == pytest.approx(steps["none"].loss, rel=1e-3)
    assert len(steps[setting].gaps) > 4 * 6
    assert {name: gap for name, gap in steps[setting].gaps.items() if not gap < 2e-2} == {}


def measure(trainer, pack: TokenBatch) -> tuple[Step, float, dict[str, Tensor]]:
    """A step, the best of three; seconds of a log-probability pass, likewise; gradients."""
    seconds, passes = [], []
    for repeat in range(4):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        between, began = torch.cuda.memory_allocated(), time.perf_counter()
        stats = trainer.train_step([pack], nll, temperature=1.0)
        torch.cuda.synchronize()
        ended, peak = time.perf_counter(), torch.cuda.max_memory_allocated() - between
        trainer.logprobs([pack], temperature=1.0)
        torch.cuda.synchronize()
        if repeat:  # the first one chooses kernels
            seconds.append(ended - began)
            passes.append(time.perf_counter() - ended)
    grads = {name: param.main_grad.clone() for name, param in trainer.trainable}
    return Step(loss=stats.loss, peak=peak, seconds=min(seconds), gaps={}), min(passes), grads


@pytest.mark.parametrize(
    ("setting", "prompt", "group"),
    [("keep_attention, slices", 131_072, 8), ("full", 131_072, 8), ("keep_attention", 32_768, 1), ("none", 32_768, 1)],
)
def test_the_last_layer_computes_only_what_predicts(
    setting: str, prompt: int, group: int, layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the same layer on all rows: equal gradients, and the time that the FLOPs it leaves out would take."""
    from megalong.attention import shard
    from megalong.config import costs
    from megalong.config.shapes import read_model_shape
    from megalong.config.tree import Recompute, VideoConfig

    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 4}))
    pack, done = make_pack(prompt, group), {}
    for form, rows_of in (
        ("all rows", lambda tokens: torch.arange(len(tokens.ids_T))),
        ("needed", shard.predicting_rows),
    ):
        with mock.patch.object(shard, "predicting_rows", rows_of):
            done[form] = measure(make_trainer(tmp_path, layout, setting), pack)
        gc.collect()
        torch.cuda.empty_cache()
    (whole, whole_pass, want), (step, one_pass, got) = done["all rows"], done["needed"]
    gap = max(float((got[name] - grad).norm() / grad.norm()) for name, grad in want.items())
    shape = read_model_shape(tmp_path, family="qwen2", video=VideoConfig())
    work = costs.shared_work(prompt, RESPONSE, group)
    every = costs.whole_work(tokens=work.tokens, pairs=work.pairs, rows=work.rows)
    recompute = Recompute[SETTINGS[setting][0]]
    ratio = costs.train_flops(shape, work, recompute=recompute) / costs.train_flops(shape, every, recompute=recompute)
    lines = [
        f"4 layers of 7B width, prompt {prompt:,}, {group} x {RESPONSE}, {setting}: last layer on all rows, on some",
        f"  step {whole.seconds:.3f} s, {step.seconds:.3f} s: {step.seconds / whole.seconds:.3f}; FLOPs {ratio:.3f}",
        f"  log-probabilities {whole_pass:.3f} s, {one_pass:.3f} s: {one_pass / whole_pass:.3f}",
        f"  peak {whole.peak / 2**30:.2f} GiB, {step.peak / 2**30:.2f} GiB; gradients within {gap:.1e}",
    ]
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))
    assert step.loss == pytest.approx(whole.loss, rel=1e-3)
    assert gap < 2e-2
    assert step.seconds < whole.seconds * (1 + ratio) / 2
    assert one_pass < whole_pass
    assert step.peak < whole.peak * 1.01


def waves(rows: Tensor, layers: int) -> Tensor:
    """Each layer saves its input, and is busy for some milliseconds."""
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(layers):
        for _ in range(20):
            busy = busy @ busy
        rows = (rows * 1.01).sin() + 0 * busy.nan_to_num()[0, 0]
    return rows


def peak_of(rows: Tensor, layers: int, context: AbstractContextManager[None]) -> tuple[Tensor, int]:
    """Gradient of `waves` made inside the context, and bytes at the peak."""
    leaf = rows.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with context:
        out = waves(leaf, layers)
    out.backward(rows)
    torch.cuda.synchronize()
    return leaf.grad, torch.cuda.max_memory_allocated() - before


def test_offloaded_tensors_come_back_as_they_were() -> None:
    from megalong.parallel.offload import CudaCopies, Offload

    layers = 16
    # Not a multiple of the blocks that the host memory is made of.
    rows = torch.randn(70_001, 1, 512, device="cuda", dtype=torch.bfloat16)
    want, whole = peak_of(rows, layers, nullcontext())
    offload = Offload(CudaCopies(rows.device))
    for _ in range(3):
        inputs = offload.forward(lambda tensor: tensor.shape == rows.shape, layers=layers)
        got, peak = peak_of(rows, layers, inputs)
        assert torch.equal(got, want)
    of_layer = rows.numel() * 2
    assert whole > layers * of_layer
    assert peak < (layers - 6) * of_layer
