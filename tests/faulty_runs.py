"""What runs inside the processes of the restart tests: train, with something going wrong at a chosen moment."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import DemoWorld
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor

from megalong import engines, evaluating, run, sft
from megalong.__main__ import main
from megalong.data import video_process
from megalong.data.video_decoder import FrameDecoder
from megalong.data.video_process import ProcessFrameDecoder
from megalong.engine import checkpoint
from megalong.engine.trainer import LossOf, TooManySkippedStepsError, Trainer
from megalong.grpo import train_grpo
from megalong.records import StepStats, TokenBatch
from megalong.rollout import vllm_engine
from megalong.sft import train_sft
from megalong.vision import encode

CRASHED = 17


def train(demo: DemoWorld, run_dir: Path, task: str, overrides: tuple[str, ...], *faults: str) -> None:
    """Run a task to its end, or to where a fault ends it. `faults`: names of functions below and `@step`."""
    run_task = train_sft if task == "sft" else train_grpo
    with_faults(lambda: run_task(demo.config(run_dir, *overrides, task=task)), *faults)


@dataclass(kw_only=True)
class Watched:
    """What a rank saw of a run: its steps, a checksum of the exported weights after each, and the error at its end."""

    stats: list[StepStats] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    error: str = ""


def command_line(demo: DemoWorld, run_dir: Path, task: str, overrides: tuple[str, ...], *faults: str) -> None:
    """The same as a command; ends this process with the exit code."""
    argv = [task, str(demo.recipe), *demo.overrides(run_dir, task=task), *overrides]
    code = with_faults(lambda: main(argv), *faults)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def with_faults(action: Callable[[], Any], *faults: str) -> Any:
    with ExitStack() as broken:
        for fault in faults:
            name, _, step = fault.partition("@")
            broken.enter_context(FAULTS[name](int(step or 0)))
        return action()


def train_and_watch(demo: DemoWorld, run_dir: Path, overrides: tuple[str, ...], *faults: str) -> Watched:
    """SFT with faults; its own error does not end the process."""
    watched, train_step = Watched(), Trainer.train_step

    def step_and_watch(trainer: Trainer, *args: object, **settings: object) -> StepStats:
        stats = train_step(trainer, *args, **settings)
        watched.stats.append(stats)
        watched.weights.append(sum(int(bucket.checksums_n.sum()) for bucket in trainer.export_weights()))
        return stats

    with mock.patch.object(Trainer, "train_step", step_and_watch):
        try:
            train(demo, run_dir, "sft", overrides, "no_checkpoints", *faults)
        except TooManySkippedStepsError as error:
            watched.error = str(error)
    parallel_state.destroy_model_parallel()
    return watched


def watch_all(demo: DemoWorld, folder: Path, parallel: tuple[str, ...], cases: dict[str, tuple]) -> dict[str, Watched]:
    """Each case (overrides, faults) under one layout, in the same processes."""
    return {
        name: train_and_watch(demo, folder / name, (*overrides, *parallel), *faults)
        for name, (overrides, faults) in cases.items()
    }


@contextmanager
def between_backward_and_update(step: int, action: object) -> Iterator[None]:
    finish_gradients = Trainer._finish_gradients

    def finish(trainer: Trainer) -> None:
        finish_gradients(trainer)
        if trainer.step == step - 1:
            action()

    with mock.patch.object(Trainer, "_finish_gradients", finish):
        yield


def crash_in_step(step: int) -> object:
    return between_backward_and_update(step, lambda: os._exit(CRASHED))


def sigterm_in_step(step: int) -> object:
    return between_backward_and_update(step, lambda: os.kill(os.getpid(), signal.SIGTERM))


@contextmanager
def sigterm_in_save(step: int) -> Iterator[None]:
    """On the last rank alone, while it writes the checkpoint of step."""
    save = dist_checkpointing.save

    def write(state: dict, path: str) -> None:
        if _is_of(path, step) and _is_last_rank():
            os.kill(os.getpid(), signal.SIGTERM)
        save(state, path)

    with mock.patch.object(dist_checkpointing, "save", write):
        yield


def sigterm_in_evaluation(step: int) -> object:
    """After `step` steps, on the last rank alone, in the second batch of questions."""
    return _in_evaluation(step, lambda: _is_last_rank() and os.kill(os.getpid(), signal.SIGTERM))


def crash_in_evaluation(step: int) -> object:
    """After `step` steps, in the second batch of questions."""
    return _in_evaluation(step, lambda: os._exit(CRASHED))


@contextmanager
def _in_evaluation(step: int, action: Callable[[], Any]) -> Iterator[None]:
    """What happens in the second batch of questions of the evaluation after `step` steps."""
    answer_batch, batches = evaluating._answer_batch, []

    def answer(this: run.Run, *args: object, **settings: object) -> None:
        batches.append(this.trainer.step)
        if batches[-1] == step and batches.count(step) == 2:
            action()
        answer_batch(this, *args, **settings)

    with mock.patch.object(evaluating, "_answer_batch", answer):
        yield


def kill_last_rank_in_step(step: int) -> object:
    """As the kernel does it when the host is out of memory; where torchrun restarts the processes, only at first."""

    def kill() -> None:
        if _is_last_rank() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    return between_backward_and_update(step, kill)


def hang_last_rank_in_step(step: int) -> object:
    return between_backward_and_update(step, lambda: _is_last_rank() and hang())


def hang() -> None:
    time.sleep(600)


def gpu_out_of_memory_in_step(step: int) -> object:
    """On the last rank, as the caching allocator says it."""

    def fail() -> None:
        if _is_last_rank():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity")

    return between_backward_and_update(step, fail)


def real_gpu_out_of_memory_in_step(step: int) -> object:
    """On the last rank, more than any GPU has."""
    return between_backward_and_update(step, lambda: _is_last_rank() and torch.empty(1 << 50, device="cuda"))


def host_out_of_memory_in_step(step: int) -> object:
    """On the last rank, more than any machine has."""
    return between_backward_and_update(step, lambda: _is_last_rank() and torch.empty(1 << 50))


def disk_full_in_step(step: int) -> object:
    """From then on the last rank can write no file of more than 4 KiB."""

    def fill() -> None:
        if _is_last_rank():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    return between_backward_and_update(step, fill)


def _is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


@contextmanager
def engine_dies(_: int) -> Iterator[None]:
    """vLLM is installed, it seems, and its process ends in the first generate(). The last rank drives none."""
    settings = engines._settings
    with (
        mock.patch.object(engines, "_settings", lambda *of, **run: None if _is_last_rank() else settings(*of, **run)),
        mock.patch.object(sys, "path", [*sys.path, str(Path(__file__).parent / "unit" / "rollout")]),
        mock.patch.dict(os.environ, FAKE_ENGINE="exit", FAKE_METHOD="generate"),
        mock.patch.object(vllm_engine, "SERVER", "fake_server"),
        mock.patch.object(engines, "_takes_vllm", return_value=True),
    ):
        yield


@contextmanager
def decoding_process_dies(_: int) -> Iterator[None]:
    """The last rank decodes in a process of its own, as with a GPU, which dies with its first frames on their way."""
    on_cpu = encode.open_decoder

    def open_decoder(*of: object) -> FrameDecoder:
        return ProcessFrameDecoder("dying later", settings="nvcodec") if _is_last_rank() else on_cpu(*of)

    with (
        mock.patch.object(sys, "path", [*sys.path, str(Path(__file__).parent / "unit" / "data")]),
        mock.patch.object(video_process, "SERVER", "fake_decoder"),
        mock.patch.object(encode, "open_decoder", open_decoder),
    ):
        yield


def crash_before_writing(step: int) -> object:
    return _crash_at(dist_checkpointing, "save", lambda _, path: _is_of(path, step))


@contextmanager
def crash_half_written(step: int) -> Iterator[None]:
    save = dist_checkpointing.save

    def write_half(state: dict, path: str) -> None:
        save(state, path)
        if _is_of(path, step):
            (Path(path) / "metadata.json").unlink()
            shard = max(Path(path).glob("*.distcp"))
            os.truncate(shard, shard.stat().st_size // 2)
            os._exit(CRASHED)

    with mock.patch.object(dist_checkpointing, "save", write_half):
        yield


def crash_before_naming(step: int) -> object:
    return _crash_at(checkpoint, "_flush", lambda path: _is_of(path, step))


def crash_while_deleting(step: int) -> object:
    """Deletes one file of step's folder and is gone."""

    def torn(path: Path) -> bool:
        if _is_of(path, step):
            (path / "metadata.json").unlink()
        return _is_of(path, step)

    return _crash_at(shutil, "rmtree", torn)


