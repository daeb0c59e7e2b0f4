"""Weight tables: one declarative list per family maps Megatron's tensors to Hugging Face's, in both directions.

The same table serves the initial load, weight sync to the sampler, and export. An entry
knows how its Hugging Face tensors are cut over tensor-parallel ranks and how the cuts are put together again. What is
cut or joined may share the memory of what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megalong.models.gpt_shape import GptShape

Shards = Sequence[Tensor] | Tensor
"""The cuts of a tensor in the order of the ranks: one after another, or stacked to [ranks, ..]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicated:
    """The same tensor on every tensor-parallel rank."""

    megatron: str
    hf: tuple[str, ...]

    def cut(self, tensors: Sequence[Tensor], *, rank: int, size: int) -> Tensor:
        return tensors[0]

    def join(self, shards: Shards) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Cut along dimension 0 (column-parallel weights and their biases)."""

    megatron: str
    hf: tuple[str, ...]

    def cut(self, tensors: Sequence[Tensor], *, rank: int, size: int) -> Tensor:
        return tensors[0].chunk(size)[rank]

    def join(self, shards: Shards) -> tuple[Tensor, ...]:
        return (_whole(shards),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Cut along dimension 1 (row-parallel weights)."""

    megatron: str
    hf: tuple[str, ...]

    def cut(self, tensors: Sequence[Tensor], *, rank: int, size: int) -> Tensor:
        return tensors[0].chunk(size, dim=1)[rank]

    def join(self, shards: Shards) -> tuple[Tensor, ...]:
        return (_whole(shards, dim=1),)


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabRows:
    """Vocabulary rows, padded with zeros to a multiple of the tensor-parallel size."""

    megatron: str
    hf: tuple[str, ...]
    vocab: int

    def cut(self, tensors: Sequence[Tensor], *, rank: int, size: int) -> Tensor:
        padding = -self.vocab % size
        # F.pad copies even when there is nothing to add, and this is the largest tensor of the model.
        padded = F.pad(tensors[0], (0, 0, 0, padding)) if padding else tensors[0]
        return padded.chunk(size)[rank]

    def join(self, shards: Shards) -> tuple[Tensor, ...]:
        return (_whole(shards)[: self.vocab],)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedRows:
    """Gate and up projection: each rank holds [its gate rows; its up rows]."""

    megatron: str
    hf: tuple[str, ...]

    def cut(self, tensors: Sequence[Tensor], *, rank: int, size: int) -> Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def join(self, shards: Shards) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return _whole([half[0] for half in halves]), _whole([half[1] for half in halves])


