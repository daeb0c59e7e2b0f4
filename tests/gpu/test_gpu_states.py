"""AdamW with its states in pinned host memory on a GPU: equal bits, less device memory, and the time of an update.

`pytest -s` shows bytes and seconds.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

HIDDEN, FFN, VOCAB, LAYERS = 3584, 18_944, 152_064, 4
LAYER = {
    "qkv": (HIDDEN + 1024, HIDDEN), "bias": (HIDDEN + 1024,), "out": (HIDDEN, HIDDEN), "norm": (HIDDEN,),
    "up": (2 * FFN, HIDDEN), "down": (HIDDEN, FFN), "odd": (1_000_003,),
}  # fmt: skip
SHAPES = {"table": (VOCAB, HIDDEN)} | {f"{name}{i}": shape for i in range(LAYERS) for name, shape in LAYER.items()}
"""Of a 7B: an embedding and four layers, and some of lengths that pieces and vectors do not divide."""
STEPS = [(1e-2, 1.0), (3e-3, 0.37), (2e-2, 0.9), (1e-3, 1.0)]
"""Learning rate and factor of the gradients."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Some updates: checksums of all weights and states, bytes on the device, and the fastest update."""

    sums: dict[str, tuple[int, int]]
    between: int  # bytes on the device before an update: weights, gradients, states
    peak: int  # bytes of an update beyond those
    moved: int  # bytes of states in host memory
    setup: float  # seconds until the states are there
    seconds: float


def checksum(tensor: Tensor) -> tuple[int, int]:
    """Sums over the bits of all elements, the second by place: equal for equal bits, wherever the tensor is."""
    sums = [0, 0]
    bits = tensor.view(-1).view(torch.int32 if tensor.itemsize == 4 else torch.int16)
    for start, part in zip(range(0, len(bits), 1 << 24), bits.split(1 << 24), strict=True):
        wide = part.cuda().long()
        place = torch.arange(start, start + len(part), device="cuda") % 65_521 + 1
        sums[0] += int(wide.sum())
        sums[1] += int((wide * place).sum())  # wraps, equally on both sides
    return sums[0], sums[1]


def run(layout, dtype: torch.dtype, *, offload: bool) -> Run:
    from megalong.config.tree import OptimizerConfig
    from megalong.engine.build import state_copies
    from megalong.engine.optimizer import ShardedAdamW

    generator = torch.Generator("cuda").manual_seed(1)
    named = []
    for name, shape in SHAPES.items():
        param = nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype).normal_(0, 0.02, generator=generator))
        param.main_grad = torch.empty(shape, device="cuda").normal_(0, 1, generator=generator)
        named.append((name, param))
    began = time.perf_counter()
    adam = ShardedAdamW(
        named, layout, counted=frozenset(SHAPES), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
        offload=state_copies(OptimizerConfig(offload=offload), layout),
    )  # fmt: skip
    torch.cuda.synchronize()
    setup, seconds, peak = time.perf_counter() - began, [], 0
    gc.collect()
    torch.cuda.empty_cache()
    between = torch.cuda.memory_allocated()
    for lr, scale in STEPS:
        for _, param in named:
            param.main_grad.normal_(0, 1, generator=generator)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        adam.step(lr=lr, grad_scale=scale)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        peak = max(peak, torch.cuda.max_memory_allocated() - between)
    states = {f"{kind}.{name}": tensor for name, of in adam.states.items() for kind, tensor in of.items()}
    hosted = [tensor for tensor in states.values() if tensor.device.type == "cpu"]
    assert all(tensor.is_pinned() for tensor in hosted)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in hosted)  # nothing is rounded up
    everything = {**states, **{name: param.data for name, param in named}}
    return Run(
        sums={name: checksum(tensor) for name, tensor in everything.items()},
        between=between,
        peak=peak,
        moved=sum(tensor.nbytes for tensor in hosted),
        setup=setup,
        seconds=min(seconds),
    )


