"""Group sampling: the replica's prompts are shared out over its ranks' engines and everybody gets all groups."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megalong.parallel.collectives import gather_objects
from megalong.parallel.layout import ParallelLayout
from megalong.records import MEDIA_TOKEN, Prompt, RolloutGroup, WeightBucket
from megalong.rollout.engine import Request, RolloutEngine, Sampled, Sampling


def response_seeds(sample_id: str, *, seed: int, step: int, repeat: int, group_size: int) -> tuple[int, ...]:
    """A seed per response that depends on the run's seed, the step and the sample, and not on the layout.

    repeat: how many times this step has had the sample before; one that comes again gets other responses.
    """
    first = repeat * group_size
    return tuple(zlib.crc32(f"{seed}/{step}/{sample_id}/{first + index}".encode()) for index in range(group_size))


def share_out(prompts: Sequence[Prompt], num_engines: int) -> list[int]:
    """Which engine samples each prompt.

    No engine gets more than an equal share, rounded up: a batch lasts as long as its slowest engine, and two that
    compute the same video side by side take no longer than one. Within that, questions about the same videos go to one.
    """
    count = len(prompts)
    first_of: dict[object, int] = {}
    videos = [first_of.setdefault(prompt.selections or index, index) for index, prompt in enumerate(prompts)]
    order = sorted(range(count), key=videos.__getitem__)  # questions about the same videos side by side
    largest = -(-count // num_engines)
    engines = [0] * count
    first = 0
    for engine in range(num_engines):
        others = num_engines - engine - 1
        last = first + -(-(count - first) // (others + 1))
        for stop in range(last, max(first, count - others * largest - 1), -1):
            if stop == count or videos[order[stop - 1]] != videos[order[stop]]:
                last = stop  # the most that ends with a video and leaves the others no more than `largest`
                break
        for index in order[first:last]:
            engines[index] = engine
        first = last
    return engines


@dataclass(kw_only=True, slots=True)
class PendingGroups:
    """What begin() gives out and finish() takes."""

    prompts: list[Prompt]
    version: int  # of the weights that sample
    asked: bool  # whether this rank's engine has a share of the prompts
    before: Mapping[str, float] = field(default_factory=dict)  # that engine's counts
    groups: list[RolloutGroup] | None = None  # once they are there


class GroupSampler:
    """Samples G responses per prompt with the weights loaded last. All methods are collective over the replica.

    One batch at a time: load_weights, release and begin wait for the batch begun before, whose groups are kept for
    its finish().
    """

    def __init__(
        self,
        engine: RolloutEngine | None,
        layout: ParallelLayout,
        *,
        decode: Callable[[Sequence[int]], str],
        seed: int,
    ) -> None:
        self.engine = engine  # None: another rank of the replica drives one
        self.layout = layout
        self.decode = decode
        self.seed = seed
        self.version = -1  # of the weights loaded last
        self.needs_weights = False  # before the next begin, all of them
        mine = engine is not None, engine is not None and engine.shares_gpus
        flags, sharing = zip(*gather_objects(mine, group=layout.replica_host), strict=True)
        self.shares_gpus = any(sharing)  # an engine of the replica is a process of its own on the trainer's GPUs
        self._released = False  # an engine sleeps, and needs memory to wake up
        self._pending: PendingGroups | None = None  # what the engines are sampling
        self._counts: Counter[str] = Counter()  # of the batches that have ended, see take_counts
        self._drivers = [rank for rank, has_engine in enumerate(flags) if has_engine]

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        """See RolloutEngine. A rank without an engine takes part in making the buckets."""
        self.settle()
        self._make_room()
        buckets = self._leaving_room(buckets)
        if self.engine is None:
            for bucket in buckets:
                del bucket  # its memory is the next one's
        else:
            self.engine.load_weights(buckets, version=version)
        self.version, self.needs_weights, self._released = version, False, False

    def release(self) -> None:
        """The engines give back the memory that the trainer needs, until the next load_weights or begin."""
        self.settle()
        if self.engine is not None:
            self.engine.release()
        mine = (self.engine.asleep, self.engine.needs_weights) if self.engine is not None else (False, False)
        everyone = gather_objects(mine, group=self.layout.replica_host)
        self._released, self.needs_weights = (any(flags) for flags in zip(*everyone, strict=True))

    def _make_room(self) -> None:
        """Before an engine wakes up: one on several GPUs needs those of ranks without an engine, too."""
        if self._released and len(self._drivers) < self.layout.replica_size:
            if self.engine is None:
                torch.cuda.empty_cache()
            gather_objects(None, group=self.layout.replica_host)  # nobody goes on before all have done it

    def _leaving_room(self, buckets: Iterable[WeightBucket]) -> Iterator[WeightBucket]:
        """The buckets. Where they were gathered, an engine's keys and values wake up when it has all of them.

        Where an engine is on the GPUs that gather, nobody begins the next bucket, and waits in NCCL for the ranks that
        drive engines, before these have loaded the last one.
        """
        for bucket in buckets:
            yield bucket
            del bucket  # its memory is the next one's
            if self.shares_gpus and self.layout.replica_size > 1:
                gather_objects(None, group=self.layout.replica_host)
        self._make_room()

    def close(self) -> None:
        """End the engines."""
        if self.engine is not None:
            self.engine.close()

    def begin(
        self,
        prompts: Sequence[Prompt],
        embeds: Sequence[Tensor | None],
        *,
        sampling: Sampling,
        step: int,
        repeats: Sequence[int] | None = None,
    ) -> PendingGroups:
        """Ask the engines for one group per prompt.

        embeds: [N, D'] of each prompt that this rank owns (owners), the very same tensor for prompts about the same
        videos; the others' are not read. repeats: how many times this step, on any replica, has had each prompt's
        sample before; by default no sample comes twice.
        """
        self.settle()
        self._make_room()
        self._released = False
        repeats = repeats or [0] * len(prompts)
        here = self._owned(prompts)
        requests = [
            Request(
                ids_P=prompt.ids_P,
                positions_P=prompt.positions_P,
                next_position=prompt.next_position,
                embeds_ND=embeds_ND,
                seeds=response_seeds(
                    prompt.sample.sample_id,
                    seed=self.seed,
                    step=step,
                    repeat=repeat,
                    group_size=sampling.group_size,
                ),
            )
            for prompt, embeds_ND, repeat, is_mine in zip(prompts, embeds, repeats, here, strict=True)
            if is_mine
        ]
        before = dict(self.engine.counts) if requests else {}
        if requests:
            self.engine.begin(requests, sampling=sampling)
        self._pending = PendingGroups(prompts=list(prompts), version=self.version, asked=bool(requests), before=before)
        return self._pending

    def finish(self, pending: PendingGroups) -> list[RolloutGroup]:
        """The groups of a batch, waited for: in the order of its prompts, equal on every rank of the replica."""
        if pending is self._pending:
            self.settle()
        return pending.groups

    def settle(self) -> None:
        """Wait for the batch that the engines are sampling, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        mine, taken = [], {}
        if pending.asked:
            mine = self.engine.finish()
            taken = {name: total - pending.before[name] for name, total in self.engine.counts.items()}
        parts, counts = zip(*gather_objects((mine, taken), group=self.layout.replica_host), strict=True)
        owners, sampled = self.owners(pending.prompts), dict[int, list[Sampled]]()
        for rank, part in enumerate(parts):
            sampled.update(zip([index for index, owner in enumerate(owners) if owner == rank], part, strict=True))
        everyone = [sampled[index] for index in range(len(owners))]
        pending.groups = self.groups_of(pending.prompts, everyone, version=pending.version)
        if any(counts):
            lengths = [len(prompt.ids_P) for prompt in pending.prompts]
            for part in (*counts, {"prompt_tokens": sum(lengths), "sampled_groups": len(lengths)}):
                self._counts.update(part)

    def take_counts(self) -> dict[str, float]:
        """What the replica's engines have counted (RolloutEngine.counts) in the batches that ended since the last call,
        with `prompt_tokens` and `sampled_groups` of these; {} of engines that count nothing."""
        taken, self._counts = self._counts, Counter()
        return dict(taken)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside are batches of an evaluation, which take_counts() leaves out."""
        kept = self._counts.copy()
        yield
        self._counts = kept

    def groups_of(
        self, prompts: Sequence[Prompt], everyone: Sequence[Sequence[Sampled]], *, version: int
    ) -> list[RolloutGroup]:
        """The records of responses to the prompts, sampled with the weights of a version."""
        return [
            RolloutGroup(
                prompt=prompt,
                response_ids=tuple(response.ids for response in sampled),
                logprobs=tuple(response.logprobs for response in sampled),
                texts=tuple(self.decode(response.ids) for response in sampled),
                truncated=tuple(response.truncated for response in sampled),
                weights_version=version,
            )
            for prompt, sampled in zip(prompts, everyone, strict=True)
        ]

    def embeds_room(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """Host memory for the embeddings of those of the prompts that this rank owns: see RolloutEngine."""
        self.settle()
        mine = [prompt for prompt, here in zip(prompts, self._owned(prompts), strict=True) if here]
        rows = sum({prompt.selections: prompt.ids_P.count(MEDIA_TOKEN) for prompt in mine}.values())
        return self.engine.embeds_room(rows) if rows else None

    def _owned(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Of each prompt, whether this rank's engine samples it."""
        return [owner == self.layout.replica_rank for owner in self.owners(prompts)]

    def owners(self, prompts: Sequence[Prompt]) -> list[int]:
        """The rank of the replica that samples each prompt."""
        return [self._drivers[index] for index in share_out(prompts, len(self._drivers))]
