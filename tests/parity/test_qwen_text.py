"""Text families in Megatron against transformers: equal log-probabilities, entropies and gradients, on 1 to 4 ranks.

The oracle is the stock causal LM on every [prompt | response] as a sequence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_world
from qwen_checkpoints import SIZES, write_qwen
from torch import Tensor
from transformers import PreTrainedModel

from megalong.config.tree import Dtype, ModelConfig, OptimizerConfig, Recompute
from megalong.data.packing import GroupTokens, pack_groups
from megalong.engine.build import build_model
from megalong.engine.trainer import Trainer
from megalong.models.errors import CheckpointError
from megalong.models.families import FAMILIES
from megalong.parallel.layout import ParallelLayout, destroy_layout, make_layout
from megalong.records import Prompt, Sample, TokenBatch
from megalong.rollout.embedded import EmbeddedEngine
from megalong.rollout.engine import Request, Sampling

TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    changes: dict[str, Any] = field(default_factory=dict)  # of config.json
    temperature: float = 1.0
    recompute: Recompute = Recompute.none


CASES = {
    "qwen2": Case(family="qwen2"),
    "qwen2 tied": Case(family="qwen2", changes={"tie_word_embeddings": True}, temperature=0.6),
    "qwen2_5": Case(family="qwen2_5", changes={"num_key_value_heads": 1}),
    "qwen3": Case(family="qwen3", recompute=Recompute.full),
    "qwen3 tied": Case(family="qwen3", changes={"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3 scaled": Case(
        family="qwen3", changes={"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}}
    ),
}
SPLIT = {name: CASES[name] for name in ("qwen2 tied", "qwen2_5", "qwen3", "qwen3 tied")}


@dataclass(kw_only=True)
class Result:
    """By pack, and gradients in Hugging Face names and whole shapes."""

    logprobs: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def groups() -> list[list[GroupTokens]]:
    """Two packs: prompts and responses of ragged lengths, groups of one to four responses."""
    generator = torch.Generator().manual_seed(11)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist())

    def group(prompt: int, *responses: int) -> GroupTokens:
        sample = Sample(
            sample_id=f"{prompt}", question="", answer="", videos=(), problem_type="", category="", reasoning="",
            subtitles="",
        )  # fmt: skip
        record = Prompt(
            sample=sample, ids_P=ids(prompt), selections=(), positions_P=torch.arange(prompt), next_position=prompt
        )
        return GroupTokens(prompt=record, responses=tuple(ids(length) for length in responses))

    return [[group(7, 3, 1, 6), group(2, 5), group(19, 4, 4)], [group(11, 2, 40, 1, 9), group(5, 1)]]


def weights_of(rows: int) -> Tensor:
    return torch.linspace(-1, 2, rows) / rows


def oracle(model: PreTrainedModel, temperature: float) -> Result:
    result = Result()
    total = torch.zeros(())
    for pack in groups():
        values = []
        for prompt, response in [(g.prompt.ids_P, response) for g in pack for response in g.responses]:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
            rows = logits[len(prompt) - 1 : -1]
            logprobs = rows.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            values.append((logprobs, torch.distributions.Categorical(logits=rows).entropy()))
        logprobs_R, entropies_R = (torch.cat(parts) for parts in zip(*values, strict=True))
        total = total + (logprobs_R * weights_of(len(logprobs_R))).sum()
        result.logprobs.append(logprobs_R.detach())
        result.entropies.append(entropies_R.detach())
    total.backward()
    result.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return result


def policy(folder: Path, case: Case, layout: ParallelLayout, *, sequence_parallel: bool) -> Result:
    """One train step at learning rate 0 on all packs."""
    config = ModelConfig(family=case.family, path=str(folder), dtype=Dtype.float32, recompute=case.recompute)
    model = build_model(config, layout, sequence_parallel=sequence_parallel)
    settings = OptimizerConfig(lr=0.0, weight_decay=0.0)
    trainer = Trainer(model, layout, settings, total_steps=1, embeddings=lambda _: None)
    result = Result()

    def loss_of(_: int, logprobs_R: Tensor, entropies_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result.logprobs.append(logprobs_R.detach())
        result.entropies.append(entropies_R.detach())
        return (logprobs_R * weights_of(len(logprobs_R))).sum(), {}

    packs: list[TokenBatch] = [pack_groups(pack) for pack in groups()]
    trainer.train_step(packs, loss_of, temperature=case.temperature)
    for _, parameter in trainer.trainable:
        parameter.data = parameter.main_grad
    result.gradients = {name: t.clone() for bucket in trainer.export_weights() for name, t in bucket.tensors.items()}
    return result


def compare(got: Result, want: Result) -> None:
    for mine, theirs in zip(got.logprobs + got.entropies, want.logprobs + want.entropies, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=1e-5)
    compare_gradients(got, want)


def compare_gradients(got: Result, want: Result) -> None:
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in got.gradients.items():
        scale = want.gradients[name].abs().max()
        assert scale > 0, f"the oracle has no gradient for {name}"
        error = (gradient - want.gradients[name]).abs().max() / scale
        assert error < TOLERANCE, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logprobs_and_gradients_equal_transformers(tmp_path: Path, layout: ParallelLayout, case: Case) -> None:
    model = write_qwen(tmp_path, case.family, **case.changes)
    compare(policy(tmp_path, case, layout, sequence_parallel=False), oracle(model, case.temperature))


def split_policies(folders: Sequence[Path], cases: Sequence[Case], tp: int, pp: int) -> list[list[Result]]:
    """On one of the ranks: each case, for tensor-parallel ones without and with sequence parallelism."""
    layout = make_layout(tp=tp, cp=1, pp=pp, seed=1)
    results = [
        [policy(folder, case, layout, sequence_parallel=split) for split in (False, True)[:tp]]
        for folder, case in zip(folders, cases, strict=True)
    ]
    destroy_layout()
    return results


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_equal_transformers(tmp_path: Path, tp: int, pp: int) -> None:
    folders = [tmp_path / name for name in SPLIT]
    wanted = []
    for folder, case in zip(folders, SPLIT.values(), strict=True):
        wanted.append(oracle(write_qwen(folder, case.family, **case.changes), case.temperature))
    ranks = run_world(tp * pp, split_policies, folders, list(SPLIT.values()), tp, pp, folder=tmp_path / "world")
    for rank, policies in enumerate(ranks):
        # The loss is asked for on the last stage only, which has the last ranks.
        check = compare if rank >= tp * (pp - 1) else compare_gradients
        for ours, want in zip(policies, wanted, strict=True):
            for got in ours:
                check(got, want)


@pytest.mark.parametrize("name", ["qwen2 tied", "qwen2_5", "qwen3"])
def test_sampler_and_trainer_agree(tmp_path: Path, layout: ParallelLayout, name: str) -> None:
    """Sampled log-probabilities are the trainer's on what was sampled; prompts of several lengths in one batch."""
    case = CASES[name]
    write_qwen(tmp_path, case.family, **case.changes)
    family = FAMILIES[case.family]
    config = ModelConfig(family=case.family, path=str(tmp_path), dtype=Dtype.float32)
    model = build_model(config, layout, sequence_parallel=False)
    trainer = Trainer(model, layout, OptimizerConfig(), total_steps=1, embeddings=lambda _: None)
    engine = EmbeddedEngine(
        family.sampler_model(tmp_path, torch.float32), name_of=family.sampler_name, eos_id=3,
        device=torch.device("cpu"), batch_prompts=4,
    )  # fmt: skip
    engine.load_weights(trainer.export_weights(), version=0)
    prompts = [group.prompt for pack in groups() for group in pack]
    requests = [
        Request(
            ids_P=prompt.ids_P, positions_P=prompt.positions_P, next_position=prompt.next_position, embeds_ND=None,
            seeds=(index, index + 9, index + 99),
        )
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    sampling = Sampling(group_size=3, max_tokens=12, temperature=0.8, top_p=1.0, top_k=0)
    sampled = engine.generate(requests, sampling=sampling)
    items = [
        GroupTokens(prompt=prompt, responses=tuple(response.ids for response in group))
        for prompt, group in zip(prompts, sampled, strict=True)
    ]
    logprobs_R = trainer.logprobs([pack_groups(items)], temperature=0.8)[0]
    want_R = torch.tensor([value for group in sampled for response in group for value in response.logprobs])
    assert len(want_R) > 100
    torch.testing.assert_close(logprobs_R, want_R, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope type 'yarn'"),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding-window attention is not supported"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_decoder_does_not_do_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    write_qwen(tmp_path, family, **changes)
    with pytest.raises(CheckpointError, match=message):
        FAMILIES[family].read_spec(tmp_path)


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    write_qwen(tmp_path, "qwen3")
    with pytest.raises(
        CheckpointError, match=r"config.json: model_type is 'qwen3', expected 'qwen2'; set model.family"
    ):
        FAMILIES["qwen2_5"].read_spec(tmp_path)
