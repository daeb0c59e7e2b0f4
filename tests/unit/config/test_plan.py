"""plan and render: layout, lengths, memory and FLOPs of known configurations."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megalong.config import costs
from megalong.config.errors import ConfigError
from megalong.config.load import load_config
from megalong.config.model_shape import ModelShape
from megalong.config.plan import GIB, GPU_STORE, RUNTIME_BYTES, Plan, plan, planned_processes, shape_for_planning
from megalong.config.plan_engine import ENGINE_BUCKET, EnginePlan
from megalong.config.plan_text import render
from megalong.config.plan_videos import videos_of
from megalong.config.shapes import SHIPPED_SHAPES
from megalong.config.tree import EnginePlacement
from megalong.config.validate import Task, validate

RECIPE = """
model: {path: no/such/model}
logger: {run_dir: r}
data: {train: t.jsonl, max_prompt_tokens: 1000000, max_response_tokens: 1024}
video: {num_frames: 3600}
gpus: 8
parallel: {tp: 4, cp: 2, sequence_parallel: true}
grpo: {batch_size: 4}
"""


def planned(recipe: Path, shape: ModelShape, *, task: Task = "grpo", overrides: tuple[str, ...] = ()) -> Plan:
    config = load_config(recipe, overrides)
    validate(config, task=task, world_size=planned_processes(config), model=shape)
    return plan(config, task, shape)


def test_an_hour_of_video_on_8_gpus(recipe: Path, shape: ModelShape) -> None:
    result = planned(recipe, shape)
    assert (result.layout.dp, result.layout.replica, result.layout.world_size) == (1, 8, 8)
    assert (result.lengths.prompt, result.lengths.shared, result.lengths.repeated) == (925_456, 933_648, 7_411_840)
    assert result.lengths.copies_per_pack == 1
    memory = result.memory
    states = ("LLM weights", "reference policy weights", "gradients (float32)", "optimizer: master and moments")
    # 6N/tp + 12N/(tp*cp) + 2N/tp with N = 7.6156e9.
    assert sum(memory[name] for name in states) == pytest.approx(26.65e9, rel=2e-3)
    local = 933_648 // 2
    assert memory["kept activations (recompute keep_attention)"] == (2 * 2 * 3584 + 4 * 28) // 4 * local * 28
    assert memory["one layer in backward, without its MLP"] == (84_992 // 4 + 4 * 3584) * local
    # 29 slices: ceil(466,824 / 16,384). A row takes 12 x 18944 / 4 bytes.
    assert memory["its MLP in 29 slice(s)"] == 3 * 18_944 * 16_098
    # Of a slice of the rows, all of them vision tokens; without sequence parallelism of its context-parallel rank.
    assert memory["vision embeddings of a pack"] == 3584 * 2 * local // 4
    whole = planned(recipe, shape, overrides=("parallel.sequence_parallel=false",))
    assert whole.memory["vision embeddings of a pack"] == 3600 * 256 * 3584 * 2 // 2
    assert memory["runtime: context, NCCL, sleeping sampler"] == RUNTIME_BYTES
    assert 100e9 < result.memory_total < 140 * GIB


def test_a_ring_holds_the_keys_of_the_whole_pack(recipe: Path, shape: ModelShape) -> None:
    """cp 8 over 4 key-value heads of 128: ranks that trade rows for heads have fewer heads each."""
    cp8 = ("parallel.tp=1", "parallel.cp=8", "parallel.sequence_parallel=false")

    def ring(*overrides: str, task: Task = "grpo") -> dict[str, int]:
        memory = planned(recipe, shape, task=task, overrides=(*cp8, *overrides)).memory
        return {name: value for name, value in memory.items() if "ring" in name}

    # 16 bytes an element of one head's key and value: both, float32 sums of their gradients, and those in bfloat16.
    for a2a, ring_size in ((1, 8), (2, 4), (4, 2)):
        row = {f"its keys gathered over a ring of {ring_size}": 933_648 * 4 // a2a * 128 * 16}
        assert ring(f"parallel.cp_a2a={a2a}") == row
    assert ring() == row, "as many as the heads allow trade rows"
    assert ring("parallel.tp=2", "parallel.cp=2", "gpus=4") == {}
    # Eight ranks of tp share each head by two.
    assert costs.gathered_bytes_per_token(shape, element=2, tp=8, a2a=1, train=True) == 128 * 16
    assert list(ring("model.dtype=float32").values()) == [933_648 * 128 * 24]
    assert ring("mr_sp.mode=stage1") == {}, "sequences are whole"
    asked = ("eval.manifest=e.jsonl", "eval.likelihood=true", "eval.batch_prompts=1")
    assert list(ring(*asked, task="eval").values()) == [(925_456 + 1024) * 128 * 8], "a forward alone"
    text = " ".join(render(planned(recipe, shape, overrides=(*cp8, "parallel.cp_a2a=2"))).split())
    assert "context (cp) 8 - all-to-all, heads for rows 2 - ring, keys gathered 4 pipeline (pp) 1" in text


def test_plain_attention_holds_whole_score_matrices(recipe: Path, shape: ModelShape) -> None:
    """28 heads over tp 4: seven of them, three float32 matrices at a time."""
    name = "its scores (plain attention)"

    def scores(*overrides: str, task: Task = "grpo") -> int | None:
        return planned(recipe, shape, task=task, overrides=overrides).memory.get(name)

    plain = "model.attention=plain"
    assert scores() is None
    # The last of the four chunks that cp 2 cuts the prompt into, on the three before it.
    chunk = 925_456 // 4
    assert scores(plain) == scores("model.dtype=float32") == 3 * 4 * 7 * chunk * 3 * chunk
    assert scores(plain, "parallel.cp=1", "gpus=4") == 3 * 4 * 7 * 925_456**2
    assert scores(plain, "mr_sp.mode=stage1") == 3 * 4 * 7 * (925_456 + 1024) ** 2
    heads = (plain, "parallel.tp=2", "parallel.cp=2", "gpus=4")
    assert scores(*heads) == 3 * 4 * 7 * 925_456**2, "an all-to-all of two halves the 14 heads of a rank"
    # Many long responses to a short prompt: 16 x 1,024 of them on 513 tokens, or each on itself.
    many = (plain, "video.num_frames=1", "rollout.group_size=16", "parallel.cp=1", "gpus=4")
    assert scores(*many) == 3 * 4 * 7 * 16 * 1024**2
    # Four questions of 256 tokens and eight responses each, all on their video.
    four = (*many[:2], "parallel.cp=1", "gpus=4", "data.questions_per_video=4", "data.pack_tokens=40000")
    assert scores(*four) == 3 * 4 * 7 * 4 * (8 * 1024 + 256) * 513
    assert scores(*four, "data.pack_tokens=20000") == 3 * 4 * 7 * 2 * (8 * 1024 + 256) * 513, "two have room"
    assert scores(*four, "mr_sp.mode=stage1") == 3 * 4 * 7 * (513 + 1024) ** 2
    assert scores(*four, "sft.batch_size=4", task="sft") == 3 * 4 * 7 * 4 * (256 + 1024) ** 2, "side by side"
    assert scores("model.dtype=float32", "gpus=0") is None, "the CPU's kernel takes float32"
    assert scores(plain, "gpus=0") == scores(plain)
    result = planned(recipe, shape, overrides=("video.num_frames=512", "model.dtype=float32"))
    assert "on 141 GB (H200) does NOT fit" in " ".join(render(result).split())


def test_settings_that_save_memory(recipe: Path, shape: ModelShape) -> None:
    local, kept = 933_648 // 2, (2 * 2 * 3584 + 4 * 28) // 4
    plain = planned(recipe, shape, overrides=("model.mlp_chunks=1",))
    assert plain.memory["its MLP in 1 slice(s)"] == 3 * 18_944 * local
    assert plain.host_activations == 0
    away = planned(recipe, shape, overrides=("model.mlp_chunks=100", "model.offload_activations=true"))
    assert away.memory["its MLP in 100 slice(s)"] == 3 * 18_944 * 4669
    assert away.memory["kept activations (recompute keep_attention)"] == 2 * kept * local
    assert away.host_activations == 28 * kept * local
    assert plain.memory_total - away.memory_total == 26 * kept * local + 3 * 18_944 * (local - 4669)
    assert away.flops == plain.flops
    assert "offloaded activations, pinned host memory per process" in render(away)
    assert "offloaded" not in render(plain)
    evaluated = ("model.offload_activations=true", "eval.manifest=e.jsonl")
    assert planned(recipe, shape, task="eval", overrides=evaluated).host_activations == 0
    # Four packs of seven layers are under way in the first of four stages.
    staged = (
        "parallel.tp=2",
        "parallel.cp=1",
        "parallel.pp=4",
        "model.recompute=full",
        "model.offload_activations=true",
    )
    assert planned(recipe, shape, overrides=staged).host_activations == 4 * 7 * 3584 * 933_648
    # Nothing else is computed again, so slices cost an MLP forward.
    sliced, none = (
        planned(recipe, shape, overrides=("model.recompute=none", f"model.mlp_chunks={chunks}")) for chunks in (4, 0)
    )
    more = sliced.flops["forward and backward"] - none.flops["forward and backward"]
    assert more == 4 * 2 * 3 * 3584 * 18_944 * (27 * 933_648 + 8185)
    assert "its MLP in 1 slice(s)" in none.memory
    fewer = none.memory["kept activations (recompute none)"] - sliced.memory["kept activations (recompute none)"]
    assert fewer == 28 * local * 2 * (3584 + 3 * 18_944) // 4


def test_offloaded_optimizer_states_leave_their_pieces(recipe: Path, shape: ModelShape) -> None:
    states, pieces = "optimizer: master and moments", "optimizer: pieces of offloaded states"
    here, away = planned(recipe, shape), planned(recipe, shape, overrides=("optimizer.offload=true",))
    assert (here.host_states, pieces in here.memory) == (0, False)
    assert (away.host_states, states in away.memory) == (here.memory[states], False)
    # Three pieces of three states, and a gradient, of 32 MiB each.
    assert away.memory[pieces] == (3 * 3 + 1) * 2**25
    assert here.memory_total - away.memory_total == here.memory[states] - away.memory[pieces]
    assert here.engine.trainer - away.engine.trainer == here.memory[states] - away.memory[pieces]
    text = " ".join(render(away).split())
    assert f"offloaded optimizer states, pinned host memory per process {away.host_states / GIB:,.2f} GiB" in text
    assert "offloaded" not in render(here)
    float32 = planned(recipe, shape, overrides=("optimizer.offload=true", "model.dtype=float32"))
    assert float32.host_states * 12 == away.host_states * 8
    assert float32.memory[pieces] == (3 * 2 + 1) * 2**25
    evaluated = planned(recipe, shape, task="eval", overrides=("optimizer.offload=true", "eval.manifest=e.jsonl"))
    assert (evaluated.host_states, pieces in evaluated.memory) == (0, False)
    # The first and the last stage hold most; a rank of two owns no less than the whole embedding.
    staged = ("parallel.tp=2", "parallel.cp=1", "parallel.pp=4", "optimizer.offload=true")
    assert planned(recipe, shape, overrides=staged).host_states == 12 * (
        152_064 * 3584 // 2 + 7 * ((233_046_016 + 4608) // 2 + 7168) + 3584
    )
    small = planned(recipe, replace(shape, hidden=64, vocab=100, vision=None), overrides=("optimizer.offload=true",))
    assert small.memory[pieces] == (3 * 3 + 1) * 4 * 100 * 64 // 4


def test_each_pipeline_stage_has_its_own_memory(recipe: Path, shape: ModelShape) -> None:
    staged = ("parallel.tp=2", "parallel.cp=1", "parallel.pp=4", "gpus=8", "model.recompute=full")
    result = planned(recipe, shape, overrides=staged)
    assert (result.layout.dp, result.lengths.packs) == (1, 4)
    assert len(result.stages) == 4
    assert result.memory_total == max(result.stages)
    one = 2 * 3584 // 2 * 933_648 * 7  # bytes of a pack's inputs of the seven layers of a stage
    table, layers = 152_064 * 3584 // 2, 7 * ((233_046_016 + 4608) // 2 + 7168)
    # Four packs are under way in the first stage, one less in the next; two weights (policy and reference), gradients
    # and states take 2 + 2 + 4 + 12 bytes; the embeddings of all packs lie on the first.
    embeddings = 4 * 3584 * 2 * 933_648 // 2
    assert result.stages[0] - result.stages[1] == one + 20 * table + embeddings
    assert result.stages[1] - result.stages[2] == one
    assert result.memory["kept activations (recompute full)"] == 4 * one
    assert result.memory["LLM weights"] == 2 * (layers + table)
    assert "logits of a chunk of rows" not in result.memory
    single = planned(recipe, shape, overrides=(*staged, "grpo.batch_size=1"))
    assert single.stages[1] == single.stages[2] == result.stages[2] - one
    lines = [" ".join(line.split()) for line in render(result).splitlines()]
    for stage, total in enumerate(result.stages):
        assert f"total on pipeline stage {stage} {total / GIB:,.2f} GiB" in lines
    assert "pipeline stage" not in render(planned(recipe, shape))


def test_flops_are_those_of_the_batch(recipe: Path, shape: ModelShape) -> None:
    result = planned(recipe, shape)
    size = {"prompt": 925_456, "response": 1024, "group": 8}
    one_pass = costs.forward_flops(shape, costs.shared_work(**size))
    assert result.flops["reference log-probabilities"] == 4 * one_pass
    assert result.flops["vision: encode every frame once"] == 4 * 3600 * shape.vision.frame_flops
    assert "old log-probabilities" not in result.flops
    assert result.flops_total == sum(result.flops.values())
    assert result.flops_repeated / result.flops_total == pytest.approx(6.7, abs=0.3)
    twice = planned(recipe, shape, overrides=("grpo.updates_per_batch=2",))
    assert twice.flops["old log-probabilities"] == 4 * one_pass
    without_kl = planned(recipe, shape, overrides=("grpo.kl_coef=0",))
    assert "reference log-probabilities" not in without_kl.flops
    assert "reference policy weights" not in without_kl.memory


def test_short_groups_share_a_pack_up_to_the_replica_s_share(recipe: Path, shape: ModelShape) -> None:
    short = ("video.num_frames=4", "data.pack_tokens=40000", "data.max_response_tokens=512")
    # 4 * 257 + 256 + 8 * 512 = 5,380 tokens: 7 groups fit, but the replica has only 4 (then 1) per update.
    assert planned(recipe, shape, overrides=short).lengths.copies_per_pack == 4
    assert planned(recipe, shape, overrides=(*short, "grpo.updates_per_batch=4")).lengths.copies_per_pack == 1
    assert planned(recipe, shape, overrides=(*short, "grpo.batch_size=64")).lengths.copies_per_pack == 7


def test_shorter_groups_fill_a_pack_beyond_the_longest_ones_in_it(recipe: Path, shape: ModelShape) -> None:
    """Seven groups of 5,380 tokens leave room for a shorter eighth, whose memory counts, too."""
    short = ("video.num_frames=4", "data.max_response_tokens=512", "grpo.batch_size=64")
    full, filled = (
        planned(recipe, shape, overrides=(*short, f"data.pack_tokens={size}")) for size in (7 * 5380, 40000)
    )
    assert (full.lengths.pack, filled.lengths.pack) == (7 * 5380, 40000)
    for name in ("kept activations (recompute keep_attention)", "vision embeddings of a pack"):
        assert filled.memory[name] / full.memory[name] == pytest.approx(40000 / (7 * 5380), rel=1e-3)
    one = planned(recipe, shape, overrides=(*short[:2], "data.pack_tokens=40000", "grpo.updates_per_batch=4"))
    assert one.lengths.pack == 5380, "there is no other group to share a pack with"
    assert filled.flops == full.flops


def test_sft_and_eval_leave_out_what_they_do_not_do(recipe: Path, shape: ModelShape) -> None:
    sft = planned(recipe, shape, task="sft")
    assert set(sft.flops) == {"vision: encode every frame once", "forward and backward"}
    assert sft.lengths.shared == 925_456 + 1024
    assert "reference policy weights" not in sft.memory
    evaluation = planned(recipe, shape, task="eval", overrides=("eval.manifest=e.jsonl",))
    assert "gradients (float32)" not in evaluation.memory
    assert "forward and backward" not in evaluation.flops
    assert not any("layer" in name or "of a pack" in name for name in evaluation.memory)


def test_the_forward_of_an_evaluation_s_likelihood_is_planned(recipe: Path, shape: ModelShape) -> None:
    layout = ("parallel.cp=1", "gpus=4", "data.pack_tokens=3000000")
    manifest = ("eval.manifest=e.jsonl", "eval.likelihood=true", "eval.num_samples=2", "eval.temperature=1")
    training = planned(recipe, shape, task="grpo", overrides=(*layout, "grpo.batch_size=2")).memory
    one, two = (
        planned(recipe, shape, task="eval", overrides=(*layout, *manifest, f"eval.batch_prompts={prompts}"))
        for prompts in (1, 2)
    )
    assert one.lengths.pack == 925_456 + 2 * 1024
    assert two.lengths.pack == 2 * one.lengths.pack, "questions that are asked together share a pack"
    layer = "one layer of eval.likelihood, without its MLP"
    backward = training["one layer in backward, without its MLP"] / (2 * (925_456 + 8 * 1024))
    assert two.memory[layer] == 2 * one.memory[layer]
    assert one.memory[layer] / one.lengths.pack == pytest.approx(backward / 2, rel=1e-6)
    assert two.memory["vision embeddings of a pack"] == 2 * one.memory["vision embeddings of a pack"]
    assert not any("kept" in name or "gradients" in name for name in one.memory)
    assert one.memory["logits of a chunk of rows"] < training["logits of a chunk of rows"], "the head has no gradient"
    prefill, options = (one.flops[name] for name in ("rollout: prefill, once per prompt", "likelihood of the options"))
    assert 0.95 * prefill < options < prefill, "but for the last layer, which computes the rows of the options alone"
    assert one.lengths.packs == 1
    # Every response counts with its prompt: two do not fit a pack of this size, and each has a copy of the video then.
    tight = planned(
        recipe, shape, task="eval", overrides=(*layout[:2], *manifest, "data.pack_tokens=1000000", "parallel.tp=4")
    )
    assert tight.lengths.packs == 2 * load_config(recipe, manifest).eval.batch_prompts
    assert tight.flops["likelihood of the options"] == options + prefill


def test_trained_vision_parts_add_gradients_and_states(recipe: Path, shape: ModelShape) -> None:
    frozen = planned(recipe, shape, task="sft").memory
    with_tower = ("model.train_tower=true", "video.cache_embeddings=false")
    trained = planned(recipe, shape, task="sft", overrides=with_tower)
    more = trained.memory["gradients (float32)"] - frozen["gradients (float32)"]
    assert more == 4 * shape.vision.tower_params
    assert trained.videos.host_store == 0


def test_a_trained_tower_holds_all_its_layers(recipe: Path, shape: ModelShape) -> None:
    """SigLIP at 448 px of a LongVILA: 26 of its 27 layers run."""
    with_tower = ("model.train_tower=true", "video.cache_embeddings=false", "video.num_frames=256")
    frozen = planned(recipe, shape, task="sft", overrides=("video.num_frames=256",)).memory
    batch = frozen["tower on one batch of frames"]
    assert batch == 2 * 64 * shape.vision.frame_elements
    again = planned(recipe, shape, task="sft", overrides=with_tower).memory
    assert again["trained tower on one batch of frames"] == 26 * batch
    pack = ("data.pack_tokens=67072", "model.recompute=none")
    kept = planned(recipe, shape, task="sft", overrides=(*with_tower, *pack)).memory
    assert kept["trained tower on a pack's frames"] == 26 * batch // 2, "256 frames over the 8 ranks of a replica"
    none = planned(recipe, shape, task="sft", overrides=(*with_tower, *pack, "mr_sp.mode=none")).memory
    assert none["trained tower on a pack's frames"] == 26 * batch * 4, "every rank encodes all of them"
    whole = planned(recipe, shape, task="sft", overrides=(*with_tower, *pack, "mr_sp.mode=stage1")).memory
    assert whole["trained tower on a pack's frames"] == 26 * batch, "two packs at a time, one of each context rank"
    filled = (*pack[1:], f"data.pack_tokens={67072 * 3 // 2}", "grpo.batch_size=8")
    more = planned(recipe, shape, task="sft", overrides=(*with_tower, *filled)).memory
    assert more["trained tower on a pack's frames"] / (26 * batch) == pytest.approx(0.75, rel=0.01)


def test_float32_weights_are_their_own_master(recipe: Path, shape: ModelShape) -> None:
    full = planned(recipe, shape, overrides=("model.dtype=float32",)).memory
    half = planned(recipe, shape).memory
    assert full["LLM weights"] == 2 * half["LLM weights"]
    assert full["optimizer: master and moments"] * 12 == half["optimizer: master and moments"] * 8


def test_without_gpus_one_replica_is_planned_and_sampling_is_embedded(recipe: Path, shape: ModelShape) -> None:
    result = planned(recipe, shape, overrides=("gpus=0",))
    assert result.layout.world_size == 8
    assert result.memory["embedded sampler: weights"] == 2 * 7_615_616_512
    assert not any(name.startswith("runtime") for name in result.memory)


def test_shape_for_planning_says_when_it_uses_the_shipped_sizes(recipe: Path) -> None:
    shape, note = shape_for_planning(load_config(recipe))
    assert shape.hidden == 3584
    assert note == "model.path=no/such/model does not exist: planned with the sizes in launch/shapes/longvila_7b"
    shape, note = shape_for_planning(load_config(recipe, [f"model.path={SHIPPED_SHAPES['longvila']}"]))
    assert (shape.hidden, note) == (3584, "")
    with pytest.raises(ConfigError, match="model.path=no/such/model does not exist"):
        shape_for_planning(load_config(recipe, ["gpus=0"]))


def test_text_holds_every_part(recipe: Path, shape: ModelShape) -> None:
    config = load_config(recipe)
    text = render(plan(config, "grpo", shape, note="sizes from elsewhere"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "num_frames: 3600",
        "sizes from elsewhere",
        "replicas (dp) 1",
        "ranks per replica 8",
        "tokens per frame 257",
        "tokens per prompt 925,456",
        "tokens per group of 8, prompt shared 933,648",
        "repeating would cost 7.94 x the tokens",
        "on 80 GB (A100, H100) does NOT fit 79 GiB",
        "on 141 GB (H200) fits 139 GiB",
        "docs/memory.md lists the settings that lower it, cheapest first",
    ):
        assert expected in lines, expected


def test_a_plan_for_the_cpu_says_nothing_of_cards(recipe: Path, shape: ModelShape) -> None:
    text = render(planned(recipe, shape, overrides=("gpus=0", "video.num_frames=64")))
    assert "total per CPU process" in text
    assert "(H200)" not in text
    assert "docs/memory.md" not in render(planned(recipe, shape, overrides=("video.num_frames=64",)))


def test_the_embedding_store_per_video_and_rank(recipe: Path, shape: ModelShape) -> None:
    """3,600 frames of 256 embeddings of 3,584 bfloat16 elements, on 8 ranks; a step has 4 videos."""
    result = planned(recipe, shape)
    video = 3600 * 256 * 3584 * 2
    assert (result.videos.embeddings, result.videos.step_store) == (video, 4 * (1 << 30))  # 0.77 GiB takes 1 GiB pinned
    text = " ".join(render(result).split())
    assert (
        "embeddings of a video 6.152 GiB share of each of 8 rank(s) 0.769 GiB host memory per process, at most 16.00"
        in text
    )
    assert "if no two samples share one 4.00 GiB, fits" in text
    assert GPU_STORE not in result.memory
    small = planned(recipe, shape, overrides=("video.cache_gib=2", "video.cache_gpu_gib=1.5"))
    assert small.memory[GPU_STORE] == 1.5 * GIB
    text = " ".join(render(small).split())
    assert "GPU memory per process, at most 1.50 GiB host memory per process, at most 2.00 GiB" in text
    assert "4.00 GiB, does NOT fit" in text
    ahead = planned(recipe, shape, overrides=("rollout.steps_off_policy=1", "grpo.tis_cap=2"))
    assert ahead.videos.step_store == 2 * result.videos.step_store, "the next step's videos, too"
    off = planned(recipe, shape, overrides=("video.cache_embeddings=false", "video.cache_gpu_gib=1"))
    assert (off.videos.host_store, off.videos.step_store, GPU_STORE in off.memory) == (0, 0, False)
    assert "# embedding store (off) embeddings of a video 6.152 GiB" in " ".join(render(off).split())


def test_the_decoded_frames_of_a_step(recipe: Path, shape: ModelShape) -> None:
    """Frames of 448 x 448 pixels, 3,600 of each of 4 videos, on 8 ranks."""
    frame = 3 * 448 * 448
    result = planned(recipe, shape)
    assert (result.videos.step_frames, result.videos.frame_store) == (4 * 450 * frame, 16 * GIB)
    assert result.videos.least_frames == 450 * frame, "let go as they are encoded"
    text = " ".join(render(result).split())
    assert "# decoded frames host memory per process, at most 16.00 GiB a video's, at least 0.25 GiB, fits" in text
    assert "a step's, decoded ahead as far as there is room 1.01 GiB" in text
    many = ("grpo.batch_size=64", "video.frame_cache_gib=0.001")
    assert planned(recipe, shape, overrides=many).videos.step_frames == 64 * 450 * frame
    assert "at least 0.25 GiB, does NOT fit" in " ".join(render(planned(recipe, shape, overrides=many)).split())
    # Without embeddings that take their place they stay, with those of the step that is sampled for.
    anew = (*many, "video.cache_embeddings=false")
    assert planned(recipe, shape, overrides=anew).videos.least_frames == 64 * 450 * frame
    text = " ".join(render(planned(recipe, shape, overrides=anew)).split())
    assert "a step's videos per process, if no two samples share one 16.15 GiB, does NOT fit" in text
    ahead = ("rollout.steps_off_policy=1", "grpo.tis_cap=2")
    assert planned(recipe, shape, overrides=ahead).videos.least_frames == 450 * frame
    anew = (*ahead, "video.cache_embeddings=false")
    assert planned(recipe, shape, overrides=anew).videos.least_frames == 2 * 4 * 450 * frame
    pooled = replace(shape, vision=replace(shape.vision, frames_per_step=8))
    assert planned(recipe, pooled).videos.least_frames == 456 * frame, "a rank has whole steps of the tower"
    whole = planned(recipe, shape, overrides=("mr_sp.mode=none",))
    assert whole.videos.least_frames == 4 * 3600 * frame, "every rank decodes all"
    evaluated = ("eval.manifest=e.jsonl", "eval.batch_prompts=3")
    evaluation = planned(recipe, shape, task="eval", overrides=evaluated)
    assert (evaluation.videos.step_frames, evaluation.videos.step_store) == (3 * 450 * frame, 3 << 30)
    assert "decoded ahead" not in render(evaluation)


def test_modes_that_share_less_have_their_own_packs_and_work(recipe: Path, shape: ModelShape) -> None:
    modes = ("shared_prefix", "stage1+2", "stage1", "none")
    one = 925_456 + 1024  # a prompt and a response
    layout = ("parallel.tp=2", "parallel.cp=2", "gpus=4", "grpo.batch_size=2", f"data.pack_tokens={one}")
    plans = {mode: planned(recipe, shape, overrides=(f"mr_sp.mode={mode}", *layout)) for mode in modes}
    shared, *repeated = (plan.lengths for plan in plans.values())
    assert (shared.pack, shared.copies_per_pack, shared.packs, shared.repeats) == (925_456 + 8 * 1024, 1, 2, False)
    for lengths in repeated:
        assert (lengths.pack, lengths.copies_per_pack, lengths.repeats) == (one, 1, True)
    # Sixteen sequences: over both ranks each, or eight on every rank.
    assert [lengths.packs for lengths in repeated] == [16, 8, 8]
    kept = {mode: plan.memory["kept activations (recompute keep_attention)"] for mode, plan in plans.items()}
    assert kept["stage1+2"] / kept["shared_prefix"] == pytest.approx(one / shared.pack)
    assert kept["stage1"] == kept["none"] == 2 * kept["stage1+2"]
    embeddings = {mode: plan.memory["vision embeddings of a pack"] for mode, plan in plans.items()}
    assert embeddings["stage1"] == embeddings["none"] == 2 * embeddings["stage1+2"] == 2 * 3584 * one // 2
    assert embeddings["shared_prefix"] == 2 * 3584 * shared.pack // 4, "as many rows, more of them text"
    # Eight copies of the video in each pass, the reference's and the training's, on both ranks of tp; and one.
    once, anew = "vision: encode every frame once", "vision: encode every frame 33 times"
    assert plans["none"].flops[anew] == 33 * plans["stage1"].flops[once]
    assert plans["none"].videos.host_store == 0, "nothing is kept for the next pass"
    for mode in modes[1:]:
        assert plans[mode].flops["forward and backward"] > 6 * plans["shared_prefix"].flops["forward and backward"]
        assert plans["shared_prefix"].flops_repeated == pytest.approx(plans["stage1"].flops_total)
    text = " ".join(render(plans["stage1"]).split())
    assert (
        f"tokens per pack, at most (1 of the longest sequence(s)) {one:,} which one context-parallel rank has whole"
        in text
    )
    assert "with repeated prompts" not in text


@pytest.mark.parametrize(
    ("task", "overrides", "times"),
    [
        ("grpo", (), 1),
        ("grpo", ("model.train_projector=true", "video.cache_embeddings=false"), 3),
        ("grpo", ("video.cache_embeddings=false", "mr_sp.mode=stage1+2", "grpo.updates_per_batch=2"), 25),
        ("grpo", ("mr_sp.mode=none", "grpo.kl_coef=0", "parallel.tp=4", "parallel.cp=2"), 33),
        ("sft", ("video.cache_embeddings=false",), 1),
        ("sft", ("mr_sp.mode=none", "parallel.tp=4", "parallel.cp=2"), 4),
        ("eval", ("mr_sp.mode=none", "eval.manifest=e.jsonl"), 1),
    ],
)
def test_frames_are_encoded_as_often_as_nothing_is_kept(
    recipe: Path, shape: ModelShape, task: Task, overrides: tuple[str, ...], times: int
) -> None:
    flops = planned(recipe, shape, task=task, overrides=overrides).flops
    name = "vision: encode every frame once" if times == 1 else f"vision: encode every frame {times} times"
    batch = {"grpo": 4, "sft": planned(recipe, shape, task="sft").batch_size, "eval": 1}[task]
    assert flops[name] == batch * times * 3600 * shape.vision.frame_flops


def test_an_evaluation_has_a_prompt_s_embeddings_whole_on_every_stage(recipe: Path, shape: ModelShape) -> None:
    layout = ("parallel.tp=2", "parallel.cp=2", "parallel.pp=2", "gpus=8", "eval.manifest=e.jsonl")
    result = planned(recipe, shape, task="eval", overrides=layout)
    assert result.memory["vision embeddings of a prompt, for its engine"] == result.videos.embeddings
    assert result.stages[1] - result.stages[0] == 2 * 3584  # the head and its norm, where the first has the embedding


def test_a_check_has_weights_an_engine_and_a_forward(recipe: Path, shape: ModelShape) -> None:
    training, check = planned(recipe, shape), planned(recipe, shape, task="check-sync")
    memory = check.memory
    assert set(memory) - set(training.memory) == {
        "vision embeddings of a prompt, for its engine",
        "one layer of the trainer's forward, without its MLP",
    }
    assert "gradients (float32)" not in memory
    assert memory["LLM weights"] == training.memory["LLM weights"]
    live = "one layer of the trainer's forward, without its MLP", "one layer in backward, without its MLP"
    assert 2 * memory[live[0]] == training.memory[live[1]], "a prompt and its group, as in training"
    assert check.engine.memory == training.engine.memory
    # A prompt for each of the eight ranks.
    assert (check.batch_size, check.videos.handover) == (8, 8 * check.videos.embeddings)
    assert "FLOPs" not in render(check)
    assert planned(recipe, shape, task="check-sync", overrides=("parallel.cp=1",)).batch_size == 2 * 4


def test_embeddings_ahead_need_a_tower_and_a_disk(recipe: Path, shape: ModelShape) -> None:
    folder = ("video.cache_dir=d", "video.cache_dir_gib=100", "video.cache_gpu_gib=1")
    result = planned(recipe, shape, task="cache-embeddings", overrides=folder)
    vision = shape.vision
    video, frames = 3600 * 256 * 3584 * 2, 3600 * 3 * 448 * 448
    assert result.memory == {
        "tower and projector weights": 2 * (vision.tower_params + vision.projector_params),
        "tower on one batch of frames": 2 * 64 * vision.frame_elements,
        "a video's frames and embeddings, twice": 2 * (video + frames),
        GPU_STORE: GIB,
        "runtime: context, NCCL, sleeping sampler": RUNTIME_BYTES,
    }
    assert (result.layout.dp, result.layout.replica, result.engine) == (8, 1, None)
    assert (result.videos.step_frames, result.videos.step_store) == (frames, 8 * GIB)
    assert result.flops == {"vision: encode every frame once": 3600 * vision.frame_flops}
    text = " ".join(render(result).split())
    for part in ("tokens per frame 257 # memory", "share of each of 1 rank(s) 6.152 GiB", "a video 8.00 GiB, fits",
                 "videos that video.cache_dir_gib has room for 16", "# FLOPs per longest video"):  # fmt: skip
        assert part in text, part
    trained = planned(recipe, shape, overrides=folder)
    assert "video.cache_dir_gib has room for 16" in " ".join(render(trained).split())
    assert "video.cache_dir_gib has" not in render(planned(recipe, shape))


def test_how_a_node_s_gpus_are_split(recipe: Path, shape: ModelShape) -> None:
    apart, beside = "disaggregated: a node has", "colocated: all nodes have"

    def split(*overrides: str) -> dict[str, str]:
        lines = [" ".join(line.split()) for line in render(planned(recipe, shape, overrides=overrides)).splitlines()]
        return {name: line[len(name) + 1 :] for name in (apart, beside) for line in lines if line.startswith(name)}

    two = ("rollout.engine_tp=2", "rollout.engines_per_node=3")
    assert split(*two) == {
        apart: "3 engine(s) on 6 GPU(s) behind its training processes'",
        beside: "4 engine(s) on the 8 training processes' GPU(s)",
    }
    assert split(*two, "rollout.placement=colocated").keys() == {beside}


COLOCATED, DISAGGREGATED = EnginePlacement.colocated, EnginePlacement.disaggregated
H200, A100 = 139 * GIB, 79 * GIB


def engine_of(recipe: Path, shape: ModelShape, *overrides: str, task: Task = "grpo") -> EnginePlan:
    result = planned(recipe, shape, task=task, overrides=overrides).engine
    assert result is not None
    return result


def test_the_vllm_engine_of_an_hour_of_video(recipe: Path, shape: ModelShape) -> None:
    engine = engine_of(recipe, shape)
    assert engine.memory == {
        "LLM weights": 2 * 7_615_616_512,
        # 28 layers of 4 heads of 128 keys and values, 2 bytes each; the prompt once and 8 responses.
        "keys and values of a group": 2 * 28 * 4 * 128 * 2 * 933_648,
        "a layer on 16,384 tokens": 2 * 16_384 * (4 * 3584 + 3 * 18_944),
    }
    assert (engine.gpus, engine.shares) == (1, {DISAGGREGATED: 0.9, COLOCATED: 0.4})
    # The trainer keeps weights, reference, gradients and optimizer states, and the tower; not its activations.
    memory = planned(recipe, shape).memory
    kept = ("LLM weights", "tower and projector weights", "reference policy weights", "gradients (float32)",
            "optimizer: master and moments", ENGINE_BUCKET, "runtime: context, NCCL, sleeping sampler")  # fmt: skip
    assert engine.trainer == sum(memory[name] for name in kept)
    assert engine.problem(DISAGGREGATED, card=A100) == ""
    assert engine.problem(COLOCATED, card=H200).startswith("too small a share")  # 0.4 of 139 is less than 66
    lines = [" ".join(line.split()) for line in render(planned(recipe, shape)).splitlines()]
    assert "needed on each of its GPUs 66.22 GiB" in lines
    assert "disaggregated on 80 GB (A100, H100) 71.10 GiB for the engine, fits" in lines
    assert any(line.startswith("colocated on 141 GB (H200) 55.60 GiB for the engine, does NOT fit") for line in lines)


def test_the_engines_of_a_replica_are_given_the_embeddings_of_its_prompts(recipe: Path, shape: ModelShape) -> None:
    more = ("grpo.batch_size=16", "eval.manifest=e.jsonl", "eval.batch_prompts=5")
    training, evaluation = planned(recipe, shape, overrides=more), planned(recipe, shape, task="eval", overrides=more)
    assert training.videos.handover == 16 // training.layout.dp * training.videos.embeddings > 0
    assert evaluation.videos.handover == 5 * evaluation.videos.embeddings
    row = f"embeddings of a replica's prompts, pinned in /dev/shm {training.videos.handover / GIB:,.2f} GiB"
    assert row in [" ".join(line.split()) for line in render(training).splitlines()]


def test_questions_that_share_a_video_have_it_once(recipe: Path, shape: ModelShape) -> None:
    """16 prompts of two replicas of four ranks: eight each, about two videos of four questions."""
    two = ("gpus=8", "parallel.cp=1", "grpo.batch_size=16")
    apart, shared = (
        planned(recipe, shape, overrides=(*two, f"data.questions_per_video={count}", "rollout.engine_tp=2"))
        for count in (1, 4)
    )
    assert (apart.layout.dp, apart.layout.replica) == (2, 4)
    for name in ("handover", "step_store", "step_frames"):  # an engine of two has one video's four questions
        assert getattr(apart.videos, name) == 4 * getattr(shared.videos, name) > 0
    assert "a step's videos per process, if every 4 samples share one " in render(shared)
    encode, prefill = "vision: encode every frame once", "rollout: prefill, once per prompt"
    assert apart.flops[encode] == 4 * shared.flops[encode]
    # Behind the video each of the other twelve questions has 256 tokens: a 3,615th of its prompt.
    assert shared.flops[prefill] / apart.flops[prefill] == pytest.approx((4 + 12 / 1800) / 16, rel=2e-3)
    assert shared.flops["forward and backward"] == apart.flops["forward and backward"]
    # Four engines are given two of a video's four questions each; eight in threes are about four videos at most.
    four = planned(recipe, shape, overrides=(*two, "data.questions_per_video=4"))
    assert four.videos.handover == 4 * four.videos.embeddings
    assert four.videos.step_store == shared.videos.step_store
    threes = planned(recipe, shape, overrides=(*two, "data.questions_per_video=3"))
    assert threes.videos.step_store == 4 * apart.videos.step_store // 8
    asked = ("eval.manifest=e.jsonl", "eval.batch_prompts=5", "data.questions_per_video=4")
    evaluation = planned(recipe, shape, task="eval", overrides=asked)
    assert evaluation.videos.handover == 5 * evaluation.videos.embeddings, "its order is another"


def test_questions_that_a_pack_has_room_for_are_computed_with_one_video(recipe: Path, shape: ModelShape) -> None:
    """512 frames: a group is 135,936 tokens long, four about one video 148,992."""
    base = ("video.num_frames=512", "data.max_response_tokens=512", "grpo.updates_per_batch=2", "grpo.batch_size=8")
    passes = ("old log-probabilities", "reference log-probabilities", "forward and backward")

    def cost(questions: int, pack: int, *more: str) -> list[int]:
        asked = (f"data.questions_per_video={questions}", f"data.pack_tokens={pack}")
        flops = planned(recipe, shape, overrides=(*base, *asked, *more)).flops
        return [flops[name] for name in passes]

    apart, three = cost(1, 148_992), cost(4, 148_991)
    for once, alone in zip(cost(4, 148_992), apart, strict=True):
        assert alone / once == pytest.approx(3.44, abs=0.02)
    # With room for three the fourth has the video again.
    assert [(a - b) for a, b in zip(apart, three, strict=True)] == pytest.approx(
        [(a - b) * 2 / 3 for a, b in zip(apart, cost(4, 148_992), strict=True)]
    )
    assert cost(4, 100_000) == apart
    assert cost(4, 148_992, "mr_sp.mode=stage1") == cost(1, 148_992, "mr_sp.mode=stage1")


@pytest.mark.parametrize("together", range(1, 7))
def test_as_many_videos_as_a_share_of_prompts_can_be_about(together: int) -> None:
    for prompts in range(1, 20):
        shares = [range(first, first + prompts) for first in range(0, prompts * together, prompts)]
        most = max(len({prompt // together for prompt in share}) for share in shares)
        assert videos_of(prompts, together=together) == most


def test_an_engine_with_deepstack_holds_what_the_first_layers_add(recipe: Path, shape: ModelShape) -> None:
    assert shape.vision is not None
    three = replace(shape, vision=replace(shape.vision, embed_width=4 * shape.hidden))
    plain, deeper = engine_of(recipe, shape).memory, engine_of(recipe, three).memory
    assert deeper == {**plain, "deepstack embeddings of a step": 3 * 2 * 16_384 * 3584}


def test_an_engine_over_several_gpus(recipe: Path, shape: ModelShape) -> None:
    one, four, eight = (engine_of(recipe, shape, f"rollout.engine_tp={tp}").memory for tp in (1, 4, 8))
    assert four["LLM weights"] * 4 == one["LLM weights"]
    assert four["keys and values of a group"] * 4 == one["keys and values of a group"]
    assert four["a layer on 16,384 tokens"] == 2 * 16_384 * (4 * 3584 + 3 * 18_944 // 4)
    # Two ranks share each of the 4 key-value heads.
    assert eight["keys and values of a group"] == four["keys and values of a group"]
    assert eight["LLM weights"] * 8 == one["LLM weights"]


def test_an_engine_beside_the_trainer_needs_room_for_both(recipe: Path, shape: ModelShape) -> None:
    colocated = "rollout.placement=colocated"
    for share, problem in ((0.4, "too small a share"), (0.6, ""), (0.85, "no room beside the trainer's states")):
        engine = engine_of(recipe, shape, colocated, f"rollout.memory_share={share}")
        assert list(engine.shares.values()) == [share]
        found = engine.problem(COLOCATED, card=H200)
        assert found.startswith(problem), share
        assert bool(found) is bool(problem)
    # What the trainer does not keep makes room: of 139 GiB the engine has 118.15.
    apart = engine_of(recipe, shape, "rollout.placement=disaggregated", "rollout.memory_share=0.85")
    assert apart.problem(DISAGGREGATED, card=H200) == ""
    assert "colocated: the trainer keeps" not in render(
        planned(recipe, shape, overrides=("rollout.placement=disaggregated",))
    )
    assert list(engine_of(recipe, shape, "rollout.placement=auto").shares) == [DISAGGREGATED, COLOCATED]
    assert list(engine_of(recipe, shape, "rollout.steps_off_policy=1", "grpo.tis_cap=2").shares) == [DISAGGREGATED]
    more = engine_of(recipe, shape, colocated, "video.cache_gpu_gib=5")
    assert more.trainer == engine_of(recipe, shape, colocated).trainer + 5 * GIB
    less = engine_of(recipe, shape, colocated, "eval.manifest=e.jsonl", task="eval")
    assert less.trainer < engine_of(recipe, shape, colocated).trainer / 2


def test_an_engine_that_never_sleeps_needs_room_beside_the_trainer_s_peak(recipe: Path, shape: ModelShape) -> None:
    awake = ("rollout.placement=colocated", "rollout.sleep=false", "rollout.memory_share=0.6")
    engine = engine_of(recipe, shape, *awake)
    assert engine.trainer == planned(recipe, shape, overrides=awake).memory_total
    problem = engine.problem(COLOCATED, card=H200)
    assert problem.startswith("no room beside the trainer's peak: lower rollout.memory_share, set rollout.sleep=true")
    text = render(planned(recipe, shape, overrides=awake))
    assert "colocated: the trainer holds at its peak" in text
    assert problem in text


def test_a_colocated_engine_s_buffer_for_weights_stays_on_the_trainer_s_gpu(recipe: Path, shape: ModelShape) -> None:
    colocated, apart = ("rollout.placement=colocated",), ("rollout.placement=disaggregated",)
    result, other = planned(recipe, shape, overrides=colocated), planned(recipe, shape, overrides=apart)
    # The output head, which is more than 1 GiB.
    assert result.memory[ENGINE_BUCKET] == 2 * 152_064 * 3584 > GIB
    assert result.memory_total - other.memory_total == result.memory[ENGINE_BUCKET]
    assert result.engine.trainer - other.engine.trainer == result.memory[ENGINE_BUCKET]
    assert f"{ENGINE_BUCKET} 1.02 GiB" in " ".join(render(result).split())
    evaluated = (*colocated, "eval.manifest=e.jsonl")
    assert ENGINE_BUCKET in planned(recipe, shape, task="eval", overrides=evaluated).memory
    # Every stage may drive one.
    staged = (*colocated, "parallel.tp=2", "parallel.cp=1", "parallel.pp=4", "model.recompute=full")
    stages = planned(recipe, shape, overrides=staged).stages
    without = planned(recipe, shape, overrides=(*staged, *apart)).stages
    assert [more - less for more, less in zip(stages, without, strict=True)] == [result.memory[ENGINE_BUCKET]] * 4
    for task, overrides in (
        ("grpo", apart),
        ("grpo", ("rollout.steps_off_policy=1", "grpo.tis_cap=2")),  # auto, and then never colocated
        ("grpo", ("gpus=0",)),
        ("grpo", ("rollout.engine=embedded",)),
        ("sft", ()),
    ):
        assert ENGINE_BUCKET not in planned(recipe, shape, task=task, overrides=overrides).memory, (task, overrides)


def test_a_bucket_of_weights_is_filled_up_or_the_largest_tensor_and_no_more_than_all(shape: ModelShape) -> None:
    assert costs.bucket_bytes(replace(shape, vocab=1000), element=2) == costs.WEIGHT_BUCKET_BYTES
    assert costs.bucket_bytes(replace(shape, vocab=1000, ffn=200_000), element=2) == 2 * 200_000 * 3584
    small = replace(shape, layers=1, hidden=64, vocab=100)
    assert costs.bucket_bytes(small, element=4) == 4 * costs.llm_params(small)


def test_runs_without_a_vllm_engine(recipe: Path, shape: ModelShape) -> None:
    for task, override in (("sft", "seed=1"), ("grpo", "gpus=0"), ("grpo", "rollout.engine=embedded")):
        result = planned(recipe, shape, task=task, overrides=(override,))
        assert result.engine is None
        assert "vLLM" not in render(result)


def test_a_phase_that_cannot_end_in_time_is_named() -> None:
    recipe = Path(__file__).parents[3] / "launch" / "recipes" / "grpo_7b_3600f.yaml"

    def times(*overrides: str) -> list[str]:
        config = load_config(recipe, overrides)
        shape, _ = shape_for_planning(config)
        return [line for line in render(plan(config, "grpo", shape)).splitlines() if line.startswith("at the peak of")]

    a100, h100 = times("parallel.timeout_minutes=30")
    over = r"\(forward and backward: 35 min, over parallel\.timeout_minutes=30; raise it\)"
    assert re.fullmatch(rf"at the peak of 8 x A100 +3,290\.0 s {over}", a100)
    assert re.fullmatch(r"at the peak of 8 x H100, H200 +1,037\.9 s", h100)
    assert not any("over" in line for line in (*times("parallel.timeout_minutes=0"), *times()))
