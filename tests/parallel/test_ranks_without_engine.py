"""A replica of two ranks samples the same groups whether both drive an engine or one does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from harness import run_world

from megalong.parallel.layout import make_layout
from megalong.records import Prompt, RolloutGroup, Sample, WeightBucket
from megalong.rollout.engine import Request, Sampled, Sampling
from megalong.rollout.sampler import GroupSampler

SAMPLING = Sampling(group_size=3, max_tokens=8, temperature=1.0, top_p=1.0, top_k=0)


class FakeEngine:
    """Answers with what it was given; its weights are lost at each release."""

    def __init__(self, *, shares_gpus: bool = True) -> None:
        self.version, self.asleep, self.needs_weights, self.shares_gpus = -1, False, False, shares_gpus
        self.asked: list[str] = []
        self.counts: dict[str, float] = {}
        self.sums: list[int] = []

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        self.sums = [bucket.checksums_n.tolist() for bucket in buckets]
        self.version, self.asleep, self.needs_weights = version, False, False

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        self.begun = requests

    def finish(self) -> list[list[Sampled]]:
        requests, self.begun = self.begun, None
        self.asked += [str(request.ids_P[0]) for request in requests]
        return [
            [
                Sampled(ids=(*request.ids_P, seed), logprobs=(-float(request.embeds_ND.sum()),), truncated=False)
                for seed in request.seeds
            ]
            for request in requests
        ]

    def release(self) -> None:
        self.asleep = self.needs_weights = True


def prompt(number: int) -> Prompt:
    sample = Sample(
        sample_id=str(number), question="q", answer="A", videos=(), problem_type="open-ended", category="c",
        reasoning="", subtitles="",
    )  # fmt: skip
    return Prompt(sample=sample, ids_P=(number, 2), selections=(), positions_P=torch.arange(2), next_position=2)


def sampled(drivers: tuple[int, ...], count: int) -> tuple[list[RolloutGroup], list[str], list[int], list[bool]]:
    """Groups, the prompts that this rank's engine was asked, its weights, and needs_weights around a release."""
    layout = make_layout(tp=2, cp=1, pp=1, seed=1)
    engine = FakeEngine() if layout.replica_rank in drivers else None
    sampler = GroupSampler(engine, layout, decode=str, seed=9)
    made = []

    def buckets() -> Iterable[WeightBucket]:
        for index in range(3):
            made.append(index)  # a rank that made none would leave the others alone in a collective
            tensors = {"w": torch.full((2,), float(index))}
            yield WeightBucket.of(tensors)

    sampler.load_weights(buckets(), version=4)
    prompts = [prompt(number) for number in range(count)]
    owners = sampler.owners(prompts)
    embeds = [
        torch.full((1, 2), float(item.ids_P[0])) if owner == layout.replica_rank else None
        for item, owner in zip(prompts, owners, strict=True)
    ]
    groups = sampler.finish(sampler.begin(prompts, embeds, sampling=SAMPLING, step=5))
    needs = [sampler.needs_weights]
    sampler.release()
    needs.append(sampler.needs_weights)
    sampler.load_weights(buckets(), version=5)
    needs.append(sampler.needs_weights)
    if made != [0, 1, 2] * 2:
        raise AssertionError(f"buckets made: {made}")
    return groups, engine.asked if engine else [], engine.sums if engine else [], needs


@pytest.mark.parametrize("count", [5, 1, 0])
def test_one_engine_samples_what_two_do(tmp_path: Path, count: int) -> None:
    both = run_world(2, sampled, (0, 1), count, folder=tmp_path / "both")
    first = run_world(2, sampled, (0,), count, folder=tmp_path / "first")
    second = run_world(2, sampled, (1,), count, folder=tmp_path / "second")
    want = both[0][0]
    assert [group.response_ids[0][:2] for group in want] == [(number, 2) for number in range(count)]
    assert [group.logprobs[0] for group in want] == [(-2.0 * number,) for number in range(count)]
    assert {group.weights_version for group in want} <= {4}
    for groups, *_ in (*both, *first, *second):
        assert groups == want
    names = [str(number) for number in range(count)]
    assert both[0][1] + both[1][1] == names
    assert abs(len(both[0][1]) - len(both[1][1])) <= 1
    assert [asked for _, asked, _, _ in (*first, *second)] == [names, [], [], names]
    assert first[0][2] == second[1][2] == both[0][2] == both[1][2]
    # A rank without an engine must know that its neighbour's lost the weights: all make the buckets.
    assert [needs for *_, needs in (*both, *first, *second)] == [[False, True, False]] * 6


class SlowEngine(FakeEngine):
    """Says when it had loaded each bucket of the last update."""

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        self.loaded: list[float] = []
        for _ in buckets:
            time.sleep(0.2)
            self.loaded.append(time.monotonic())


def times_of_an_update(shares_gpus: bool) -> tuple[list[float], list[float]]:
    """When each bucket was begun here, and when the engine had loaded it."""
    layout = make_layout(tp=2, cp=1, pp=1, seed=1)
    engine = SlowEngine(shares_gpus=shares_gpus) if layout.replica_rank == 0 else None
    sampler = GroupSampler(engine, layout, decode=str, seed=9)
    begun = []

    def buckets() -> Iterable[WeightBucket]:
        for _ in range(3):
            begun.append(time.monotonic())
            yield WeightBucket.of({"w": torch.zeros(2)})

    sampler.load_weights(buckets(), version=1)
    return begun, engine.loaded if engine else []


def test_no_rank_begins_a_bucket_while_an_engine_on_its_gpu_loads_the_one_before(tmp_path: Path) -> None:
    """It would wait for the engine's rank in NCCL, and keep busy the GPU that the engine loads on."""
    (_, loaded), (begun, _) = run_world(2, times_of_an_update, True, folder=tmp_path)
    assert all(later >= before for before, later in zip(loaded, begun[1:], strict=False))


def test_buckets_for_an_engine_on_gpus_of_its_own_are_gathered_ahead(tmp_path: Path) -> None:
    (_, loaded), (begun, _) = run_world(2, times_of_an_update, False, folder=tmp_path)
    assert begun[-1] < loaded[-1] - 0.2
