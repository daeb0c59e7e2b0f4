"""LongVila: the vision encoder and the Megatron LLM as one module, and its tokenizer's view of a prompt."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megalong.models.gpt import PackGpt
from megalong.models.longvila.spec import LongVilaSpec
from megalong.models.longvila.tower import VisionEncoder
from megalong.models.longvila.weights import weight_table
from megalong.models.weights import Entry
from megalong.records import TokenBatch


class LongVila(MegatronModule):
    """Parameters `llm.*` are tensor-parallel; `vision.*` are whole on every rank."""

    def __init__(
        self, config: TransformerConfig, spec: LongVilaSpec, *, use_te: bool, attention_kernel: str = "auto"
    ) -> None:
        super().__init__(config=config)
        self.spec, self.use_te = spec, use_te
        tp = config.tensor_model_parallel_size
        self.llm = PackGpt(
            config,
            spec.gpt,
            use_te=use_te,
            padded_vocab=spec.gpt.vocab + -spec.gpt.vocab % tp,
            attention_kernel=attention_kernel,
        )
        self.vision = VisionEncoder(spec).to(config.params_dtype)

    def forward(self, tokens: TokenBatch, embeds_ND: Tensor | None) -> Tensor:
        """Hidden states of the response rows, [R, D]; see PackGpt.response_hidden."""
        return self.llm.response_hidden(tokens, embeds_ND)

    def freeze(self, *, llm: bool, projector: bool, tower: bool) -> None:
        """Mark what is not trained. Flags say what IS trained."""
        self.llm.requires_grad_(llm)
        self.vision.requires_grad_(tower)
        self.vision.projector.requires_grad_(projector)

    def weight_table(self) -> list[Entry]:
        """The tensors of this pipeline stage (all of them without pipeline parallelism)."""
        return self.llm.stage_table(weight_table(self.spec, self.vision, use_te=self.use_te), prefix="llm.")

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        state = self.llm.sharded_state_dict(f"{prefix}llm.", sharded_offsets, metadata)
        state.update(
            make_sharded_tensors_for_checkpoint(self.vision.state_dict(), f"{prefix}vision.", {}, sharded_offsets)
        )
        return state
