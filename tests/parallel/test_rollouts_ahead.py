"""rollout.steps_off_policy=1: the engines sample for the next step while this one trains.

The engine beside the trainer is the embedded one, which owns a copy of the weights; where something must happen at the
same time it samples on a thread.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import faulty_runs
import pytest
import torch
from harness import DemoWorld, World, run_world
from test_restart import history, saved_steps
from torch import Tensor

from megalong import run
from megalong.config.tree import RunConfig
from megalong.engine.build import TORCH_DTYPE, family_of
from megalong.engine.trainer import Trainer
from megalong.grpo import train_grpo
from megalong.metrics import read_jsonl
from megalong.models.families import FAMILIES
from megalong.parallel.layout import ParallelLayout
from megalong.records import StepStats, TokenBatch, WeightBucket
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import Request, Sampled, Sampling

CAP = "grpo.tis_cap=2"
AHEAD = ("rollout.engine=vllm", "rollout.steps_off_policy=1", CAP)
STEPS = 4
CONSTANT = "grpo.aggregation=constant"
"""It refuses a response longer than data.max_response_tokens."""
GRPO = (f"grpo.steps={STEPS}", "grpo.batch_size=2")
SECONDS = 60.0
"""What is waited for something that must come."""


@dataclass
class Seen:
    """What a run did, in order, and with which weights."""

    events: list[str] = field(default_factory=list)
    engine_weights: dict[int, int] = field(default_factory=dict)  # version -> checksum
    trainer_weights: dict[int, int] = field(default_factory=dict)  # updates made -> checksum
    tis_weight: list[float] = field(default_factory=list)  # per step, by the twin
    gap: list[float] = field(default_factory=list)
    training: threading.Event = field(default_factory=threading.Event)


class WatchedEngine(EmbeddedEngine):
    """Writes down what is asked of it."""

    seen: Seen

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        kept = list(buckets)
        super().load_weights(kept, version=version)
        self.seen.engine_weights[version] = sum(int(bucket.checksums_n.sum()) for bucket in kept)
        self.seen.events.append(f"load {version}")

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        self.seen.events.append(f"begin {self.version}")
        super().begin(requests, sampling=sampling)

    def finish(self) -> list[list[Sampled]]:
        self.seen.events.append(f"finish {self.version}")
        return super().finish()


class ThreadedEngine(WatchedEngine):
    """Samples beside the trainer. A batch does not end before a training step has begun since it began: a loop that
    waited for it first would wait in vain."""

    first = True

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        self.seen.events.append(f"begin {self.version}")
        self.seen.training.clear()
        self.results: list[list[list[Sampled]]] = []
        self.thread = threading.Thread(target=self._sample, args=(requests, sampling, not self.first))
        self.first = False
        self.thread.start()

    def _sample(self, requests: Sequence[Request], sampling: Sampling, waits: bool) -> None:
        sampled = self.generate(requests, sampling=sampling)
        if not waits or self.seen.training.wait(SECONDS):
            self.seen.events.append(f"sampled {self.version}")
            self.results.append(sampled)

    def finish(self) -> list[list[Sampled]]:
        self.thread.join()
        self.seen.events.append(f"finish {self.version}")
        (sampled,) = self.results
        return sampled


class HangingEngine(WatchedEngine):
    """Never answers for the second batch."""

    def finish(self) -> list[list[Sampled]]:
        if "finish 0" in self.seen.events:
            faulty_runs.hang()
        return super().finish()


def beside_the_trainer(engine: type[WatchedEngine], seen: Seen, *, drivers: Sequence[int] | None = None) -> mock._patch:
    """open_run gets such engines in vLLM's place, on these ranks of the replica (default: on all)."""

    def build(config: RunConfig, layout: ParallelLayout, *, task: str, eos_id: int) -> WatchedEngine | None:
        if drivers is not None and layout.replica_rank not in drivers:
            return None
        family = family_of(config.model)
        built = engine(
            family.sampler_model(Path(config.model.path), TORCH_DTYPE[config.model.dtype]),
            name_of=family.sampler_name,
            eos_id=eos_id,
            device=layout.device,
            batch_prompts=config.rollout.batch_prompts,
        )
        built.seen = seen
        return built

    # vLLM, which the check would look for, need not be installed.
    return mock.patch.multiple(run, build_engine=build, check_engines=lambda *args, **rest: None)


