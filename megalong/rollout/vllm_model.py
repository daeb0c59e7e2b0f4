"""Which vLLM, which of its models has the layers of a sampler model, and its config.json."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

VLLM_VERSION = "0.25"
"""vLLM's minor version that vllm_server.py and vllm_worker.py were written for: their plug-in points are not stable."""

MODELS = {
    "qwen2": ("qwen2", "MediaQwen2"),
    "qwen2_5_vl_text": ("qwen2", "MediaQwen2"),
    "qwen3": ("qwen3", "MediaQwen3"),
    "qwen3_vl_text": ("qwen3", "MediaQwen3Vl"),
}
"""The sampler model's config.model_type -> vLLM's model_type of the same sizes, and vllm_worker's class."""


def write_config(model: PreTrainedModel, folder: Path, *, max_tokens: int, eos_id: int) -> None:
    """config.json for vLLM: the sampler model's, as the vLLM model with the same layers. Raises ValueError for a model
    that vllm_worker.py has no class for."""
    config = model.config.to_dict()
    if config["model_type"] not in MODELS:
        raise ValueError(
            f"the vLLM engine has no model for {config['model_type']!r} (it has {', '.join(MODELS)}); set "
            "rollout.engine=embedded"
        )
    config["model_type"], architecture = MODELS[config["model_type"]]
    config["architectures"] = [architecture]
    config["eos_token_id"] = eos_id  # vLLM ends responses at the checkpoint's, too
    config["max_position_embeddings"] = max(max_tokens, config["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
