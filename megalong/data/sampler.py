"""Endless, shuffled, resumable order of samples; each data-parallel rank gets its share of a batch."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from megalong.parallel.split import shard_range

logger = logging.getLogger(__name__)


class PromptSampler:
    """Iterator over the sample indexes of this data-parallel rank, one list per global batch.

    The epochs' orders, one after another, are one endless sequence; a global batch is the next
    `batch_size` of it, so it may run from one epoch into the next and each epoch has every sample once.
    Rank r takes the r-th contiguous share of the batch (shares may differ by one, or be empty when
    batch_size < dp_size): joined in rank order they are the same batch for every dp_size. The state is
    the position in the sequence and nothing of the ranks, so a run may resume with another dp_size or
    batch_size.

    questions_per_video > 1, with shuffle: that many samples whose entries of `videos` are equal stand side by side, and
    begin at a multiple of it, so that a share of such a size holds them all.
    """

    def __init__(
        self, num_samples: int, batch_size: int, dp_rank: int, dp_size: int, *,
        seed: int, shuffle: bool, questions_per_video: int = 1, videos: Sequence[Hashable] = (),
    ) -> None:  # fmt: skip
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1; check data.train")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1; set grpo or sft.batch_size")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more; set data.seed")
        if batch_size > num_samples:
            logger.info(  # which the main process alone shows
                "a batch of %s is more than the %s samples of data.train: some come %s times in it; lower grpo or "
                "sft.batch_size", batch_size, num_samples, -(-batch_size // num_samples),
            )  # fmt: skip
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.questions_per_video = questions_per_video
        self._videos = videos
        self.position = 0  # samples of the endless sequence handed out so far, over all ranks
        self._share = shard_range(batch_size, dp_rank, dp_size)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        indexes = self.peek()
        self.position += self.batch_size
        return indexes

    def peek(self) -> list[int]:
        """What the next call of next() returns."""
        return [self._sample_at(self.position + offset) for offset in range(*self._share)]

    def state_dict(self) -> dict[str, int | bool]:
        return {
            "position": self.position,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "questions_per_video": self.questions_per_video,
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue after the last batch of the saved run. Raises ValueError when the order differs."""
        state = {"questions_per_video": 1, **state}  # a checkpoint from before there was the setting has none
        for name in ("num_samples", "seed", "shuffle", "questions_per_video"):
            knob, here = "data.train" if name == "num_samples" else f"data.{name}", getattr(self, name)
            if state[name] != here:
                raise ValueError(
                    f"sampler state has {name}={state[name]}, this run has {name}={here}: the order of samples "
                    f"would change; restore {knob}, or choose another logger.run_dir, where model.init_from takes the "
                    "weights"
                )
        if state["position"] < 0:
            raise ValueError(f"sampler state has position={state['position']}, expected 0 or more")
        self.position = int(state["position"])

    def _sample_at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if not self.shuffle:
            return offset
        if epoch != self._epoch:
            # The pair seeds the generator: seed + epoch would give seed 1's second epoch to seed 2's first.
            rng = np.random.default_rng((self.seed, epoch))
            self._order = rng.permutation(self.num_samples)
            if self.questions_per_video > 1:
                first = epoch * self.num_samples
                self._order = neighbouring(self._order, self._videos, self.questions_per_video, first=first, rng=rng)
            self._epoch = epoch
        return int(self._order[offset])


def neighbouring(
    order: np.ndarray, videos: Sequence[Hashable], together: int, *, first: int, rng: np.random.Generator
) -> np.ndarray:
    """`order` (sample indexes, [N] int64) rearranged: `together` samples of a video side by side, where it has as many.

    What is left of a video shares such a place with the rests of others, none torn apart where they fit. first: the
    order's position in the endless sequence, in which the places begin at multiples of `together`.
    """
    samples_of: dict[Hashable, list[int]] = {}
    for sample in order.tolist():
        samples_of.setdefault(videos[sample], []).append(sample)
    parts = [own[at : at + together] for own in samples_of.values() for at in range(0, len(own), together)]
    places: list[list[list[int]]] = [[] for _ in range(together + 1)]  # by how many samples they still take
    for part in sorted(parts, key=len, reverse=True):
        fitting = next((with_room for with_room in places[len(part) : together] if with_room), None)
        place = [*(fitting.pop() if fitting else ()), *part]
        places[together - len(place)].append(place)
    whole, partial = places[0], [place for with_room in places[1:] for place in with_room]
    rng.shuffle(whole)
    rng.shuffle(partial)  # how many questions a video has tells nothing about when it comes
    lead, head = min(-first % together, len(order)), []  # samples before the first place
    while len(head) < lead:
        head += (partial or whole).pop()
    rest = head[lead:]
    for place in partial:
        rest += place
        if len(rest) % together == 0:
            whole.append(rest)
            rest = []
    rng.shuffle(whole)
    return np.array([*head[:lead], *(sample for place in whole for sample in place), *rest], dtype=np.int64)
