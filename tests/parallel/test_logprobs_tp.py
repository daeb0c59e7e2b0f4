"""Log-probabilities of a head split over two tensor-parallel processes equal those of the whole head."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megalong.objectives import logprobs as module
from megalong.objectives.logprobs import logprobs_reference, vocab_parallel_logprobs

REAL_VOCAB, TP, ROWS, WIDTH = 9, 2, 7, 5  # 9 tokens are padded to 10 rows: 5 on each rank


def test_two_ranks_equal_the_whole_head(tmp_path: Path) -> None:
    mp.spawn(check_rank, args=(str(tmp_path / "store"),), nprocs=TP, join=True)


def check_rank(rank: int, store: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"  # the tensors are on the CPU, on a machine with a GPU too
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=TP)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for temperature in (1.0, 0.7):
            for chunk_elements in (12, 1 << 26):
                module.CHUNK_ELEMENTS = chunk_elements
                check_case(rank, dtype=dtype, temperature=temperature, tolerance=tolerance)
    if find_spec("triton"):  # Linux alone has it
        # The kernels keep logits in float32; gradients are bfloat16, which Triton's interpreter truncates to.
        check_case(rank, dtype=torch.bfloat16, temperature=0.7, tolerance=2e-2, backend="triton")
    dist.destroy_process_group()


def check_case(rank: int, *, dtype: torch.dtype, temperature: float, tolerance: float, backend: str = "plain") -> None:
    generator = torch.Generator().manual_seed(5)
    hidden_RD = torch.randn(ROWS, WIDTH, dtype=dtype, generator=generator).requires_grad_()
    whole_VD = torch.randn(REAL_VOCAB, WIDTH, dtype=dtype, generator=generator).requires_grad_()
    targets_R = torch.tensor([0, 8, 4, 5, 3, 8, 0])  # on both ranks, and at both sides of the cut
    upstream_R = torch.linspace(-1, 1, ROWS, dtype=dtype)
    exact = [part.detach().double().requires_grad_() for part in (hidden_RD, whole_VD)]
    want = logprobs_reference(*exact, targets_R, temperature=temperature)
    want_hidden, want_weight = torch.autograd.grad((want[0] * upstream_R).sum(), exact)

    padded_VD = torch.nn.functional.pad(whole_VD.detach(), (0, 0, 0, -REAL_VOCAB % TP))
    local_VD = padded_VD.chunk(TP)[rank].clone().requires_grad_()
    got = vocab_parallel_logprobs(
        hidden_RD, local_VD, targets_R,
        group=dist.group.WORLD, real_vocab=REAL_VOCAB, temperature=temperature, backend=backend,
    )  # fmt: skip
    got_hidden, got_weight = torch.autograd.grad((got[0] * upstream_R).sum(), (hidden_RD, local_VD))
    dist.all_reduce(got_hidden)  # each rank holds the part that comes from its own vocabulary rows

    def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)

    torch.testing.assert_close(got[0].double(), want[0], rtol=min(tolerance, 2e-5), atol=min(tolerance, 2e-5))
    torch.testing.assert_close(got[1].double(), want[1], rtol=min(tolerance, 2e-5), atol=min(tolerance, 2e-5))
    close(got_hidden, want_hidden)
    close(got_weight, torch.nn.functional.pad(want_weight, (0, 0, 0, -REAL_VOCAB % TP)).chunk(TP)[rank])
    everyone = [torch.empty_like(got[0]) for _ in range(TP)]
    dist.all_gather(everyone, got[0].detach())
    if not torch.equal(everyone[0], everyone[1]):
        raise AssertionError("the ranks disagree on the log-probabilities")
