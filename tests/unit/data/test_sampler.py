import json
import logging
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalong.data.sampler import PromptSampler


def global_batches(num_batches, *, num_samples, batch_size, dp_size, seed=3, shuffle=True, state=None):
    """The batches joined over the ranks, and the state after them."""
    samplers = [
        PromptSampler(num_samples, batch_size, rank, dp_size, seed=seed, shuffle=shuffle) for rank in range(dp_size)
    ]
    for sampler in samplers:
        if state is not None:
            sampler.load_state_dict(state)
    batches = [
        [index for share in shares for index in share] for shares in islice(zip(*samplers, strict=True), num_batches)
    ]
    states = [sampler.state_dict() for sampler in samplers]
    assert all(state == states[0] for state in states)
    return batches, states[0]


@given(
    num_samples=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    dp_size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
)
def test_every_epoch_has_each_sample_once(num_samples, batch_size, dp_size, seed, shuffle):
    num_batches = -(-3 * num_samples // batch_size)
    batches, _ = global_batches(
        num_batches, num_samples=num_samples, batch_size=batch_size, dp_size=dp_size, seed=seed, shuffle=shuffle
    )
    assert all(len(batch) == batch_size for batch in batches)
    stream = [index for batch in batches for index in batch]
    for epoch in range(3):
        assert sorted(stream[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(num_samples=st.integers(1, 50), batch_size=st.integers(1, 20), dp_size=st.integers(2, 7))
def test_order_is_the_same_for_every_dp_size(num_samples, batch_size, dp_size):
    alone, _ = global_batches(5, num_samples=num_samples, batch_size=batch_size, dp_size=1)
    spread, _ = global_batches(5, num_samples=num_samples, batch_size=batch_size, dp_size=dp_size)
    assert spread == alone


@given(
    num_samples=st.integers(1, 40),
    batch_size=st.integers(1, 15),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    done=st.integers(0, 9),
)
def test_resume_with_another_dp_size_continues_exactly(num_samples, batch_size, before, after, done):
    whole, _ = global_batches(done + 4, num_samples=num_samples, batch_size=batch_size, dp_size=before)
    _, state = global_batches(done, num_samples=num_samples, batch_size=batch_size, dp_size=before)
    state = json.loads(json.dumps(state))  # a checkpoint keeps it as JSON
    rest, _ = global_batches(4, num_samples=num_samples, batch_size=batch_size, dp_size=after, state=state)
    assert rest == whole[done:]


def test_orders_differ_by_epoch_and_seed_and_are_fixed():
    def epochs(seed):
        batches, _ = global_batches(3, num_samples=50, batch_size=50, dp_size=1, seed=seed)
        return [tuple(batch) for batch in batches]

    assert epochs(1) == epochs(1)
    assert len({*epochs(1), *epochs(2), *epochs(3)}) == 9


def test_peek_tells_the_next_batch_and_leaves_the_order():
    sampler, other = (PromptSampler(7, 3, 0, 1, seed=1, shuffle=True) for _ in range(2))
    assert [(sampler.peek(), next(sampler)) for _ in range(9)] == [(batch, batch) for batch in islice(other, 9)]


def test_without_shuffle_the_order_is_the_manifests():
    batches, _ = global_batches(3, num_samples=4, batch_size=3, dp_size=2, shuffle=False)
    assert batches == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]


def test_uneven_and_empty_shares():
    shares = [next(PromptSampler(9, 3, rank, 4, seed=0, shuffle=False)) for rank in range(4)]
    assert shares == [[0], [1], [2], []]


def share_of(rank, dp_size, videos, *, batch_size, together, epochs):
    """What a rank gets, batch by batch."""
    sampler = PromptSampler(
        len(videos), batch_size, rank, dp_size, seed=5, shuffle=True, questions_per_video=together, videos=videos
    )
    return list(islice(sampler, epochs * len(videos) // batch_size))


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    together=st.integers(2, 4),
    dp_size=st.integers(1, 3),
)
def test_questions_of_a_video_come_together_and_each_epoch_has_each_once(sizes, together, dp_size):
    videos = [number for number, size in enumerate(sizes) for _ in range(size)]
    batch_size = together * dp_size
    shares = [
        share_of(rank, dp_size, videos, batch_size=batch_size, together=together, epochs=3) for rank in range(dp_size)
    ]
    stream = [index for batch in zip(*shares, strict=True) for share in batch for index in share]
    for epoch in range(len(stream) // len(videos)):
        assert sorted(stream[epoch * len(videos) : (epoch + 1) * len(videos)]) == list(range(len(videos)))
    # A share is one place. Over an epoch all whole ones of a video are shares, but one that makes room at its ends.
    epoch = [
        [videos[index] for index in share]
        for batch in zip(*shares, strict=True) for share in batch
    ][: len(videos) // together]  # fmt: skip
    whole = sum(len(set(places)) == 1 for places in epoch)
    assert whole >= sum(size // together for size in sizes) - 1


def test_rests_of_videos_are_not_torn_apart():
    videos = ["a"] * 5 + ["b"] * 3 + ["c"] * 3 + ["d"] + ["e"] * 2 + ["f"] * 2
    batches = share_of(0, 1, videos, batch_size=4, together=4, epochs=1)
    found = sorted("".join(sorted(videos[index] for index in batch)) for batch in batches)
    assert found == ["aaaa", "abbb", "cccd", "eeff"] or found == ["aaaa", "accc", "bbbd", "eeff"]


@pytest.mark.parametrize(("together", "sizes"), [(4, [3] * 8 + [4] * 6), (8, [5] * 8 + [6] * 8 + [7] * 8)])
def test_how_many_questions_a_video_has_does_not_tell_when_it_comes(together, sizes):
    """None of 5, 6 and 7 questions fills a place of 8, nor makes room for another's."""
    videos = [number for number, size in enumerate(sizes) for _ in range(size)]
    stream = [sizes[videos[share[0]]] for share in share_of(0, 1, videos, batch_size=1, together=together, epochs=40)]
    for size in set(sizes):
        places = [at % len(videos) for at, found in enumerate(stream) if found == size]
        assert sum(places) / len(places) / len(videos) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions_per_video": 2}, r"questions_per_video=2, this run has questions_per_video=1.*data\.questions_per"),
        ({"num_samples": 8}, r"num_samples=8, this run has num_samples=9.*data\.train"),
        ({"seed": 4}, r"seed=4, this run has seed=0.*data\.seed"),
        ({"shuffle": True}, r"shuffle=True, this run has shuffle=False.*data\.shuffle"),
        ({"position": -1}, "position=-1"),
    ],
)
def test_state_of_another_order_is_refused(change, message):
    sampler = PromptSampler(9, 3, 0, 1, seed=0, shuffle=False)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})


def test_a_checkpoint_from_before_the_setting_is_taken():
    sampler = PromptSampler(9, 3, 0, 1, seed=0, shuffle=False)
    state = sampler.state_dict()
    del state["questions_per_video"]
    sampler.load_state_dict({**state, "position": 6})
    assert sampler.position == 6


@pytest.mark.parametrize(
    ("arguments", "seed", "message"),
    [
        ((0, 1, 0, 1), 0, "num_samples is 0"),
        ((1, 0, 0, 1), 0, "batch_size is 0"),
        ((1, 1, 1, 1), 0, "rank is 1 of 1"),
        ((1, 1, 0, 1), -1, "seed is -1"),
    ],
)
def test_bad_arguments(arguments, seed, message):
    with pytest.raises(ValueError, match=message):
        PromptSampler(*arguments, seed=seed, shuffle=True)


@pytest.mark.parametrize(("batch_size", "times"), [(16, None), (17, 2), (64, 4)])
def test_a_batch_of_more_than_all_samples_is_said(
    batch_size: int, times: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        batch = next(PromptSampler(16, batch_size, 0, 1, seed=0, shuffle=True))
    assert caplog.messages == (
        []
        if times is None
        else [
            f"a batch of {batch_size} is more than the 16 samples of data.train: some come {times} times in it; lower "
            "grpo or sft.batch_size"
        ]
    )
    assert max(batch.count(index) for index in batch) == (times or 1)
