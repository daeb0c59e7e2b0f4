"""What a run folder holds of an earlier start: whether a run may continue it and where from; who writes it."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

import yaml
from omegaconf import DictConfig, OmegaConf

from megalong.config.errors import ConfigError
from megalong.config.load import config_yaml, known_keys
from megalong.config.tree import RunConfig
from megalong.config.validate import TRAINING, Task
from megalong.engine.checkpoint import complete_checkpoints, newest_checkpoint, read_extra, step_of
from megalong.models.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run began from; its checkpoints carry it. Paths are absolute."""

    task: str
    model: str  # model.path
    weights: str  # what its files hold: see fingerprint
    family: str
    train: str | None  # data.train
    init_from: str | None  # the checkpoint that model.init_from meant then: its reference policy, too

    def to_extra(self) -> dict[str, Any]:
        """For the `extra` of a checkpoint, with the launch that saves it."""
        return {"origin": asdict(self), "launch": _launch()}


def origin_of(config: RunConfig, task: Task) -> Origin:
    """Of a run that begins. Raises CheckpointError where model.init_from has no checkpoint."""
    init_from = config.model.init_from
    return Origin(
        task=task,
        model=os.path.abspath(config.model.path),
        weights=fingerprint(Path(config.model.path)),
        family=config.model.family,
        train=os.path.abspath(config.data.train) if task in TRAINING else None,  # others may have none
        init_from=os.path.abspath(newest_checkpoint(Path(init_from))) if init_from else None,
    )


def fingerprint(model: Path) -> str:
    """Of a checkpoint's configuration and samples of its weights, wherever the folder is: 1 MiB of every file."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("config.json")):
        digest.update(path.read_bytes())
    for path in sorted(model.rglob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // 16)):
                file.seek(place)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def checkpoint_folder(config: RunConfig) -> Path:
    return Path(config.logger.run_dir) / "checkpoints"


def resume_point(config: RunConfig) -> Path | None:
    """The checkpoint the run continues from; None at a fresh start.

    Raises CheckpointError when the run folder holds checkpoints that the run is told not to continue from: they would
    pass for its own, and be the ones that a later restart picks up. Where torchrun starts the processes again, they
    are its own: the first start has looked.
    """
    folder = checkpoint_folder(config)
    checkpoints = complete_checkpoints(folder)
    if checkpoints and not config.checkpoint.resume and not _of_this_launch(checkpoints[-1]):
        raise CheckpointError(
            f"checkpoint.resume=false, but {folder} holds {checkpoints[-1].name} of an earlier run; delete {folder} to "
            "start over, choose another logger.run_dir, or set checkpoint.resume=true to continue"
        )
    return checkpoints[-1] if checkpoints else None


def _launch() -> str:
    """Which torchrun, on one node or on several, started this process; "none", as it says itself, without an id."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "none")


def _of_this_launch(checkpoint: Path) -> bool:
    """TORCHELASTIC_RESTART_COUNT alone does not say it: of several nodes each counts its own failures."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return restarted or (_launch() != "none" and read_extra(checkpoint).get("launch") == _launch())


def resumed_origin(start: Path, config: RunConfig, task: Task, *, keeps_reference: bool) -> Origin:
    """What the run that `start` is of began from; of a checkpoint that does not say, what this one would begin from.

    Raises CheckpointError when this is another task or model, or the reference policy is gone, ConfigError when GRPO's
    rounds would not meet its step.
    """
    stored = read_extra(start).get("origin")
    says = stored is not None and set(stored) == {field.name for field in fields(Origin)}
    origin = Origin(**stored) if says else origin_of(config, task)
    other = []
    if origin.task != task:
        other.append(f"task {origin.task}, not {task}")
    if origin.family != config.model.family:
        other.append(f"model.family={origin.family}, not {config.model.family}")
    if origin.weights != fingerprint(Path(config.model.path)):
        other.append(f"the model that {origin.model} was, not the one in model.path={config.model.path}")
    if other:
        raise CheckpointError(
            f"{start} is of a run with {', '.join(other)}; choose another logger.run_dir "
            f"(model.init_from={start.parent} takes its weights there)"
        )
    step, updates = step_of(start), config.grpo.updates_per_batch
    if task == "grpo" and step % updates:  # checkpoints are written between rounds alone: the setting was another one
        raise ConfigError(
            f"{start}: step {step} is no multiple of grpo.updates_per_batch={updates}, so the run's rounds would pass "
            f"its last step; set grpo.updates_per_batch to what it was, or another divisor of {step}, or choose "
            f"another logger.run_dir (model.init_from={start.parent} takes its weights there)"
        )
    if origin.train != os.path.abspath(config.data.train):
        logger.warning("%s: data.train was %s, and is %s now", start, origin.train, config.data.train)
    # Of all ranks the main one alone shows this, and reads the file for it.
    if logger.isEnabledFor(logging.INFO) and (changed := changed_settings(config)):
        logger.info("%s: the run goes on with other settings: %s", start, ", ".join(changed))
    if not keeps_reference or origin.init_from is None or Path(origin.init_from).is_dir():
        return origin
    name = Path(origin.init_from).name
    for moved in (Path(config.model.init_from or ""), Path(config.model.init_from or "") / name):
        if moved.name == name and moved.is_dir():
            return replace(origin, init_from=os.path.abspath(moved))
    raise CheckpointError(
        f"{start}: the reference policy of its run is {origin.init_from}, which is gone; set model.init_from to where "
        f"{name} is now, or grpo.kl_coef=0"
    )


def changed_settings(config: RunConfig) -> list[str]:
    """What config.yaml of the run folder, which is about to be replaced, says otherwise; data.train is Origin's."""
    try:
        before = OmegaConf.load(Path(config.logger.run_dir) / "config.yaml")
    except (OSError, ValueError, yaml.YAMLError):  # nothing to compare with
        return []
    if not isinstance(before, DictConfig):
        return []
    now, changed = OmegaConf.create(config_yaml(config)), []
    for key in known_keys(RunConfig):
        new = OmegaConf.select(now, key)
        old = OmegaConf.select(before, key, default=new)  # an older version's file may lack it
        if new != old and key != "data.train":
            changed.append(f"{key}={new} (was {old})")
    return changed


def lock_folder(run_dir: Path) -> IO[str]:
    """Make the run folder and hold it until the file is closed. Raises ConfigError where another process does."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("a+")
    except OSError as error:
        raise ConfigError(
            f"logger.run_dir={run_dir} cannot be made or written to: {error.strerror}; choose another folder"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"logger.run_dir={run_dir} is written by {holder}; choose another, or end that") from None
    except OSError as error:  # a file system without locks
        logger.warning("%s: cannot be locked (%s): keep other runs out of it", run_dir, error.strerror)
    os.register_at_fork(after_in_child=file.close)  # megatron's writers of checkpoints would hold it, too
    file.truncate(0)
    file.write(f"process {os.getpid()} of {os.uname().nodename}\n")
    file.flush()
    return file
