"""validate: each contradiction is found, named with keys and values, and all come in one error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megalong.config.errors import ConfigError
from megalong.config.load import load_config
from megalong.config.longvila_shape import read_longvila_shape
from megalong.config.model_shape import ModelShape
from megalong.config.shapes import SHIPPED_SHAPES
from megalong.config.tree import RunConfig
from megalong.config.validate import Task, prompt_tokens, split_problems, validate

GOOD = """
model: {path: m}
logger: {run_dir: r}
data: {train: t.jsonl}
eval: {manifest: e.jsonl}
parallel: {tp: 4, sequence_parallel: true}
video: {num_frames: 256}
"""


@pytest.fixture(scope="module")
def model() -> ModelShape:
    return read_longvila_shape(SHIPPED_SHAPES["longvila"])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def problems(config: RunConfig, *, task: Task, world_size: int, model: ModelShape) -> tuple[str, ...]:
    try:
        validate(config, task=task, world_size=world_size, model=model)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize(("kv_heads", "tp", "fine"), [(4, 2, True), (2, 4, True), (1, 4, True), (7, 4, False)])
def test_key_value_heads_are_cut_or_shared(model: ModelShape, kv_heads: int, tp: int, fine: bool) -> None:
    found = list(split_problems(dataclasses.replace(model, kv_heads=kv_heads), tp=tp, pp=1))
    want = (
        "parallel.tp=4 neither divides the model's 7 key-value heads nor is a multiple of them; "
        "choose a divisor or a multiple of 7"
    )
    assert found == ([] if fine else [want])


@pytest.mark.parametrize("task", ["sft", "grpo", "eval"])
def test_a_sound_configuration_passes(recipe: Path, model: ModelShape, task: Task) -> None:
    assert problems(load_config(recipe), task=task, world_size=8, model=model) == ()


def test_prompt_tokens_of_the_7b_model(recipe: Path, model: ModelShape) -> None:
    assert prompt_tokens(load_config(recipe), model) == 256 * 257 + 256
    by_rate = load_config(recipe, ["video.sampling=fps", "video.max_frames=3600"])
    assert prompt_tokens(by_rate, model) == 925_456


CASES: list[tuple[Task, list[str], list[str]]] = [
    ("grpo", ["parallel.tp=3"], ["8 processes", "28 attention heads", "4 key-value heads", "18944 ffn width"]),
    ("grpo", ["parallel.tp=8"], ["28 attention heads"]),
    ("sft", ["parallel.tp=1"], ["parallel.sequence_parallel=true needs parallel.tp > 1"]),
    ("sft", ["parallel.pp=8"], ["8 processes cannot be split", "parallel.pp=8 does not divide the model's 28 layers"]),
    ("sft", ["parallel.cp=4"], ["parallel.cp=4 x parallel.pp=1 = 16"]),
    ("sft", ["gpus=6"], ["gpus=6 is not a multiple"]),
    ("sft", ["video.num_frames=512"], ["lower video.num_frames to 509 or raise data.max_prompt_tokens to 131840"]),
    ("sft", ["data.max_prompt_tokens=260"], ["over data.max_prompt_tokens=260; raise data.max_prompt_tokens to 66048"]),
    ("sft", ["video.sampling=fps"], ["video.max_frames=8192 at 257 tokens per frame"]),
    ("sft", ["data.max_prompt_tokens=1048576"], ["lower data.max_prompt_tokens to 1046528"]),
    ("sft", ["model.train_tower=true"], ["model.train_tower=true makes stale; set video.cache_embeddings=false"]),
    ("sft", ["model.train_llm=false"], ["nothing would be trained"]),
    ("grpo", ["model.attention=te"], ["mr_sp.mode=shared_prefix merges the outputs of several calls; set mr_sp"]),
    ("sft", ["gpus=8", "model.attention=flash", "model.dtype=float32"], ["model.attention=flash takes no float32"]),
    ("grpo", ["gpus=8", "model.attention=cpu_flash"], ["cpu_flash does not run on GPUs (gpus=8)"]),
    ("check-sync", ["model.attention=te"], ["mr_sp.mode=shared_prefix merges"]),
    (
        "sft",
        [
            "model.attention=te",
            "mr_sp.mode=stage1+2",
            "parallel.tp=1",
            "parallel.sequence_parallel=false",
            "parallel.cp=8",
        ],
        ["parallel.cp=8 over parallel.cp_a2a=0 (4 key-value heads per tensor-parallel rank) cuts them over a ring"],
    ),
    (
        "eval",
        ["model.attention=te", "eval.likelihood=true"],
        ["eval.likelihood=true packs the options of a question behind their shared prefix; set model.attention"],
    ),
    (
        "sft",
        ["model.attention=te", "mr_sp.mode=none", "eval.likelihood=true", "eval.every=5"],
        ["set model.attention=auto or eval.likelihood=false"],
    ),
    ("sft", ["model.attention=te", "mr_sp.mode=none", "parallel.tp=0"], ["parallel.tp=0 must be at least 1"]),
    ("sft", ["seed=-1"], ["seed=-1 must be at least 0 and less than 4294967296"]),
    ("eval", ["seed=4294967296"], ["seed=4294967296 must be at least 0 and less than 4294967296"]),
    ("grpo", ["data.seed=-1"], ["data.seed=-1 must be at least 0"]),
    ("sft", ["model.mlp_chunks=-1"], ["model.mlp_chunks=-1 must be at least 0"]),
    (
        "sft",
        ["model.offload_activations=true", "model.recompute=none"],
        ["model.recompute=none computes nothing again; set model.recompute=keep_attention or full"],
    ),
    (
        "grpo",
        ["model.train_projector=true", "video.cache_embeddings=false", "grpo.updates_per_batch=2"],
        ["set grpo.updates_per_batch=1"],
    ),
    ("sft", ["optimizer.warmup_steps=101"], ["optimizer.warmup_steps=101 is more than sft.steps=100"]),
    (
        "grpo",
        ["optimizer.warmup_steps=201", "grpo.updates_per_batch=2"],
        ["optimizer.warmup_steps=201 is more than grpo.steps=100 x grpo.updates_per_batch=2"],
    ),
    ("sft", ["optimizer.min_lr=1"], ["optimizer.min_lr=1 is more than optimizer.lr=1e-06"]),
    ("sft", ["sft.batch_size=33"], ["make sft.batch_size a multiple of 2"]),
    ("grpo", ["grpo.updates_per_batch=3"], ["grpo.updates_per_batch=3 does not divide grpo.batch_size=32"]),
    ("grpo", ["grpo.updates_per_batch=32"], ["make grpo.batch_size a multiple of 64"]),
    (
        "grpo",
        ["grpo.updates_per_batch=4", "data.questions_per_video=8"],
        ["data.questions_per_video=8 does not divide the 4 prompts that a replica takes for an update"],
    ),
    ("sft", ["data.questions_per_video=0"], ["data.questions_per_video=0 must be at least 1"]),
    (
        "sft",
        ["data.questions_per_video=2", "data.shuffle=false"],
        ["set data.shuffle=true or data.questions_per_video=1"],
    ),
    ("grpo", ["rollout.group_size=1"], ["rollout.group_size=1 with grpo.advantage=grpo"]),
    ("grpo", ["rollout.group_size=1", "grpo.advantage=rloo"], ["grpo.advantage=rloo"]),
    ("grpo", ["rollout.group_size=1", "grpo.advantage=dr_grpo"], ["grpo.advantage=dr_grpo"]),
    ("grpo", ["rollout.temperature=0"], ["rollout.temperature=0 must be more than 0"]),
    ("grpo", ["rollout.top_p=0"], ["rollout.top_p=0 must be more than 0 and at most 1"]),
    ("grpo", ["rollout.top_p=1.1"], ["rollout.top_p=1.1 must be more than 0 and at most 1"]),
    ("grpo", ["grpo.clip_low=1"], ["grpo.clip_low=1 must be more than 0 and less than 1"]),
    ("grpo", ["grpo.clip_high=-0.1"], ["grpo.clip_high=-0.1 must be more than 0"]),
    ("grpo", ["grpo.kl_coef=-1"], ["grpo.kl_coef=-1 must be at least 0"]),
    ("grpo", ["reward.weights={}"], ["reward.weights={} gives every response a reward of 0"]),
    ("grpo", ["reward.weights={accuracy: 0}"], ["gives every response a reward of 0"]),
    ("grpo", ["reward.weights.format=.nan"], ["reward.weights.format=nan must be a finite number"]),
    ("grpo", ["reward.overlong_buffer=4096"], ["longer than data.max_response_tokens=2048"]),
    (
        "grpo",
        ["reward.weights={format: 1}", "grpo.dynamic_sampling=true"],
        ["none with rollout.group_size=8 and reward.weights={'format': 1.0}; take groups of at least 2"],
    ),
    (
        "grpo",
        ["rollout.group_size=1", "grpo.advantage=reinforce_pp", "grpo.batch_size=4", "grpo.dynamic_sampling=true"],
        ["keeps groups whose accuracy varies: none with rollout.group_size=1 and reward.weights"],
    ),
    (
        "grpo",
        ["rollout.steps_off_policy=2"],
        ["off_policy=2 must be at least 0 and at most 1", "tis_cap=0"],
    ),
    ("grpo", ["rollout.steps_off_policy=1"], ["and grpo.tis_cap=0 corrects for none; set it, to 2 say"]),
    (
        "grpo",
        ["rollout.steps_off_policy=1", "grpo.tis_cap=2", "rollout.engine=embedded"],
        ["with rollout.engine=embedded both are on the same device; set it to 0, or take rollout.engine=vllm"],
    ),
    (
        "grpo",
        ["rollout.steps_off_policy=1", "grpo.tis_cap=2", "rollout.placement=colocated"],
        ["with rollout.placement=colocated both are on the same device"],
    ),
    (
        "grpo",
        ["rollout.steps_off_policy=1", "grpo.tis_cap=2", "grpo.dynamic_sampling=true"],
        ["begins one batch a step and grpo.dynamic_sampling=true more when needed; turn one of them off"],
    ),
    (
        "grpo",
        ["rollout.engine=vllm", "rollout.engine_tp=3"],
        [
            "3 does not divide the model's 28 att",
            "divide the model's 18944",
            "neither divides the model's 4 key-value heads",
        ],
    ),
    (
        "check-sync",
        ["rollout.engine=vllm", "rollout.engine_tp=7", "rollout.placement=colocated"],
        ["ffn width", "key-value heads", "does not divide parallel.tp=4 x parallel.cp=1 = 4, so a colocated engine"],
    ),
    (
        "grpo",
        ["rollout.engine=vllm", "rollout.temperature=0.7", "rollout.top_p=0.9"],
        ["rollout.engine=vllm, with rollout.temperature=0.7 and rollout.top_p=0.9"],
    ),
    (
        "grpo",
        ["rollout.engine=vllm", "rollout.prefill_tokens=255"],
        ["a step of rollout.prefill_tokens=255 tokens has none for each of rollout.max_sequences=256 responses"],
    ),
    ("sft", ["rollout.engine=vllm", "rollout.engine_tp=0"], ["rollout.engine_tp=0 must be at least 1"]),
    ("eval", ["eval.manifest=null"], ["megalong eval needs a manifest"]),
    ("sft", ["eval.manifest=null", "eval.at_end=true"], ["eval.at_end=true needs a manifest"]),
    ("grpo", ["eval.manifest=null", "eval.every=5"], ["eval.every=5 needs a manifest"]),
    ("eval", ["eval.num_samples=4"], ["eval.temperature=0 (greedy) gives equal samples"]),
    ("sft", ["data.train=???"], ["data.train has no value; sft needs a manifest"]),
    ("sft", ["optimizer.lr=.inf"], ["optimizer.lr=inf must be more than 0"]),
    ("sft", ["parallel.tp=0"], ["parallel.tp=0 must be at least 1"]),
    ("grpo", ["video.cache_gpu_gib=-1"], ["video.cache_gpu_gib=-1 must be at least 0"]),
    ("cache-embeddings", [], ["megalong cache-embeddings needs a folder to fill: set video.cache_dir"]),
    ("cache-embeddings", ["video.cache_dir=d", "data.train=???"], ["data.train has no value; cache-embeddings needs"]),
    (
        "eval",
        ["video.cache_dir=d", "model.train_projector=true"],
        ["embeddings that model.train_projector=true makes stale; set video.cache_dir=null"],
    ),
    ("sft", ["video.cache_dir=d", "video.cache_embeddings=false"], ["video.cache_dir=d needs video.cache_embeddings"]),
    ("grpo", ["video.cache_dir=d", "mr_sp.mode=none"], ["video.cache_dir=d is not read with mr_sp.mode=none"]),
    ("sft", ["video.cache_dir_gib=0"], ["video.cache_dir_gib=0 must be more than 0"]),
    ("sft", ["video.frame_cache_gib=0"], ["video.frame_cache_gib=0 must be more than 0"]),
    ("eval", ["video.max_frame_pixels=-1"], ["video.max_frame_pixels=-1 must be at least 0"]),
]


@pytest.mark.parametrize(("task", "overrides", "expected"), CASES, ids=[" ".join(case[1]) for case in CASES])
def test_a_contradiction_is_named(
    recipe: Path, model: ModelShape, task: Task, overrides: list[str], expected: list[str]
) -> None:
    found = problems(load_config(recipe, overrides), task=task, world_size=8, model=model)
    assert len(found) == len(expected), found
    for text in expected:
        assert sum(text in problem for problem in found) == 1, (text, found)


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("sft", ["rollout.group_size=1", "rollout.temperature=0", "grpo.updates_per_batch=3", "reward.weights={}"]),
        ("eval", ["data.train=???", "optimizer.lr=-1", "sft.batch_size=33", "model.train_llm=false"]),
        ("grpo", ["grpo.advantage=reinforce_pp", "rollout.group_size=1"]),
        ("grpo", ["grpo.kl_coef=0", "eval.manifest=null"]),
        ("grpo", ["optimizer.warmup_steps=200", "grpo.updates_per_batch=2"]),  # 200 optimizer steps
        ("grpo", ["rollout.steps_off_policy=1", "grpo.tis_cap=2", "grpo.updates_per_batch=2"]),
        # They sample and wait; what else the recipe of a training says does not matter.
        ("eval", ["rollout.steps_off_policy=1", "rollout.engine=embedded"]),
        ("check-sync", ["rollout.steps_off_policy=1", "rollout.placement=colocated"]),
        ("grpo", ["rollout.engine_tp=3", "rollout.engine=embedded"]),
        ("grpo", ["rollout.engine=vllm", "rollout.prefill_tokens=256"]),
        # An evaluation reads no log-probabilities.
        ("eval", ["rollout.engine=vllm", "rollout.temperature=0.7", "rollout.top_p=0.9", "rollout.engine_tp=2"]),
        ("eval", ["model.attention=te"]),
        ("sft", ["seed=4294967295"]),
        ("grpo", ["seed=0", "data.seed=0"]),
        ("sft", ["model.attention=te", "mr_sp.mode=none", "eval.likelihood=true"]),  # which evaluates nothing
        ("grpo", ["parallel.cp=2", "grpo.batch_size=33"]),  # one replica
        # A process of it is its own replica, and nothing is trained.
        ("cache-embeddings", ["video.cache_dir=d", "parallel.tp=3", "optimizer.lr=-1", "eval.num_samples=4"]),
    ],
)
def test_settings_a_task_does_not_read_or_that_agree_are_left_alone(
    recipe: Path, model: ModelShape, task: Task, overrides: list[str]
) -> None:
    assert problems(load_config(recipe, overrides), task=task, world_size=8, model=model) == ()


def test_all_problems_come_in_one_error(recipe: Path, model: ModelShape) -> None:
    config = load_config(recipe, ["rollout.temperature=0", "grpo.kl_coef=-1", "eval.every=1", "eval.manifest=null"])
    with pytest.raises(ConfigError) as caught:
        validate(config, task="grpo", world_size=8, model=model)
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith("3 problems in the configuration:\n- grpo.kl_coef=-1 must be at least 0\n- ")
