"""LongVILA in Megatron against transformers: same files, same packs, equal log-probabilities and gradients.

The oracle is SiglipVisionModel's hidden_states[-2], a projector written out here, and Qwen2ForCausalLM, on every
[prompt | response] as a sequence of its own. Nothing of megalong.models or megalong.attention is in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from harness import forward_pack
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from megalong.attention.shard import shard_tokens
from megalong.config.tree import Dtype, ModelConfig, OptimizerConfig, Recompute
from megalong.data.packing import GroupTokens, pack_groups
from megalong.data.sequence import SequenceBuilder
from megalong.engine.build import build_model
from megalong.engine.trainer import Trainer
from megalong.models.gpt import PackRotary
from megalong.models.gpt_shape import GptShape
from megalong.models.longvila.demo_checkpoint import DemoModelSize, top_config, write_json
from megalong.models.longvila.layout import SquareFrames
from megalong.records import MEDIA_TOKEN, FrameSelection, Sample

VOCAB = 96
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Variant:
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    rope: dict | None = None
    layers: int = 2
    image: int = 16  # with patches of 4: a grid of 4 x 4
    projector: str = "mlp_downsample"
    pool: tuple[int, int, int] = (1, 1, 1)
    temperature: float = 1.0
    recompute: Recompute = Recompute.none


VARIANTS = {
    "grouped queries, untied": Variant(),
    "tied embeddings": Variant(tied=True),
    "a key for every query head": Variant(kv_heads=4),
    "one key head": Variant(kv_heads=1),
    "linear position scaling": Variant(rope={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}),
    "odd patch grid": Variant(image=20),
    "2x2 projector": Variant(image=20, projector="mlp_downsample_2x2_fix"),
    "3x3 projector, padded": Variant(image=20, projector="mlp_downsample_3x3_fix"),
    "3x3 projector, whole": Variant(image=24, projector="mlp_downsample_3x3_fix"),
    "frames pooled": Variant(pool=(2, 1, 1)),
    "frames, rows and columns pooled": Variant(image=32, pool=(4, 2, 4)),
    "3x3 projector, frames pooled": Variant(image=24, projector="mlp_downsample_3x3_fix", pool=(2, 1, 2)),
    "temperature": Variant(temperature=0.6),
    "activation recomputation": Variant(recompute=Recompute.full),
}


def write_checkpoint(folder: Path, variant: Variant) -> Path:
    """Weights and configs in LongVILA's layout; every tensor random, so that no bias or norm hides behind 0 or 1."""
    torch.manual_seed(7)
    size = DemoModelSize(hidden=32, tower_hidden=16)
    llm = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=variant.layers,
        num_attention_heads=variant.heads,
        num_key_value_heads=variant.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=variant.tied,
        rope_parameters=variant.rope or {"rope_type": "default", "rope_theta": 1e4},
        rms_norm_eps=1e-6,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(llm)
    randomise(model)
    model.save_pretrained(folder / "llm")
    tower_config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=variant.image,
        patch_size=4, vision_use_head=False, dtype="float32",
    )  # fmt: skip
    tower = SiglipVisionModel(tower_config)
    randomise(tower)
    tower.save_pretrained(folder / "vision_tower")
    (folder / "mm_projector").mkdir()
    widths = {1: (64,), 2: (32, 64), 4: (32, 32)}
    if "3x3" in variant.projector:
        widths = {1: (144,), 2: (48, 144), 4: (48,), 5: (32, 48), 7: (32, 32)}
    projector = {}
    for place, shape in widths.items():
        projector[f"layers.{place}.weight"] = torch.randn(shape) * 0.2 + (0.8 if len(shape) == 1 else 0)
        projector[f"layers.{place}.bias"] = torch.randn(shape[0]) * 0.2
    save_file(projector, folder / "mm_projector" / "model.safetensors")
    write_json(folder / "mm_projector" / "config.json", {"mm_projector_type": variant.projector})
    top = top_config(size)
    if variant.pool != (1, 1, 1):
        encoder = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [list(variant.pool)]}
        top["video_encoder"] = json.dumps(encoder)
    write_json(folder / "config.json", top)
    return folder


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("weight") and "norm" in name else 0.0
        parameter.copy_(centre + torch.randn_like(parameter) * (0.2 if parameter.ndim < 2 else 0.15))


