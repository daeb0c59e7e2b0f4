"""vLLM against transformers' generate for the LLMs that are not plain Qwen2: M-RoPE, deepstack, QK norm, tied heads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engines import HAS_VLLM, check_logits_are_not_rounded, known_hidden_model
from transformers import PreTrainedModel, Qwen2_5_VLTextConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3VLConfig

from megalong.models.qwen2_5_vl.positions import Grid, mrope_positions
from megalong.models.qwen2_5_vl.sampler import Sampler
from megalong.models.qwen3_vl.sampler import sampler_model
from megalong.records import MEDIA_TOKEN, WeightBucket
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import Request, RolloutEngine, Sampled, Sampling
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


def qwen3_vl() -> PreTrainedModel:
    """Two deepstack levels for three layers; config.json does not say that M-RoPE is interleaved."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [14, 10, 8]}
    text = {**SIZES, "num_hidden_layers": 3, "head_dim": 64, "rope_parameters": rope}
    vision = {"depth": 2, "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0, 1]}
    with tempfile.TemporaryDirectory() as folder:
        Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True).save_pretrained(folder)
        return sampler_model(Path(folder), torch.float32)


def load(engine: RolloutEngine, model: PreTrainedModel, *, version: int = 0) -> None:
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine.load_weights([WeightBucket.of(tensors)], version=version)


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


def timed_request(*, steps: int = 9) -> Request:
    """Text, steps of 3 x 4 places with words before each, as Qwen3-VL has them, text; two deepstack levels.

    Longer than a block of the prefix cache (128 tokens on the CPU), which ends inside a step.
    """
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(VOCAB - 1, (20 + 16 * steps,), generator=generator)
    for step in range(steps):
        ids[5 + 16 * step + 3 : 5 + 16 * step + 15] = MEDIA_TOKEN
    positions_P, following = mrope_positions(ids.tolist(), [Grid(ticks=(0,), rows=3, columns=4)] * steps)
    return Request(
        ids_P=tuple(ids.tolist()), positions_P=positions_P, next_position=following,
        embeds_ND=torch.randn(12 * steps, 3 * WIDTH, generator=generator), seeds=(1, 2),
    )  # fmt: skip


def text_request(*, mrope: bool) -> Request:
    positions_P = torch.arange(9)
    return Request(
        ids_P=tuple(range(40, 49)), positions_P=positions_P.expand(3, -1) if mrope else positions_P, next_position=9,
        embeds_ND=None, seeds=(1, 2),
    )  # fmt: skip


def engine_of(model: PreTrainedModel, folder: Path, *, max_tokens: int = 512, prefill_tokens: int = 32) -> VllmEngine:
    settings = VllmSettings(
        devices=(), transport=Transport.file, max_tokens=max_tokens, prefill_tokens=prefill_tokens, max_sequences=8,
        memory_share=0.1, cuda_graphs=False, processed_logprobs=False, sleeps=False, discard_weights=False,
        start_seconds=120, timeout_seconds=120, log_file=folder / "engine.log", seed=1,
    )  # fmt: skip
    return VllmEngine(model, name_of=str, eos_id=EOS, settings=settings)


@pytest.mark.parametrize("frames", [0, 40], ids=["text", "media"])
def test_a_group_is_prefilled_once(frames: int, tmp_path: Path) -> None:
    """The others take all whole blocks (128 tokens on the CPU) from the first; nothing is left after new weights.

    vLLM keeps embeddings of as many media places as a step has tokens (here 4096: 16 frames). The second step must keep
    one frame of the first's and has room for 15, so that tokens are left over in it for another response, when of the
    first one's prompt only a part is computed.
    """
    model = qwen3()
    media = [*[MEDIA_TOKEN] * 256, 13] * frames
    length = 300 + len(media)
    request = Request(
        ids_P=(*media, *range(300)), positions_P=torch.arange(length), next_position=length,
        embeds_ND=torch.randn(256 * frames, model.config.hidden_size) if frames else None, seeds=tuple(range(8)),
    )  # fmt: skip
    engine = engine_of(model, tmp_path, max_tokens=length + 16, prefill_tokens=4096 if frames else 32)
    try:
        for version in range(2):
            load(engine, model, version=version)
            before = engine.counts["prefilled_tokens"]
            engine.generate([request], sampling=replace(GREEDY, group_size=8, max_tokens=2))
            assert engine.counts["prefilled_tokens"] - before == length + 7 * (length % 128)
    finally:
        engine.close()


def assert_equal(groups: list[list[Sampled]], expected: list[list[Sampled]]) -> None:
    """The same tokens, log-probabilities within 1e-4."""
    for group, want in zip(groups, expected, strict=True):
        assert [item.ids for item in group] == [item.ids for item in want]
        for one, other in zip(group, want, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)


