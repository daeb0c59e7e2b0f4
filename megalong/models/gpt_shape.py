"""Sizes of a Qwen-style decoder, and reading them from a stock config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalong.models.errors import CheckpointError
from megalong.models.json_files import require_sizes

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class GptShape:
    """Sizes of a decoder with grouped-query attention, RoPE, RMSNorm and SwiGLU."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # hidden / heads unless the checkpoint says otherwise
    ffn: int
    vocab: int  # rows of the embedding in the checkpoint
    tied: bool
    rope_theta: float
    rope_scaling: float  # linear position scaling factor; 1.0: none
    norm_eps: float
    max_positions: int
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over head_dim on every query and key head
    mrope_section: tuple[int, int, int] | None = None
    """Frequencies that turn with the temporal, height and width position, head_dim / 2 together; None: plain RoPE."""
    mrope_interleaved: bool = False  # T H W T H W .. instead of one section after the other
    deepstack: int = 0  # first layers behind each of which vision embeddings of its own are added


def read_gpt_shape(llm: dict[str, Any], *, where: str, qkv_bias: bool = True, qk_norm: bool = False) -> GptShape:
    """GptShape of a stock Qwen config.json. Raises CheckpointError for what the decoder does not implement."""
    require_sizes(llm, SIZES, where)
    if llm.get("use_sliding_window") or "sliding_attention" in (llm.get("layer_types") or ()):
        raise CheckpointError(f"{where}: sliding-window attention is not supported (use_sliding_window, layer_types)")
    if llm.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {llm['hidden_act']!r}, expected 'silu'")
    if qk_norm and llm.get("attention_bias"):
        raise CheckpointError(f"{where}: attention_bias=true is not supported together with norms on queries and keys")
    heads, rope = llm["num_attention_heads"], _rope(llm, where)
    head_dim = llm.get("head_dim") or llm["hidden_size"] // heads
    return GptShape(
        hidden=llm["hidden_size"],
        layers=llm["num_hidden_layers"],
        heads=heads,
        kv_heads=llm.get("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=llm["intermediate_size"],
        vocab=llm["vocab_size"],
        tied=llm.get("tie_word_embeddings", False),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=float(rope.get("factor", 1.0)) if rope["rope_type"] == "linear" else 1.0,
        norm_eps=llm.get("rms_norm_eps", 1e-6),
        max_positions=llm.get("max_position_embeddings", 32768),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        mrope_section=_mrope_section(rope, head_dim=head_dim, where=where),
        mrope_interleaved=bool(rope.get("mrope_interleaved", False)),
    )


def _rope(llm: dict[str, Any], where: str) -> dict[str, Any]:
    """rope_theta, rope_type ("default" or "linear") and what comes with it."""
    # transformers 5 writes rope_parameters; older checkpoints rope_theta and rope_scaling.
    rope = dict(llm.get("rope_parameters") or {"rope_theta": llm.get("rope_theta"), **(llm.get("rope_scaling") or {})})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # Qwen2-VL's "mrope" is plain RoPE on three rows of positions; mrope_section says which frequency reads which.
    rope["rope_type"] = "default" if kind == "mrope" else kind
    if rope["rope_type"] not in ("default", "linear"):
        raise CheckpointError(f"{where}: rope type {kind!r} is not supported (default or linear)")
    if rope.get("rope_theta") is None:
        raise CheckpointError(f"{where}: rope_theta is missing; it is never guessed")
    return rope


def _mrope_section(rope: dict[str, Any], *, head_dim: int, where: str) -> tuple[int, int, int] | None:
    section = rope.get("mrope_section")
    if section is None:
        return None
    if len(section) != 3 or sum(section) != head_dim // 2:
        raise CheckpointError(
            f"{where}: mrope_section is {section}, expected three numbers that add up to head_dim / 2 = {head_dim // 2}"
        )
    return tuple(section)
