"""megatron-core's transformer layer with its MLP half in slices of rows, and with deepstack.

On a pack of a million rows the MLP's inner activations, five times as wide as the rows, would outweigh everything else
that a layer holds. Row by row it depends on nothing but that row, so slices give the same output and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megalong.config.costs import mlp_slices


class PackLayer(TransformerLayer):
    """A layer whose norm, MLP and residual sum run over slices of rows, forward and backward."""

    mlp_chunks = 1  # model.mlp_chunks; 1: as megatron does it

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

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        hidden, context_tLD = super().forward(*args, **kwargs)
        level = self.layer_number - 1
        if context_tLD is None or level >= context_tLD.shape[1]:
            return hidden, context_tLD
        return hidden + context_tLD[:, level, None], context_tLD


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
