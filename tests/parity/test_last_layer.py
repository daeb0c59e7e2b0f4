"""The last layer computes the rows that predict a token, and nothing changes for it: every family, in float64.

The twin computes all rows in all layers, in one process. Settings that save memory are in
tests/parallel/test_memory_settings.py, whole runs in tests/parallel/test_equal_layouts.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import tiny_vl
import torch
from harness import run_world
from megatron.core import parallel_state
from qwen_vl_oracle import BLOCK, FILM, ODD, SHORT, Video, group, make_builder, make_trainer
from torch import Tensor, nn

from megalong.attention import shard
from megalong.config.tree import Dtype, Recompute
from megalong.data.packing import GroupTokens, pack_groups
from megalong.engine.build import TORCH_DTYPE
from megalong.models.longvila.demo_checkpoint import DemoModelSize
from megalong.parallel.layout import make_layout
from megalong.records import TokenBatch

SIDE = DemoModelSize().image // BLOCK
SQUARE = Video(name="square", num_frames=2, rows=SIDE, columns=SIDE)
OTHER = Video(name="other", num_frames=3, rows=SIDE, columns=SIDE)
VIDEOS = {
    "longvila": (SQUARE, OTHER),
    "qwen2_5_vl": (FILM, SHORT),
    "qwen3_vl": (ODD, SHORT),
    "qwen3_vl, deep": (ODD, SHORT),  # as many layers as levels: the last one adds vision embeddings, too
}
LENGTHS = {
    "a group": ((0, [5, 1, 9, 4]),),
    "one answer": ((0, [6]),),  # a sequence without a shared prefix, as in SFT
    "answers of one token": ((1, [1, 1]),),  # fewer rows than ranks
    "groups": ((0, [2, 9, 1]), (1, [3]), (0, [7, 7])),
}
"""Packs: (which video, lengths of the responses) of each group."""
LAYOUTS = {
    1: {"alone": ({}, False)},
    2: {
        "tp2": ({"tp": 2}, False),
        "tp2_sp": ({"tp": 2}, True),
        "cp2": ({"cp": 2, "cp_a2a": 2}, False),
        "cp2_ring": ({"cp": 2}, False),
        "pp2": ({"pp": 2}, False),
    },
    4: {
        "tp2_cp2_sp": ({"tp": 2, "cp": 2, "cp_a2a": 1}, True),
        "cp4": ({"cp": 4, "cp_a2a": 2}, False),
        "cp2_pp2": ({"cp": 2, "cp_a2a": 2, "pp": 2}, False),
    },
}
"""Processes -> name -> split, sequence parallelism."""
LIMIT = 1e-10


@dataclass(kw_only=True)
class Result:
    """Of a train step at learning rate 0 on all packs."""

    loss: float = 0.0
    gradients: dict[str, Tensor] = field(default_factory=dict)
    mlp_rows: dict[int, list[int]] = field(default_factory=dict)  # by layer number, of this rank's forward of each pack


def make_packs(folder: Path, family: str) -> list[list[GroupTokens]]:
    builder, videos = make_builder(folder, family.partition(",")[0]), VIDEOS[family]
    return [
        [group(builder, [videos[which]], lens, seed=index) for index, (which, lens) in enumerate(pack)]
        for pack in LENGTHS.values()
    ]


def all_rows(tokens: TokenBatch) -> Tensor:
    return torch.arange(len(tokens.ids_T))


@contextmanager
def as_the_others(*, whole: bool) -> Iterator[None]:
    """whole: the last layer computes all rows, as the twin does."""
    with mock.patch.object(shard, "predicting_rows", all_rows if whole else shard.predicting_rows):
        yield


def train(
    folders: dict[str, Path], size: int, names: Sequence[str], whole: bool, recompute: Recompute
) -> dict[tuple[str, str], Result]:
    """On one of the ranks: (family, layout) -> the step."""
    done = {}
    wide = mock.patch.dict(TORCH_DTYPE, {Dtype.float32: torch.float64})
    with wide, tiny_vl.float64_towers(), as_the_others(whole=whole):
        for name in names:
            split, sequence_parallel = LAYOUTS[size][name]
            layout = make_layout(**{"tp": 1, "cp": 1, "pp": 1, **split}, seed=1)
            for family, folder in folders.items():
                if layout.pp_size > 1 and family.endswith("deep"):
                    continue  # refused: the first stage must hold all levels
                done[family, name] = train_family(folder, layout, family, sequence_parallel, recompute)
            parallel_state.destroy_model_parallel()
    return done


def train_family(folder: Path, layout: object, family: str, sequence_parallel: bool, recompute: Recompute) -> Result:
    trainer = make_trainer(
        folder, layout, VIDEOS[family], family=family.partition(",")[0], sequence_parallel=sequence_parallel,
        recompute=recompute, lr=0.0,
    )  # fmt: skip
    result = Result()
    for layer in trainer.model.llm.decoder.layers:
        seen = result.mlp_rows.setdefault(layer.layer_number, [])

        def count(_: nn.Module, args: tuple[Tensor, ...], seen: list[int] = seen) -> None:
            if torch.is_grad_enabled() == (recompute is Recompute.none):  # not again in the backward
                seen.append(len(args[0]))

        layer.mlp.register_forward_pre_hook(count)

    def loss_of(_: int, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights_R = torch.linspace(-1, 2, len(logprobs_R), dtype=torch.float64)
        return (weights_R * (logprobs_R + 0.1 * logprobs_R.square())).sum(), {}

    packs = [pack_groups(groups) for groups in make_packs(folder, family)]
    result.loss = trainer.train_step(packs, loss_of, temperature=0.7).loss
    for _, parameter in trainer.trainable:
        parameter.data = parameter.main_grad
    for bucket in trainer.export_weights():
        result.gradients.update({name: tensor.clone() for name, tensor in bucket.tensors.items()})
    return result


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: write(tmp_path_factory.mktemp(family)) for family, write in tiny_vl.WRITERS.items()}
    deep = shutil.copytree(made["qwen3_vl"], tmp_path_factory.mktemp("deep") / "model")
    config = json.loads((deep / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = len(config["vision_config"]["deepstack_visual_indexes"])
    (deep / "config.json").write_text(json.dumps(config))
    return {"longvila": tiny_checkpoint, **made, "qwen3_vl, deep": deep}


@pytest.fixture(scope="module")
def twin(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    folder = tmp_path_factory.mktemp("twin")
    return run_world(1, train, folders, 1, ["alone"], True, Recompute.none, folder=folder)[0]


@pytest.mark.parametrize(
    ("size", "recompute"), [(1, Recompute.none), (1, Recompute.full), (2, Recompute.none), (2, Recompute.full),
    (4, Recompute.full)], ids=str,
)  # fmt: skip
def test_nothing_changes_but_the_rows(
    size: int, recompute: Recompute, folders: dict[str, Path], twin: dict[tuple[str, str], Result], tmp_path: Path
) -> None:
    ranks = run_world(size, train, folders, size, list(LAYOUTS[size]), False, recompute, folder=tmp_path)
    for family, layout in ranks[0]:
        want = twin[family, "alone"]
        for got in (rank[family, layout] for rank in ranks):
            assert got.loss == pytest.approx(want.loss, rel=LIMIT)
            assert got.gradients.keys() == want.gradients.keys()
            for name, gradient in want.gradients.items():
                assert gradient.dtype == torch.float64
                # What is added to vision tokens behind the last layer is read by nothing.
                unread = family.endswith("deep") and "deepstack_merger_list.1" in name
                assert (gradient.abs().max() > 0) != unread, f"{name} has no gradient to compare"
                limit = LIMIT * max(float(gradient.abs().max()), 1e-3)
                assert (got.gradients[name] - gradient).abs().max() <= limit, f"{family} {layout} {name}"
        check_rows([rank[family, layout].mlp_rows for rank in ranks], folders[family], family, layout)


def check_rows(by_rank: list[dict[int, list[int]]], folder: Path, family: str, layout: str) -> None:
    """The last layer's MLP has the rows that predict and little padding, evenly; the others' have all."""
    size = len(by_rank)
    split, sequence_parallel = LAYOUTS[size][layout]
    last = max(number for rows in by_rank for number in rows)
    each = 1 if sequence_parallel else split.get("tp", 1)  # ranks that have the same rows
    multiple = split.get("tp", 1) if sequence_parallel else 1
    tokens = [pack_groups(groups) for groups in make_packs(folder, family)]
    needed = [len(pack.rows_R.unique()) for pack in tokens]
    assert last > 1
    for number in range(1, last + 1):
        calls = [rows[number] for rows in by_rank if number in rows]
        for at, (pack, count) in enumerate(zip(tokens, needed, strict=True)):
            total = sum(rows[at] for rows in calls) // each
            whole, shares = (count if number == last else len(pack.ids_T)), split.get("cp", 1)
            assert whole <= total < whole + 2 * shares * multiple, (layout, number)
            if number == last:
                assert max(rows[at] for rows in calls) <= -(-count // len(calls) * each) + 2 * multiple
        assert all(len(rows) == len(tokens) for rows in calls)
    assert sum(needed) < sum(len(pack.ids_T) for pack in tokens) / 3
