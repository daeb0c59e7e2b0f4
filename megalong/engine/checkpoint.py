"""Training checkpoints: megatron dist_checkpointing, complete or absent, loadable at any TP, PP and DP split."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megalong.engine.trainer import Trainer
from megalong.models.errors import CheckpointError
from megalong.models.policy import sharded_encoder
from megalong.parallel.collectives import broadcast_object

logger = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step_(\d{8})")
_LOAD_ERRORS = (
    OSError, EOFError, RuntimeError, LookupError, ValueError, AttributeError, pickle.UnpicklingError,
    CheckpointException, CheckpointingException,
)  # fmt: skip
"""Of damaged files; megatron-core 0.16 trips over an absent common.pt by an AttributeError, 0.19 writes none."""
_STATE = ("step", "num_updates", "skipped_in_a_row", "num_skipped")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A folder gets its name only once everything in it is on disk."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a training checkpoint's folder; 0 for a folder of another name."""
    name = _COMPLETE.fullmatch(checkpoint.resolve().name)
    return int(name[1]) if name else 0


def save_checkpoint(folder: Path, trainer: Trainer, *, extra: dict[str, Any], keep: int) -> Path:
    """Write step_<n> under `folder` (collective) and delete all but the `keep` newest complete ones.

    A kill at any moment leaves the older checkpoints as they were and at most a *.partial folder; so does a disk that
    is full, which raises CheckpointError.
    """
    final = folder / f"step_{trainer.step:08d}"
    partial = folder / f"{final.name}.partial"
    found = _make_room(final, partial) if trainer.layout.is_main else None
    # Of a shared disk the other ranks may have an older view, and would wait in the save for those that return.
    is_there, obstacle = broadcast_object(found, source=0, group=trainer.layout.world)
    if obstacle:
        raise CheckpointError(obstacle)
    if is_there:
        return final
    try:
        dist_checkpointing.save(_sharded_state(trainer, extra), str(partial))
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(_not_written(partial, error)) from error
    dist.barrier()
    if trainer.layout.is_main:
        _flush(partial)
        os.rename(partial, final)
        _flush_folder(folder)
        for old in complete_checkpoints(folder)[:-keep] if keep > 0 else []:
            with _only_warned(old):
                _delete(old)
    dist.barrier()
    return final


def _make_room(final: Path, partial: Path) -> tuple[bool, str]:
    """Whether the checkpoint is there already, and why the folder to write it into cannot be made when it is not."""
    delete_partial(final.parent)
    if final.exists():
        return True, ""
    try:
        if partial.exists():  # once more, for the reason: this one is in the way
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        return False, (
            f"{partial}: cannot be made anew for this save ({_causes(error)}). Older checkpoints are as they were: "
            "delete it, end what has a file in it open or free space, and start again to continue"
        )
    return False, ""


def delete_partial(folder: Path) -> None:
    """Delete what saves that failed or were killed have left: it may be what fills the disk."""
    for leftover in folder.glob("*.partial"):
        with _only_warned(leftover):
            shutil.rmtree(leftover)


@contextmanager
def _only_warned(folder: Path) -> Iterator[None]:
    """A folder that is not deleted ends no run: a file of it may be open, which NFS keeps, or still be written."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: cannot be deleted (%s); the next save tries again", folder, error)


def newest_checkpoint(path: Path) -> Path:
    """`path` itself when it is a checkpoint, or the newest complete one in it."""
    if (path / "metadata.json").is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        raise CheckpointError(f"model.init_from={no_checkpoint(path)}")
    return found[-1]


def no_checkpoint(path: Path) -> str:
    """What is said of a path without a checkpoint, which may be the run folder above them."""
    below = f"; {path}/checkpoints is there: try that" if (path / "checkpoints").is_dir() else ""
    return f"{path}: neither a megatron checkpoint nor a folder with step_<n> checkpoints{below}"


def load_checkpoint(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Continue from a checkpoint of save_checkpoint, at any TP, PP and DP split (collective). Returns its `extra`."""
    _check(path)
    state = _load(_sharded_state(trainer, {}), path)
    _load_model(trainer, state["model"])
    trainer.optimizer.load_sharded_state(state.get("optimizer", {}), num_updates=state["trainer"]["num_updates"])
    for name in _STATE:
        setattr(trainer, name, state["trainer"][name])
    torch.set_rng_state(state["rng"])
    return state["extra"]


