"""megatron-core's transformer layer with its MLP half in slices of rows, as a model's last one, and with deepstack.

On a pack of a million rows the MLP's inner activations, five times as wide as the rows, would outweigh everything else
that a layer holds. Row by row it depends on nothing but that row, so slices give the same output and gradients.

Behind the attention of the last layer there are only the rows that predict a token (attention.last_layer): what its
core attention returns, and of the residual stream the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megalong.config.costs import mlp_slices


class PackLayer(TransformerLayer):
    """A layer whose norm, MLP and residual sum run over slices of rows, forward and backward."""

    mlp_chunks = 1  # model.mlp_chunks; 1: as megatron does it

    def compute_needed_only(self) -> None:
        """Be the model's last layer: return the rows that predict a token, [n (/tp with sequence parallel), 1, D]."""
        self.self_attention.core_attention.needed_only = True

    def _forward_attention(
        self, hidden_states: Tensor, attention_mask: Tensor, context: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None, **others: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not self.self_attention.core_attention.needed_only:
            return super()._forward_attention(
                hidden_states, attention_mask, context, rotary_pos_emb=rotary_pos_emb, **others
            )
        # megatron's own adds the attention's output to rows that it takes from hidden_states itself.
        attended = self.self_attention(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        residual = self._needed(hidden_states, attention_mask)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(attended, residual, self.hidden_dropout), context

    def _needed(self, rows: Tensor, attention_mask: Tensor) -> Tensor:
        """Of rows as they are before this layer, those that are behind it: all but in the last layer.

        rows: [t, ...] of this context-parallel rank, its tensor-parallel rank's share with sequence parallelism.
        """
        needed = self.self_attention.core_attention.needed(attention_mask)
        if needed is None:
            return rows
        if not self.config.sequence_parallel:
            return needed.take(rows)
        first = parallel_state.get_tensor_model_parallel_rank() * len(rows)
        held_m = (needed.picked_m >= first) & (needed.picked_m < first + len(rows))
        mine = rows.index_select(0, (needed.picked_m[held_m] - first).to(rows.device))
        places = held_m.nonzero()[:, 0].to(rows.device)
        picked = rows.new_zeros((len(held_m), *rows.shape[1:])).index_copy(0, places, mine)
        # Each row is on one rank and zero on the others, so the sum is exact.
        return scatter_to_sequence_parallel_region(needed.deliver(reduce_from_tensor_model_parallel_region(picked)))

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = hidden_states.shape[0]
        gathered = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        recompute = self.config.recompute_granularity is not None
        slices = min(rows, mlp_slices(rows * gathered, chunks=self.mlp_chunks, recompute=recompute))
        if slices == 1:
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        # megatron recomputes a layer with gradients on, to differentiate it. The value of its output, which is the
        # value computed here, is then read by nothing.
        differentiating = is_checkpointing() and torch.is_grad_enabled()
        return slice_rows(super()._forward_mlp, hidden_states, slices=slices, skip_forward=differentiating)


class DeepstackLayer(PackLayer):
    """A decoder layer that adds its level's vision embeddings behind itself, when there are any.

    They travel as megatron's cross-attention context [t (/tp with sequence parallel), levels, D], which nothing else
    reads here and which recomputation hands through with its gradient.
    """

    def forward(self, *args: Any, attention_mask: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden, context_tLD = super().forward(*args, attention_mask=attention_mask, **kwargs)
        level = self.layer_number - 1
        if context_tLD is None or level >= context_tLD.shape[1]:
            return hidden, context_tLD
        return hidden + self._needed(context_tLD[:, level, None], attention_mask), context_tLD


def slice_rows(
    function: Callable[[Tensor], Tensor], rows: Tensor, *, slices: int, skip_forward: bool = False
) -> Tensor:
    """function(rows), `slices` runs of consecutive rows at a time.

    rows: [t, ...]; function keeps the shape and treats each row alone, so it may also gather and scatter rows over
    ranks that slice equally. The backward computes function again, slice by slice, and accumulates into the
    parameters' gradients as it goes: nothing but `rows` is kept. skip_forward: the result is NaN everywhere, for a
    caller that wants the gradients alone.
    """
    return _SliceRows.apply(rows, function, slices, skip_forward)


class _SliceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, function: Callable[[Tensor], Tensor], slices: int, skip_forward: bool
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.function, ctx.slices = function, slices
        if skip_forward:
            return rows.new_full((), torch.nan).expand(rows.shape)
        out = torch.empty_like(rows)
        for source, target in zip(rows.detach().tensor_split(slices), out.tensor_split(slices), strict=True):
            target.copy_(function(source))
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        parts = (part.tensor_split(ctx.slices) for part in (rows, grad_out, grad_rows))
        for source, grad, target in zip(*parts, strict=True):
            leaf = source.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(leaf)
            torch.autograd.backward(out, grad)
            target.copy_(leaf.grad)
        return grad_rows, None, None, None