def train(
    demo: DemoWorld, run_dir: Path, overrides: Sequence[str], *faults: str, drivers: Sequence[int] | None = None
) -> None:
    with beside_the_trainer(WatchedEngine, Seen(), drivers=drivers):
        faulty_runs.train(demo, run_dir, "grpo", tuple(overrides), *faults)


def train_and_watch(demo: DemoWorld, run_dir: Path, overrides: Sequence[str], engine: str) -> Seen:
    """One process; also what TIS weights and gaps plain PyTorch finds, by the trainer's own older weights."""
    seen, train_step = Seen(), Trainer.train_step
    snapshots: list[dict[str, Tensor]] = []

    def step_and_watch(trainer: Trainer, packs: Sequence[TokenBatch], *args: object, temperature: float) -> StepStats:
        seen.events.append(f"train {trainer.step + 1}")
        seen.training.set()
        snapshots.append({name: param.data.clone() for name, param in trainer.trainable})
        old = per_response(packs, trainer.logprobs(packs, temperature=temperature))
        use(trainer, snapshots[-2] if len(snapshots) > 1 else snapshots[-1])
        sampled = per_response(packs, trainer.logprobs(packs, temperature=temperature))
        use(trainer, snapshots[-1])
        cap = float(overrides_of(overrides)["grpo.tis_cap"])
        weights = [torch.exp(a - b).clamp(max=cap).mean() for a, b in zip(old, sampled, strict=True)]
        seen.tis_weight.append(float(torch.stack(weights).mean()))
        gaps = [(a - b).abs().mean() for a, b in zip(old, sampled, strict=True)]
        seen.gap.append(float(torch.stack(gaps).mean()))
        seen.trainer_weights[trainer.num_updates] = checksum(trainer)
        return train_step(trainer, packs, *args, temperature=temperature)

    with (
        mock.patch.object(Trainer, "train_step", step_and_watch),
        beside_the_trainer(globals()[engine], seen),
    ):
        faulty_runs.with_faults(lambda: train_grpo(demo.config(run_dir, *overrides, task="grpo")), "no_checkpoints")
    del seen.training  # it cannot be sent
    return seen


def per_response(packs: Sequence[TokenBatch], logprobs: Sequence[Tensor]) -> list[Tensor]:
    return [part for pack, rows_R in zip(packs, logprobs, strict=True) for part in rows_R.split(pack.response_lens)]


def overrides_of(overrides: Sequence[str]) -> dict[str, str]:
    return dict(override.split("=", 1) for override in overrides)


def use(trainer: Trainer, weights: dict[str, Tensor]) -> None:
    for name, param in trainer.trainable:
        param.data.copy_(weights[name])


def checksum(trainer: Trainer) -> int:
    """Of what the sampler gets."""
    buckets = trainer.export_weights(name_of=FAMILIES["longvila"].sampler_name)
    return sum(int(bucket.checksums_n.sum()) for bucket in buckets)


def watch(demo: DemoWorld, folder: Path, *overrides: str, engine: str = "WatchedEngine") -> Seen:
    (seen,) = run_world(1, train_and_watch, demo, folder, (*GRPO, *overrides), engine, folder=folder / "processes")
    return seen


def finish(demo: DemoWorld, run_dir: Path, *overrides: str, size: int = 1, faults: Sequence[str] = ()) -> None:
    run_world(size, train, demo, run_dir, (*GRPO, *overrides), *faults, folder=run_dir / "processes")


