"""What sft, grpo, eval and check-sync share: opening a run, its batches, checkpoints, and an orderly end."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megalong.config.load import save_config
from megalong.config.model_shape import ModelShape
from megalong.config.shapes import read_model_shape
from megalong.config.tree import SHARDED, Recompute, RunConfig
from megalong.config.validate import TRAINING, Task, validate
from megalong.config.validate_attention import a2a_ranks
from megalong.data.batches import build_prompts
from megalong.data.manifest import ManifestError, read_manifest
from megalong.data.sampler import PromptSampler
from megalong.data.sequence import SequenceBuilder
from megalong.engine.build import build_model, check_states, family_of
from megalong.engine.checkpoint import delete_partial, load_checkpoint, load_weights, save_checkpoint
from megalong.engine.trainer import Trainer
from megalong.engines import build_engine, check_engines
from megalong.failures import warn_of_memory
from megalong.metrics import PhaseTimer, RunLogger, open_wandb
from megalong.models.errors import CheckpointError
from megalong.parallel.collectives import broadcast_object, gather_objects, max_over, sum_over
from megalong.parallel.layout import ParallelLayout, make_layout
from megalong.records import Dropped, Prompt, Sample
from megalong.resume import Origin, checkpoint_folder, lock_folder, origin_of, resume_point, resumed_origin
from megalong.rewards.functions import check_problem_types
from megalong.rollout.sampler import GroupSampler
from megalong.videos import check_store, frame_chooser, open_vision
from megalong.vision.encode import VisionStage

_LOOKED_AT = 16
"""Videos of a manifest that are looked for before a model is built."""


@dataclass(kw_only=True)
class Run:
    """Everything a loop works with; built once by open_run, for one `with`."""

    config: RunConfig
    layout: ParallelLayout
    trainer: Trainer
    vision: VisionStage
    builder: SequenceBuilder
    sampler: GroupSampler
    logger: RunLogger
    timer: PhaseTimer
    origin: Origin
    resumed: dict[str, Any]  # `extra` of the checkpoint the run continues from; {} at a fresh start
    lock: IO[str] | None = None  # of the run folder, while the run is open
    weights_version: int = -1  # of the sampler
    stop_requested: bool = False
    told_of_prefill: bool = False
    step_before: int = 0  # trainer.step when the loop's current round began
    ahead: Sequence[Prompt] = ()  # of a later step: their videos stay in memory

    def sync_weights(self) -> None:
        """Send the sampler its part of the trainer's weights, frozen ones once, unless it has them already."""
        if self.weights_version != self.trainer.num_updates or self.sampler.needs_weights:
            name_of = family_of(self.config.model).sampler_name
            frozen = self.weights_version < 0 or self.sampler.needs_weights
            buckets = self.trainer.export_weights(name_of=name_of, frozen=frozen)
            self.sampler.load_weights(buckets, version=self.trainer.num_updates)
            self.weights_version = self.trainer.num_updates

    def steps(self, total: int) -> Iterator[int]:
        """Numbers of the steps left to do (from 1), with a progress bar on the main process.

        Stops early, after the step in progress, when any process got SIGTERM. To be used in heeding_sigterm: behind the
        last step a checkpoint is written, which a SIGTERM, or a second one, must not end.
        """
        bar = tqdm(
            total=total, initial=self.trainer.step, disable=not self.layout.is_main, unit="step", dynamic_ncols=True
        )
        with bar:
            while self.trainer.step < total and not self.stop_anywhere():
                self.step_before = self.trainer.step
                self.release_videos()
                yield self.trainer.step + 1
                bar.update(self.trainer.step - self.step_before)

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """SIGTERM is a request to stop, for stop_anywhere to see, and does not end the process."""
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop_requested", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def release_videos(self) -> None:
        """Let go of the videos that nobody needs any more."""
        self.vision.release(keep=[item for prompt in self.ahead for item in prompt.selections])

    def stop_anywhere(self) -> bool:
        """Whether any process got SIGTERM (collective over all of them)."""
        flags = {"stop": float(self.stop_requested)}
        self.stop_requested = bool(max_over(flags, group=self.layout.world, device=self.layout.device)["stop"])
        return self.stop_requested

    def save(self, data: Resumable) -> Path:
        """Checkpoint under <run_dir>/checkpoints (collective)."""
        with self.timer.during("checkpoint"):
            return save_checkpoint(
                checkpoint_folder(self.config),
                self.trainer,
                extra={**data.state_dict(), **self.origin.to_extra()},
                keep=self.config.checkpoint.keep,
            )

    def save_if_due(self, data: Resumable) -> None:
        if self.is_due(self.config.checkpoint.save_every):
            self.save(data)

    def is_due(self, every: int) -> bool:
        """Whether this round, which may hold several optimizer steps, reached a multiple of `every` (0: never)."""
        return every > 0 and self.trainer.step // every > self.step_before // every

    def report_dropped(self, dropped: Sequence[Dropped]) -> int:
        """Write the drops of all replicas to dropped.jsonl; returns how many there were."""
        everywhere = [drop for part in gather_objects(list(dropped), group=self.layout.dp) for drop in part]
        self.logger.dropped(everywhere)
        return len(everywhere)

    def report_decoded_elsewhere(self, step: int | None = None) -> int:
        """Write the files of all replicas that the chosen decoder refused, so that PyAV decoded them, to
        decoded_elsewhere.jsonl; returns how many there are so far. step: as for RunLogger.dropped."""
        parts = gather_objects(self.vision.decoded_elsewhere, group=self.layout.dp)
        reasons = {path: reason for part in parts for path, reason in part.items()}
        self.logger.decoded_elsewhere(reasons, step)
        return len(reasons)

    def store_metrics(self) -> dict[str, float]:
        """Files of video.cache_dir that were refused, and that made room, so far, over all ranks (collective)."""
        disk = self.vision.embeds.disk
        if disk is None:
            return {}
        counts = {"refused_embeddings": float(len(disk.refused)), "evicted_embeddings": float(disk.num_evicted)}
        return sum_over(counts, group=self.layout.world, device=self.layout.device)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # other ranks may be gone: what waits for nobody is ended here, engines by the end of this process
            self.vision.close(wait=False)
        if self.lock is not None:
            self.lock.close()

    def close(self) -> None:
        self.vision.close()
        self.sampler.close()
        self.logger.close()


