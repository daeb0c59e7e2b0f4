"""Rollout batches: G responses to each prompt, sampled while the trainer waits, or one batch ahead of it."""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from megalong.engine.trainer import merge_sums
from megalong.parallel.collectives import gather_objects
from megalong.records import Dropped, Prompt, RolloutGroup
from megalong.rollout.engine import Sampled, Sampling
from megalong.rollout.sampler import PendingGroups
from megalong.run import PromptBatches, Run, owned_embeddings

logger = logging.getLogger(__name__)

ROLLOUTS = "rollouts"
"""Where a checkpoint has the rollouts of the batch ahead."""
BLOCK_TOKENS = 128
"""vLLM keeps keys and values by whole blocks, the largest of so many tokens (on the CPU; 16 on a GPU): each response of
a group computes anew what its prompt has behind the last one."""


def begin_rollouts(run: Run, prompts: Sequence[Prompt], *, step: int, seen: Counter[str]) -> PendingGroups:
    """Have G responses to each prompt sampled, with the weights of now.

    `seen` counts what the step has had before, and this batch.
    """
    config = run.config
    with run.timer("rollout"):
        embeds = owned_embeddings(run, prompts)
    with run.timer("sync"):
        run.sync_weights()  # not before: an engine on the trainer's GPUs may sleep but for sampling
    with run.timer("rollout"):
        sampling = Sampling(
            group_size=config.rollout.group_size,
            max_tokens=config.data.max_response_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
        )
        repeats = count_repeats(run, prompts, seen)
        return run.sampler.begin(prompts, embeds, sampling=sampling, step=step, repeats=repeats)


def count_repeats(run: Run, prompts: Sequence[Prompt], seen: Counter[str]) -> list[int]:
    """How many times the step has had each prompt's sample before, in the order of the global batch. Adds to `seen`.

    A batch that runs from one epoch into the next, or is longer than the data, has a sample twice.
    """
    repeats = []
    everywhere = gather_objects([prompt.sample.sample_id for prompt in prompts], group=run.layout.dp)
    for rank, names in enumerate(everywhere):
        for name in names:
            if rank == run.layout.dp_rank:
                repeats.append(seen[name])
            seen[name] += 1
    return repeats


def prefill_metrics(run: Run) -> dict[str, float]:
    """GroupSampler.take_counts of the step's rollouts, over all replicas (collective over these).

    Once in a run, a warning where much more was computed of the prompts than one for each group.
    """
    counts = merge_sums(gather_objects(run.sampler.take_counts(), group=run.layout.dp))
    if not counts or run.told_of_prefill or not run.layout.is_main:
        return counts
    computed, once = counts["prefilled_tokens"], counts["prompt_tokens"]
    followers = counts["sampled_groups"] * (run.config.rollout.group_size - 1)
    if computed > 1.5 * (once + followers * BLOCK_TOKENS):
        run.told_of_prefill = True
        logger.warning(
            "vLLM computed %s prompt tokens for prompts of %s, %.1f times what one prompt per group takes: keys and "
            "values were gone before a group's other responses began; raise rollout.memory_share or rollout.engine_tp",
            f"{computed:,.0f}", f"{once:,.0f}", computed / once,
        )  # fmt: skip
    return counts


@dataclass(kw_only=True, slots=True)
class _Batch:
    """One batch of this replica's prompts."""

    prompts: list[Prompt]
    dropped: list[Dropped]
    position: dict[str, Any]  # PromptBatches.state_dict() before it
    pending: PendingGroups | None = None  # None: nobody samples it yet