@pytest.fixture(scope="module")
def ahead(demo: DemoWorld, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """A run that nothing interrupts: its folder, and what was seen of it."""
    folder = tmp_path_factory.mktemp("ahead")
    return folder, watch(demo, folder, *AHEAD)


def without(rows: list[dict], *names: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


def test_with_weights_that_stay_all_is_as_on_policy(demo: DemoWorld, tmp_path: Path) -> None:
    """A learning rate that changes no bit of float32 weights; every update still is a new version."""
    still = ("optimizer.lr=1e-60", "optimizer.weight_decay=0")
    late, now = watch(demo, tmp_path / "late", *AHEAD, *still), watch(demo, tmp_path / "now", CAP, *still)
    assert len(set(late.trainer_weights.values())) == 1
    assert [row["policy_lag"] for row in history(tmp_path / "late")] == [0, 1, 1, 1]
    assert [row["policy_lag"] for row in history(tmp_path / "now")] == [0, 0, 0, 0]
    assert without(history(tmp_path / "late"), "policy_lag") == without(history(tmp_path / "now"), "policy_lag")
    assert history(tmp_path / "late", name="samples.jsonl") == history(tmp_path / "now", name="samples.jsonl")
    assert {row["grad_norm"] > 0 for row in history(tmp_path / "now")} == {True}
    assert now.events[:4] == ["load 0", "begin 0", "finish 0", "train 1"]
    assert late.events[:5] == ["load 0", "begin 0", "finish 0", "begin 0", "train 1"]


def test_a_step_trains_on_what_the_weights_of_the_step_before_sampled(ahead: tuple[Path, Seen]) -> None:
    folder, seen = ahead
    assert seen.events == [
        "load 0", "begin 0", "finish 0", "begin 0", "train 1",
        "finish 0", "load 1", "begin 1", "train 2",
        "finish 1", "load 2", "begin 2", "train 3",
        "finish 2", "train 4",
    ]  # fmt: skip
    assert seen.engine_weights == {version: seen.trainer_weights[version] for version in range(3)}
    assert len(set(seen.trainer_weights.values())) == STEPS
    rows = history(folder)
    assert [row["policy_lag"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["sampler_gap_max"] < 1e-5
    assert min(row["sampler_gap_max"] for row in rows[1:]) > 1e-3


@pytest.mark.parametrize("cap", [2.0, 1.0])
def test_importance_weights_are_those_of_plain_pytorch(
    cap: float, demo: DemoWorld, ahead: tuple[Path, Seen], tmp_path: Path
) -> None:
    """The twin asks the trainer itself, with the weights that sampled and with those that the step starts from."""
    folder, seen = ahead
    if cap != 2.0:
        folder = tmp_path
        seen = watch(demo, folder, *AHEAD, f"grpo.tis_cap={cap}")
    rows = history(folder)
    assert [row["tis_weight"] for row in rows] == pytest.approx(seen.tis_weight, abs=2e-6)
    assert [row["sampler_gap_sum"] for row in rows] == pytest.approx(seen.gap, abs=2e-6)
    assert max(abs(weight - 1) for weight in seen.tis_weight[1:]) > 1e-4
    if cap == 1.0:  # truncation alone keeps their mean below 1
        assert max(seen.tis_weight[1:]) < 1 - 1e-4


def test_engines_sample_while_the_trainer_trains(demo: DemoWorld, ahead: tuple[Path, Seen], tmp_path: Path) -> None:
    """No batch but the first ends before the training step of the batch before it has begun, and nothing is late."""
    seen = watch(demo, tmp_path, *AHEAD, engine="ThreadedEngine")
    assert [event for event in seen.events if not event.startswith("sampled")] == ahead[1].events
    sampled = [index for index, event in enumerate(seen.events) if event.startswith("sampled")]
    trained = [index for index, event in enumerate(seen.events) if event.startswith("train")]
    assert len(sampled) == STEPS
    for step in range(1, STEPS):
        assert trained[step - 1] < sampled[step] < trained[step]
    assert history(tmp_path) == history(ahead[0])


def test_several_updates_per_batch(demo: DemoWorld, tmp_path: Path) -> None:
    """The lag counts updates; old log-probabilities are the trainer's, so clipping is about this step's updates."""
    seen = watch(demo, tmp_path, *AHEAD, "grpo.updates_per_batch=2", "grpo.steps=3")
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["policy_lag"] for row in rows] == [0, 2, 2]
    assert [event for event in seen.events if event.startswith("begin")] == ["begin 0", "begin 0", "begin 2"]


def test_an_evaluation_in_between_changes_nothing(demo: DemoWorld, ahead: tuple[Path, Seen], tmp_path: Path) -> None:
    """It waits for the batch ahead, whose videos stay; the store has room for those of two batches and no more."""
    evaluate = (f"eval.manifest={demo.rl}", "eval.every=1", "eval.batch_prompts=2", "eval.at_end=true")
    video = 5 * 4 * 32 * 4  # bytes: 5 frames of 4 embeddings of 32 float32 numbers
    seen = watch(demo, tmp_path, *AHEAD, *evaluate, f"video.cache_gib={4.5 * video / 2**30}")
    assert history(tmp_path) == history(ahead[0])
    assert [row["step"] for row in read_jsonl(tmp_path / "evaluations.jsonl")] == [1, 2, 3, 4]
    for step in (1, 2, 3):  # with the weights that the step has made
        at = seen.events.index(f"train {step}")
        assert seen.events[at + 1 : at + 4] == [f"finish {step - 1}", f"load {step}", f"begin {step}"]


def test_an_evaluation_that_was_cut_short_changes_nothing(
    demo: DemoWorld, ahead: tuple[Path, Seen], tmp_path: Path
) -> None:
    """The run that continues makes it before it takes the checkpoint's rollouts."""
    run_dir = tmp_path / "run"
    settings = (*GRPO, *AHEAD, f"eval.manifest={demo.rl}", "eval.every=2", "eval.batch_prompts=2")
    more = ("checkpoint.save_every=2",)
    world = World(1, train, demo, run_dir, (*settings, *more), "crash_in_evaluation@2", folder=run_dir / "processes")
    assert world.exit_codes() == [faulty_runs.CRASHED], world.log()
    finish(demo, run_dir, *settings, faults=["no_checkpoints"])
    assert [row["step"] for row in read_jsonl(run_dir / "evaluations.jsonl")] == [2]
    assert history(run_dir) == history(ahead[0])
    assert history(run_dir, name="samples.jsonl") == history(ahead[0], name="samples.jsonl")


@pytest.mark.parametrize("fault", ["crash_in_step@4", "sigterm_in_step@2", "crash_in_step@3"])
def test_a_run_that_was_ended_continues_bit_for_bit(
    fault: str, demo: DemoWorld, ahead: tuple[Path, Seen], tmp_path: Path
) -> None:
    """The checkpoint has the rollouts of the batch ahead: newer weights would sample others."""
    run_dir = tmp_path / "run"
    save = ("checkpoint.save_every=2",)
    world = World(1, train, demo, run_dir, (*GRPO, *AHEAD, *save), fault, folder=run_dir / "processes")
    assert world.exit_codes() == [0 if "sigterm" in fault else faulty_runs.CRASHED], world.log()
    assert saved_steps(run_dir) == ["step_00000002"]
    finish(demo, run_dir, *AHEAD, faults=["no_checkpoints"])
    assert history(run_dir) == history(ahead[0])
    assert history(run_dir, name="samples.jsonl") == history(ahead[0], name="samples.jsonl")


def test_rollouts_of_a_checkpoint_on_other_layouts_and_settings(
    demo: DemoWorld, ahead: tuple[Path, Seen], tmp_path: Path
) -> None:
    finish(demo, tmp_path / "run", *AHEAD, faults=["sigterm_in_step@2"])
    expected = history(ahead[0])

    def resumed(name: str, *overrides: str, size: int = 1) -> list[dict]:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "run", folder)
        finish(demo, folder, *overrides, size=size, faults=["no_checkpoints"])
        return history(folder)

    two = resumed("dp2", *AHEAD, size=2)
    for row, expected_row in zip(two, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)
    # On-policy from here: the batch is read again, and the weights of now sample.
    on_policy = resumed("on_policy", CAP)
    assert [row["policy_lag"] for row in on_policy] == [0, 1, 0, 0]
    assert sampled_ids(tmp_path / "on_policy") == sampled_ids(ahead[0])
    # Rollouts that do not fit are said to be sampled anew: the same questions about other frames are other prompts.
    frames = resumed("frames", *AHEAD, "video.num_frames=4")
    assert [row["policy_lag"] for row in frames] == [0, 1, 0, 1]
    other = resumed("group", *AHEAD, "rollout.group_size=3")
    assert [row["policy_lag"] for row in other] == [0, 1, 0, 1]
    assert sampled_ids(tmp_path / "group") == sampled_ids(ahead[0])
    short = resumed("short", *AHEAD, "data.max_response_tokens=8", "reward.overlong_buffer=8", CONSTANT)
    assert [row["policy_lag"] for row in short] == [0, 1, 0, 1]
    for name, most in (("group", 24), ("short", 8)):
        log = (tmp_path / name / "processes" / "rank0.log").read_text()
        assert (
            "another rollout.group_size than this run's first batch, or longer than "
            f"data.max_response_tokens={most}: it is sampled anew"
        ) in log


def sampled_ids(folder: Path) -> list[set[str]]:
    """Sample ids of each step."""
    rows = history(folder, name="samples.jsonl")
    return [{row["sample_id"] for row in rows if row["step"] == step} for step in range(1, STEPS + 1)]


@pytest.mark.parametrize(
    ("layout", "drivers"),
    [((), None), (("parallel.tp=2", "parallel.sequence_parallel=true"), (0,))],
    ids=["dp2", "tp2, one engine"],
)
def test_two_processes_are_one(
    layout: tuple[str, ...], drivers: tuple[int, ...] | None, demo: DemoWorld, ahead: tuple[Path, Seen], tmp_path: Path
) -> None:
    run_world(2, train_on, demo, tmp_path, (*GRPO, *AHEAD, *layout), drivers, folder=tmp_path / "processes")
    for row, expected in zip(history(tmp_path), history(ahead[0]), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    ours, expected = (history(folder, name="samples.jsonl") for folder in (tmp_path, ahead[0]))
    assert {(row["step"], row["sample_id"], row["response"]) for row in ours} <= {
        (row["step"], row["sample_id"], row["response"]) for row in expected
    }


def train_on(demo: DemoWorld, run_dir: Path, overrides: tuple[str, ...], drivers: tuple[int, ...] | None) -> None:
    train(demo, run_dir, overrides, "no_checkpoints", drivers=drivers)


def test_an_engine_that_hangs_is_found_in_the_phase_that_waits_for_it(demo: DemoWorld, tmp_path: Path) -> None:
    overrides = (*GRPO, *AHEAD, "parallel.timeout_minutes=0.2")
    world = World(1, command_line, demo, tmp_path / "run", overrides, folder=tmp_path)
    assert world.exit_codes() == [3], world.log()
    assert "megalong: rank 0: phase 'rollout' has lasted 1" in (tmp_path / "rank0.log").read_text()
    assert (tmp_path / "run" / "stuck_rank0.txt").read_text().startswith("phase 'rollout' for 1")


def command_line(demo: DemoWorld, run_dir: Path, overrides: tuple[str, ...]) -> None:
    with beside_the_trainer(HangingEngine, Seen()):
        faulty_runs.command_line(demo, run_dir, "grpo", overrides)
