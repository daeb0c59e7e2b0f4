"""vLLM against transformers' generate for the LLMs that are not plain Qwen2: M-RoPE positions, QK norm, tied heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import HAS_VLLM
from transformers import PreTrainedModel, Qwen2_5_VLTextConfig, Qwen3Config, Qwen3ForCausalLM

from megalong.models.qwen2_5_vl.sampler import Sampler
from megalong.records import MEDIA_TOKEN, WeightBucket, bucket_checksum
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import Request, RolloutEngine, Sampling
from megalong.rollout.transfer import Transport
from megalong.rollout.vllm_engine import VllmEngine, VllmSettings

pytestmark = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")

WIDTH, VOCAB, EOS = 128, 320, 319
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512,
}  # fmt: skip
GREEDY = Sampling(group_size=2, max_tokens=10, temperature=0.0, top_p=1.0, top_k=0)


def qwen2_5_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return Sampler._from_config(Qwen2_5_VLTextConfig(**SIZES, rope_parameters=rope), dtype=torch.float32)


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM._from_config(
        Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True), dtype=torch.float32
    )


def load(engine: RolloutEngine, model: PreTrainedModel, *, version: int = 0) -> None:
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine.load_weights([WeightBucket(tensors=tensors, checksum=bucket_checksum(tensors))], version=version)


def video_request(*, mrope: bool) -> Request:
    """Text, a video of 2 x 3 x 4 places with spaced times, text: positions as Qwen2.5-VL counts them."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(VOCAB - 1, (20,), generator=generator).tolist()
    ids = (*text[:5], *(MEDIA_TOKEN,) * 24, *text[5:])
    positions_P = torch.arange(len(ids))
    if mrope:
        times, rows, columns = torch.meshgrid(torch.tensor([0, 7]), torch.arange(3), torch.arange(4), indexing="ij")
        grid_3N = torch.stack([times.flatten(), rows.flatten(), columns.flatten()]) + 5
        after = torch.arange(15) + int(grid_3N.max()) + 1
        positions_P = torch.cat([torch.arange(5).expand(3, -1), grid_3N, after.expand(3, -1)], dim=1)
    return Request(
        ids_P=ids, positions_P=positions_P, next_position=int(positions_P[..., -1].max()) + 1,
        embeds_ND=torch.randn(24, WIDTH, generator=generator), seeds=(1, 2),
    )  # fmt: skip


def text_request(*, mrope: bool) -> Request:
    positions_P = torch.arange(9)
    return Request(
        ids_P=tuple(range(40, 49)), positions_P=positions_P.expand(3, -1) if mrope else positions_P, next_position=9,
        embeds_ND=None, seeds=(1, 2),
    )  # fmt: skip


def engine_of(model: PreTrainedModel, folder: Path) -> VllmEngine:
    settings = VllmSettings(
        devices=(), transport=Transport.file, max_tokens=512, prefill_tokens=32, max_sequences=8, memory_share=0.1,
        cuda_graphs=False, processed_logprobs=False, discard_weights=False, timeout_seconds=120,
        log_file=folder / "engine.log", seed=1,
    )  # fmt: skip
    return VllmEngine(model, name_of=str, eos_id=EOS, settings=settings)


def test_a_group_is_prefilled_once(tmp_path: Path) -> None:
    """The others take all whole blocks (128 tokens on the CPU) from the first; nothing is left after new weights."""
    model = qwen3()
    request = Request(
        ids_P=tuple(index % 300 for index in range(300)), positions_P=torch.arange(300), next_position=300,
        embeds_ND=None, seeds=tuple(range(8)),
    )  # fmt: skip
    engine = engine_of(model, tmp_path)
    try:
        for version in range(2):
            load(engine, model, version=version)
            before = engine.prefilled_tokens
            engine.generate([request], sampling=replace(GREEDY, group_size=8, max_tokens=2))
            assert engine.prefilled_tokens - before == 300 + 7 * (300 - 256)
    finally:
        engine.close()


@pytest.mark.parametrize("make", [qwen2_5_vl, qwen3], ids=["qwen2_5_vl", "qwen3"])
def test_greedy_tokens_and_logprobs_equal_the_embedded_engine_s(make: object, tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initial ones: positions must matter
            parameter.mul_(1.0 if parameter.ndim == 1 else 4.0)
    mrope = make is qwen2_5_vl
    requests = [video_request(mrope=mrope), text_request(mrope=mrope)]
    embedded = EmbeddedEngine(make(), name_of=str, eos_id=EOS, device=torch.device("cpu"), batch_prompts=2)
    load(embedded, model)
    if mrope:  # a wrong position would be seen
        counted = replace(requests[0], positions_P=torch.arange(44).expand(3, -1), next_position=44)
        (group,), (other,) = (embedded.generate([item], sampling=GREEDY) for item in (requests[0], counted))
        assert abs(group[0].logprobs[0] - other[0].logprobs[0]) > 1e-2
    engine = engine_of(model, tmp_path)
    try:
        load(engine, model)
        for want, got in zip(
            embedded.generate(requests, sampling=GREEDY), engine.generate(requests, sampling=GREEDY), strict=True
        ):
            assert [item.ids for item in got] == [item.ids for item in want]
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(
                    torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4
                )
    finally:
        engine.close()
