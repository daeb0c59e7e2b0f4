"""Sequence sharding: the twins against autograd's own indexing and gradcheck, the Triton kernels against the twins.

On a machine without a GPU the kernels run in Triton's interpreter (tests/conftest.py turns it on).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from megalong_kernels import sequence_shard as module  # noqa: E402
from megalong_kernels.sequence_shard import shard_rows, unshard_rows  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# frames, text, width, places; the index is random with padding unless given
SIZES = {
    "odd width": (6, 5, 7, 13),
    "one column": (3, 4, 1, 9),
    "wider than a block": (4, 3, 41, 10),
    "no frames": (0, 5, 8, 6),
    "no text": (5, 0, 8, 7),
    "empty shard": (3, 3, 8, 0),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BLOCK", 16)


def case(frames: int, text: int, width: int, places: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(frames * 100 + text * 10 + width)
    index_T = torch.randint(-1, frames + text, (places,), generator=generator)
    parts = [torch.randn(rows, width, dtype=dtype, generator=generator) for rows in (frames, text)]
    return (*(part.to(DEVICE).requires_grad_() for part in parts), index_T.to(DEVICE))


def with_zero_row(*parts: Tensor) -> Tensor:
    """All rows and one of zeros, which index -1 picks: the definition in one line of autograd."""
    return torch.cat((*parts, parts[0].new_zeros(1, parts[0].shape[1])))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_twin_equals_indexing(sizes: tuple[int, ...]) -> None:
    frames_ND, text_MD, index_T = case(*sizes, dtype=torch.float64)
    got = shard_rows(frames_ND, text_MD, index_T, backend="plain")
    want = with_zero_row(frames_ND, text_MD)[index_T]
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (frames_ND, text_MD), upstream),
        torch.autograd.grad(want, (frames_ND, text_MD), upstream),
        rtol=1e-13, atol=1e-13,
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [SIZES["odd width"], SIZES["no frames"]], ids=["both", "no frames"])
def test_twins_pass_gradcheck(sizes: tuple[int, ...]) -> None:
    frames_ND, text_MD, index_T = case(*sizes, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f, t: shard_rows(f, t, index_T, backend="plain"), (frames_ND, text_MD))
    places_T = torch.tensor([4, 0, -1, 2, 4, 1], device=DEVICE)
    rows_TD = torch.randn(6, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: unshard_rows(rows, places_T, 6, backend="plain"), (rows_TD,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernels_equal_the_twins(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = case(*sizes, dtype=dtype)
    got, want = (shard_rows(*parts, backend=backend) for backend in ("triton", "plain"))
    assert got.dtype == dtype
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    got_grads, want_grads = (torch.autograd.grad(out, parts[:2], upstream) for out in (got, want))
    # The interpreter truncates to bfloat16 where the hardware rounds.
    torch.testing.assert_close(got_grads, want_grads, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_by_hand(backend: str) -> None:
    frames_ND = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE, requires_grad=True)
    text_MD = torch.tensor([[5.0, 6.0], [7.0, 8.0]], device=DEVICE, requires_grad=True)
    index_T = torch.tensor([2, 0, 0, -1, 3, 0], device=DEVICE)
    got = shard_rows(frames_ND, text_MD, index_T, backend=backend)
    assert got.tolist() == [[5, 6], [1, 2], [1, 2], [0, 0], [7, 8], [1, 2]]
    upstream = torch.tensor([[1.0, 10.0], [2, 20], [4, 40], [8, 80], [16, 160], [32, 320]], device=DEVICE)
    grad_frames, grad_text = torch.autograd.grad(got, (frames_ND, text_MD), upstream)
    assert grad_frames.tolist() == [[38, 380], [0, 0]]  # three places took row 0, none took row 1
    assert grad_text.tolist() == [[1, 10], [16, 160]]


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_all_padding(backend: str) -> None:
    frames_ND, text_MD, _ = case(3, 2, 5, 0, dtype=torch.float32)
    got = shard_rows(frames_ND, text_MD, torch.full((7,), -1, device=DEVICE), backend=backend)
    assert torch.equal(got, torch.zeros(7, 5, device=DEVICE))
    for grad in torch.autograd.grad(got.sum(), (frames_ND, text_MD)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_unshard_puts_rows_back(backend: str) -> None:
    rows_TD = torch.randn(5, 7, device=DEVICE, requires_grad=True)
    index_T = torch.tensor([6, 1, -1, 0, 3], device=DEVICE)
    out = unshard_rows(rows_TD, index_T, 8, backend=backend)
    want = torch.zeros(8, 7, device=DEVICE)
    want[[6, 1, 0, 3]] = rows_TD.detach()[[0, 1, 3, 4]]
    assert torch.equal(out, want)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, rows_TD, upstream)
    assert torch.equal(grad, with_zero_row(upstream)[torch.where(index_T < 0, 8, index_T)])
    # The shards of two ranks, each put back, add up to the whole.
    whole = torch.randn(8, 7, device=DEVICE)
    shards = [torch.tensor(places, device=DEVICE) for places in ([0, 7, 2, -1], [1, 3, 4, 5, 6])]
    parts = [shard_rows(whole, whole[:0], places, backend=backend) for places in shards]
    back = [unshard_rows(part, places, 8, backend=backend) for part, places in zip(parts, shards, strict=True)]
    assert torch.equal(back[0] + back[1], whole)


@pytest.mark.parametrize("backend", ["plain", "triton"])
def test_bfloat16_sums_are_rounded_once(backend: str) -> None:
    # Adding ones in bfloat16 would stick at 256.
    rows_TD = torch.ones(260, 1, dtype=torch.bfloat16, device=DEVICE)
    out = unshard_rows(rows_TD, torch.zeros(260, dtype=torch.int64, device=DEVICE), 1, backend=backend)
    assert out.item() == 260


def test_gradients_only_where_asked() -> None:
    frames_ND, text_MD, index_T = case(4, 3, 6, 9, dtype=torch.float32)
    out = shard_rows(frames_ND.detach(), text_MD, index_T, backend="triton")
    want = torch.autograd.grad(shard_rows(frames_ND, text_MD, index_T, backend="plain").sum(), text_MD)[0]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), text_MD)[0], want)


@pytest.mark.parametrize("index", [[0, 5], [-2, 0]])
def test_an_index_outside_the_rows_is_refused(index: list[int]) -> None:
    frames_ND, text_MD, _ = case(3, 2, 4, 0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"index must be in 0\.\.4, or -1 for padding; got"):
        shard_rows(frames_ND, text_MD, torch.tensor(index, device=DEVICE))
    with pytest.raises(ValueError, match=r"index must be in 0\.\.4"):
        unshard_rows(frames_ND[:2], torch.tensor(index, device=DEVICE), 5)


def test_wrong_inputs_are_refused() -> None:
    frames_ND, text_MD, index_T = case(3, 2, 4, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match="of one dtype"):
        shard_rows(frames_ND, text_MD.bfloat16(), index_T)
    with pytest.raises(ValueError, match=r"\[T\] int64"):
        shard_rows(frames_ND, text_MD, index_T.int())
    with pytest.raises(ValueError, match="one index each"):
        unshard_rows(frames_ND, index_T, 9)
    with pytest.raises(ValueError, match="use backend='plain' for float64"):
        shard_rows(frames_ND.double(), text_MD.double(), index_T, backend="triton")