class Oracle:
    """The three parts with the checkpoint's weights; `gradients()` in the names of the checkpoint's files."""

    def __init__(self, folder: Path, variant: Variant | None = None) -> None:
        self.variant = variant or Variant()
        self.llm = Qwen2ForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32, attn_implementation="eager")
        self.tower = SiglipVisionModel.from_pretrained(folder / "vision_tower", attn_implementation="eager")
        self.projector = {
            name: tensor.requires_grad_()
            for name, tensor in load_file(folder / "mm_projector/model.safetensors").items()
        }

    def encode(self, frames_FHWC: Tensor) -> Tensor:
        pixels = (frames_FHWC.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        features = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        tokens = [self.project(of_frame) for of_frame in features]
        frames, rows, columns = self.variant.pool
        steps = [torch.stack(tokens[at : at + frames]) for at in range(0, len(tokens), frames)]
        return torch.stack([self.pool(of_step, rows, columns) for of_step in steps])

    def pool(self, tokens_FND: Tensor, rows: int, columns: int) -> Tensor:
        """Means over all frames of a step and rectangles of tokens."""
        side = int(tokens_FND.shape[1] ** 0.5)
        pooled = []
        for top in range(0, side, rows):
            for left in range(0, side, columns):
                places = [(top + r) * side + left + c for r in range(rows) for c in range(columns)]
                pooled.append(tokens_FND[:, places].mean((0, 1)))
        return torch.stack(pooled)

    def project(self, features_ND: Tensor) -> Tensor:
        """One frame: its patches in blocks of 2 x 2 (3 x 3), absent ones 0, block after block along the rows."""
        size = 3 if "3x3" in self.variant.projector else 2
        side = int(len(features_ND) ** 0.5)
        empty, blocks = torch.zeros_like(features_ND[0]), []
        for row in range(0, side, size):
            for column in range(0, side, size):
                places = [(row + r, column + c) for r in range(size) for c in range(size)]
                patches = [features_ND[r * side + c] if r < side and c < side else empty for r, c in places]
                blocks.append(torch.cat(patches))
        x = self.linear(2, self.norm(1, torch.stack(blocks)))
        if size == 3:
            x = self.linear(5, self.norm(4, functional.gelu(x)))
        return self.linear(7 if size == 3 else 4, functional.gelu(x))

    def norm(self, place: int, x: Tensor) -> Tensor:
        weight, bias = self.projector[f"layers.{place}.weight"], self.projector[f"layers.{place}.bias"]
        return functional.layer_norm(x, (x.shape[-1],), weight, bias)

    def linear(self, place: int, x: Tensor) -> Tensor:
        return functional.linear(x, self.projector[f"layers.{place}.weight"], self.projector[f"layers.{place}.bias"])

    def logprobs(
        self, prompt_ids: tuple[int, ...], response: tuple[int, ...], embeds_ND: Tensor | None, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each response token and the entropy at its place."""
        ids = torch.tensor(prompt_ids + response)
        inputs = self.llm.get_input_embeddings()(ids.clamp_min(0))
        if embeds_ND is not None:
            inputs = inputs.index_put((torch.nonzero(ids == MEDIA_TOKEN)[:, 0],), embeds_ND)
        logits = self.llm(inputs_embeds=inputs[None]).logits[0] / temperature
        rows = logits[len(prompt_ids) - 1 : len(ids) - 1]
        all_logprobs = rows.log_softmax(-1)
        return all_logprobs.gather(1, torch.tensor(response)[:, None])[:, 0], torch.distributions.Categorical(
            logits=rows
        ).entropy()

    def gradients(self) -> dict[str, Tensor]:
        found = {f"llm/{name}": param.grad for name, param in self.llm.named_parameters()}
        for name, param in self.tower.named_parameters():
            found[f"vision_tower/vision_model.{name.removeprefix('vision_model.')}"] = param.grad
        found.update({f"mm_projector/{name}": tensor.grad for name, tensor in self.projector.items()})
        return found


def build_case(
    tokens_per_frame: int, image: int, *, frames_per_step: int = 1
) -> tuple[list[list[GroupTokens]], dict[str, Tensor]]:
    """Three packs: text only, one frame (step), several frames, 64 frames, two videos, and ragged group sizes."""
    generator = torch.Generator().manual_seed(11)
    frames = {
        name: torch.randint(0, 256, (count, image, image, 3), dtype=torch.uint8, generator=generator)
        for name, count in (("a", frames_per_step), ("b", 4 * frames_per_step), ("c", 2 * frames_per_step), ("d", 64))
    }

    def encode(text: str) -> list[int]:
        return [ord(character) % (VOCAB - 2) + 2 for character in text[-9:]]

    builder = SequenceBuilder(
        encode=encode, encode_markup=encode, eos_id=0,
        videos=SquareFrames(
            size=image, tokens_per_frame=tokens_per_frame, newline_id=1, frames_per_step=frames_per_step
        ),
        system_prompt="s", thinking=False,
    )  # fmt: skip

    def group(name: str, videos: tuple[str, ...], lens: tuple[int, ...]) -> GroupTokens:
        sample = Sample(
            sample_id=name, question=f"what {name}", answer="A", videos=videos, problem_type="open-ended",
            category="c", reasoning="", subtitles="",
        )  # fmt: skip
        selections = [
            FrameSelection(
                path=path,
                frames=tuple(range(len(frames[path]))),
                seconds=(0.0,) * len(frames[path]),
                height=image,
                width=image,
            )
            for path in videos
        ]
        responses = tuple(tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()) for length in lens)
        return GroupTokens(prompt=builder.prompt(sample, selections), responses=responses)

    packs = [
        [group("text", (), (3, 1, 6)), group("one frame", ("a",), (5,))],
        [group("frames", ("b",), (2, 40, 1)), group("two videos", ("c", "b"), (4, 4)), group("more text", (), (1,))],
        [group("64 frames", ("d",), (2, 7)), group("one frame", ("a",), (3,))],
    ]
    return packs, frames


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_logprobs_and_gradients_equal_transformers(tmp_path: Path, layout: object, variant: Variant) -> None:
    folder = write_checkpoint(tmp_path, variant)
    oracle = Oracle(folder, variant)
    config = ModelConfig(
        path=str(folder), dtype=Dtype.float32, recompute=variant.recompute, train_projector=True, train_tower=True
    )
    model = build_model(config, layout, sequence_parallel=False)
    vision = model.spec.vision
    packs, frames = build_case(vision.embeds_per_step, variant.image, frames_per_step=vision.frames_per_step)

    def embeddings(chosen: Sequence[FrameSelection]) -> Tensor | None:
        return torch.cat([model.vision(frames[s.path]).flatten(0, 1) for s in chosen]) if chosen else None

    trainer = Trainer(model, layout, OptimizerConfig(), total_steps=1, embeddings=embeddings)
    trainer.ddp.zero_grad_buffer()
    want_total = torch.zeros(())
    for pack in packs:
        got = forward_pack(trainer, pack_groups(pack), temperature=variant.temperature)
        pairs = []
        for group in pack:
            videos = [oracle.encode(frames[selection.path]).flatten(0, 1) for selection in group.prompt.selections]
            embeds_ND = torch.cat(videos) if videos else None
            pairs += [
                oracle.logprobs(group.prompt.ids_P, response, embeds_ND, temperature=variant.temperature)
                for response in group.responses
            ]
        want = tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
        torch.testing.assert_close(got[0], want[0], rtol=TOLERANCE, atol=1e-5)
        torch.testing.assert_close(got[1], want[1], rtol=TOLERANCE, atol=1e-5)
        weights_R = torch.linspace(-1, 2, len(want[0])) / len(want[0])
        (got[0] * weights_R).sum().backward()
        want_total = want_total + (want[0] * weights_R).sum()
    want_total.backward()
    compare_gradients(model, oracle.gradients())


def compare_gradients(model: torch.nn.Module, want: dict[str, Tensor]) -> None:
    """Every tensor of the table, relative to that tensor's largest gradient."""
    parameters = dict(model.named_parameters())
    seen = set()
    for entry in model.weight_table():
        got = entry.join([parameters[entry.megatron].main_grad])
        for name, gradient in zip(entry.hf, got, strict=True):
            scale = want[name].abs().max()
            if name.startswith("vision_tower/") and name.endswith("k_proj.bias"):
                # The same vector added to every key changes no softmax: this gradient is rounding noise around 0
                # (the LLM's is not, its keys are rotated).
                scale = want[name.replace("k_proj", "q_proj")].abs().max()
            assert scale > 0, f"the oracle has no gradient for {name}"
            error = (gradient - want[name]).abs().max() / scale
            assert error < TOLERANCE, f"gradient of {name} is off by {error:.1e}"
            seen.add(name)
    unused = {name for name in want if ".layers.2." in name and name.startswith("vision_tower/")}
    unused |= {name for name in want if "post_layernorm" in name}
    assert seen == set(want) - unused


def test_oracle_tower_layers_after_the_selected_one_get_no_gradient(tmp_path: Path) -> None:
    oracle = Oracle(write_checkpoint(tmp_path, Variant()))
    oracle.encode(torch.zeros(1, 16, 16, 3, dtype=torch.uint8)).sum().backward()
    grads = oracle.gradients()
    assert grads["vision_tower/vision_model.post_layernorm.weight"] is None
    assert grads["vision_tower/vision_model.encoder.layers.2.mlp.fc1.weight"] is None
    assert grads["vision_tower/vision_model.encoder.layers.1.mlp.fc1.weight"] is not None


def test_old_and_new_rope_keys_are_read_alike(tmp_path: Path, layout: object) -> None:
    """transformers 4 wrote rope_theta and rope_scaling, 5 writes rope_parameters."""
    variant = VARIANTS["linear position scaling"]
    folder = write_checkpoint(tmp_path, variant)
    config = ModelConfig(path=str(folder), dtype=Dtype.float32)
    new = build_model(config, layout, sequence_parallel=False).spec.gpt
    file = folder / "llm" / "config.json"
    values = json.loads(file.read_text())
    del values["rope_parameters"]
    file.write_text(json.dumps({**values, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}))
    old = build_model(config, layout, sequence_parallel=False).spec.gpt
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e4, 4.0)
    assert replace(new, rope_scaling=1.0) != new


def rope_shape(*, head_dim: int, theta: float, scaling: float) -> GptShape:
    return GptShape(
        hidden=head_dim, layers=1, heads=1, kv_heads=1, head_dim=head_dim, ffn=8, vocab=8, tied=False, rope_theta=theta,
        rope_scaling=scaling, norm_eps=1e-6, max_positions=64,
    )  # fmt: skip


def test_rotary_angles_equal_transformers_at_small_positions(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, VARIANTS["linear position scaling"])
    llm = Qwen2ForCausalLM.from_pretrained(folder / "llm")
    positions = torch.arange(512)[None]
    cos, sin = llm.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
    angles = PackRotary(rope_shape(head_dim=8, theta=5e4, scaling=4.0))(positions)[:, 0, 0]
    torch.testing.assert_close(angles.cos(), cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(angles.sin(), sin[0], rtol=0, atol=1e-4)


def test_wrong_number_of_embeddings_is_refused(tmp_path: Path, layout: object) -> None:
    folder = write_checkpoint(tmp_path, Variant())
    model = build_model(ModelConfig(path=str(folder), dtype=Dtype.float32), layout, sequence_parallel=False)
    packs, frames = build_case(model.spec.vision.embeds_per_step, 16)
    pack = shard_tokens(pack_groups(packs[0]), layout.context, part=(0, 1))
    with pytest.raises(ValueError, match="4 vision-token places but 0 embeddings"):
        model(pack, None)
    with pytest.raises(ValueError, match="4 vision-token places but 16 embeddings"):
        model(pack, model.vision(frames["b"]).flatten(0, 1))
