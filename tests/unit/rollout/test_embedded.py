"""What the embedded engine does beyond the contract: the prompt of a group is computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import World, check_logits_are_not_rounded, known_hidden_model, make_request, make_world

from megalong.records import MEDIA_TOKEN, WeightBucket
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import Sampling


@pytest.fixture(scope="module")
def world(layout: object, tiny_checkpoint: Path) -> World:
    return make_world(tiny_checkpoint, layout, engine="embedded")


def test_prefill_runs_once_per_group(world: World) -> None:
    engine = world.engine()
    seen: list[tuple[int, int]] = []  # (sequences, tokens of each) of every forward

    def count(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        tokens = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        seen.append((tokens.shape[0], tokens.shape[1]))

    hook = engine.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    requests = [
        make_request(range(20, 60), None, (0, 1, 2, 3)),
        make_request((5, 6, *[MEDIA_TOKEN] * 8, *range(100, 120)), torch.randn(8, 32), (4, 5, 6, 7)),
    ]
    sampling = Sampling(group_size=4, max_tokens=6, temperature=1.0, top_p=1.0, top_k=0)
    engine.generate(requests, sampling=sampling)
    hook.remove()
    assert seen[0] == (2, 39), "both prompts once, all but the last token"
    assert seen[1:] == [(8, 1)] * 6, "then one token of each of the eight responses at a time"


def test_prompts_of_similar_length_are_batched_together(world: World) -> None:
    engine = world.engine(batch_prompts=2)
    seen: list[tuple[int, int]] = []
    hook = engine.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (
            seen.append(tuple(kwargs["inputs_embeds"].shape[:2])) if kwargs.get("inputs_embeds") is not None else None
        ),
        with_kwargs=True,
    )
    requests = [make_request(range(1, 1 + n), None, (0,)) for n in (30, 5, 31, 6, 17)]
    engine.generate(requests, sampling=Sampling(group_size=1, max_tokens=1, temperature=0.0, top_p=1.0, top_k=0))
    hook.remove()
    assert seen == [(2, 5), (2, 29), (1, 30)]


@pytest.mark.parametrize("ids", [(42,), (4, 5, MEDIA_TOKEN)])
def test_a_prompt_that_the_prefill_cannot_be_split_from_is_refused(world: World, ids: tuple[int, ...]) -> None:
    embeds_ND = torch.zeros(1, 32) if MEDIA_TOKEN in ids else None
    sampling = Sampling(group_size=1, max_tokens=3, temperature=0.0, top_p=1.0, top_k=0)
    with pytest.raises(ValueError, match="expected at least two tokens and a text token at the end"):
        world.engine().generate([make_request(ids, embeds_ND, (0,))], sampling=sampling)


def test_logits_are_in_float32_also_of_bfloat16_weights() -> None:
    model = known_hidden_model()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = EmbeddedEngine(model, name_of=str, eos_id=319, device=torch.device("cpu"), batch_prompts=8)
    engine.load_weights([WeightBucket.of(weights)], version=0)
    check_logits_are_not_rounded(engine, model)
