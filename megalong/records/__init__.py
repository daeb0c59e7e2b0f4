"""Frozen records that cross a stage boundary, and the shape legend of the whole package.

Shape legend (suffix of a tensor's name; one letter, one meaning, everywhere):
    T  packed tokens            R  rows that predict a response token (one log-probability each)
    P  prompt tokens            S  responses (sequences) in a pack
    F  frames of a video        H W C  frame height, width, channels
    N  vision tokens            D  LLM hidden width
    V  vocabulary               G  responses of one prompt (group)
    K  reward functions         B  prompts in a batch
A digit is a fixed size; no suffix is a scalar or not a tensor.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

MEDIA_TOKEN = -1
"""Token id that stands for 'this position takes a vision embedding'. Never looked up in a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One line of a manifest: a question about zero or more videos."""

    sample_id: str
    question: str  # problem text, options included
    answer: str  # ground truth, taken out of its <answer> tags
    videos: tuple[str, ...]  # absolute paths, in the order they appear in the prompt; a picture is a one-frame video
    problem_type: str  # routes the accuracy reward: "multiple choice", "numerical", "open-ended", ...
    category: str  # temporal, spatial, goal, plot, ... ; "uncategorised" when the manifest has none
    reasoning: str  # chain of thought for SFT; "" when the manifest has none
    subtitles: str  # subtitle text put before the question; "" when there is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """A sample that is left out, and why. Counted in the metrics and written to dropped.jsonl."""

    sample_id: str
    stage: str  # "decode", "prompt", "group", ...
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameSelection:
    """Which frames of which file are used: decided once, used by trainer and sampler alike."""

    path: str
    frames: tuple[int, ...]  # presentation-order indexes, ascending; the last is repeated to fill a step of the tower
    seconds: tuple[float, ...]  # presentation time of each
    height: int  # pixels that the frames are decoded to, by the family's rule from the file's own size
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Decoded frames of (a range of) a FrameSelection, resized to its height and width."""

    selection: FrameSelection
    first: int  # position in selection.frames of frames_FHWC[0]
    frames_FHWC: np.ndarray  # uint8 RGB


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A sample as token ids, as the one sequence builder (data.sequence) makes it."""

    sample: Sample
    ids_P: tuple[int, ...]  # MEDIA_TOKEN where a vision embedding goes
    selections: tuple[FrameSelection, ...]  # one per video, in order
    positions_P: Tensor = field(compare=False)  # int64, CPU; [P], or [3, P] for M-RoPE: temporal, height, width
    next_position: int  # where every response starts, in all three rows: one more than the largest


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """G responses of one prompt, sampled with the weights of `weights_version`."""

    prompt: Prompt
    response_ids: tuple[tuple[int, ...], ...]  # without padding; ends with EOS unless truncated
    logprobs: tuple[tuple[float, ...], ...]  # sampler log-probability of each response token
    texts: tuple[str, ...]  # decoded, special tokens removed
    truncated: tuple[bool, ...]  # hit max_response_tokens before EOS
    weights_version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredGroup:
    group: RolloutGroup
    rewards_G: Tensor  # [G] float32, CPU; weighted total
    parts_GK: Tensor  # [G, K] float32, CPU; one column per reward function
    part_names: tuple[str, ...]  # K names
    round: int = 0  # which batch of its step it was sampled in: dynamic sampling has several


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A run of a pack's rows. It sees all rows of its ancestors, and its own causally; nothing else.

    A group is a prefix (no parent) and G responses whose parent it is. Questions about one video: the video, whose
    children are the questions, whose children are the responses. Segments of a pack are in row order, every one
    directly followed by its descendants, and cover the pack without gaps.
    """

    start: int  # first row
    length: int  # rows, at least 1
    parent: int  # index into the pack's segments; -1: a root

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """One pack of groups (a micro-batch): the shared prefix is stored and computed once.

    Positions restart after the prefix for every response; response i sees its prefix and itself. A plain sequence is a
    group of one response. All tensors: CPU, replicated over the replica's ranks; the engine shards them.
    """

    ids_T: Tensor  # [T] int64; MEDIA_TOKEN where a vision embedding goes
    positions_T: Tensor  # [T] int64, or [3, T] for M-RoPE: temporal, height, width; equal rows on response tokens
    segments: tuple[Segment, ...]
    selections: tuple[FrameSelection, ...]  # videos whose embeddings fill the MEDIA_TOKEN places, in order
    rows_R: Tensor  # [R] int64; index into T of the position that predicts targets_R
    targets_R: Tensor  # [R] int64 token ids
    response_R: Tensor  # [R] int64; which response (0..S-1) of the pack the row belongs to, ascending

    @property
    def response_lens(self) -> list[int]:
        """Tokens of each response of the pack."""
        return torch.bincount(self.response_R).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyBatch:
    """A pack with everything the GRPO-family losses read. Row tensors: [R] float32, CPU."""

    tokens: TokenBatch
    advantages_S: Tensor  # [S] float32
    sampler_logprobs_R: Tensor
    old_logprobs_R: Tensor | None  # None: one update per rollout batch, old = stop-gradient(policy)
    ref_logprobs_R: Tensor | None  # None: no KL term


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one optimizer step reports; scalars are global (summed over ranks and micro-batches)."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool  # non-finite loss or gradient: no update was made
    num_tokens: int  # tokens that went through the LLM
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBucket:
    """A bounded piece of the policy in Hugging Face names and shapes, on its way to a sampler."""

    tensors: dict[str, Tensor]
    checksums_n: Tensor  # tensor_checksums(tensors.values()) at the sender

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> WeightBucket:
        """With the checksums of the tensors as they are now."""
        return cls(tensors=tensors, checksums_n=tensor_checksums(tensors.values()))


def tensor_checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Checksum of each tensor's shape, dtype and bytes: [n] int64 on the tensors' device, not waited for.

    Sender and receiver call this one function; the receiver may know the tensors by other names. Bytes are summed as
    int64 words (modulo 2^64), rows of them weighed by odd factors: any change of one word changes the sum.
    """
    sums = []
    for tensor in tensors:
        header = zlib.crc32(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        sums.append(_word_sum(tensor) * (2 * header + 1) + header)
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


_ROW_WORDS = 256


def _word_sum(tensor: Tensor) -> Tensor:
    """Weighted sum of the tensor's bytes as int64 words, 0-dim int64. It is read once."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()  # words must be aligned
    whole = len(data) // (8 * _ROW_WORDS) * 8 * _ROW_WORDS
    rest = data[whole:]
    if len(rest) % 8:
        rest = torch.nn.functional.pad(rest, (0, -len(rest) % 8))
    words = rest.view(torch.int64)
    total = (words * _odd_numbers(_ROW_WORDS, data.device)[: len(words)]).sum()
    if whole:
        rows_R = data[:whole].view(torch.int64).view(-1, _ROW_WORDS).sum(1)
        # A table of a power of two: few of them are made.
        odd = _odd_numbers(1 << (len(rows_R) - 1).bit_length(), data.device)[: len(rows_R)]
        total = total * 3 + (rows_R * odd).sum()
    return total


@cache
def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * 2 + 1


__all__ = [
    "MEDIA_TOKEN",
    "Clip",
    "Dropped",
    "FrameSelection",
    "Segment",
    "PolicyBatch",
    "Prompt",
    "RolloutGroup",
    "Sample",
    "ScoredGroup",
    "StepStats",
    "TokenBatch",
    "WeightBucket",
    "tensor_checksums",
]
