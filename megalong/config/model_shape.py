"""Sizes of a model as planning and validation read them: plain numbers, from JSON files alone, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config.errors import ConfigError
from megalong.config.json_part import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """What planning asks of a vision side. Counts are of one frame at the largest size that the run allows."""

    tokens_per_frame: int
    """LLM positions of one frame, what stands between frames included."""
    embeds_per_frame: int
    """Those of them that are embeddings of the tower."""
    embed_width: int
    """Elements of one embedding: the LLM's width, or a multiple of it."""
    frames_per_step: int
    """Numbers of frames are multiples of it."""
    tower_params: int
    largest_tower_param: int
    projector_params: int
    largest_projector_param: int
    frame_bytes: int
    """Decoded, as the tower takes it: uint8."""
    frame_flops: int
    """Forward of the tower and the projector."""
    frame_elements: int
    """Activations of the frozen tower's forward alive at once: those of one layer."""
    tower_layers: int
    """Layers that run; a trained tower keeps frame_elements of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of the LLM and of its vision side; counts unless said."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    """Rows of the embedding in the checkpoint."""
    tied: bool
    rope_theta: float
    max_positions: int
    mrope: bool
    """Positions of a video follow its time and the place in a frame: there are far fewer than tokens."""
    qkv_bias: bool
    qk_norm: bool
    vision: VisionShape | None
    """None: a family that reads text only."""


def llm_shape(
    llm: Part, *, vision: VisionShape | None, qkv_bias: bool = True, qk_norm: bool = False, mrope: bool = False
) -> ModelShape:
    """Sizes of a Qwen-style decoder's configuration. Raises ConfigError naming the file and the key."""
    heads, hidden = llm.size("num_attention_heads"), llm.size("hidden_size")
    shape = ModelShape(
        hidden=hidden,
        layers=llm.size("num_hidden_layers"),
        heads=heads,
        kv_heads=llm.size("num_key_value_heads", default=heads),
        head_dim=llm.size("head_dim", default=hidden // heads),
        ffn=llm.size("intermediate_size"),
        vocab=llm.size("vocab_size"),
        # transformers' Qwen configurations leave the output head untied unless told; the key is written when it is.
        tied=llm.flag("tie_word_embeddings", default=False),
        rope_theta=_rope_theta(llm),
        max_positions=llm.size("max_position_embeddings"),
        mrope=mrope,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        vision=vision,
    )
    if shape.heads % shape.kv_heads:
        raise ConfigError(
            f"{llm.where}: num_attention_heads={shape.heads} is not a multiple of num_key_value_heads={shape.kv_heads}"
        )
    return shape


def _rope_theta(llm: Part) -> float:
    """Flat in files of transformers 4, inside rope_parameters since transformers 5; never guessed."""
    nested = llm.values.get("rope_parameters")
    nested = nested if isinstance(nested, dict) else {}
    theta = llm.values.get("rope_theta", nested.get("rope_theta"))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ConfigError(
            f"{llm.where}: rope_theta (or rope_parameters.rope_theta) is {theta!r}, expected a number > 0"
        )
    return float(theta)
