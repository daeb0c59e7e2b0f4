"""Groups around an engine: seeds per response, order, and what a RolloutGroup carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch

from megalong.records import MEDIA_TOKEN, FrameSelection, Prompt, Sample, WeightBucket
from megalong.rollout.engine import Request, Sampled, Sampling
from megalong.rollout.sampler import GroupSampler, response_seeds, share_out

SAMPLING = Sampling(group_size=3, max_tokens=8, temperature=1.0, top_p=1.0, top_k=0)


class EchoEngine:
    """Answers with the seeds it was given, so that a test sees them."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.version, self.shares_gpus, self.counts = -1, False, {}

    def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
        self.version = version

    def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
        self.begun = requests

    def finish(self) -> list[list[Sampled]]:
        requests, self.begun = self.begun, None
        self.requests += requests
        return [
            [Sampled(ids=(seed, 3), logprobs=(-1.0, -2.0), truncated=seed % 2 == 0) for seed in request.seeds]
            for request in requests
        ]


def prompt(name: str, *, video: str = "") -> Prompt:
    sample = Sample(
        sample_id=name, question="q", answer="A", videos=(), problem_type="open-ended", category="c", reasoning="",
        subtitles="",
    )  # fmt: skip
    frames = FrameSelection(path=video, frames=(0, 1), seconds=(0.0, 0.5), height=8, width=8)
    selections = (frames,) if video else ()
    return Prompt(sample=sample, ids_P=(1, 2, 3), selections=selections, positions_P=torch.arange(3), next_position=3)


def test_seeds_differ_by_run_step_sample_response_and_repeat() -> None:
    seeds = [
        *response_seeds("a", seed=1, step=1, repeat=0, group_size=8),
        *response_seeds("a", seed=1, step=1, repeat=1, group_size=8),
        *response_seeds("b", seed=1, step=1, repeat=0, group_size=8),
        *response_seeds("a", seed=1, step=2, repeat=0, group_size=8),
        *response_seeds("a", seed=2, step=1, repeat=0, group_size=8),
    ]
    assert len(set(seeds)) == 40
    assert seeds[:8] == list(response_seeds("a", seed=1, step=1, repeat=0, group_size=8))


def test_groups_are_in_the_order_of_the_prompts(layout: object) -> None:
    engine = EchoEngine()
    sampler = GroupSampler(engine, layout, decode=lambda ids: f"text {ids[0]}", seed=9)
    sampler.load_weights([], version=4)
    groups = sampler.finish(sampler.begin([prompt("b"), prompt("a")], [None, None], sampling=SAMPLING, step=5))
    assert [group.prompt.sample.sample_id for group in groups] == ["b", "a"]
    for group in groups:
        seeds = response_seeds(group.prompt.sample.sample_id, seed=9, step=5, repeat=0, group_size=3)
        assert group.response_ids == tuple((seed, 3) for seed in seeds)
        assert group.texts == tuple(f"text {seed}" for seed in seeds)
        assert group.truncated == tuple(seed % 2 == 0 for seed in seeds)
        assert group.logprobs == ((-1.0, -2.0),) * 3
        assert group.weights_version == 4
    assert sampler.finish(sampler.begin([], [], sampling=SAMPLING, step=5)) == []


def test_a_sample_that_comes_twice_gets_other_responses(layout: object) -> None:
    sampler = GroupSampler(EchoEngine(), layout, decode=str, seed=9)
    pending = sampler.begin(
        [prompt("a"), prompt("b"), prompt("a")], [None] * 3, sampling=SAMPLING, step=1, repeats=[2, 0, 3]
    )
    groups = sampler.finish(pending)
    for item, repeat in zip(groups, (2, 0, 3), strict=True):
        seeds = response_seeds(item.prompt.sample.sample_id, seed=9, step=1, repeat=repeat, group_size=3)
        assert item.response_ids == tuple((seed, 3) for seed in seeds)
    assert len({ids for item in groups for ids in item.response_ids}) == 9


