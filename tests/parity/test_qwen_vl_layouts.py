"""The Qwen-VL families on several ranks against the stock models: log-probabilities, entropies and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny_vl
import torch
from harness import make_builder, run_world
from megatron.core import parallel_state
from qwen_vl_oracle import PACKS, TOLERANCE, Oracle, group, make_trainer
from torch import Tensor

from megalong.data.packing import GroupTokens, pack_groups
from megalong.models.names import canonical
from megalong.parallel.layout import make_layout

LAYOUTS = {
    2: {"tp2": ({"tp": 2, "pp": 1}, False), "tp2_sp": ({"tp": 2, "pp": 1}, True), "pp2": ({"tp": 1, "pp": 2}, False)},
    4: {"tp2_pp2": ({"tp": 2, "pp": 2}, False), "tp2_pp2_sp": ({"tp": 2, "pp": 2}, True)},
}
"""Processes -> name -> split, sequence parallelism."""


@dataclass(kw_only=True)
class Result:
    """Of all packs; gradients in canonical Hugging Face names and whole shapes."""

    logprobs: list[Tensor] = field(default_factory=list)  # empty but on the last pipeline stage
    entropies: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def all_groups(folder: Path, family: str) -> list[list[GroupTokens]]:
    """One list for each of PACKS."""
    builder = make_builder(folder, family)
    return [
        [group(builder, videos, lens, seed=index) for index, (videos, lens) in enumerate(pack)]
        for pack in PACKS.values()
    ]


def weights_of(rows: int) -> Tensor:
    return torch.linspace(-1, 2, rows) / rows


def train_layouts(folders: dict[str, Path], size: int) -> dict[tuple[str, str], Result]:
    """On one of the ranks: (family, layout) -> a train step at learning rate 0 on all packs."""
    done = {}
    for name, (split, sequence_parallel) in LAYOUTS[size].items():
        layout = make_layout(cp=1, seed=1, **split)
        for family, folder in folders.items():
            result = done[family, name] = Result()

            def loss_of(
                _: int, logprobs_R: Tensor, entropy_R: Tensor, result: Result = result
            ) -> tuple[Tensor, dict[str, Tensor]]:
                result.logprobs.append(logprobs_R.detach())
                result.entropies.append(entropy_R.detach())
                return (logprobs_R * weights_of(len(logprobs_R))).sum(), {}

            videos = [video for pack in PACKS.values() for chosen, _ in pack for video in chosen]
            trainer = make_trainer(folder, layout, videos, family=family, sequence_parallel=sequence_parallel, lr=0.0)
            packs = [pack_groups(groups) for groups in all_groups(folder, family)]
            trainer.train_step(packs, loss_of, temperature=1.0)
            for _, parameter in trainer.trainable:
                parameter.data = parameter.main_grad
            for bucket in trainer.export_weights():
                result.gradients.update({canonical(key): tensor.clone() for key, tensor in bucket.tensors.items()})
        parallel_state.destroy_model_parallel()
    return done


def expect(folder: Path, family: str) -> Result:
    """The same of the stock model, one forward per response."""
    oracle, result = Oracle(folder, family), Result()
    total = torch.zeros(())
    for groups, pack in zip(all_groups(folder, family), PACKS.values(), strict=True):
        rows, targets = [], []
        for item, (videos, _) in zip(groups, pack, strict=True):
            for response in item.responses:
                prompt = item.prompt.ids_P
                rows.append(oracle.logits((*prompt, *response), videos)[len(prompt) - 1 : -1].log_softmax(-1))
                targets += response
        whole_RV = torch.cat(rows)
        logprobs_R = whole_RV.gather(1, torch.tensor(targets)[:, None])[:, 0]
        total = total + (logprobs_R * weights_of(len(logprobs_R))).sum()
        result.logprobs.append(logprobs_R.detach())
        result.entropies.append(-(whole_RV.exp() * whole_RV).sum(-1).detach())
    total.backward()
    result.gradients = {canonical(name): parameter.grad for name, parameter in oracle.model.named_parameters()}
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family)) for family, write in tiny_vl.WRITERS.items()}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, Result]:
    return {family: expect(folder, family) for family, folder in folders.items()}


@pytest.mark.parametrize("size", LAYOUTS)
def test_ranks_equal_transformers(
    size: int, folders: dict[str, Path], expected: dict[str, Result], tmp_path: Path
) -> None:
    for rank, done in enumerate(run_world(size, train_layouts, folders, size, folder=tmp_path)):
        for (family, layout), got in done.items():
            want, split = expected[family], LAYOUTS[size][layout][0]
            if rank >= size - size // split["pp"]:  # the last stage has the last ranks
                torch.testing.assert_close(got.logprobs, want.logprobs, rtol=TOLERANCE, atol=1e-5)
                torch.testing.assert_close(got.entropies, want.entropies, rtol=TOLERANCE, atol=1e-5)
            assert got.gradients.keys() == want.gradients.keys()
            for name, gradient in got.gradients.items():
                scale = want.gradients[name].abs().max()
                assert scale > 0, f"the oracle has no gradient for {name}"
                error = (gradient - want.gradients[name]).abs().max() / scale
                assert error < TOLERANCE, f"{family} {layout}: gradient of {name} is off by {error:.1e}"