class Resumable(Protocol):
    """Where a run is in its data."""

    def state_dict(self) -> dict[str, Any]:
        """What `Run.resumed` is when the run continues, equal on all ranks (collective)."""


class PromptBatches:
    """This replica's prompts, batch by batch, videos decoded (and encoded, for a frozen tower)."""

    def __init__(self, run: Run, samples: Sequence[Sample], *, batch_size: int) -> None:
        self.run, self.samples = run, samples
        config, layout = run.config.data, run.layout
        self._order = PromptSampler(
            len(samples), batch_size, layout.dp_rank, layout.dp_size, seed=config.seed, shuffle=config.shuffle,
            questions_per_video=config.questions_per_video, videos=[s.videos or s.sample_id for s in samples],
        )  # fmt: skip
        if "sampler" in run.resumed:
            try:
                self._order.load_state_dict(run.resumed["sampler"])
            except ValueError as error:
                raise CheckpointError(f"{checkpoint_folder(run.config)}: {error}") from error
        self.position = self._order.state_dict()  # of the batches handed out: what a checkpoint saves
        self._ahead: tuple[list[Prompt], list[Dropped]] | None = None

    def __next__(self) -> tuple[list[Prompt], list[Dropped]]:
        prompts, dropped = self._ahead or self._plan()
        self.position = self._order.state_dict()
        prompts, unreadable = make_ready(self.run, prompts)
        self._ahead = self._plan()
        return prompts, [*dropped, *unreadable]

    def decode_ahead(self) -> None:
        """Start decoding the next batch's videos, if that has not begun."""
        prompts, _ = self._ahead
        self.run.vision.prefetch([item for prompt in prompts for item in prompt.selections])

    def state_dict(self) -> dict[str, Any]:
        """See Resumable."""
        return {"sampler": self.position}

    def _plan(self) -> tuple[list[Prompt], list[Dropped]]:
        prompts, dropped = plan_prompts(self.run, [self.samples[index] for index in next(self._order)])
        self.run.vision.index_ahead([self.samples[index] for index in self._order.peek()])
        return prompts, dropped