def copy_rates() -> tuple[float, float]:
    """GB/s of 1 GiB of pinned memory: to the device alone, and there and back at once (both counted)."""
    host = [torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [tensor.cuda() for tensor in host]
    streams = [torch.cuda.Stream() for _ in range(2)]
    rates = []
    for ways in (1, 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(4):
            for way in range(ways):
                with torch.cuda.stream(streams[way]):
                    target, source = (device[0], host[0]) if way == 0 else (host[1], device[1])
                    target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(4 * ways * (1 << 30) / 1e9 / (time.perf_counter() - began))
    return rates[0], rates[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_bits_and_less_memory(layout, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    done = {}
    for offload in (False, True):
        done[offload] = run(layout, dtype, offload=offload)
        gc.collect()
        torch.cuda.empty_cache()
    here, away = done[False], done[True]
    there, both = copy_rates()
    params = sum(math.prod(shape) for shape in SHAPES.values())
    lines = [
        f"{params / 1e9:.2f}e9 parameters, {dtype}; copies of pinned memory {there:.1f} GB/s, both ways {both:.1f}"
    ]
    for name, one in (("on the device", here), ("in host memory", away)):
        lines.append(
            f"{name:<15} {one.between / 2**30:6.2f} GiB, {one.peak / 2**30:.2f} more in an update of "
            f"{one.seconds:.3f} s (the states were made in {one.setup:.1f} s)"
        )
    lines.append(f"{2 * away.moved / 1e9:.1f} GB moved at {2 * away.moved / 1e9 / away.seconds:.1f} GB/s")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", *lines, ""]))
    assert len(here.sums) == 4 * len(SHAPES)
    assert {name for name, want in here.sums.items() if away.sums[name] != want} == set()
    hosted = (12 if dtype == torch.bfloat16 else 8) * params
    assert away.moved == hosted
    # Up to half a percent more on the device: its allocator rounds up.
    assert hosted <= here.between - away.between < 1.005 * hosted
    assert away.peak < 400 << 20  # the table's states alone are 2 GiB each
    # Copies that wait for each other or for the updates would reach little more than half of it.
    assert 2 * hosted / away.seconds > 0.7 * both * 1e9


def test_memory_is_given_back(layout) -> None:
    """Pinned memory of the same addresses can be pinned again."""
    from megalong.parallel.host_tensors import CudaHostCopies

    for _ in range(3):
        copies = CudaHostCopies(layout.device)
        tensors = [copies.zeros(shape, torch.float32) for shape in ((1,), (3, 5), (1000, 1000), (1 << 26,))]
        assert all(tensor.is_pinned() and not tensor.any() for tensor in tensors)
        del copies
        gc.collect()
        assert not any(tensor.is_pinned() for tensor in tensors)
        del tensors


def test_a_checkpoint_of_states_in_host_memory(layout, tmp_path: Path) -> None:
    """The processes that write it read the pinned memory; loading puts the states where they are kept now."""
    from qwen_checkpoints import write_qwen

    from megalong.config.tree import Dtype, LayerSpec, ModelConfig, OptimizerConfig, Recompute
    from megalong.engine.build import build_model
    from megalong.engine.checkpoint import load_checkpoint, save_checkpoint
    from megalong.engine.trainer import Trainer

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_qwen(tmp_path, "qwen2", **sizes, head_dim=32, vocab_size=96)
    config = ModelConfig(
        family="qwen2", path=str(tmp_path), dtype=Dtype.bfloat16, layer_spec=LayerSpec.local, recompute=Recompute.none
    )

    def make_trainer(*, offload: bool) -> Trainer:
        model = build_model(config, layout, sequence_parallel=False)
        settings = OptimizerConfig(offload=offload)
        return Trainer(model, layout, settings, total_steps=10, embeddings=lambda _: None)

    def update(trainer: Trainer, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        for _, param in trainer.trainable:
            param.main_grad.normal_(0, 1, generator=generator)
        trainer.optimizer.step(lr=1e-2, grad_scale=0.5)
        trainer.num_updates += 1
        trainer.step += 1

    def everything(trainer: Trainer) -> dict[str, Tensor]:
        states = trainer.optimizer.states
        of = {f"{kind}.{name}": tensor.cpu() for name, kinds in states.items() for kind, tensor in kinds.items()}
        return {**of, **{name: param.detach().cpu() for name, param in trainer.trainable}}

    trainers = {offload: make_trainer(offload=offload) for offload in (True, False)}
    for saves, loads in ((True, False), (False, True)):
        for seed in (1, 2):
            update(trainers[saves], seed)
        path = save_checkpoint(tmp_path / f"run_{saves}", trainers[saves], extra={}, keep=1)
        load_checkpoint(path, trainers[loads])
        for seed in (3, 4):
            for trainer in trainers.values():
                update(trainer, seed)
        want, got = everything(trainers[saves]), everything(trainers[loads])
        assert got.keys() == want.keys()
        assert {name for name, tensor in want.items() if not torch.equal(got[name], tensor)} == set()
