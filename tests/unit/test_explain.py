"""Which errors get a message of their own, and what it says; all others keep their traceback."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist

from megalong.config.tree import Recompute, RunConfig
from megalong.failures import OtherRankError, explain, memory_advice
from megalong.rollout.engine import RolloutEngineError

OF_ANOTHER_RANK = (
    RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
    RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error, NCCL version 2.28"),
    dist.DistNetworkError("The client socket has timed out after 60000ms while trying to connect to (node1, 29500)."),
    dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0/1"),
)
OWN = (ValueError("wrong"), RuntimeError("shapes differ"), dist.DistBackendError("NCCL error: invalid usage"))


@pytest.mark.parametrize("error", OF_ANOTHER_RANK, ids=str)
def test_errors_of_another_rank(error: Exception) -> None:
    failure = explain(error, place="rank 3, phase 'sync'", phase="sync", config=RunConfig())
    assert type(failure) is OtherRankError
    assert str(failure).startswith("rank 3, phase 'sync': another rank ended or does not answer")
    assert str(failure).endswith(f"Here: {error}")


@pytest.mark.parametrize("error", OWN, ids=str)
def test_errors_of_the_program_keep_their_traceback(error: Exception) -> None:
    assert explain(error, place="rank 0", phase="train", config=RunConfig()) is None


def test_a_full_disk_is_no_mistake_in_the_program() -> None:
    """What is written without a name, too; those whose own message says more keep it."""
    config = RunConfig()
    config.logger.run_dir = "runs/one"
    metrics = "where metrics and checkpoints go, logger.run_dir=runs/one"
    for where, file in ((metrics, ()), ("/dev/shm/engine/config.json", ("/dev/shm/engine/config.json",))):
        error = OSError(errno.ENOSPC, "No space left on device", *file)
        text = str(explain(error, place="rank 0, phase 'train'", phase="train", config=config))
        assert text.startswith(f"rank 0, phase 'train': No space left on device: {where}; free space there and start")
        own = RolloutEngineError("give the container more shared memory")
        own.__cause__ = error
        assert str(explain(own, place="rank 0", phase="rollout", config=config)) == f"rank 0: {own}"


def test_the_cause_counts_and_memory_before_the_collective_it_broke() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")
        except torch.OutOfMemoryError as error:
            raise OF_ANOTHER_RANK[0] from error
    except RuntimeError as error:
        failure = explain(error, place="rank 0, phase 'data'", phase="data", config=RunConfig())
    assert "the GPU is out of memory" in str(failure)
    assert "Tried to allocate 1 GiB. To change: lower video.tower_batch_frames=64" in str(failure)


def test_advice_names_only_what_can_still_be_changed() -> None:
    config = RunConfig()
    first = memory_advice("train", config)
    assert "data.pack_tokens=131072" in first
    assert "model.recompute=full (now keep_attention)" in first
    assert first.startswith("model.offload_activations=true")  # what costs least
    assert first.endswith("data.pack_tokens=131072")
    assert "optimizer.offload=true" in first
    for phase in ("start", "rollout"):
        assert "optimizer.offload=true" in memory_advice(phase, config)
        assert "optimizer" not in memory_advice(phase, config, trains=False)  # which has no states
    config.model.recompute, config.model.offload_activations, config.model.mlp_chunks = Recompute.full, True, 8
    config.optimizer.offload = True
    second = memory_advice("train", config)
    assert "recompute" not in second
    assert "offload" not in second
    assert "raise model.mlp_chunks=8" in second
    assert "rollout.batch_prompts=8" in memory_advice("rollout", config)
    assert "offload" not in memory_advice("rollout", config)
    assert "data.pack_tokens" not in memory_advice("start", config)
    assert "offload" not in memory_advice("start", config)
