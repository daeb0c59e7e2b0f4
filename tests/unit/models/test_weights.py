"""Weight tables: cuts and joins are exact inverses at every tensor-parallel size, and nothing is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megalong.config.tree import Dtype, ModelConfig
from megalong.engine.build import build_model
from megalong.engine.weights_io import export_weights
from megalong.models.gpt_shape import GptShape
from megalong.models.weights import (
    Columns,
    Entry,
    GatedRows,
    QkvRows,
    Replicated,
    Rows,
    VocabRows,
    decoder_table,
    stage_table,
)
from megalong.records import tensor_checksums

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 8, 4, 3, 6, 10


def numbered(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


QKV = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
CASES: dict[str, tuple[Entry, list[Tensor]]] = {
    "replicated": (Replicated(megatron="m", hf=("a",)), [numbered(7)]),
    "rows": (Rows(megatron="m", hf=("a",)), [numbered(8, 3)]),
    "rows of a bias": (Rows(megatron="m", hf=("a",)), [numbered(8)]),
    "columns": (Columns(megatron="m", hf=("a",)), [numbered(3, 8)]),
    "vocabulary": (VocabRows(megatron="m", hf=("a",), vocab=VOCAB), [numbered(VOCAB, HIDDEN)]),
    "gate and up": (GatedRows(megatron="m", hf=("a", "b")), [numbered(8, 3), numbered(8, 3, start=100)]),
    "qkv weight": (
        QkvRows(megatron="m", hf=("q", "k", "v"), **QKV),
        [
            numbered(HEADS * HEAD_DIM, HIDDEN),
            numbered(KV_HEADS * HEAD_DIM, HIDDEN, start=1000),
            numbered(KV_HEADS * HEAD_DIM, HIDDEN, start=2000),
        ],
    ),
    "qkv bias": (
        QkvRows(megatron="m", hf=("q", "k", "v"), **QKV),
        [
            numbered(HEADS * HEAD_DIM),
            numbered(KV_HEADS * HEAD_DIM, start=100),
            numbered(KV_HEADS * HEAD_DIM, start=200),
        ],
    ),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("entry", "tensors"), CASES.values(), ids=CASES.keys())
def test_join_undoes_cut(entry: Entry, tensors: list[Tensor], size: int) -> None:
    shards = [entry.cut(tensors, rank=rank, size=size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1, "every rank holds a shard of the same shape"
    joined = entry.join(shards)
    assert len(joined) == len(tensors)
    for got, want in zip(joined, tensors, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", ["qkv weight", "qkv bias"])
def test_more_ranks_than_key_value_heads_cut_the_interleaved_rows_evenly(case: str) -> None:
    entry, tensors = CASES[case]
    [whole] = [entry.cut(tensors, rank=0, size=1)]
    shards = [entry.cut(tensors, rank=rank, size=8) for rank in range(8)]
    assert torch.equal(torch.cat(shards), whole)
    assert {len(shard) for shard in shards} == {(HEADS + 2 * KV_HEADS) * HEAD_DIM // 8}
    for got, want in zip(entry.join(shards), tensors, strict=True):
        assert torch.equal(got, want)


def test_vocabulary_is_padded_with_zeros_for_the_cut_and_trimmed_by_the_join() -> None:
    entry, tensors = CASES["vocabulary"]
    shards = [entry.cut(tensors, rank=rank, size=4) for rank in range(4)]
    assert [len(shard) for shard in shards] == [3, 3, 3, 3]
    assert torch.equal(shards[3], torch.cat((tensors[0][9:], torch.zeros(2, HIDDEN))))
    shards[3][1:] = 99.0  # what training may leave in the padding
    assert torch.equal(entry.join(shards)[0], tensors[0])


def test_each_rank_gets_whole_query_groups() -> None:
    """8 query heads share 4 key heads: rank 1 of 2 gets heads [4 5 | k2 | v2 | 6 7 | k3 | v3]."""
    entry, (query, key, value) = CASES["qkv bias"]
    q, k, v = (tensor.reshape(-1, HEAD_DIM) for tensor in (query, key, value))
    want = torch.cat((q[4], q[5], k[2], v[2], q[6], q[7], k[3], v[3]))
    assert torch.equal(entry.cut([query, key, value], rank=1, size=2), want)


def test_gate_and_up_lie_side_by_side_on_each_rank() -> None:
    entry, (gate, up) = CASES["gate and up"]
    assert torch.equal(entry.cut([gate, up], rank=1, size=2), torch.cat((gate[4:], up[4:])))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("use_te", [False, True])
def test_decoder_table_names(tied: bool, use_te: bool) -> None:
    shape = GptShape(
        hidden=12, layers=2, heads=4, kv_heads=2, head_dim=3, ffn=8, vocab=10, tied=tied, rope_theta=1e4,
        rope_scaling=1.0, norm_eps=1e-6, max_positions=64,
    )  # fmt: skip
    table = decoder_table(
        shape, use_te=use_te, megatron_prefix="llm.", hf_prefix="llm/model.", head_name="llm/lm_head.weight"
    )
    hf = [name for entry in table for name in entry.hf]
    assert len(set(hf)) == len(hf)
    assert ("llm/lm_head.weight" in hf) is not tied
    megatron = {entry.megatron for entry in table}
    assert ("llm.decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in megatron) is use_te
    assert ("llm.decoder.layers.1.pre_mlp_layernorm.weight" in megatron) is not use_te


@pytest.mark.parametrize("tied", [False, True])
def test_stages_share_out_the_table(tied: bool) -> None:
    """Three layers on three stages: layer numbers become local; a tied head is a second place for the embedding."""
    shape = GptShape(
        hidden=12, layers=3, heads=4, kv_heads=2, head_dim=3, ffn=8, vocab=10, tied=tied, rope_theta=1e4,
        rope_scaling=1.0, norm_eps=1e-6, max_positions=64,
    )  # fmt: skip
    whole = decoder_table(shape, use_te=False, megatron_prefix="llm.", hf_prefix="model.", head_name="lm_head.weight")
    whole.append(Replicated(megatron="vision.norm.weight", hf=("tower.norm.weight",)))
    stages = [
        stage_table(
            whole, prefix="llm.", first_layer=stage, num_layers=1, is_first=stage == 0, is_last=stage == 2, tied=tied
        )
        for stage in range(3)
    ]
    places = [{name: entry.megatron for entry in table for name in entry.hf} for table in stages]
    for stage, of_stage in enumerate(places):
        assert of_stage["tower.norm.weight"] == "vision.norm.weight"
        assert of_stage[f"model.layers.{stage}.mlp.down_proj.weight"] == "llm.decoder.layers.0.mlp.linear_fc2.weight"
        assert sum(".layers." in name for name in of_stage) == 12
    embedding = "model.embed_tokens.weight"
    assert [of_stage.get(embedding) for of_stage in places] == [
        "llm.embedding.word_embeddings.weight", None, "llm.output_layer.weight" if tied else None,
    ]  # fmt: skip
    assert [of_stage.get("lm_head.weight") for of_stage in places] == [
        None, None, None if tied else "llm.output_layer.weight",
    ]  # fmt: skip
    assert ["model.norm.weight" in of_stage for of_stage in places] == [False, False, True]
    assert {name for of_stage in places for name in of_stage} == {name for entry in whole for name in entry.hf}


def test_table_fills_every_parameter_and_names_every_tensor_of_the_files(layout: object, tiny_checkpoint: Path) -> None:
    model = build_model(ModelConfig(path=str(tiny_checkpoint), dtype=Dtype.float32), layout, sequence_parallel=False)
    table = model.weight_table()
    assert sorted(entry.megatron for entry in table) == sorted(name for name, _ in model.named_parameters())
    named = {name for entry in table for name in entry.hf}
    in_files = set()
    for folder in ("llm", "vision_tower", "mm_projector"):
        with safe_open(tiny_checkpoint / folder / "model.safetensors", framework="pt") as file:
            in_files |= {f"{folder}/{name}" for name in file.keys()}  # noqa: SIM118
    left_out = in_files - named
    assert named <= in_files
    # The tower's last block and the norm behind it are not run (select_layer -2).
    assert {".".join(name.split(".")[:-1]).split(".layers.2.")[0] for name in left_out} == {
        "vision_tower/vision_model.encoder",
        "vision_tower/vision_model.post_layernorm",
    }


@pytest.mark.parametrize("bucket_bytes", [1, 10_000, 1 << 30])
def test_export_gives_the_files_back_bit_for_bit(layout: object, tiny_checkpoint: Path, bucket_bytes: int) -> None:
    model = build_model(ModelConfig(path=str(tiny_checkpoint), dtype=Dtype.float32), layout, sequence_parallel=False)
    table = model.weight_table()
    buckets = list(export_weights(model, table, layout, bucket_bytes=bucket_bytes))
    names = [name for bucket in buckets for name in bucket.tensors]
    assert names == [name for entry in table for name in entry.hf]
    for bucket in buckets:
        assert torch.equal(bucket.checksums_n, tensor_checksums(bucket.tensors.values()))
        assert len(bucket.tensors) == 1 or sum(tensor.nbytes for tensor in bucket.tensors.values()) <= bucket_bytes
        for name, tensor in bucket.tensors.items():
            folder, _, inner = name.partition("/")
            with safe_open(tiny_checkpoint / folder / "model.safetensors", framework="pt") as file:
                assert torch.equal(tensor, file.get_tensor(inner)), name


def test_checksums_see_shapes_dtypes_bytes_and_places() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (0, 1, 7, 255, 256, 257, 1000, 70_001):
        base = torch.randn(size, generator=generator)
        others = [base.to(torch.float64), base.view(torch.int32), base[None], torch.cat([base, base.new_zeros(1)])]
        if size > 1:
            others += [base.flip(0), base.roll(1), torch.cat([base[:-1], -base[-1:]])]
        if size > 600:  # rows of 512 numbers change places
            others += [torch.cat([base[512:1000], base[:512], base[1000:]])]
        (checksum,) = tensor_checksums([base]).tolist()
        found = tensor_checksums([base.clone(), *others]).tolist()
        assert found[0] == checksum
        assert len(set(found)) == 1 + len(others), size


def test_a_flipped_bit_changes_the_checksum() -> None:
    data = torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    checksum = tensor_checksums([data])
    for place in range(0, 5000, 61):
        wrong = data.clone()
        wrong[place] ^= 1 << place % 8
        assert tensor_checksums([wrong]) != checksum
