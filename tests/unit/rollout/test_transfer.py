"""A bucket as bytes: what is packed comes out again, at places that any dtype may start at."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalong.records import tensor_checksums
from megalong.rollout.transfer import Manifest, manifest_of, pack_bucket, packed_bytes, unpack_bucket

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 100, shape, generator=generator, dtype=dtype)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got[name], tensor)
    assert torch.equal(tensor_checksums(got.values()), tensor_checksums(want.values()))


def packed_of(tensors: dict[str, Tensor]) -> tuple[Tensor, Manifest]:
    manifest = manifest_of(tensors)
    packed = torch.zeros(packed_bytes(manifest), dtype=torch.uint8)
    pack_bucket(tensors, packed)
    return packed, manifest


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6))
def test_what_is_packed_comes_out_again(items: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = {f"w{i}": random_tensor(shape, dtype, seed=i) for i, (shape, dtype) in enumerate(items)}
    packed, manifest = packed_of(tensors)
    assert (packed.dtype, packed.dim()) == (torch.uint8, 1)
    unpacked = unpack_bucket(packed, manifest)
    assert_same(unpacked, tensors)
    for tensor in unpacked.values():
        assert (tensor.data_ptr() - packed.data_ptr()) % 16 == 0
        assert tensor.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr(), "no copy is made"


def test_places_are_multiples_of_16_bytes() -> None:
    tensors = {
        "a": torch.tensor([7, 8, 9], dtype=torch.uint8),
        "b": torch.ones((2, 4), dtype=torch.bfloat16),  # exactly 16 bytes
        "c": torch.tensor(5.0, dtype=torch.float64),
    }
    packed, manifest = packed_of(tensors)
    assert manifest == [("a", (3,), "uint8"), ("b", (2, 4), "bfloat16"), ("c", (), "float64")]
    assert len(packed) == 48
    assert packed[:16].tolist() == [7, 8, 9, *[0] * 13]
    assert packed[16:32].view(torch.bfloat16).tolist() == [1.0] * 8
    assert packed[32:40].view(torch.float64).item() == 5.0


def test_views_are_packed_by_what_they_show() -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"transposed": whole.T, "columns": whole[:, 1:3], "rows": whole[2:]}
    assert_same(unpack_bucket(*packed_of(tensors)), tensors)


@pytest.mark.parametrize("change", [-1, 1, 16])
def test_bytes_of_another_bucket_are_refused(change: int) -> None:
    packed, manifest = packed_of({"a": torch.ones(5)})
    wrong = torch.zeros(len(packed) + change, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"the bucket has {32 + change} bytes, its manifest says 32"):
        unpack_bucket(wrong, manifest)
