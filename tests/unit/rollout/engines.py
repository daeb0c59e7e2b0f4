"""The rollout engines that the contract test runs over, each built from the tiny checkpoint. One line per engine."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megalong.config.tree import Dtype, ModelConfig
from megalong.engine.build import build_model, family_of
from megalong.engine.weights_io import export_weights
from megalong.models.policy import PolicyModel
from megalong.parallel.layout import ParallelLayout
from megalong.records import WeightBucket
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import Request, RolloutEngine, Sampling
from megalong.rollout.transfer import Transport
from megalong.rollout.vllm_engine import VllmEngine, VllmSettings


@dataclass(frozen=True, kw_only=True)
class World:
    """A policy in Megatron, and how to make an engine that samples from it."""

    path: Path
    model: PolicyModel
    layout: ParallelLayout
    eos_id: int
    name: str  # of the engine
    maker: Callable[..., RolloutEngine]
    made: list[RolloutEngine] = field(default_factory=list)

    def make(self, **settings: float) -> RolloutEngine:
        """An engine without weights. temperature: what its log-probabilities are for."""
        engine = self.maker(self, **settings)
        self.made.append(engine)
        return engine

    def close(self) -> None:
        """End all engines that were made."""
        while self.made:
            self.made.pop().close()

    def buckets(self, *, bucket_bytes: int = 20_000) -> Iterator[WeightBucket]:
        return export_weights(self.model, self.model.weight_table(), self.layout, bucket_bytes=bucket_bytes)

    def engine(self, **settings: float) -> RolloutEngine:
        """An engine with the policy's weights, version 0."""
        engine = self.make(**settings)
        engine.load_weights(self.buckets(), version=0)
        return engine


def make_embedded(
    world: World, *, batch_prompts: int = 8, eos_id: int | None = None, temperature: float = 1.0
) -> EmbeddedEngine:
    family = family_of(ModelConfig(path=str(world.path)))
    return EmbeddedEngine(
        family.sampler_model(world.path, torch.float32),
        name_of=family.sampler_name,
        eos_id=world.eos_id if eos_id is None else eos_id,
        device=torch.device("cpu"),
        batch_prompts=batch_prompts,
    )


def make_vllm(
    world: World, *, batch_prompts: int = 8, eos_id: int | None = None, temperature: float = 1.0
) -> VllmEngine:
    """On the CPU; vLLM decides itself how many prompts it takes together."""
    family = family_of(ModelConfig(path=str(world.path)))
    return VllmEngine(
        family.sampler_model(world.path, torch.float32),
        name_of=family.sampler_name,
        eos_id=world.eos_id if eos_id is None else eos_id,
        settings=VllmSettings(
            devices=(),
            transport=Transport.file,
            max_tokens=256,
            prefill_tokens=256,
            max_sequences=16,
            memory_share=0.1,
            cuda_graphs=False,
            processed_logprobs=temperature != 1,
            sleeps=False,
            discard_weights=False,
            start_seconds=120,
            timeout_seconds=120,
            log_file=Path(tempfile.mkdtemp()) / "engine.log",
            seed=1,
        ),
    )


def make_request(ids: Sequence[int], embeds_ND: torch.Tensor | None, seeds: tuple[int, ...]) -> Request:
    """Positions counted up from 0."""
    return Request(
        ids_P=tuple(ids), positions_P=torch.arange(len(ids)), next_position=len(ids), embeds_ND=embeds_ND, seeds=seeds
    )


def known_hidden_model() -> Qwen2ForCausalLM:
    """bfloat16, and the hidden state behind token i is exactly row i of its embedding, of 1 and -1: layers add nothing.

    Its logits are of the size that a trained model's have.
    """
    config = Qwen2Config(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=512, tie_word_embeddings=False, rms_norm_eps=1e-6,
    )  # fmt: skip
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        signs_VD = torch.randint(2, (320, 128), generator=generator) * 2 - 1
        parameters["model.embed_tokens.weight"].copy_(signs_VD)
        parameters["lm_head.weight"].copy_(torch.randn(320, 128, generator=generator))
    return model


def check_logits_are_not_rounded(engine: RolloutEngine, model: Qwen2ForCausalLM) -> None:
    """`engine` has the weights of known_hidden_model: its log-probabilities are those of exact logits."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    requests = [make_request((7, token), None, (token,)) for token in range(20, 40)]
    sampling = Sampling(group_size=1, max_tokens=1, temperature=1.0, top_p=1.0, top_k=0)
    sampled = [group[0] for group in engine.generate(requests, sampling=sampling)]
    hidden_RD = parameters["model.embed_tokens.weight"][20:40]
    exact_RV = (hidden_RD.double() @ parameters["lm_head.weight"].double().t()).log_softmax(-1)
    rounded_RV = (hidden_RD @ parameters["lm_head.weight"].t()).float().log_softmax(-1)
    tokens_R1 = torch.tensor([[item.ids[0]] for item in sampled])
    got_R = torch.tensor([item.logprobs[0] for item in sampled], dtype=torch.float64)
    exact_R, rounded_R = (values.gather(1, tokens_R1)[:, 0].double() for values in (exact_RV, rounded_RV))
    assert (rounded_R - exact_R).abs().max() > 1e-2
    assert (got_R - exact_R).abs().max() < 1e-4


HAS_VLLM = importlib.util.find_spec("vllm") is not None
ENGINES: dict[str, Callable[..., RolloutEngine]] = {
    "embedded": make_embedded,
    **({"vllm": make_vllm} if HAS_VLLM else {}),
}


def make_world(path: Path, layout: ParallelLayout, *, engine: str) -> World:
    config = ModelConfig(path=str(path), dtype=Dtype.float32)
    model = build_model(config, layout, sequence_parallel=False)
    eos_id = family_of(config).read_tokens(path).eos_id
    return World(path=path, model=model, layout=layout, eos_id=eos_id, name=engine, maker=ENGINES[engine])