def test_version_follows_the_weights(layout: object) -> None:
    sampler = GroupSampler(EchoEngine(), layout, decode=str, seed=9)
    sampler.load_weights([], version=7)
    (group,) = sampler.finish(sampler.begin([prompt("a")], [None], sampling=SAMPLING, step=1))
    assert group.weights_version == 7


@pytest.mark.parametrize("action", ["load_weights", "begin", "load_weights, awake"])
def test_a_rank_without_an_engine_makes_room_before_any_engine_wakes_up(
    layout: object, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """This rank's GPU holds a part of the engine that another rank of the replica drives."""
    happened: list[str] = []

    def gather(item: object, *, group: object) -> list[object]:
        happened.append("gather")
        # The other rank has an engine, which sleeps after a release; its samples are not looked at.
        return [item, (action != "load_weights, awake", False) if isinstance(item, tuple) else True]

    monkeypatch.setattr("megalong.rollout.sampler.gather_objects", gather)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("emptied"))
    two_ranks = replace(layout, replica_size=2)
    sampler = GroupSampler(None, two_ranks, decode=str, seed=9)
    buckets = (happened.append("bucket") for _ in range(1))
    sampler.release()
    happened.clear()
    if action == "load_weights":
        sampler.load_weights(buckets, version=1)
        # The second time for the engine's keys and values, which wake up after the last bucket.
        assert happened == ["emptied", "gather", "bucket", "emptied", "gather"]
        happened.clear()
        sampler.load_weights([], version=2)
        assert happened == [], "nothing was released since"
    elif action == "load_weights, awake":
        sampler.load_weights(buckets, version=1)
        assert happened == ["bucket"], "an engine with GPUs of its own needs none of this one's"
    else:
        monkeypatch.setattr(sampler, "owners", lambda prompts: [1] * len(prompts))
        with pytest.raises(TypeError):  # True is no list of groups
            sampler.finish(sampler.begin([prompt("a")], [None], sampling=SAMPLING, step=1))
        assert happened == ["emptied", "gather", "gather"]


def test_one_batch_at_a_time_and_none_with_other_weights_than_it_began_with(layout: object) -> None:
    """What would disturb the engines waits for the batch begun before, whose groups are kept."""
    happened: list[str] = []

    class Engine(EchoEngine):
        def load_weights(self, buckets: Iterable[WeightBucket], *, version: int) -> None:
            happened.append(f"load {version}")

        def begin(self, requests: Sequence[Request], *, sampling: Sampling) -> None:
            happened.append(f"begin {requests[0].ids_P}")
            super().begin(requests, sampling=sampling)

        def finish(self) -> list[list[Sampled]]:
            happened.append("finish")
            return super().finish()

        def release(self) -> None:
            happened.append("release")
            self.asleep = self.needs_weights = False

    sampler = GroupSampler(Engine(), layout, decode=str, seed=9)
    assert not sampler.shares_gpus
    sampler.load_weights([], version=4)
    first = sampler.begin([prompt("a")], [None], sampling=SAMPLING, step=1)
    sampler.load_weights([], version=5)
    second = sampler.begin([prompt("b"), prompt("c")], [None] * 2, sampling=SAMPLING, step=2)
    other = sampler.finish(sampler.begin([prompt("d")], [None], sampling=SAMPLING, step=2))
    sampler.begin([prompt("e")], [None], sampling=SAMPLING, step=3)
    sampler.release()
    begun = "begin (1, 2, 3)"
    assert happened == [
        "load 4", begun, "finish", "load 5", begun, "finish", begun, "finish", begun, "finish", "release",
    ]  # fmt: skip
    for pending, names, step, version in ((first, "a", 1, 4), (second, "bc", 2, 5)):
        groups = sampler.finish(pending)
        assert groups == sampler.finish(pending)
        assert [group.prompt.sample.sample_id for group in groups] == list(names)
        assert {group.weights_version for group in groups} == {version}
        for group in groups:
            seeds = response_seeds(group.prompt.sample.sample_id, seed=9, step=step, repeat=0, group_size=3)
            assert group.response_ids == tuple((seed, 3) for seed in seeds)
    assert [group.prompt.sample.sample_id for group in other] == ["d"]
    assert len(happened) == 11, "nothing is asked twice"


