"""What every rollout engine does; one contract test runs over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megalong.records import WeightBucket


class WeightSyncError(Exception):
    """A weight update the engine refuses: wrong checksum, unknown or missing names, wrong shape or version."""


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
    embeds_ND: Tensor | None  # [N, D], in order of the MEDIA_TOKEN places
    seeds: tuple[int, ...]  # one per response: a response does not depend on what else is in the batch


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

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[list[Sampled]]:
        """G responses of each request, in order."""

    @property
    def version(self) -> int:
        """Version of the weights in use; -1 before the first update."""
