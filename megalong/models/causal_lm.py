"""transformers' own causal LM for sampling."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def empty_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The LLM of the config.json in `folder`, without weights of its own: they arrive by weight sync."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
