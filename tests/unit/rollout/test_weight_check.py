"""What a weight update must be: a higher version, known names, right shapes, nothing missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megalong.records import WeightBucket
from megalong.rollout.engine import WeightSyncError
from megalong.rollout.weight_check import Update, WeightCheck

SHAPES = {"head.weight": (3, 2), "head.bias": (3,), "norm.weight": (2,)}


@pytest.fixture
def check() -> WeightCheck:
    model = nn.ModuleDict({"head": nn.Linear(2, 3), "norm": nn.RMSNorm(2)})
    return WeightCheck(model, name_of=lambda name: name.removeprefix("llm/") if name.startswith("llm/") else None)


def bucket(*names: str, **tensors: Tensor) -> WeightBucket:
    held = {f"llm/{name}": torch.ones(SHAPES[name]) for name in names} | tensors
    return WeightBucket.of(held)


def updated(check: WeightCheck, *names: str, version: int, again: bool = False, in_parts: bool = True) -> Update:
    """An update of these weights, not ended yet."""
    update = check.begin(version, again=again, in_parts=in_parts)
    for name in names:
        assert list(update.of(bucket(name)).tensors) == [name]
    return update


def test_the_first_update_must_hold_everything(check: WeightCheck) -> None:
    with pytest.raises(WeightSyncError, match="no weights were loaded before"):
        check.require()
    with pytest.raises(WeightSyncError, match=r"version 0: the update leaves out \['head.bias'\]"):
        updated(check, "head.weight", "norm.weight", version=0).end()
    assert check.version == -1
    with pytest.raises(WeightSyncError, match="update to version 0 did not finish"):
        check.require()
    # The next one, too: nobody knows what the broken one has changed.
    with pytest.raises(WeightSyncError, match="leaves out"):
        updated(check, "head.bias", version=0).end()
    updated(check, *SHAPES, version=0).end()
    check.require()
    assert check.version == 0


def test_later_updates_may_be_partial_where_the_engine_takes_parts(check: WeightCheck) -> None:
    updated(check, *SHAPES, version=0).end()
    updated(check, "norm.weight", version=1).end()
    updated(check, version=2).end()
    assert check.version == 2
    updated(check, version=3, in_parts=False).end()  # none is not a part
    with pytest.raises(WeightSyncError, match=r"leaves out \['head.bias', 'head.weight'\]"):
        updated(check, "norm.weight", version=4, in_parts=False).end()
    assert check.version == 3
    with pytest.raises(WeightSyncError, match="update to version 4 did not finish"):
        check.require()


def test_versions_go_up(check: WeightCheck) -> None:
    updated(check, *SHAPES, version=5).end()
    for version in (4, 5):
        with pytest.raises(WeightSyncError, match=f"version {version} arrived after version 5"):
            check.begin(version)
    check.require()  # an update that did not begin spoils nothing
    with pytest.raises(WeightSyncError, match="version 4 arrived"):
        check.begin(4, again=True)


def test_thrown_away_weights_come_again_at_their_version_and_whole(check: WeightCheck) -> None:
    updated(check, *SHAPES, version=5).end()
    with pytest.raises(WeightSyncError, match="leaves out"):
        updated(check, "norm.weight", version=5, again=True).end()
    updated(check, *SHAPES, version=5, again=True).end()
    assert check.version == 5
    check.require()


def test_unknown_names_and_wrong_shapes_are_refused(check: WeightCheck) -> None:
    update = check.begin(0)
    with pytest.raises(WeightSyncError, match="version 0: the sampler has no weight 'tail.weight'"):
        update.of(bucket(**{"llm/tail.weight": torch.ones(1)}))
    with pytest.raises(WeightSyncError, match=r"head.bias is \(1, 3\), expected \(3,\)"):
        update.of(bucket(**{"llm/head.bias": torch.ones(1, 3)}))
    with pytest.raises(WeightSyncError, match="did not finish"):
        check.require()


def test_weights_that_the_sampler_has_no_part_for_are_left_out(check: WeightCheck) -> None:
    update = check.begin(0)
    assert list(update.of(bucket("norm.weight", **{"vision/conv": torch.ones(9)})).tensors) == ["norm.weight"]
    assert update.missing == {"head.weight", "head.bias"}


def test_what_is_chosen_of_a_bucket_keeps_its_checksums_and_each_name_is_asked_for_once(check: WeightCheck) -> None:
    asked: list[str] = []
    name_of = check.name_of
    check.name_of = lambda name: asked.append(name) or name_of(name)
    vision = {"vision/conv": torch.ones(9), "vision/norm": torch.ones(2)}
    sent = WeightBucket.of({**bucket("head.bias").tensors, **vision, **bucket("norm.weight").tensors})
    chosen = check.begin(0).of(sent)
    assert asked == list(sent.tensors)
    assert list(chosen.tensors) == ["head.bias", "norm.weight"]
    assert torch.equal(chosen.checksums_n, sent.checksums_n[[0, 3]])
    nothing = check.begin(1).of(WeightBucket.of(vision))
    assert (nothing.tensors, len(nothing.checksums_n)) == ({}, 0)


def test_what_the_engine_found_wrong_ends_the_update_badly(check: WeightCheck) -> None:
    update = updated(check, *SHAPES, version=0)
    with pytest.raises(WeightSyncError, match="version 0: a bucket's checksum is wrong"):
        update.end("a bucket's checksum is wrong")
    with pytest.raises(WeightSyncError, match="did not finish"):
        check.require()


def test_a_tied_head_is_one_weight() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    check = WeightCheck(model, name_of=str)
    assert check.shapes == {"embed.weight": torch.Size((4, 2))}