def test_questions_about_one_video_are_prefilled_once(tmp_path: Path) -> None:
    """What they begin with, in whole blocks; each answer is what it is alone. Not for the next call, whose embeddings
    or weights may be others. With M-RoPE and deepstack: positions and levels of each question's own tokens, too."""
    torch.manual_seed(12)
    model, first, group = qwen3_vl(), timed_request(steps=18), replace(GREEDY, max_tokens=6)
    media_stop, blocks = 5 + 16 * 17 + 15, 256  # tokens, of which two blocks are whole

    def question(tail: range) -> Request:
        ids = (*first.ids_P[:media_stop], *tail)
        positions_P, following = mrope_positions(list(ids), [Grid(ticks=(0,), rows=3, columns=4)] * 18)
        return replace(first, ids_P=ids, positions_P=positions_P, next_position=following)

    other = replace(first, embeds_ND=first.embeds_ND.flip(0))
    requests = [first, other, question(range(40, 49)), question(range(60, 90))]
    engine = engine_of(model, tmp_path, prefill_tokens=64)
    try:
        load(engine, model)
        alone = [engine.generate([request], sampling=group)[0] for request in requests]
        separately = sum(2 * len(request.ids_P) - blocks for request in requests)
        assert engine.counts["prefilled_tokens"] == separately
        for _ in range(2):
            before = engine.counts["prefilled_tokens"]
            assert_equal(engine.generate(requests, sampling=group), alone)
            assert engine.counts["prefilled_tokens"] - before == separately - 2 * blocks, (
                "two questions find the video there"
            )
            assert len(engine.media) == 2 * len(first.embeds_ND)
    finally:
        engine.close()


@dataclass(frozen=True, kw_only=True)
class Case:
    make: Callable[[], PreTrainedModel]
    video: Request
    mrope: bool
    deepstack: bool = False


CASES = {
    "qwen2_5_vl": Case(make=qwen2_5_vl, video=video_request(mrope=True), mrope=True),
    "qwen3": Case(make=qwen3, video=video_request(mrope=False), mrope=False),
    "qwen3_vl": Case(make=qwen3_vl, video=timed_request(), mrope=True, deepstack=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_greedy_tokens_and_logprobs_equal_the_embedded_engine_s(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = case.make()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the initial ones: positions must matter
            parameter.mul_(1.0 if parameter.ndim == 1 else 4.0)
    # Text before and after videos: what the first layers of one step's tokens add is not left for the next step's.
    text = text_request(mrope=case.mrope)
    requests = [text, case.video, text]
    embedded = EmbeddedEngine(case.make(), name_of=str, eos_id=EOS, device=torch.device("cpu"), batch_prompts=2)
    load(embedded, model)
    others = []  # a wrong position or a level left out would be seen
    if case.mrope:
        length = len(case.video.ids_P)
        positions_P = torch.arange(length).expand(3, -1)
        others.append(replace(case.video, positions_P=positions_P, next_position=length))
    if case.deepstack:
        for level in (1, 2):
            embeds_ND = case.video.embeds_ND.clone()
            embeds_ND[:, level * WIDTH : (level + 1) * WIDTH] = 0
            others.append(replace(case.video, embeds_ND=embeds_ND))
    (first,) = embedded.generate([case.video], sampling=GREEDY)
    for request in others:
        (other,) = embedded.generate([request], sampling=GREEDY)
        assert abs(first[0].logprobs[0] - other[0].logprobs[0]) > 1e-2
    engine = engine_of(model, tmp_path)
    try:
        load(engine, model)
        assert_equal(engine.generate(requests, sampling=GREEDY), embedded.generate(requests, sampling=GREEDY))
        # The second of a group takes whole blocks (128 tokens on the CPU) from the first.
        lengths = [len(request.ids_P) for request in requests]
        assert engine.counts["prefilled_tokens"] == sum(2 * length - length // 128 * 128 for length in lengths)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        load(engine, model, version=1)
        load(embedded, model, version=1)
        (changed,) = embedded.generate([case.video], sampling=GREEDY)
        assert abs(first[0].logprobs[0] - changed[0].logprobs[0]) > 1e-2
        assert_equal(engine.generate([case.video], sampling=GREEDY), [changed])
        if case.deepstack:
            with pytest.raises(ValueError, match=f"embeddings are {WIDTH} wide, expected {3 * WIDTH}"):
                engine.generate([replace(case.video, embeds_ND=case.video.embeds_ND[:, :WIDTH])], sampling=GREEDY)
    finally:
        engine.close()


def test_logits_are_in_float32_also_of_bfloat16_weights(tmp_path: Path) -> None:
    model = known_hidden_model()
    engine = engine_of(model, tmp_path)
    try:
        load(engine, model)
        check_logits_are_not_rounded(engine, model)
    finally:
        engine.close()
