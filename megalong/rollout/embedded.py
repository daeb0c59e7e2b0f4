"""The embedded rollout engine: transformers' `generate` in the training process, on synced weights.

Needs nothing but the base install. The prompt's keys and values are computed once per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megalong.records import MEDIA_TOKEN, WeightBucket, tensor_checksums
from megalong.rollout.engine import Request, Sampled, Sampling, WeightSyncError
from megalong.rollout.logits import float32_logits
from megalong.rollout.weight_check import WeightCheck


class SeededSampler(LogitsProcessor):
    """Draws each row's token with the row's own generator and makes it the only choice left.

    Gumbel-max: argmax(logits / T + Gumbel noise) is a sample of softmax(logits / T). With a generator per row a
    response is the same whatever batch, rank or replica it is sampled in.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self.greedy = sampling.temperature == 0
        self.temperature = 1.0 if self.greedy else sampling.temperature
        self.warpers: list[Callable[[Tensor, Tensor], Tensor]] = []
        if sampling.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.logprobs: list[Tensor] = []  # one [rows] float32 tensor per step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scaled = scores.float() / self.temperature
        allowed = scaled
        for warper in self.warpers:
            allowed = warper(input_ids, allowed)
        chosen = allowed if self.greedy else allowed + self._gumbel(allowed)
        token = chosen.argmax(dim=-1, keepdim=True)
        self.logprobs.append(scaled.log_softmax(-1).gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _gumbel(self, like: Tensor) -> Tensor:
        noise = torch.empty_like(like)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return -noise.log()


class _Float32Head(nn.Linear):
    """What transformers' own head becomes, its weight in place: it may be the embedding's, too."""

    def forward(self, hidden: Tensor) -> Tensor:
        return float32_logits(hidden, self.weight)


class EmbeddedEngine:
    """`model` is a transformers causal LM with uninitialised weights.

    name_of: sync name to the name of the model's parameter, None for a weight that the model has no part for.
    """

    def __init__(
        self, model: PreTrainedModel, *, name_of: Callable[[str], str | None], eos_id: int, device: torch.device,
        batch_prompts: int,
    ) -> None:  # fmt: skip
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.get_output_embeddings().__class__ = _Float32Head
        self.weights = WeightCheck(model, name_of=name_of)
        self.eos_id = eos_id
        self.device = device
        self.batch_prompts = batch_prompts
        self.shares_gpus = self.asleep = self.needs_weights = False
        self.counts: dict[str, float] = {}

    @property
    def version(self) -> int:
        return self.weights.version

    def embeds_room(self, rows: int) -> None:
        """See RolloutEngine: it takes embeddings where they are."""

    def release(self) -> None:
        """Its weights are the trainer's size and stay where they are."""

    def close(self) -> None:
        """It is an object of the trainer's process."""

    @torch.no_grad()
    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        """See RolloutEngine. Buckets are copied one at a time."""
        update = self.weights.begin(version)
        parameters = dict(self.model.named_parameters())
        for bucket in buckets:
            if not torch.equal(tensor_checksums(bucket.tensors.values()), bucket.checksums_n):
                raise WeightSyncError(
                    f"version {version}: a bucket's checksum is wrong ({list(bucket.tensors)[:3]} ..)"
                )
            for name, tensor in update.of(bucket).tensors.items():
                parameters[name].copy_(tensor)
                del tensor
            del bucket  # its memory is the next one's
        update.end()

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        """See RolloutEngine. It shares the trainer's device, so it samples when it is waited for."""
        self._begun = requests, sampling

    def finish(self) -> list[list[Sampled]]:
        requests, sampling = self._begun
        del self._begun
        return self.generate(requests, sampling=sampling)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[list[Sampled]]:
        """See RolloutEngine. Prompts are batched (left-padded) `batch_prompts` at a time, similar lengths together."""
        self.weights.require()
        results: dict[int, list[Sampled]] = {}
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].ids_P))
        for at in range(0, len(order), self.batch_prompts):
            indexes = order[at : at + self.batch_prompts]
            groups = self._generate_batch([requests[index] for index in indexes], sampling)
            results.update(zip(indexes, groups, strict=True))
        return [results[index] for index in range(len(requests))]

    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sampled]]:
        group, longest = sampling.group_size, max(len(request.ids_P) for request in requests)
        ids_BP = torch.full((len(requests), longest), self.eos_id)
        mask_BP = torch.zeros((len(requests), longest), dtype=torch.int64)
        for row, request in enumerate(requests):
            request.check(group_size=group)
            ids_BP[row, longest - len(request.ids_P) :] = torch.tensor(request.ids_P)
            mask_BP[row, longest - len(request.ids_P) :] = 1
        ids_BP, mask_BP = ids_BP.to(self.device), mask_BP.to(self.device)
        positions = _left_padded_positions(requests, longest).to(self.device)
        cache = self._prefill(ids_BP, mask_BP, positions, requests)
        cache.batch_repeat_interleave(group)
        sampler = SeededSampler([seed for request in requests for seed in request.seeds], sampling, self.device)
        sequences = self.model.generate(
            # The cache holds all of the prompt but its last token, so the other ids are never looked up.
            input_ids=ids_BP.clamp_min(0).repeat_interleave(group, dim=0),
            attention_mask=mask_BP.repeat_interleave(group, dim=0),
            # generate() counts on from each row's last position.
            position_ids=positions.repeat_interleave(group, dim=-2),
            past_key_values=cache,
            logits_processor=LogitsProcessorList([sampler]),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                eos_token_id=self.eos_id,
                pad_token_id=self.eos_id,
            ),
        )
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
        responses = [
            _cut(ids, values, eos_id=self.eos_id)
            for ids, values in zip(sequences[:, longest:].tolist(), logprobs, strict=True)
        ]
        return [responses[at : at + group] for at in range(0, len(responses), group)]

    def _prefill(self, ids_BP: Tensor, mask_BP: Tensor, positions: Tensor, requests: Sequence[Request]) -> DynamicCache:
        """Keys and values of every prompt token but the last. positions: [B, P] or [3, B, P]."""
        embeds_BPD = self.model.get_input_embeddings()(ids_BP.clamp_min(0))
        vision = [request.embeds_ND for request in requests if request.embeds_ND is not None]
        media_BP = ids_BP == MEDIA_TOKEN
        deeper: dict[str, object] = {}
        if vision:
            own_ND, *levels = torch.cat(vision).to(embeds_BPD).split(embeds_BPD.shape[-1], dim=-1)
            embeds_BPD = embeds_BPD.masked_scatter(media_BP[..., None], own_ND)
            if levels:  # what the first layers add at the same places
                deeper = {"visual_pos_masks": media_BP[:, :-1], "deepstack_visual_embeds": levels}
        cache = DynamicCache(config=self.model.config)
        self.model.base_model(
            inputs_embeds=embeds_BPD[:, :-1],
            attention_mask=mask_BP[:, :-1],
            position_ids=positions[..., :-1],
            past_key_values=cache,
            use_cache=True,
            **deeper,
        )
        return cache


def _left_padded_positions(requests: Sequence[Request], longest: int) -> Tensor:
    """[B, P], or [3, B, P] for M-RoPE; 0 under the padding."""
    padded = [F.pad(request.positions_P, (longest - len(request.ids_P), 0)) for request in requests]
    return torch.stack(padded, dim=-2)


def _cut(ids: list[int], logprobs: list[float], *, eos_id: int) -> Sampled:
    """Drop what follows the first EOS."""
    truncated = eos_id not in ids
    length = len(ids) if truncated else ids.index(eos_id) + 1
    return Sampled(ids=tuple(ids[:length]), logprobs=tuple(logprobs[:length]), truncated=truncated)
