"""PolicyModel: the Megatron LLM and, for a family with vision, its encoder, as one module. One class for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megalong.attention.shard import PackShard
from megalong.models.gpt import PackGpt
from megalong.models.weights import Entry


class PolicyModel(MegatronModule):
    """Parameters `llm.*` are tensor-parallel; `vision.*` are whole on every rank.

    family: its name, which checkpoints carry. spec: the family's, with `path` and `gpt`. vision: [F, H, W, 3] uint8
    frames to [F / frames_per_step, tokens per step, D'] embeddings, where D' may be a multiple of the LLM's width; its
    attribute `projector` is the part behind the tower, `settings` a text that names all beside the weights that decides
    the output. None for a family without vision. table: the family's weight table of this very model.
    """

    def __init__(
        self, config: TransformerConfig, spec: Any, *, family: str, vision: nn.Module | None,
        table: Sequence[Entry], use_te: bool, core_attention: Callable[..., Any],
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.family, self.spec = family, spec
        self._table = tuple(table)
        tp = config.tensor_model_parallel_size
        self.llm = PackGpt(
            config,
            spec.gpt,
            use_te=use_te,
            padded_vocab=spec.gpt.vocab + -spec.gpt.vocab % tp,
            core_attention=core_attention,
        )
        self.vision = None if vision is None else vision.to(config.params_dtype)

    def forward(self, pack: PackShard, embeds_nD: Tensor | None) -> Tensor:
        """Hidden states of the response rows this rank scores, [r, D]; see PackGpt.response_hidden."""
        return self.llm.response_hidden(pack, embeds_nD)

    def freeze(self, *, llm: bool, projector: bool, tower: bool) -> None:
        """Mark what is not trained. Flags say what IS trained; the last two say nothing without vision."""
        self.llm.requires_grad_(llm)
        if self.vision is not None:
            self.vision.requires_grad_(tower)
            self.vision.projector.requires_grad_(projector)

    def weight_table(self) -> list[Entry]:
        """The tensors of this pipeline stage (all of them without pipeline parallelism)."""
        return self.llm.stage_table(self._table, prefix="llm.")

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        state = self.llm.sharded_state_dict(f"{prefix}llm.", sharded_offsets, metadata)
        if self.vision is not None:
            state.update(sharded_encoder(self.vision, prefix=prefix, sharded_offsets=sharded_offsets))
        return state


def sharded_encoder(encoder: nn.Module, *, prefix: str = "", sharded_offsets: tuple = ()) -> dict:
    """The vision side's part of PolicyModel.sharded_state_dict."""
    return make_sharded_tensors_for_checkpoint(encoder.state_dict(), f"{prefix}vision.", {}, sharded_offsets)