@dataclass(frozen=True, kw_only=True, slots=True)
class QkvRows:
    """Q, K, V rows interleaved by key/value head: [q of its query heads; k; v] for each, as megatron-core does.

    The interleaved rows are cut evenly. With fewer key/value heads than ranks a cut goes through a head: megatron-core
    then gathers the projection's output over the ranks, and each takes its query heads and the head they share.
    """

    megatron: str
    hf: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int

    def cut(self, tensors: Sequence[Tensor], *, rank: int, size: int) -> Tensor:
        by_kv_head = [tensor.reshape(self.kv_heads, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(by_kv_head, dim=1).flatten(0, 1).chunk(size)[rank]

    def join(self, shards: Shards) -> tuple[Tensor, ...]:
        whole = _whole(shards)
        whole = whole.reshape(self.kv_heads, -1, *whole.shape[1:])
        sizes = (self.heads // self.kv_heads * self.head_dim, self.head_dim, self.head_dim)
        return tuple(part.reshape(-1, *part.shape[2:]).contiguous() for part in whole.split(sizes, dim=1))


def _whole(shards: Shards, dim: int = 0) -> Tensor:
    """A single shard is the whole, not a copy, and so are stacked ones: it may be the largest tensor of the model."""
    if len(shards) == 1:
        return shards[0]
    return shards.flatten(0, 1) if isinstance(shards, Tensor) and dim == 0 else torch.cat(list(shards), dim=dim)


Entry = Replicated | Rows | Columns | VocabRows | GatedRows | QkvRows


def decoder_table(
    shape: GptShape, *, use_te: bool, megatron_prefix: str, hf_prefix: str, head_name: str
) -> list[Entry]:
    """The table of a Qwen-style decoder. Transformer Engine fuses each norm into the projection behind it.

    hf_prefix: what stands before `embed_tokens`, `layers` and `norm`; head_name: the whole name of the output head.
    """
    attention_norm = "self_attention.linear_qkv.layer_norm_weight" if use_te else "input_layernorm.weight"
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if use_te else "pre_mlp_layernorm.weight"
    table: list[Entry] = [
        VocabRows(
            megatron=f"{megatron_prefix}embedding.word_embeddings.weight",
            hf=(f"{hf_prefix}embed_tokens.weight",),
            vocab=shape.vocab,
        )
    ]
    for layer in range(shape.layers):
        ours, theirs = f"{megatron_prefix}decoder.layers.{layer}.", f"{hf_prefix}layers.{layer}."
        table.append(Replicated(megatron=ours + attention_norm, hf=(theirs + "input_layernorm.weight",)))
        for part in ("weight", "bias") if shape.qkv_bias else ("weight",):
            table.append(
                QkvRows(
                    megatron=f"{ours}self_attention.linear_qkv.{part}",
                    hf=tuple(f"{theirs}self_attn.{name}_proj.{part}" for name in "qkv"),
                    heads=shape.heads,
                    kv_heads=shape.kv_heads,
                    head_dim=shape.head_dim,
                )
            )
        for name in "qk" if shape.qk_norm else "":
            table.append(
                Replicated(
                    megatron=f"{ours}self_attention.{name}_layernorm.weight",
                    hf=(f"{theirs}self_attn.{name}_norm.weight",),
                )
            )
        table += [
            Columns(megatron=ours + "self_attention.linear_proj.weight", hf=(theirs + "self_attn.o_proj.weight",)),
            Replicated(megatron=ours + mlp_norm, hf=(theirs + "post_attention_layernorm.weight",)),
            GatedRows(
                megatron=ours + "mlp.linear_fc1.weight",
                hf=(theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"),
            ),
            Columns(megatron=ours + "mlp.linear_fc2.weight", hf=(theirs + "mlp.down_proj.weight",)),
        ]
    table.append(
        Replicated(megatron=f"{megatron_prefix}decoder.final_layernorm.weight", hf=(f"{hf_prefix}norm.weight",))
    )
    if not shape.tied:
        table.append(VocabRows(megatron=f"{megatron_prefix}output_layer.weight", hf=(head_name,), vocab=shape.vocab))
    return table


def stage_table(
    table: Sequence[Entry], *, prefix: str, first_layer: int, num_layers: int, is_first: bool, is_last: bool, tied: bool
) -> list[Entry]:  # fmt: skip
    """The entries of one pipeline stage, Megatron's layer numbers counted from the stage's first layer.

    Entries outside `prefix` (the vision side) belong to every stage. A tied embedding belongs to the first stage, and
    under the head's name to the last one.
    """
    layers, embedding, head = f"{prefix}decoder.layers.", f"{prefix}embedding.", f"{prefix}output_layer.weight"
    kept: list[Entry] = []
    for entry in table:
        name = entry.megatron
        if name.startswith(layers):
            number, _, inner = name.removeprefix(layers).partition(".")
            local = int(number) - first_layer
            if 0 <= local < num_layers:
                kept.append(replace(entry, megatron=f"{layers}{local}.{inner}"))
        elif name.startswith(embedding):
            if is_first:
                kept.append(entry)
            if is_last and tied:
                kept.append(replace(entry, megatron=head))
        elif is_last or not name.startswith(prefix):
            kept.append(entry)
    return kept