def test_an_engine_has_room_for_the_embeddings_of_its_own_prompts(
    layout: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a replica of three ranks, the first and the last drive an engine each. A video's are there once."""
    asked: list[int] = []

    class Engine(EchoEngine):
        def embeds_room(self, rows: int) -> torch.Tensor:
            asked.append(rows)
            return torch.empty(rows, 2)

    drives = [(True, False), (False, False), (True, False)]
    monkeypatch.setattr("megalong.rollout.sampler.gather_objects", lambda item, *, group: drives)
    prompts = [
        replace(prompt(str(index), video=str(count)), ids_P=(MEDIA_TOKEN,) * count + (5, 6))
        for index, count in enumerate((1, 4, 2, 8, 4, 8, 8, 1))
    ]
    for rank, rows in enumerate((5, None, 10)):
        engine = Engine() if rows else None
        sampler = GroupSampler(engine, replace(layout, replica_size=3, replica_rank=rank), decode=str, seed=9)
        room = sampler.embeds_room(prompts)
        assert (room is None) if rows is None else room.shape == (rows, 2)
        assert sampler.embeds_room([]) is None
    assert asked == [5, 10]


@pytest.mark.parametrize(
    ("videos", "engines", "want"),
    [
        ("abcde", 2, "00011"),
        ("abc", 4, "012"),
        ("", 2, ""),
        ("abab", 2, "0101"),
        ("aabbb", 2, "00111"),  # three and two would do as well
        ("-----", 2, "00011"),  # text
        ("aaaa", 2, "0011"),  # one engine would have everything to do
        ("aaabbbcc", 2, "00001111"),
        ("abcabcabc", 3, "012012012"),
        ("aabbcc", 4, "001123"),
        ("aaaabbbcccd", 4, "00011122233"),
    ],
)
def test_questions_about_one_video_go_to_one_engine_where_shares_stay_equal(
    videos: str, engines: int, want: str
) -> None:
    prompts = [prompt(str(index), video=name.strip("-")) for index, name in enumerate(videos)]
    shares = share_out(prompts, engines)
    assert "".join(map(str, shares)) == want
    assert max(map(shares.count, range(engines))) == -(-len(videos) // engines)


def test_groups_are_in_the_order_of_the_prompts_whichever_engine_has_them(
    layout: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines; questions about two videos by turns."""
    prompts = [prompt(str(index), video="ab"[index % 2]) for index in range(4)]
    two = [(True, False), (True, False)]
    monkeypatch.setattr("megalong.rollout.sampler.gather_objects", lambda item, *, group: two)
    samplers = [
        GroupSampler(EchoEngine(), replace(layout, replica_size=2, replica_rank=rank), decode=str, seed=9)
        for rank in range(2)
    ]
    pending = [sampler.begin(prompts, [None] * 4, sampling=SAMPLING, step=5) for sampler in samplers]
    parts = [(sampler.engine.finish(), {}) for sampler in samplers]
    assert [len(groups) for groups, _ in parts] == [2, 2]
    monkeypatch.setattr(EchoEngine, "finish", lambda self: None)
    monkeypatch.setattr("megalong.rollout.sampler.gather_objects", lambda item, *, group: parts)
    for sampler, begun in zip(samplers, pending, strict=True):
        for index, group in enumerate(sampler.finish(begun)):
            seeds = response_seeds(str(index), seed=9, step=5, repeat=0, group_size=3)
            assert group.response_ids == tuple((seed, 3) for seed in seeds)