def read_extra(path: Path) -> dict[str, Any]:
    """The `extra` of a checkpoint of save_checkpoint, on any process."""
    _check(path)
    with _named(path):
        return dist_checkpointing.load_common_state_dict(str(path))["extra"]


def load_weights(path: Path, trainer: Trainer) -> None:
    """Take only the model's weights from a checkpoint of another run (collective), e.g. SFT's before GRPO."""
    _check(path)
    state = _load({"model": _model_state(trainer)}, path)
    _load_model(trainer, state["model"])
    if trainer.optimizer is not None:
        trainer.optimizer.refresh_masters()


def load_encoder_weights(path: Path, encoder: nn.Module) -> None:
    """Take only the vision side from a checkpoint of another run (collective), for a process without the LLM."""
    _check(path)
    state = _load({"model": sharded_encoder(encoder)}, path)["model"]
    encoder.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in state.items()})


def _check(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if not (path / "metadata.json").is_file():
        raise CheckpointError(f"{path}: not a megatron checkpoint (no metadata.json), or one cut short")


def _load(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    with _named(path):
        return dist_checkpointing.load(sharded, str(path))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What megatron and torch raise becomes a CheckpointError of that checkpoint."""
    try:
        yield
    except torch.OutOfMemoryError:  # it says itself what it is, and what to change
        raise
    except _LOAD_ERRORS as error:
        raise CheckpointError(
            f"{path}: cannot be loaded into this model ({_causes(error)}); it is damaged, or of another model than "
            "model.path"
        ) from error


def _causes(error: BaseException) -> str:
    """What failed where: CheckpointException, which is no Exception, knows the errors of all ranks."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    causes = [f"rank {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in failures.items()]
    return "; ".join(causes) or f"{type(error).__name__}: {error}"


def _not_written(partial: Path, error: BaseException) -> str:
    text = _causes(error).splitlines()[0]
    free = shutil.disk_usage(partial).free / (1 << 30)
    return (
        f"{partial}: cannot be written ({text}); {free:.1f} GiB are free on that disk. "
        "Older checkpoints are as they were: free space, lower checkpoint.keep or choose another logger.run_dir, "
        "and start again to continue"
    )


def _load_model(trainer: Trainer, state: dict[str, Any]) -> None:
    missing, unexpected = trainer.model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(f"the checkpoint lacks {missing[:5]} and has unknown {unexpected[:5]}")


def _model_state(trainer: Trainer) -> dict[str, Any]:
    """This rank's tensors of the model.

    Extra states belong to FP8, which is not used, and which of them there are depends on the layer spec: without them
    a checkpoint of a CPU run or a converted one loads on a GPU.
    """
    state = trainer.model.sharded_state_dict()
    kept = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    stage = trainer.layout.pp_rank
    for name, value in kept.items():
        if name.startswith("vision."):  # whole on every pipeline stage: the first one writes it
            kept[name] = dataclasses.replace(value, replica_id=(stage, *value.replica_id[1:]))
    return kept


def _sharded_state(trainer: Trainer, extra: dict[str, Any]) -> dict[str, Any]:
    model_state = _model_state(trainer)
    by_name = {
        name: value for name, value in model_state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    return {
        "family": trainer.model.family,
        "model": model_state,
        "optimizer": trainer.optimizer.sharded_state(by_name),
        "trainer": {name: getattr(trainer, name) for name in _STATE},
        "rng": torch.get_rng_state(),
        "extra": extra,
    }


def _delete(checkpoint: Path) -> None:
    """Take the name of a complete checkpoint away before its files: a kill leaves a *.partial folder, no torn one."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.partial")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    """Make every file of the folder durable before the rename says that it is."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
