"""What every rollout engine does; one contract test runs over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megalong.records import MEDIA_TOKEN, WeightBucket


class WeightSyncError(Exception):
    """A weight update the engine refuses: wrong checksum, unknown or missing names, wrong shape or version."""


class RolloutEngineError(Exception):
    """The engine itself failed: its process ended, or it does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How responses are drawn."""

    group_size: int
    max_tokens: int
    temperature: float  # 0: greedy
    top_p: float
    top_k: int  # 0: off


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt: all G responses share its prefill."""

    ids_P: tuple[int, ...]  # MEDIA_TOKEN where a vision embedding goes
    positions_P: Tensor  # int64, CPU; [P] or [3, P], as in Prompt
    next_position: int  # of the first response token
    # [N, D], in order of the MEDIA_TOKEN places; the very same tensor in requests about the same videos, so that an
    # engine sees what they share
    embeds_ND: Tensor | None
    seeds: tuple[int, ...]  # one per response: a response does not depend on what else is in the batch

    def check(self, *, group_size: int) -> None:
        """Raises ValueError for a request that no engine can take.

        Each by itself: in a batch, one's missing embedding and another's extra one would cancel out.
        """
        if len(self.seeds) != group_size:
            raise ValueError(f"{len(self.seeds)} seeds for a group of {group_size}")
        places = self.ids_P.count(MEDIA_TOKEN)
        given = 0 if self.embeds_ND is None else len(self.embeds_ND)
        if places != given:
            raise ValueError(f"the prompt has {places} vision-token places but {given} embeddings were given")
        # generate() looks up the last token of the prompt itself, and the prefill takes what is before it.
        if len(self.ids_P) < 2 or self.ids_P[-1] == MEDIA_TOKEN:
            raise ValueError(
                f"the prompt has {len(self.ids_P)} tokens and ends in {self.ids_P[-1:]}, expected at least two "
                "tokens and a text token at the end"
            )
        if self.positions_P.shape[-1] != len(self.ids_P):
            raise ValueError(f"{self.positions_P.shape[-1]} positions for a prompt of {len(self.ids_P)} tokens")
        if (self.positions_P[..., -1] + 1 != self.next_position).any():
            raise ValueError(
                f"the prompt's last token is at position {self.positions_P[..., -1].tolist()}, so the response cannot "
                f"start at {self.next_position}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One response: token ids (EOS included when reached) and the sampler's log-probability of each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of softmax(logits / temperature), before top-p and top-k; temperature 1 if greedy
    truncated: bool


class RolloutEngine(Protocol):
    """Samples groups; gets every weight through load_weights and none from disk."""

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        """Take an update. The first one holds every weight; later ones may leave out frozen weights.
        Raises WeightSyncError and keeps refusing to generate when an update is wrong."""

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        """Ask for G responses of each request. An engine beside the trainer works on them while the trainer goes on.
        Until finish() nothing else can be asked of it but close()."""

    def finish(self) -> list[list[Sampled]]:
        """Wait for the responses to the requests begun last: G of each, in order."""

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[list[Sampled]]:
        """begin(), then finish()."""

    @property
    def version(self) -> int:
        """Version of the weights in use; -1 before the first update."""

    @property
    def shares_gpus(self) -> bool:
        """Whether it is a process of its own on the trainer's GPUs, which then take turns."""

    def embeds_room(self, rows: int) -> Tensor | None:
        """[rows, D] of host memory, from where it takes the embeddings of its next requests, one after the other, what
        several share once; written there, they need not be copied again. None: it takes them where they are."""

    @property
    def asleep(self) -> bool:
        """Whether release() gave back GPU memory, which it needs to wake up."""

    @property
    def counts(self) -> Mapping[str, float]:
        """Metrics that add up since the start, {} of an engine without any: `prefilled_tokens`, prompt tokens computed,
        and `handover_seconds`, spent on embeddings on their way to it."""

    @property
    def needs_weights(self) -> bool:
        """Whether release() threw the weights away, so that the next update must hold all of them."""

    def release(self) -> None:
        """Give back what memory the trainer may use until the next load_weights or generate."""

    def close(self) -> None:
        """End what the engine started. Nothing can be asked of it afterwards."""
