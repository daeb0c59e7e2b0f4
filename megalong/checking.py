"""`megalong check-sync`: does the rollout engine hold the trainer's weights, and compute what the trainer computes?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from megalong.config.errors import ConfigError
from megalong.config.plan_lengths import check_prompts
from megalong.config.tree import Dtype, RunConfig
from megalong.data.manifest import ManifestError
from megalong.data.packing import pack_rollouts
from megalong.engine.build import family_of
from megalong.failures import RunFailedError
from megalong.metrics import PhaseTimer
from megalong.parallel.collectives import gather_objects, max_over, sum_over
from megalong.records import Dropped, Prompt, RolloutGroup, Sample, WeightBucket
from megalong.rollout.engine import Sampling
from megalong.run import Run, make_ready, open_run, owned_embeddings, plan_prompts, read_samples

MEAN_GAP_LIMITS = {Dtype.float32: 1e-3, Dtype.bfloat16: 0.02}
"""Mean |trainer - engine| log-probability of a sampled token that rounding explains, in nats."""


class OutOfSyncError(RunFailedError):
    """Trainer and engine disagree."""


@dataclass(kw_only=True, slots=True)
class Sent:
    """What one update held for the sampler."""

    buckets: int = 0
    tensors: int = 0
    bytes: int = 0


@dataclass(kw_only=True, slots=True)
class SyncReport:
    """Equal on all ranks; tokens, gaps and prompts are those of all replicas."""

    version: int  # of the weights sent last
    sent: Sent  # by a replica, in one update
    limit: float  # of mean_gap
    prompts: int
    responses: int
    tokens: int  # sampled, at rollout.temperature
    mean_gap: float  # |trainer - engine| log-probability
    max_gap: float
    mean_logprob: float  # the trainer's
    greedy_changed: int  # prompts whose greedy response differs after the same weights were sent again
    dropped: list[Dropped] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What is out of sync; [] when nothing is."""
        found = []
        if not self.mean_gap <= self.limit:  # NaN is a problem, too
            found.append(f"the mean gap of log-probabilities is {self.mean_gap:.2e}, over {self.limit:g}")
        if not math.isfinite(self.max_gap):
            found.append(f"the largest gap of log-probabilities is {self.max_gap}")
        if self.greedy_changed:
            found.append(
                f"{self.greedy_changed} of {self.prompts} greedy responses changed when the same weights were sent "
                "again"
            )
        return found

    def table(self) -> str:
        rows = [
            ("weights version", str(self.version)),
            ("buckets of an update", str(self.sent.buckets)),
            ("tensors", str(self.sent.tensors)),
            ("bytes", f"{self.sent.bytes:,}"),
            ("prompts (and left out)", f"{self.prompts} ({len(self.dropped)})"),
            ("responses", str(self.responses)),
            ("response tokens", str(self.tokens)),
            ("mean |gap|", f"{self.mean_gap:.2e} (at most {self.limit:g})"),
            ("max |gap|", f"{self.max_gap:.2e}"),
            ("mean log-probability", f"{self.mean_logprob:.4f}"),
            ("greedy tokens unchanged", "no" if self.greedy_changed else "yes"),
        ]
        lines = [f"{name:<{max(len(name) for name, _ in rows)}}  {value}" for name, value in rows]
        lost = [f"left out: {drop.sample_id}: {drop.reason}" for drop in self.dropped[:5]]
        return "\n".join([*lines, *lost])


def check_sync(config: RunConfig, timer: PhaseTimer | None = None) -> SyncReport:
    """`megalong check-sync`: compare the engine with the trainer on the weights of model.path (or model.init_from).

    Prompts are the first of data.train, or of eval.manifest where data.train is not set. Names, shapes and checksums
    are compared by each update itself (WeightSyncError). Raises OutOfSyncError after the table was shown.
    """
    samples = _samples(config)
    with open_run(config, task="check-sync", timer=timer or PhaseTimer()) as run:
        report = compare(run, samples)
    if run.layout.is_main:
        tqdm.write(report.table())
    if report.problems():
        raise OutOfSyncError(f"trainer and rollout engine are out of sync: {'; '.join(report.problems())}")
    return report


def _samples(config: RunConfig) -> list[Sample]:
    manifest, video_dir = config.eval.manifest, config.eval.video_dir
    if not OmegaConf.is_missing(config.data, "train"):
        manifest, video_dir = config.data.train, config.data.video_dir
    if manifest is None:
        raise ConfigError("a check needs a manifest to sample from: set data.train or eval.manifest")
    return read_samples(config, manifest=manifest, video_dir=video_dir, thinking_targets=False)