class RolloutsAhead:
    """rollout.steps_off_policy=1: while a step trains, the engines sample for the next one.

    A step takes the batch that was begun in the step before, sends the weights it starts from to the engines, and has
    them begin the next batch. So step k, from the second on, trains on what the weights that step k - 1 started from
    have sampled. All methods are collective; nothing runs on a thread: engines beside the trainer need none.
    """

    def __init__(self, run: Run, batches: PromptBatches, *, total: int) -> None:
        """total: optimizer steps of the run; nothing is sampled for later ones."""
        self.run, self.batches, self.total = run, batches, total
        self._next: _Batch | None = None

    def take(self, step: int) -> tuple[list[RolloutGroup], list[Dropped]]:
        """This replica's groups of the round that begins with optimizer step `step`; the next round's are begun."""
        run = self.run
        batch = self._next or self._first(step)
        following, more = step + run.config.grpo.updates_per_batch, None
        if following <= self.total:
            more = self._prompts()  # before the wait: videos are encoded while the engines sample
        with run.timer("rollout"):
            groups = run.sampler.finish(batch.pending)
        if more is not None:
            more.pending = begin_rollouts(run, more.prompts, step=following, seen=Counter())
        self._next = more
        run.ahead = more.prompts if more is not None else ()
        return groups, batch.dropped

    def state_dict(self) -> dict[str, Any]:
        """See Resumable: the place before the batch ahead, and its rollouts, waited for.

        A run that continues reads the batch again and does not sample it: newer weights would give other responses.
        """
        batch = self._next
        if batch is None:
            return self.batches.state_dict()
        with self.run.timer.during("rollout"):
            groups = self.run.sampler.finish(batch.pending)
        mine = [[_name_of(group.prompt), group.response_ids, group.logprobs, group.truncated] for group in groups]
        everyone = [row for part in gather_objects(mine, group=self.run.layout.dp) for row in part]
        stored = {"version": batch.pending.version, "groups": everyone}
        # As text: dist_checkpointing walks over lists, number by number.
        return {**batch.position, ROLLOUTS: json.dumps(stored)}

    def _prompts(self) -> _Batch:
        position = self.batches.state_dict()
        with self.run.timer("data"):
            prompts, dropped = next(self.batches)
            self.batches.decode_ahead()
        return _Batch(prompts=prompts, dropped=dropped, position=position)

    def _first(self, step: int) -> _Batch:
        """The batch of the first round of this process: from the checkpoint, or begun now."""
        batch = self._prompts()
        stored = self.run.resumed.pop(ROLLOUTS, None)
        if stored is not None:
            batch.pending = self._restored(batch.prompts, json.loads(stored))
        if batch.pending is None:
            batch.pending = begin_rollouts(self.run, batch.prompts, step=step, seen=Counter())
        return batch

    def _restored(self, prompts: list[Prompt], stored: dict[str, Any]) -> PendingGroups | None:
        """This replica's share of a checkpoint's rollouts, at any DP size; None when this run would sample others."""
        run = self.run
        everywhere = gather_objects([_name_of(prompt) for prompt in prompts], group=run.layout.dp)
        names, group_size = [name for part in everywhere for name in part], run.config.rollout.group_size
        rows, most = stored["groups"], run.config.data.max_response_tokens  # the losses count on it
        too_long = any(len(ids) > most for row in rows for ids in row[1])
        if [row[0] for row in rows] != names or any(len(row[1]) != group_size for row in rows) or too_long:
            if run.layout.is_main:
                tqdm.write(
                    "the checkpoint's rollouts are of other prompts or another rollout.group_size than this run's "
                    f"first batch, or longer than data.max_response_tokens={most}: it is sampled anew"
                )
            return None
        before = sum(map(len, everywhere[: run.layout.dp_rank]))
        sampled = [
            [
                Sampled(ids=tuple(ids), logprobs=tuple(logprobs), truncated=truncated)
                for ids, logprobs, truncated in zip(*row[1:], strict=True)
            ]
            for row in rows[before : before + len(prompts)]
        ]
        version = stored["version"]
        groups = run.sampler.groups_of(prompts, sampled, version=version)
        return PendingGroups(prompts=prompts, version=version, asked=False, groups=groups)


def _name_of(prompt: Prompt) -> str:
    """The sample and what an engine is given of it, wherever its files are."""
    frames = [(item.frames, item.height, item.width) for item in prompt.selections]
    return f"{prompt.sample.sample_id}/{zlib.crc32(repr((prompt.ids_P, frames)).encode()):08x}"
