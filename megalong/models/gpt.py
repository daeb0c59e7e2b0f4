"""The LLM of every family: megatron-core's GPTModel over packs of groups, returning hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megalong_kernels.sequence_shard import PADDING, shard_rows
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megalong.attention.shard import PackShard
from megalong.models.gpt_shape import GptShape
from megalong.models.layer import DeepstackLayer, PackLayer
from megalong.models.weights import Entry, stage_table
from megalong.parallel.offload import Offload


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 (float64 for float64), weight applied in the input's dtype, as Qwen2.

    Marks its weight for megatron's sequence-parallel gradient reduction, which the local spec's own
    norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        return F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(hidden.dtype) * self.weight


class PackRotary(nn.Module):
    """Rotary angles at given positions (megatron asks this through its M-RoPE call, which passes position ids).

    Angles are made in float64 and reduced modulo 2 pi before they become float32: at position
    2,000,000 a float32 product is off by up to 0.1 rad.
    """

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        # float64, CPU; no buffers: never cast or saved
        self.inv_freq_64 = shape.rope_theta**-exponents / shape.rope_scaling
        self.row_of_frequency = _position_rows(shape)

    def forward(self, position_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """position_ids: [1, T] or [3, T] int64. Returns angles [T, 1, 1, head_dim] float32, on the same device."""
        rows = self.row_of_frequency.clamp(max=len(position_ids) - 1)
        inv_freq = self.inv_freq_64.to(position_ids.device)
        angles = position_ids.double()[rows.to(position_ids.device)].T * inv_freq
        angles = torch.remainder(angles, 2 * torch.pi).float()
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def _position_rows(shape: GptShape) -> Tensor:
    """Which row of three positions each frequency turns with, [head_dim / 2] int64; all row 0 without M-RoPE.

    One section after the other (Qwen2-VL), or T H W T H W .. as far as H and W go, then T (Qwen3-VL).
    """
    rows = torch.zeros(shape.head_dim // 2, dtype=torch.int64)
    if shape.mrope_section is None:
        return rows
    if not shape.mrope_interleaved:
        return torch.tensor([row for row, count in enumerate(shape.mrope_section) for _ in range(count)])
    for row in (1, 2):
        rows[row : 3 * shape.mrope_section[row] : 3] = row
    return rows


class PackGpt(GPTModel):
    """GPTModel that takes its share of a pack and returns the hidden states of response rows.

    With pipeline parallelism it is one stage: the first one embeds, each holds an equal share of the layers, the last
    one holds the final norm and the output head. The schedule hands over what the stage before returned
    (set_input_tensor) before it calls.
    """

    offload: Offload | None = None
    """Where the activations that recomputation keeps wait for the backward; None: on the device."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: GptShape,
        *,
        use_te: bool,
        padded_vocab: int,
        core_attention: Callable[..., Any],
    ) -> None:
        stages = config.pipeline_model_parallel_size
        # megatron's layers take their numbers from the same place.
        stage = parallel_state.get_pipeline_model_parallel_rank() if stages > 1 else 0
        if config.num_layers // stages < shape.deepstack:
            raise ValueError(
                f"parallel.pp={stages} leaves {config.num_layers // stages} layers to the first stage, which adds "
                f"{shape.deepstack} levels of vision embeddings; lower parallel.pp"
            )
        super().__init__(
            config=config,
            transformer_layer_spec=_block_spec(
                config,
                config.num_layers // stages,
                use_te=use_te,
                core_attention=core_attention,
                layer_class=DeepstackLayer if shape.deepstack else PackLayer,
            ),
            pre_process=stage == 0,
            post_process=stage == stages - 1,
            vocab_size=padded_vocab,
            max_sequence_length=shape.max_positions,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="mrope",
            rotary_base=shape.rope_theta,
            # embed() puts text and vision rows into this rank's slice of the sequence.
            scatter_embedding_sequence_parallel=False,
        )
        if self.post_process:
            self.decoder.layers[-1].compute_needed_only()
        self.rotary_pos_emb = PackRotary(shape)
        self.real_vocab = shape.vocab
        self.num_deepstack = shape.deepstack

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        # megatron would compute logits of every token here; response rows are picked first.
        return hidden_states

    def embed(self, pack: PackShard, embeds_nD: Tensor | None) -> Tensor:
        """Hidden states that go into the first layer: vision and text embeddings, each at its place, zeros as padding.

        embeds_nD: [n, (1 + levels) * D] vision embeddings of the rows that this rank embeds, its slice of the
        context-parallel rank's with sequence parallel, otherwise all of them, equal over TP; here the first D columns
        are read. Returns [s, 1, D] in the model's dtype, s = t (/tp with sequence parallel). Raises ValueError when
        places and embeddings differ in number.
        """
        device = next(self.parameters()).device
        given = 0 if embeds_nD is None else len(embeds_nD)
        if pack.num_media != given:
            raise ValueError(f"the pack has {pack.num_media} vision-token places but {given} embeddings were given")
        # Looked up for text rows alone: over TP every row is summed, and most are vision tokens.
        text_MD = self.embedding.word_embeddings(pack.text_M.to(device)[None])[0]
        if self.config.sequence_parallel:
            # A row's gradient comes from the slice that it is in, and goes to the rank that has the token's weights.
            text_MD = copy_to_tensor_model_parallel_region(text_MD)
        frames_nD = text_MD[:0] if embeds_nD is None else embeds_nD[:, : text_MD.shape[1]].to(text_MD.dtype)
        hidden = shard_rows(frames_nD, text_MD, pack.source_s.to(device))[:, None]
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # A frozen LLM on a pack without videos: its layers are differentiated like those of every other pack.
            hidden.requires_grad_()
        return hidden

    def deepstack(self, pack: PackShard, embeds_nD: Tensor | None) -> Tensor | None:
        """[s, levels, D], rows as those of embed(): what the first layers add, 0 where no vision token is.

        None for a family without deepstack, and for a pack without videos.
        """
        if embeds_nD is None or not self.num_deepstack:
            return None
        levels_nD = embeds_nD[:, self.config.hidden_size :].to(self.config.params_dtype)
        source_s = pack.source_s.masked_fill(pack.source_s >= len(levels_nD), PADDING).to(levels_nD.device)
        return shard_rows(levels_nD, levels_nD[:0], source_s).unflatten(1, (self.num_deepstack, -1))

    def response_hidden(self, pack: PackShard, embeds_nD: Tensor | None) -> Tensor:
        """Final hidden states of the response rows that this rank scores.

        embeds_nD: [n, (1 + levels) * D], as for embed(); read by the first pipeline stage alone. Returns [r, D],
        replicated over TP, in the model's dtype; its backward sums the gradient over the TP group, so each rank hands
        in the part that comes from its own vocabulary rows. Before the last stage: what the next stage takes,
        [t (/tp with sequence parallel), 1, D].
        """
        device = next(self.parameters()).device
        given = {
            "input_ids": None,
            "position_ids": torch.atleast_2d(pack.positions_t.to(device)),  # [1, t] or [3, t]
            "attention_mask": pack.mask,
            "decoder_input": self.embed(pack, embeds_nD) if self.pre_process else None,
            "extra_block_kwargs": {"context": self.deepstack(pack, embeds_nD) if self.pre_process else None},
        }
        with self._keeping_inputs():
            hidden = self(**given)
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return copy_to_tensor_model_parallel_region(pack.response_rows(hidden[:, 0]))

    @contextmanager
    def kept_attention(self) -> Iterator[None]:
        """Inside this context, recomputed layers keep their attention output and log-sum-exp (KeptOutputs)."""
        with ExitStack() as stack:
            for layer in self.decoder.layers:
                stack.enter_context(layer.self_attention.core_attention.kept.record(self.offload))
            yield

    def _keeping_inputs(self) -> AbstractContextManager[None]:
        """What a forward runs in: with gradients and an offload, the inputs of recomputed layers go there."""
        if self.offload is None or not torch.is_grad_enabled():
            return nullcontext()
        rows = (1, self.config.hidden_size)  # [t, 1, D]; rotary angles and deepstack's context are shared by the layers
        return self.offload.forward(lambda saved: saved.shape[1:] == rows, layers=len(self.decoder.layers))

    def slice_mlps(self, chunks: int) -> None:
        """Run every layer's MLP in slices of rows, as model.mlp_chunks says."""
        for layer in self.decoder.layers:
            layer.mlp_chunks = chunks

    @property
    def sequence_part(self) -> tuple[int, int]:
        """(which, of how many) equal slices of a context-parallel rank's rows are between this rank's layers."""
        if not self.config.sequence_parallel:
            return 0, 1
        return parallel_state.get_tensor_model_parallel_rank(), self.config.tensor_model_parallel_size

    @property
    def head_weight(self) -> Tensor:
        """[padded V / tp, D]: this rank's rows of the output head."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This stage's copy of an embedding that is also the head, when two stages hold one."""
        one_of_two = self.pre_process != self.post_process
        return (
            self.shared_embedding_or_output_weight()
            if one_of_two and self.share_embeddings_and_output_weights
            else None
        )

    def stage_table(self, table: Sequence[Entry], *, prefix: str) -> list[Entry]:
        """This stage's part of the weight table of the whole model, with the names that its tensors have here.

        prefix: of this module's names in the table.
        """
        if self.pre_process and self.post_process:
            return list(table)
        return stage_table(
            table,
            prefix=prefix,
            first_layer=self.decoder.layers[0].layer_number - 1,
            num_layers=len(self.decoder.layers),
            is_first=self.pre_process,
            is_last=self.post_process,
            tied=self.share_embeddings_and_output_weights,
        )


def _block_spec(
    config: TransformerConfig, num_layers: int, *, use_te: bool, core_attention: Callable[..., Any],
    layer_class: type[PackLayer],
) -> TransformerBlockSubmodules:  # fmt: skip
    """Megatron's layer with our core attention and sliced MLP; Transformer Engine's linears and norms on a GPU."""
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.module = layer_class
    attention: ModuleSpec = layer.submodules.self_attention
    attention.submodules.core_attention = core_attention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def transformer_config(
    shape: GptShape, *, tp: int, cp: int, pp: int, sequence_parallel: bool, dtype: torch.dtype,
    recompute: bool, on_gpu: bool,
) -> TransformerConfig:  # fmt: skip
    """Megatron's config for `shape`. Losses are sums over tokens, so gradients are summed, not averaged, over DP."""
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,  # between pipeline stages: packs differ in length
        deallocate_pipeline_outputs=True,  # what was sent to the next stage is kept there
        moe_token_dispatcher_type="alltoall",  # the one that megatron lets variable lengths have
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        calculate_per_token_loss=True,
        mrope_section=[shape.head_dim // 2, 0, 0],  # only to be there; PackRotary knows the sections
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