@contextmanager
def busy_folders(_: int) -> Iterator[None]:
    """No folder of a checkpoint can be deleted: as on NFS, where a file that is open somewhere stays, renamed."""
    rmtree = shutil.rmtree

    def refuse(path: str | Path, **settings: object) -> None:
        if Path(path).name.startswith("step_"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmtree(path, **settings)

    with mock.patch.object(shutil, "rmtree", refuse):
        yield


@contextmanager
def old_view_of_the_disk(step: int) -> Iterator[None]:
    """On the last rank alone, as an NFS client caches it: the checkpoint of step is not there yet."""
    exists = Path.exists

    def looked_earlier(path: Path, **settings: bool) -> bool:
        return exists(path, **settings) and not (path.name == f"step_{step:08d}" and _is_last_rank())

    with mock.patch.object(Path, "exists", looked_earlier):
        yield


def no_checkpoints(_: int) -> object:
    """Nothing is saved: for runs whose checkpoints nobody reads."""
    return mock.patch.object(run.Run, "save")


@contextmanager
def poisoned_loss(step: int) -> Iterator[None]:
    """The loss of one pack of step is not a number, on the last rank alone."""
    token_mean_loss = sft.token_mean_loss

    def loss(this: run.Run, packs: list[TokenBatch]) -> LossOf:
        honest = token_mean_loss(this, packs)
        if this.trainer.step != step - 1 or this.layout.rank != this.layout.world_size - 1:
            return honest

        def poisoned(index: int, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, sums = honest(index, logprobs_R, entropy_R)
            return value * (float("nan") if index == len(packs) - 1 else 1.0), sums

        return poisoned

    with mock.patch.object(sft, "token_mean_loss", loss):
        yield


@contextmanager
def poisoned_gradient(step: int) -> Iterator[None]:
    """One element of one gradient is infinite in step, on the last rank alone; the loss is as it should be."""
    finish_gradients = Trainer._finish_gradients

    def finish(trainer: Trainer) -> None:
        finish_gradients(trainer)
        if trainer.step == step - 1 and trainer.layout.rank == trainer.layout.world_size - 1:
            # A weight that every tensor-parallel rank holds whole: the norm counts another rank's copy.
            dict(trainer.trainable)["llm.decoder.final_layernorm.weight"].main_grad[3] = float("inf")

    with mock.patch.object(Trainer, "_finish_gradients", finish):
        yield


FAULTS = {
    function.__name__: function
    for function in (
        crash_in_step,
        sigterm_in_step,
        sigterm_in_save,
        sigterm_in_evaluation,
        crash_in_evaluation,
        kill_last_rank_in_step,
        hang_last_rank_in_step,
        gpu_out_of_memory_in_step,
        real_gpu_out_of_memory_in_step,
        host_out_of_memory_in_step,
        disk_full_in_step,
        engine_dies,
        decoding_process_dies,
        crash_before_writing,
        crash_half_written,
        crash_before_naming,
        crash_while_deleting,
        busy_folders,
        old_view_of_the_disk,
        no_checkpoints,
        poisoned_loss,
        poisoned_gradient,
    )
}


def _is_of(path: str | Path, step: int) -> bool:
    return Path(path).name.startswith(f"step_{step:08d}")


@contextmanager
def _crash_at(place: object, name: str, due: object) -> Iterator[None]:
    function = getattr(place, name)

    def crash_or_call(*args: object, **settings: object) -> object:
        if due(*args):
            os._exit(CRASHED)
        return function(*args, **settings)

    with mock.patch.object(place, name, crash_or_call):
        yield
