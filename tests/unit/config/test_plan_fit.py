"""shortages: what a run on given GPUs is told before its weights are read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from megalong.config.load import load_config
from megalong.config.model_shape import ModelShape
from megalong.config.plan import GIB, plan
from megalong.config.plan_fit import host_shortages, shortages
from megalong.failures import warn_of_memory

H200 = 150_754_820_096
RECIPE = """
model: {path: no/such/model}
logger: {run_dir: r}
data: {train: t.jsonl, max_prompt_tokens: 264000, max_response_tokens: 512, pack_tokens: 268096}
video: {num_frames: 1024}
grpo: {batch_size: 1}
rollout: {engine: vllm, group_size: 8}
"""
COLOCATED = ("gpus=4", "parallel.cp=4", "rollout.engine_tp=4", "rollout.placement=colocated")
AWAKE = (*COLOCATED, "rollout.sleep=false", "rollout.memory_share=0.12")
TP2 = ("gpus=2", "parallel.tp=2", "parallel.sequence_parallel=true", "rollout.engine_tp=2")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [  # the first four were run on H200s: those that are told of ran out of memory
        (AWAKE, "no room beside the trainer's peak"),
        ((*AWAKE, "video.num_frames=512", "data.pack_tokens=136448"), ""),
        ((*TP2, "rollout.placement=disaggregated"), "a training process takes up to 148."),
        ((*TP2, "rollout.placement=disaggregated", "video.num_frames=512", "data.pack_tokens=136448"), ""),
        ((*AWAKE, "model.offload_activations=true"), ""),
        ((*COLOCATED, "rollout.memory_share=0.3"), ""),  # asleep while the trainer works
    ],
)
def test_what_1024_frames_of_a_7b_have_no_room_for(
    recipe: Path, shape: ModelShape, overrides: tuple[str, ...], said: str
) -> None:
    found = list(shortages(plan(load_config(recipe, overrides), "grpo", shape), card=H200))
    assert len(found) == bool(said)
    assert all(said in text for text in found)


def test_either_placement_will_do(recipe: Path, shape: ModelShape) -> None:
    config = load_config(recipe, ("gpus=4", "parallel.cp=4", "rollout.engine_tp=4", "rollout.sleep=false"))
    planned = plan(config, "grpo", shape)
    assert len(planned.engine.shares) == 2
    assert not list(shortages(planned, card=H200))
    assert len(list(shortages(planned, card=planned.memory_total))) == 0  # an engine elsewhere has such a GPU alone
    assert len(list(shortages(planned, card=planned.memory_total - 1))) == 1
    assert "beside" in next(shortages(plan(load_config(recipe, AWAKE), "grpo", shape), card=130 * GIB))


def test_stores_that_a_step_s_videos_have_no_room_for(
    recipe: Path, shape: ModelShape, caplog: pytest.LogCaptureFixture
) -> None:
    """64 videos of 1,024 frames on four ranks: 448 MiB of embeddings, in 512 MiB of pinned memory, and 147 MiB of
    frames each."""
    one = ("gpus=4", "parallel.cp=4", "rollout.engine_tp=4")
    assert not list(host_shortages(plan(load_config(recipe, one), "grpo", shape)))
    config = load_config(recipe, (*one, "grpo.batch_size=64", "video.frame_cache_gib=0.001"))
    embeddings, frames = host_shortages(plan(config, "grpo", shape))
    assert "up to 32.000 GiB of a process's store of embeddings, which has 16.000; raise video.cache_gib" in embeddings
    assert "a video takes up to 0.144 GiB of a process's store of decoded frames, which has 0.001; raise v" in frames
    anew = load_config(recipe, (*one, "grpo.batch_size=64", "video.frame_cache_gib=1", "video.cache_embeddings=false"))
    (all_frames,) = host_shortages(plan(anew, "grpo", shape))
    assert "a step's videos take up to 9.188 GiB of a process's store of decoded frames, which has 1" in all_frames
    with caplog.at_level(logging.WARNING):
        warn_of_memory(config, "grpo", shape, world_size=4, card=H200)
    assert [record.args for record in caplog.records] == [(embeddings,), (frames,)]
    room = (*one, "grpo.batch_size=64", "video.cache_gib=16", "video.cache_gpu_gib=16")
    assert not list(host_shortages(plan(load_config(recipe, room), "grpo", shape)))


def test_a_run_says_it_with_what_to_change(recipe: Path, shape: ModelShape, caplog: pytest.LogCaptureFixture) -> None:
    by_hand = (*TP2, "rollout.placement=disaggregated", "gpus=0")  # torchrun's number of processes is what counts
    with caplog.at_level(logging.WARNING):
        warn_of_memory(load_config(recipe, by_hand), "grpo", shape, world_size=2, card=H200)
        (message,) = [record.getMessage() for record in caplog.records]
        caplog.clear()
        offloads = load_config(recipe, (*by_hand, "model.offload_activations=true"))
        warn_of_memory(offloads, "grpo", shape, world_size=2, card=H200)
    assert "takes up to 148." in message
    assert "of a GPU's 140.4" in message
    assert "To change: model.offload_activations=true" in message
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        warn_of_memory(load_config(recipe, (*by_hand, "model.attention=plain")), "grpo", shape, world_size=2, card=H200)
    assert "To change: model.attention=auto, model.offload_activations=true" in caplog.records[0].getMessage()
