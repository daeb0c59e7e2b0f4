"""How a run that cannot go on ends: one message that says which rank, which phase, what happened and what to change."""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megalong.config.errors import ConfigError
from megalong.config.load import with_gpus
from megalong.config.model_shape import ModelShape
from megalong.config.plan import GIB, plan
from megalong.config.plan_fit import host_shortages, shortages
from megalong.config.tree import AttentionKernel, Dtype, Recompute, RunConfig
from megalong.config.validate import Task
from megalong.data.manifest import ManifestError
from megalong.data.video_process import DecoderProcessError
from megalong.engine.trainer import TooManySkippedStepsError
from megalong.metrics import PhaseTimer
from megalong.models.errors import CheckpointError
from megalong.rollout.engine import RolloutEngineError, WeightSyncError
from megalong.vision.disk import EmbeddingCacheError
from megalong.vision.store import StoreFullError
from megalong.watchdog import Watchdog

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 2.0
"""How long a rank that lost another one waits before it ends: torchrun looks every 0.1 s, and reports the rank that it
sees ending first as the cause."""

GLOO = ("gloo/transport", "Application timeout caused pair closure", "Connection closed by peer")
NCCL = ("ncclRemoteError", "remote process exit", "imed out", "imeout", "aborted")
"""Texts by which a collective says that it is another rank that failed: gloo has no exception type of its own, NCCL one
for all errors."""


MISTAKES = (
    ConfigError, ManifestError, CheckpointError, EmbeddingCacheError, StoreFullError, FileNotFoundError,
    TooManySkippedStepsError,
)  # fmt: skip
"""Errors about what the user gave, and of what came of it: their message says it all."""
BESIDE = (RolloutEngineError, WeightSyncError, DecoderProcessError)
"""Errors of the processes beside this one: to their message belongs whose they are."""


class RunFailedError(RuntimeError):
    """The run cannot go on; the message is complete, so no traceback is shown."""


class OtherRankError(RunFailedError):
    """The run cannot go on because another rank ended or does not answer."""


@contextmanager
def failures_reported(config: RunConfig, timer: PhaseTimer, *, trains: bool = True) -> Iterator[None]:
    """Around a whole run: a watchdog over its phases, and errors of the machine as RunFailedError.

    Errors reach torchrun's summary too, except when another rank is the cause. Every other error passes through, with
    rank and phase as a note. trains: whether it holds optimizer states.
    """
    place = f"rank {os.environ.get('RANK', '0')}"
    faulthandler.enable(file=sys.__stderr__)  # stacks at a segmentation fault or an abort, NCCL's included

    def report_stuck(what: str) -> None:
        error = RunFailedError(
            f"{place}: {what}. More than parallel.timeout_minutes={config.parallel.timeout_minutes:g} counts as stuck: "
            "the stacks of all ranks show which one waits for what; raise the limit if the phase is only slow"
        )
        sys.stderr.write(f"megalong: {error}\n")
        sys.stderr.flush()
        _tell_torchrun(error)

    limit = config.parallel.timeout_minutes * 60
    stacks = Path(config.logger.run_dir) / f"stuck_rank{os.environ.get('RANK', '0')}.txt"
    watchdog = Watchdog(timer, limit_seconds=limit, stacks_file=stacks, report=report_stuck) if limit > 0 else None
    try:
        yield
    except Exception as error:
        where = f"{place}, phase {timer.phase!r}"
        failure = explain(error, place=where, phase=timer.phase, config=config, trains=trains)
        if failure is None:
            if isinstance(error, (*MISTAKES, RunFailedError)):
                error = error.with_traceback(None)
            else:
                error.add_note(f"{place}, phase {timer.phase!r}")
            get_error_handler().record_exception(error)
            raise
        if isinstance(failure, OtherRankError):
            time.sleep(PAUSE_SECONDS)
        else:
            _tell_torchrun(failure)
        raise failure from None
    finally:
        if watchdog is not None:
            watchdog.close()


def explain(
    error: BaseException, *, place: str, phase: str, config: RunConfig, trains: bool = True
) -> RunFailedError | None:
    """The message for an error that is not a mistake in the program; None for those that need their traceback."""
    if isinstance(error, BESIDE):
        return RunFailedError(f"{place}: {error}")
    causes = list(_chain(error))
    for cause in causes:
        first_line = (str(cause).splitlines() or [""])[0]
        if isinstance(cause, torch.OutOfMemoryError):
            return RunFailedError(
                f"{place}: the GPU is out of memory; {gpu_memory()}; {first_line[:200]} To change: "
                f"{memory_advice(phase, config, trains=trains)}; `megalong plan` says what takes how much"
            )
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(cause):
            return RunFailedError(
                f"{place}: out of host memory ({first_line[:200]}). To change: lower video.cache_gib="
                f"{config.video.cache_gib:g}, video.frame_cache_gib={config.video.frame_cache_gib:g}, "
                f"data.decode_workers={config.data.decode_workers} or data.pack_tokens={config.data.pack_tokens}; "
                "model.offload_activations and optimizer.offload need host memory, too"
            )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or f"where metrics and checkpoints go, logger.run_dir={config.logger.run_dir}"
        return RunFailedError(
            f"{place}: {error.strerror}: {where}; free space there and start again: training continues from its newest "
            "checkpoint"
        )
    for cause in causes:
        if is_of_another_rank(cause):
            first_line = (str(cause).splitlines() or [""])[0]
            return OtherRankError(
                f"{place}: another rank ended or does not answer; the first error above, or in the other nodes' logs, "
                f"says why (killed without a message: often the host's memory). Here: {first_line[:200]}"
            )
    return None


