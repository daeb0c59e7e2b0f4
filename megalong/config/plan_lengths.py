"""Tokens of prompts, responses and packs at the configured limits, by mr_sp.mode."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config import costs
from megalong.config.model_shape import ModelShape
from megalong.config.plan_videos import sharing
from megalong.config.tree import SHARDED, ParallelConfig, RunConfig
from megalong.config.validate import TEXT_TOKENS, Task, frames_per_video, prompt_tokens

CHECK_PROMPTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Token counts; a real video or response may be shorter. A pack has copies of prompts, each before responses."""

    frames: int
    tokens_per_frame: int
    prompt: int
    response: int
    group: int  # responses of a prompt; 1 for sft
    responses: int  # behind each copy of a prompt in a pack: the group, or 1 where every response repeats its prompt
    copies_per_pack: int  # of the longest
    questions: int  # about one video, which they share in a pack, at most
    pack: int  # tokens at most: shorter prompts and responses fill a pack up to data.pack_tokens
    packs: int  # of one optimizer step, on one replica, or on each of its context-parallel ranks when not sharded
    sharded: bool

    @property
    def shared(self) -> int:
        """One group as a pack: the prompt once."""
        return costs.shared_tokens(self.prompt, self.response, self.group)

    @property
    def repeated(self) -> int:
        return costs.repeated_tokens(self.prompt, self.response, self.group)

    @property
    def longest(self) -> int:
        """What a pack has of one copy of a prompt."""
        return costs.shared_tokens(self.prompt, self.response, self.responses)

    @property
    def repeats(self) -> bool:
        """Whether every response carries its own prompt."""
        return self.responses < self.group

    def longest_call(self, *, ring: int) -> int:
        """Pairs of a query and a key in the longest attention call of a rank of a ring, of one copy of a prompt.

        A lone sequence, or a prompt that responses share, on itself: over a ring in chunks, each on all before it
        (attention.tree). The responses: together on their prompt, and each on itself in one padded batch. Questions
        about one video, with their responses: together on the video; with one each they are such a batch.
        """
        apart = self.questions > 1
        own = self.prompt if self.responses > 1 else self.longest
        chunk = -(-own // (2 * ring))
        calls = [own**2 if ring == 1 else chunk * max(chunk, own - chunk)]
        if self.responses > 1 or apart:
            below = self.questions * (self.responses * self.response + TEXT_TOKENS * apart)
            calls += [-(-below // ring) * self.prompt, self.responses * self.response**2]
        if apart and self.responses == 1:
            calls.append(self.questions * (TEXT_TOKENS + self.response) ** 2)
        return max(calls)

    def on_rank(self, count: int, *, cp: int) -> int:
        """What a context-parallel rank has of so many tokens (or bytes) of a pack."""
        return -(-count // cp) if self.sharded else count


def lengths_of(config: RunConfig, task: Task, shape: ModelShape, *, dp: int, cp: int) -> Lengths:
    """Of a configuration that `validate` accepts."""
    prompt, response = prompt_tokens(config, shape), config.data.max_response_tokens
    sampled = config.rollout.group_size
    group = {"grpo": sampled, "check-sync": sampled, "eval": config.eval.num_samples}.get(task, 1)
    prompts = {
        "sft": config.sft.batch_size // dp,
        "grpo": config.grpo.batch_size // config.grpo.updates_per_batch // dp,
        "eval": config.eval.batch_prompts,
        "check-sync": check_prompts(config.parallel),
        "cache-embeddings": 1,
    }[task]
    mode = config.mr_sp.mode.name
    responses = group if mode == "shared_prefix" or task == "eval" else 1
    copies = prompts * (group // responses)
    sharded = mode in SHARDED
    # What is longer than pack_tokens gets a pack of its own.
    longest = costs.shared_tokens(prompt, response, responses)
    per_pack = max(1, min(config.data.pack_tokens // longest, copies))
    packs = -(-copies // (per_pack if sharded else per_pack * cp))
    questions = 1
    if shape.vision and mode == "shared_prefix":
        room = (config.data.pack_tokens - prompt + TEXT_TOKENS) // (longest - prompt + TEXT_TOKENS)
        questions = max(1, min(sharing(config, task), prompts, room))
    if task == "eval":
        packs = -(-prompts * group // options_per_pack(config, prompt, response))
    return Lengths(
        frames=frames_per_video(config) if shape.vision else 0,
        tokens_per_frame=shape.vision.tokens_per_frame if shape.vision else 0,
        prompt=prompt,
        response=response,
        group=group,
        responses=responses,
        copies_per_pack=per_pack,
        questions=questions,
        pack=max(longest, min(config.data.pack_tokens, copies * longest)),
        packs=max(1, packs),
        sharded=sharded,
    )


def check_prompts(parallel: ParallelConfig) -> int:
    """Prompts of a replica that `megalong check-sync` samples: one per rank at least, so that every engine answers."""
    return max(CHECK_PROMPTS, parallel.tp * parallel.cp * parallel.pp)


def options_per_pack(config: RunConfig, prompt: int, response: int) -> int:
    """Responses whose options (eval.likelihood) share a pack: each counts with its prompt, which those in it share."""
    return max(1, config.data.pack_tokens // (prompt + response))