@torch.no_grad()
def compare(run: Run, samples: list[Sample]) -> SyncReport:
    """Send, sample, compute the same log-probabilities in the trainer, send again, sample again (collective)."""
    rollout, layout = run.config.rollout, run.layout
    with run.timer.during("data"):
        run.vision.release()
        prompts, dropped = _prompts(run, samples)
        embeds = owned_embeddings(run, prompts)
    count = sum_over({"prompts": float(len(prompts))}, group=layout.dp, device=layout.device)
    if not count["prompts"]:
        first = dropped[0]
        raise ManifestError(f"none of the first samples can be used, for example {first.sample_id}: {first.reason}")

    def sampled(*, group_size: int, temperature: float) -> list[RolloutGroup]:
        sampling = Sampling(
            group_size=group_size,
            max_tokens=run.config.data.max_response_tokens,
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )
        with run.timer.during("rollout"):
            return run.sampler.finish(run.sampler.begin(prompts, embeds, sampling=sampling, step=0))

    _send(run, version=0)
    # Greedy first: in both rounds without keys and values of earlier prompts.
    before = sampled(group_size=1, temperature=0.0)
    groups = sampled(group_size=rollout.group_size, temperature=rollout.temperature)
    run.sampler.release()
    sums, max_gap = _gaps(run, groups)
    sent = _send(run, version=1)
    after = sampled(group_size=1, temperature=0.0)
    sums["greedy_changed"] = sum(
        float(old.response_ids != new.response_ids) for old, new in zip(before, after, strict=True)
    )
    sums["responses"] = float(sum(len(group.response_ids) for group in groups))
    sums = sum_over(sums, group=layout.dp, device=layout.device)
    tokens = max(1.0, sums["tokens"])
    return SyncReport(
        version=run.sampler.version,
        sent=sent,
        limit=MEAN_GAP_LIMITS[run.config.model.dtype],
        prompts=int(count["prompts"]),
        responses=int(sums["responses"]),
        tokens=int(sums["tokens"]),
        mean_gap=sums["gap"] / tokens,
        max_gap=max_over({"gap": max_gap}, group=layout.dp, device=layout.device)["gap"],
        mean_logprob=sums["logprob"] / tokens,
        greedy_changed=int(sums["greedy_changed"]),
        dropped=dropped,
    )


def _prompts(run: Run, samples: list[Sample]) -> tuple[list[Prompt], list[Dropped]]:
    """This replica's, from the start of the manifest and again when it is short; the drops of all replicas."""
    layout = run.layout
    count = check_prompts(run.config.parallel)
    mine = list(islice(cycle(samples), layout.dp_rank * count, (layout.dp_rank + 1) * count))
    prompts, unusable = plan_prompts(run, mine)
    prompts, unreadable = make_ready(run, prompts)
    parts = gather_objects([*unusable, *unreadable], group=layout.dp)
    return prompts, [drop for part in parts for drop in part]


def _send(run: Run, *, version: int) -> Sent:
    """One update of all the engine's weights, whether it has them or not."""
    sent, name_of = Sent(), family_of(run.config.model).sampler_name

    def counted() -> Iterator[WeightBucket]:
        for bucket in run.trainer.export_weights(name_of=name_of):
            sent.buckets += 1
            sent.tensors += len(bucket.tensors)
            sent.bytes += sum(tensor.nbytes for tensor in bucket.tensors.values())
            yield bucket
            del bucket  # its memory is the next one's

    with run.timer.during("sync"):
        run.sampler.load_weights(counted(), version=version)
    return sent


def _gaps(run: Run, groups: list[RolloutGroup]) -> tuple[dict[str, float], float]:
    """Sums over this replica's response tokens, and its largest gap, of the packs that training would make."""
    config = run.config
    packs = pack_rollouts(
        groups,
        [torch.zeros(len(group.response_ids)) for group in groups],
        pack_tokens=config.data.pack_tokens,
        share_prefix=config.mr_sp.mode.name == "shared_prefix",
    )
    tokens = [pack.tokens for pack in packs]
    sums, max_gap = {"tokens": 0.0, "gap": 0.0, "logprob": 0.0}, 0.0
    with run.timer.during("logprob"):
        trainers = run.trainer.logprobs(tokens, temperature=config.rollout.temperature) if tokens else []
    for pack, logprobs_R in zip(packs, trainers, strict=True):
        gap_R = (logprobs_R.double() - pack.sampler_logprobs_R.double()).abs()
        sums["tokens"] += len(gap_R)
        sums["gap"] += gap_R.sum().item()
        sums["logprob"] += logprobs_R.double().sum().item()
        max_gap = torch.cat((gap_R, gap_R.new_tensor([max_gap]))).max().item()
    return sums, max_gap