def is_of_another_rank(error: BaseException) -> bool:
    """Whether a collective, or the store that processes meet at, failed because of another process."""
    text = str(error)
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    if isinstance(error, dist.DistBackendError):
        return any(part in text for part in (*GLOO, *NCCL))
    return isinstance(error, RuntimeError) and any(part in text for part in GLOO)


def gpu_memory() -> str:
    """What the GPU's memory is used for, in words."""
    if not torch.cuda.is_available():
        return "no GPU here to ask"
    free, total = torch.cuda.mem_get_info()
    return (
        f"of {total / GIB:.1f} GiB, tensors take {torch.cuda.memory_allocated() / GIB:.1f} (at most "
        f"{torch.cuda.max_memory_allocated() / GIB:.1f} so far), PyTorch holds "
        f"{torch.cuda.memory_reserved() / GIB:.1f}, {free / GIB:.1f} are free"
    )


def memory_advice(phase: str, config: RunConfig, *, trains: bool = True) -> str:
    """Settings that lower the GPU memory of a phase and are not at their end yet."""
    model, parallel = config.model, config.parallel
    spread = f"more GPUs per replica (parallel.tp={parallel.tp}, cp={parallel.cp}, pp={parallel.pp})"
    offload = ["optimizer.offload=true"] if trains and not config.optimizer.offload else []
    if phase == "rollout":
        lower = (
            f"lower rollout.batch_prompts={config.rollout.batch_prompts} (embedded engine), rollout.memory_share "
            "(vllm) or data.max_response_tokens"
        )
        return "; ".join([lower, *offload, spread])
    if phase in ("data", "eval"):
        return (
            f"lower video.tower_batch_frames={config.video.tower_batch_frames}, rollout.batch_prompts="
            f"{config.rollout.batch_prompts} or video.num_frames; {spread}"
        )
    if phase not in ("train", "logprob"):
        return ", ".join([*offload, f"{spread}, or end other programs on this GPU"])
    changes = []  # cheapest first
    if model.attention is AttentionKernel.plain:
        changes.append("model.attention=auto")
    if model.dtype is Dtype.float32:
        changes.append("model.dtype=bfloat16")
    if model.recompute is Recompute.none:
        changes.append("model.recompute=keep_attention")
    if model.recompute is not Recompute.none and not model.offload_activations:
        changes.append("model.offload_activations=true")
    if parallel.tp > 1 and not parallel.sequence_parallel:
        changes.append("parallel.sequence_parallel=true")
    if not config.rollout.sleep:
        changes.append("rollout.sleep=true")
    changes.append(f"raise model.mlp_chunks={model.mlp_chunks}" if model.mlp_chunks else "set model.mlp_chunks=16")
    changes += [*offload, spread]
    if model.recompute is not Recompute.full:
        changes.append(f"model.recompute=full (now {model.recompute.name})")
    return ", ".join([*changes, f"lower data.pack_tokens={config.data.pack_tokens}"])


def warn_of_memory(config: RunConfig, task: Task, shape: ModelShape, *, world_size: int, card: int) -> None:
    """Say before the weights are read what GPUs of `card` bytes are not expected to have room for.

    No error: what `megalong plan` says is an upper estimate, a tenth too high, with activations in host memory a
    quarter, and samples may share a video.
    """
    planned = plan(with_gpus(config, world_size), task, shape)
    for what in host_shortages(planned):
        logger.warning("this run may not fit, unless samples share videos (`megalong plan` has its parts): %s", what)
    for what in shortages(planned, card=card):
        logger.warning(
            "this run may not fit, an upper estimate says (`megalong plan` has its parts): %s. To change: %s",
            what,
            memory_advice("train", config),
        )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from or while handling, outermost first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def _tell_torchrun(error: RunFailedError) -> None:
    """The message alone, without frames, as this rank's error in torchrun's summary."""
    try:
        raise error.with_traceback(None) from None
    except RunFailedError:
        get_error_handler().record_exception(error)