def plan_prompts(run: Run, samples: Sequence[Sample]) -> tuple[list[Prompt], list[Dropped]]:
    """Choose frames and build token ids; nothing is decoded yet."""
    selections, unreadable = run.vision.select(samples, frame_chooser(run.config, run.vision.videos))
    prompts, too_long = build_prompts(
        samples,
        selections,
        run.builder,
        max_prompt_tokens=run.config.data.max_prompt_tokens,
        max_response_tokens=run.config.data.max_response_tokens,
        max_positions=run.trainer.model.spec.gpt.max_positions,
    )
    return prompts, [*unreadable, *too_long]


def make_ready(run: Run, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Dropped]]:
    """Decode (and encode) the prompts' videos. Returns the prompts that can be used and the drops."""
    selections = {item.path: item for prompt in prompts for item in prompt.selections}
    dropped = run.vision.prepare([prompt.sample for prompt in prompts], selections)
    bad = {drop.sample_id for drop in dropped}
    return [prompt for prompt in prompts if prompt.sample.sample_id not in bad], dropped


def owned_embeddings(run: Run, prompts: Sequence[Prompt]) -> list[Tensor | None]:
    """What the engine of this rank is given of the prompts' videos (collective over the replica)."""
    room = run.sampler.embeds_room(prompts)
    return run.vision.embeddings_of(prompts, run.sampler.owners(prompts), room_ND=room)


def read_samples(config: RunConfig, *, manifest: str, video_dir: str | None, thinking_targets: bool) -> list[Sample]:
    """Read and check a manifest before anything else is built."""
    samples = read_manifest(manifest, video_dir=video_dir)
    with_videos = [sample.sample_id for sample in samples if sample.videos]
    if with_videos and family_of(config.model).vision is None:
        raise ManifestError(
            f"{manifest}: {len(with_videos)} of {len(samples)} samples have videos (first: {with_videos[0]!r}), and "
            f"model.family={config.model.family} has no vision; choose another family or take them out"
        )
    first = [path for sample in samples for path in sample.videos][:_LOOKED_AT]
    if first and not any(Path(path).exists() for path in first):  # single ones are dropped, and counted
        section = "eval" if manifest == config.eval.manifest else "data"
        raise ManifestError(
            f"{manifest}: none of its first {len(first)} videos is there, {first[0]} for one; relative paths start "
            f"from {section}.video_dir={video_dir or 'null'}, or from the manifest's folder where that is not set"
        )
    try:
        check_problem_types(samples)
    except ValueError as error:
        raise ManifestError(f"{manifest}: {error}") from error
    if thinking_targets and config.data.thinking:
        lacking = [sample.sample_id for sample in samples if not sample.reasoning]
        if lacking:
            raise ManifestError(
                f"{manifest}: {len(lacking)} of {len(samples)} samples have no reasoning (first: {lacking[0]!r}); "
                "chain-of-thought SFT needs it: add it or set data.thinking=false"
            )
    return samples


def checked_shape(config: RunConfig, *, task: Task) -> ModelShape:
    """The model's sizes, after the configuration was checked against them: before a manifest is read, too."""
    shape = read_model_shape(config.model.path, family=config.model.family, video=config.video)
    validate(config, task=task, world_size=int(os.environ.get("WORLD_SIZE", "1")), model=shape)
    return shape


def open_run(config: RunConfig, *, task: Task, timer: PhaseTimer) -> Run:
    """Check the configuration, join the other processes, build the model, load or resume (collective)."""
    with timer.during("start"):
        return _start(config, task=task, timer=timer)


def _start(config: RunConfig, *, task: Task, timer: PhaseTimer) -> Run:
    shape = checked_shape(config, task=task)
    check_store(config)
    check_engines(config, task=task, world_size=int(os.environ.get("WORLD_SIZE", "1")), shape=shape)
    trains = task in TRAINING
    # A check leaves the folder of the run that it checks as it is.
    writes = task != "check-sync" and os.environ.get("RANK", "0") == "0"
    lock = lock_folder(Path(config.logger.run_dir)) if writes else None
    start = resume_point(config) if trains else None
    keeps_reference = task == "grpo" and config.grpo.kl_coef > 0
    if start is None:
        origin = origin_of(config, task)
    else:
        origin = resumed_origin(start, config, task, keeps_reference=keeps_reference)
    if trains and writes:  # before anything else is written: the disk may be full of it
        delete_partial(checkpoint_folder(config))
    wandb_run = None
    if writes and config.logger.wandb:  # before the model: without a login the run ends here
        wandb_run = open_wandb(Path(config.logger.run_dir), config, resumes=start is not None)
    family = family_of(config.model)
    layout = layout_of(config, shape)
    # Another run may save one meanwhile: all ranks take what the first one found.
    start, origin = broadcast_object((start, origin), source=0, group=layout.world)
    seed_everything(config.seed)
    if trains:
        check_states(config.optimizer, layout)
        if layout.is_main and layout.device.type == "cuda":
            card = torch.cuda.get_device_properties(layout.device).total_memory
            warn_of_memory(config, task, shape, world_size=layout.world_size, card=card)
    model = build_model(config.model, layout, sequence_parallel=config.parallel.sequence_parallel)
    tokens = family.read_tokens(Path(config.model.path))
    vision = open_vision(config, layout, model.vision, spec=model.spec, tokens=tokens)
    total_steps = config.grpo.steps * config.grpo.updates_per_batch if task == "grpo" else config.sft.steps
    trainer = Trainer(
        model,
        layout,
        config.optimizer,
        total_steps=total_steps,
        embeddings=vision.embeddings,
        sharded=config.mr_sp.mode.name in SHARDED,
        keep_attention=config.model.recompute is Recompute.keep_attention,
        trains=trains,
    )
    if origin.init_from and (start is None or keeps_reference):
        load_weights(Path(origin.init_from), trainer)
    if keeps_reference:
        trainer.keep_reference()
    resumed = {} if start is None else load_checkpoint(start, trainer)
    if start is not None and layout.is_main:
        done = f"; nothing is left to do: raise {task}.steps, or choose another logger.run_dir"
        tqdm.write(
            f"continues {start}: step {trainer.step} of {total_steps}{done if trainer.step >= total_steps else ''}"
        )
    vision.weights_changed()
    run = Run(
        config=config,
        layout=layout,
        trainer=trainer,
        vision=vision,
        builder=SequenceBuilder(
            encode=tokens.encode,
            encode_markup=tokens.encode_markup,
            eos_id=tokens.eos_id,
            videos=vision.videos,
            system_prompt=tokens.system_prompt,
            thinking=config.data.thinking,
        ),
        sampler=GroupSampler(
            build_engine(config, layout, task=task, eos_id=tokens.eos_id),
            layout,
            decode=tokens.decode,
            seed=config.seed,
        ),
        logger=RunLogger(
            config.logger.run_dir,
            tensorboard=config.logger.tensorboard,
            wandb_run=wandb_run,
            config=config,
            is_main=writes,
            resume_step=trainer.step,
        ),
        timer=timer,
        origin=origin,
        resumed=resumed,
        lock=lock,
        step_before=trainer.step,
    )
    run.sampler.release()  # until there is something to sample
    if writes:
        save_config(config, Path(config.logger.run_dir) / "config.yaml")
    return run


def layout_of(config: RunConfig, shape: ModelShape) -> ParallelLayout:
    """The process groups config.parallel asks for (collective)."""
    parallel = config.parallel
    return make_layout(
        tp=parallel.tp,
        cp=parallel.cp,
        pp=parallel.pp,
        cp_a2a=a2a_ranks(parallel, shape),
        seed=config.seed,
        timeout_minutes=parallel.timeout_minutes,
    )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
