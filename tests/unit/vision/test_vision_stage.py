"""Stage 1 in one process: each video is decoded and encoded once, and what cannot be read is a counted drop."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megalong import cache_embeddings
from megalong.config.tree import FrameSampling
from megalong.data import video_decoder
from megalong.data.video import DecodeError, decode_frames, probe, select_frames
from megalong.metrics import PhaseTimer
from megalong.models.longvila.layout import SquareFrames
from megalong.records import Dropped, FrameSelection, Sample
from megalong.vision.encode import VisionStage
from megalong.vision.settings import VisionSettings
from megalong.vision.store import StoreFullError

SIZE, TOKENS, WIDTH = 8, 2, 5
SETTINGS = VisionSettings(
    tower_batch_frames=3, frozen=True, recompute=False, share_frames=True, embed_gpu_bytes=0, embed_host_bytes=1 << 20,
    embed_folder=None, embed_folder_bytes=1 << 20, frame_store_bytes=1 << 20, decode_workers=2,
)  # fmt: skip
LAYOUT = SquareFrames(size=SIZE, tokens_per_frame=TOKENS, newline_id=1)
CHOOSE = partial(select_frames, sampling=FrameSampling.uniform, num_frames=7, fps=1.0, max_frames=8, layout=LAYOUT)


class Tower(nn.Module):
    """Frames to TOKENS embeddings each; remembers how many frames each forward took."""

    settings = "linear"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(SIZE * SIZE * 3, TOKENS * WIDTH)
        self.batches: list[int] = []

    def forward(self, frames_FHWC: Tensor) -> Tensor:
        self.batches.append(len(frames_FHWC))
        return self.linear(frames_FHWC.flatten(1).float() / 255).reshape(-1, TOKENS, WIDTH)


def write_video(path: Path, num_frames: int, *, shade: int) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            picture = np.full((32, 32, 3), (shade + 9 * index) % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def sample(name: str, *videos: str) -> Sample:
    return Sample(
        sample_id=name, question="q", answer="A", videos=videos, problem_type="open-ended", category="c", reasoning="",
        subtitles="",
    )  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    paths = {name: write_video(folder / f"{name}.mp4", 8 + i, shade=40 * i) for i, name in enumerate("abc")}
    (folder / "text.mp4").write_text("no video")
    return {**paths, "bad": str(folder / "text.mp4"), "gone": str(folder / "gone.mp4")}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos in the order they were decoded."""
    calls: list[str] = []

    def counted(selection: FrameSelection, **arguments: int) -> object:
        calls.append(Path(selection.path).stem)
        return decode_frames(selection, **arguments)

    monkeypatch.setattr(video_decoder, "decode_frames", counted)
    return calls


@pytest.fixture
def make(layout: object) -> Iterator[object]:
    stages: list[VisionStage] = []

    def build(**changes: object) -> VisionStage:
        stages.append(VisionStage(Tower(), layout, replace(SETTINGS, **changes), videos=LAYOUT))
        return stages[-1]

    yield build
    for stage in stages:
        stage.close()


def ready(stage: VisionStage, samples: Sequence[Sample]) -> tuple[dict[str, FrameSelection], list[Dropped]]:
    """What a loop does with a batch."""
    selections, dropped = stage.select(samples, CHOOSE)
    usable = [item for item in samples if all(path in selections for path in item.videos)]
    return selections, [*dropped, *stage.prepare(usable, selections)]


def direct(stage: VisionStage, selection: FrameSelection) -> Tensor:
    """[F * TOKENS, WIDTH]: the tower on the frames, all at once."""
    frames = torch.from_numpy(decode_frames(selection).frames_FHWC)
    with torch.no_grad():
        return stage.encoder(frames).flatten(0, 1)


def test_files_are_indexed_once_and_ahead(
    make: object, videos: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, calls = make(), []

    def counted(path: str) -> object:
        calls.append((Path(path).stem, threading.current_thread() is threading.main_thread()))
        return probe(path)

    monkeypatch.setattr(stage.decoder, "probe", counted)
    batch = [sample("1", videos["a"], videos["b"]), sample("2", videos["bad"])]
    stage.index_ahead([*batch, sample("3")])
    stage.index_ahead(batch)
    selections, dropped = stage.select(batch, CHOOSE)
    assert sorted(calls) == [("a", False), ("b", False), ("text", False)]
    assert [drop.sample_id for drop in dropped] == ["2"]
    assert stage.select(batch, CHOOSE)[0] == selections
    stage.select([sample("4", videos["c"])], CHOOSE)
    assert sorted(calls) == [("a", False), ("b", False), ("c", False), ("text", False)]


@pytest.mark.parametrize("frozen", [True, False])
def test_embeddings_are_the_tower_s_in_the_order_asked_for(make: object, videos: dict[str, str], frozen: bool) -> None:
    stage = make(frozen=frozen)
    samples = [sample("1", videos["a"]), sample("2", videos["b"], videos["a"]), sample("3")]
    selections, dropped = ready(stage, samples)
    assert dropped == []
    assert [len(selections[videos[name]].frames) for name in "ab"] == [7, 7]
    for names in ("a", "ab", "ba", "aa"):
        chosen = [selections[videos[name]] for name in names]
        want = torch.cat([direct(stage, item) for item in chosen])
        got = stage.embeddings(chosen)
        assert got.shape == (len(names) * 7 * TOKENS, WIDTH)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert got.requires_grad is not frozen
    assert stage.embeddings([]) is None


@pytest.mark.parametrize("in_room", [False, True])
def test_prompts_get_their_videos_one_prompt_at_a_time_and_each_video_once(
    make: object, videos: dict[str, str], in_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all prompts of an hour each would not fit on the device at once. The last prompt is another rank's."""
    stage, names = make(), ["a", "", "ba", "a", "ba", "a"]
    batch = [sample(name, *(videos[letter] for letter in name)) for name in names]
    selections, _ = ready(stage, batch)
    prompts = [SimpleNamespace(selections=tuple(selections[videos[letter]] for letter in name)) for name in names]
    want = [stage.embeddings(prompt.selections) for prompt in prompts]
    asked, embeddings = [], stage.embeddings
    monkeypatch.setattr(stage, "embeddings", lambda items, *rest: asked.append(len(items)) or embeddings(items, *rest))
    room = torch.empty(len(want[0]) + len(want[2]), WIDTH) if in_room else None
    first, none, last, *again, other = stage.embeddings_of(prompts, [0, 0, 0, 0, 0, 1], room_ND=room)
    if in_room:
        assert [part.data_ptr() for part in (first, last)] == [room[at].data_ptr() for at in (0, len(first))]
    assert asked == [1, 0, 2, 1]
    assert none is other is None
    assert again[0] is first
    assert again[1] is last
    torch.testing.assert_close([first, last], [want[0], want[2]], rtol=0, atol=0)


def test_without_sharing_a_rank_encodes_only_the_videos_it_needs(make: object, videos: dict[str, str]) -> None:
    stage = make(frozen=False, share_frames=False)
    selections, _ = ready(stage, [sample("1", videos["a"]), sample("2", videos["b"]), sample("3", videos["c"])])
    chosen = [selections[videos[name]] for name in "abc"]
    wanted = torch.tensor([3 * 7 * TOKENS - 1, 5, 2 * 7 * TOKENS])  # of c, a and c again
    stage.encoder.batches.clear()
    got = stage.embeddings(chosen, [wanted])
    assert sum(stage.encoder.batches) == 2 * 7
    want = torch.cat([direct(stage, item) for item in chosen])[wanted]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    nothing = stage.embeddings(chosen, [wanted[:0]])
    assert nothing.shape == (0, WIDTH)


def test_cached_and_fresh_embeddings_are_bit_equal(make: object, videos: dict[str, str]) -> None:
    samples = [sample("1", videos["a"]), sample("2", videos["b"])]
    results = []
    for frozen in (True, True, False):
        stage = make(frozen=frozen)
        selections, _ = ready(stage, samples)
        for _ in range(2):
            results.append(stage.embeddings([selections[videos["a"]], selections[videos["b"]]]).detach().clone())
    # Another pass over the same stage: from the store.
    assert all(torch.equal(result, results[0]) for result in results[:4])
    # Encoded one by one and in one pass: the same frames in other batches.
    torch.testing.assert_close(results[4], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_trained_tower_gets_its_gradient(make: object, videos: dict[str, str], recompute: bool) -> None:
    stage = make(frozen=False, recompute=recompute)
    selections, _ = ready(stage, [sample("1", videos["a"])])
    chosen = selections[videos["a"]]
    stage.embeddings([chosen]).square().sum().backward()
    got = stage.encoder.linear.weight.grad.clone()
    stage.encoder.zero_grad()
    frames = torch.from_numpy(decode_frames(chosen).frames_FHWC)
    stage.encoder(frames).square().sum().backward()
    torch.testing.assert_close(got, stage.encoder.linear.weight.grad, rtol=1e-5, atol=1e-5)


def test_a_recomputed_tower_keeps_frames_alone_and_gives_the_same_bits(make: object, videos: dict[str, str]) -> None:
    gradients, kept = [], []
    for recompute in (False, True):
        stage = make(frozen=False, recompute=recompute)
        selections, _ = ready(stage, [sample("1", videos["a"])])
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            embeds = stage.embeddings([selections[videos["a"]]])
        forwards = list(stage.encoder.batches)
        embeds.square().sum().backward()
        again = stage.encoder.batches[len(forwards) :]
        assert again == ([1, 3, 3] if recompute else []), "batch by batch, the last one first"
        gradients.append(stage.encoder.linear.weight.grad)
        kept.append(sum(sizes))
    assert torch.equal(*gradients)
    assert 7 * SIZE * SIZE * 3 <= kept[1] < kept[0] / 3
    with torch.no_grad():
        stage.embeddings([selections[videos["a"]]])


def test_a_frozen_tower_decodes_and_encodes_each_video_once(
    make: object, videos: dict[str, str], decoded: list[str]
) -> None:
    stage = make()
    first = [sample("1", videos["a"]), sample("2", videos["a"]), sample("3", videos["b"], videos["a"])]
    selections, _ = ready(stage, first)
    for _ in range(3):
        stage.embeddings([selections[videos["a"]]])
    ready(stage, [sample("4", videos["b"]), sample("5", videos["c"])])
    ready(stage, first)
    assert sorted(decoded) == ["a", "b", "c"]
    assert sum(stage.encoder.batches) == stage.frames_encoded == 21
    assert max(stage.encoder.batches) <= 3
    assert len(stage.frames) == 0, "frames are freed once their embeddings are kept"
    assert len(stage.embeds) == 3
    assert stage.embeds.host.bytes_used == 3 * 7 * TOKENS * WIDTH * 4


def test_a_trained_tower_decodes_once_and_encodes_at_every_use(
    make: object, videos: dict[str, str], decoded: list[str]
) -> None:
    stage = make(frozen=False)
    batch = [sample("1", videos["a"]), sample("2", videos["b"])]
    for _ in range(2):
        selections, _ = ready(stage, batch)
        stage.embeddings([selections[videos["a"]]])
    assert sorted(decoded) == ["a", "b"]
    assert stage.frames_encoded == 14
    assert len(stage.embeds) == 0
    assert len(stage.frames) == 2


def test_bad_videos_drop_every_sample_that_uses_them(make: object, videos: dict[str, str]) -> None:
    stage = make()
    samples = [
        sample("ok", videos["a"]),
        sample("bad", videos["bad"]),
        sample("half bad", videos["a"], videos["bad"]),
        sample("gone", videos["gone"]),
        sample("text only"),
    ]
    selections, dropped = ready(stage, samples)
    assert set(selections) == {videos["a"]}
    assert [(drop.sample_id, drop.stage) for drop in dropped] == [
        ("bad", "decode"),
        ("half bad", "decode"),
        ("gone", "decode"),
    ]
    for drop, name in zip(dropped, ("bad", "bad", "gone"), strict=True):
        assert drop.reason.startswith(f"{videos[name]}: ")
        assert len(drop.reason) > len(videos[name]) + 5
    assert stage.embeddings([selections[videos["a"]]]).shape == (7 * TOKENS, WIDTH)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_video_that_breaks_while_decoding_drops_its_samples(
    make: object, videos: dict[str, str], tmp_path: Path, frozen: bool
) -> None:
    """Its packets can be indexed, its pictures cannot be decoded."""
    whole = Path(videos["c"]).read_bytes()
    broken = tmp_path / "broken.mp4"
    start = whole.index(b"mdat") + 4
    broken.write_bytes(whole[: start + 8] + bytes(len(whole[start + 8 : -1200])) + whole[-1200:])
    stage = make(frozen=frozen)
    samples = [sample("ok", videos["a"]), sample("x", str(broken)), sample("y", videos["a"], str(broken))]
    selections, dropped = ready(stage, samples)
    assert [(drop.sample_id, drop.stage) for drop in dropped] == [("x", "decode"), ("y", "decode")]
    assert all(str(broken) in drop.reason for drop in dropped)
    assert stage.embeddings([selections[videos["a"]]]).shape == (7 * TOKENS, WIDTH)


@pytest.mark.parametrize("change", ["gone", "another", "another of the same times"])
def test_a_file_that_changes_after_it_was_indexed_drops_its_samples(make: object, tmp_path: Path, change: str) -> None:
    paths = [write_video(tmp_path / f"{name}.mp4", 9, shade=shade) for name, shade in (("a", 0), ("b", 40))]
    batch, stage = [sample("1", paths[0]), sample("2", paths[1])], make()
    selections, _ = stage.select(batch, CHOOSE)
    if change == "gone":
        Path(paths[0]).unlink()
    else:
        write_video(Path(paths[0]), 9 if "same" in change else 30, shade=90)
    (dropped,) = stage.prepare(batch, selections)
    assert dropped.sample_id == "1"
    assert ("no such file" if change == "gone" else "changed since") in dropped.reason
    stage.release(keep=list(selections.values()))
    assert stage.prepare(batch[1:], selections) == []


@pytest.mark.parametrize("frozen", [True, False])
def test_a_file_that_is_gone_is_not_missed_while_it_is_in_memory(make: object, tmp_path: Path, frozen: bool) -> None:
    path = write_video(tmp_path / "a.mp4", 9, shade=0)
    batch, stage = [sample("1", path)], make(frozen=frozen)
    selections, dropped = ready(stage, batch)
    before = stage.embeddings([selections[path]])
    Path(path).unlink()
    stage.release(keep=[selections[path]])
    assert ready(stage, batch) == (selections, dropped) == (selections, [])
    assert torch.equal(stage.embeddings([selections[path]]), before)


def test_prefetch_decodes_ahead_and_only_what_is_missing(
    make: object, videos: dict[str, str], decoded: list[str]
) -> None:
    stage = make()
    samples = [sample("1", videos["a"]), sample("2", videos["b"])]
    selections, _ = stage.select(samples, CHOOSE)
    stage.prefetch(list(selections.values()))
    stage.prefetch(list(selections.values()))  # already running: not started again
    stage.prepare(samples, selections)
    assert sorted(decoded) == ["a", "b"]
    stage.prefetch(list(selections.values()))  # embeddings are kept: nothing to decode
    stage.prepare(samples, selections)
    assert sorted(decoded) == ["a", "b"]


def test_new_weights_and_new_content_make_new_embeddings(make: object, tmp_path: Path) -> None:
    stage = make()
    path = write_video(tmp_path / "v.mp4", 8, shade=10)
    batch = [sample("1", path)]
    selections, _ = ready(stage, batch)
    key, before = stage.embed_key(selections[path]), stage.embeddings([selections[path]])
    with torch.no_grad():
        stage.encoder.linear.bias[0] += 1
    stage.weights_changed()
    assert stage.embed_key(selections[path]) != key
    with pytest.raises(KeyError):
        stage.embeddings([selections[path]])
    ready(stage, batch)
    torch.testing.assert_close(stage.embeddings([selections[path]])[0, 0], before[0, 0] + 1)
    write_video(tmp_path / "v.mp4", 8, shade=100)
    another = make()  # a run keeps to the files that it has indexed
    selections, _ = ready(another, batch)
    assert another.embed_key(selections[path]) != key
    assert (another.embeddings([selections[path]]) - before).abs().max() > 0.01


CLIP_BYTES = 7 * SIZE * SIZE * 3


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> dict[VisionStage, int]:
    """The most bytes of frames that a stage had in memory or had promised a place, at any time."""
    seen: dict[VisionStage, int] = {}

    def watched(stage: VisionStage, *args: object, **settings: object) -> None:
        start(stage, *args, **settings)
        seen[stage] = max(seen.get(stage, 0), stage.fetches.num_bytes + stage.frames.bytes_used)

    start = VisionStage._start
    monkeypatch.setattr(VisionStage, "_start", watched)
    return seen


@pytest.mark.parametrize("clips", [1, 2, 3, 8])
def test_a_step_of_any_size_keeps_decoded_frames_within_their_budget(
    make: object, videos: dict[str, str], decoded: list[str], most: dict[VisionStage, int], clips: int
) -> None:
    """Of a frozen tower; frames decoded ahead, and what an earlier step left over, count too."""
    batch = [sample("1", videos["c"]), sample("2", videos["a"], videos["b"]), sample("3", videos["c"])]
    stage, free = make(frame_store_bytes=clips * CLIP_BYTES), make()
    selections, _ = stage.select(batch, CHOOSE)
    stage.prefetch(list(selections.values()))
    assert stage.fetches.num_bytes == min(clips, 3) * CLIP_BYTES
    assert ready(stage, batch) == ready(free, batch) == (selections, [])
    assert most == {stage: min(clips, 3) * CLIP_BYTES, free: 3 * CLIP_BYTES}
    for item in selections.values():
        torch.testing.assert_close(stage.embeddings([item]), direct(stage, item))
    assert sorted(decoded) == sorted("abc" * 2)
    assert (stage.frames.bytes_used, stage.fetches.num_bytes) == (0, 0)


def test_what_was_decoded_ahead_makes_room_for_a_step_that_does_not_need_it(
    make: object, videos: dict[str, str], decoded: list[str], most: dict[VisionStage, int]
) -> None:
    stage = make(frame_store_bytes=2 * CLIP_BYTES)
    batch, ahead = [sample("1", videos["a"])], [sample("2", videos["b"]), sample("3", videos["c"])]
    stage.prefetch(list(stage.select(ahead, CHOOSE)[0].values()))
    ready(stage, batch)
    ready(stage, ahead)
    assert decoded.count("a") == 1
    assert most == {stage: 2 * CLIP_BYTES}
    for item in stage.select([*batch, *ahead], CHOOSE)[0].values():
        torch.testing.assert_close(stage.embeddings([item]), direct(stage, item))


def test_frames_of_a_trained_tower_s_next_step_are_decoded_as_far_as_there_is_room(
    make: object, videos: dict[str, str], decoded: list[str], most: dict[VisionStage, int]
) -> None:
    """They are kept beside those of the step in progress, and those of the step before make room first."""
    stage = make(frozen=False, frame_store_bytes=2 * CLIP_BYTES)
    steps = [[sample(name, videos[name])] for name in "abcb"]
    for step, later in zip(steps, [*steps[1:], []], strict=True):
        selections, _ = ready(stage, step)
        stage.prefetch(list(stage.select(later, CHOOSE)[0].values()))
        for item in selections.values():
            torch.testing.assert_close(stage.embeddings([item]), direct(stage, item))
        stage.release()
    assert decoded == ["a", "b", "c"]  # b was not thrown out for c
    assert most == {stage: 2 * CLIP_BYTES}


def test_encoded_frames_are_gone_when_the_next_are_decoded(
    make: object, videos: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only from the store."""
    clips: list[weakref.ref] = []
    alive: list[int] = []

    def watched(selection: FrameSelection, **arguments: int) -> object:
        gc.collect()
        alive.append(sum(clip() is not None for clip in clips))
        clip = decode_frames(selection, **arguments)
        clips.append(weakref.ref(clip.frames_FHWC))
        return clip

    monkeypatch.setattr(video_decoder, "decode_frames", watched)
    stage = make(frame_store_bytes=CLIP_BYTES)
    ready(stage, [sample("1", videos["a"], videos["b"], videos["c"])])
    assert alive == [0, 0, 0]


def test_what_is_read_from_disk_needs_no_room_for_frames(
    make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path
) -> None:
    batch = [sample(name, videos[name]) for name in "abc"]
    first, second = make(embed_folder=str(tmp_path)), make(embed_folder=str(tmp_path), frame_store_bytes=CLIP_BYTES - 1)
    selections, _ = ready(first, batch)
    for item in selections.values():
        first.embeds.save(first.embed_key(item))
    assert second.select(batch, CHOOSE)[0] == selections
    assert second.prefetch(list(selections.values()))
    assert second.fetches.num_bytes == 0
    assert ready(second, batch) == (selections, [])
    assert len(decoded) == 3
    for item in selections.values():
        assert torch.equal(second.embeddings([item]), first.embeddings([item]))


def test_frames_that_the_next_step_needs_are_not_thrown_out_for_its_others(
    make: object, videos: dict[str, str], decoded: list[str], most: dict[VisionStage, int]
) -> None:
    stage = make(frozen=False, frame_store_bytes=2 * CLIP_BYTES)
    first, now, later = [sample("1", videos["a"])], [sample("2", videos["b"])], [sample("3", videos["a"], videos["c"])]
    for batch in (first, now):
        stage.release()
        ready(stage, batch)
    assert not stage.prefetch(list(stage.select(later, CHOOSE)[0].values()))  # b is in use
    assert decoded == ["a", "b"]
    stage.release()
    ready(stage, later)
    assert decoded == ["a", "b", "c"]
    assert most == {stage: 2 * CLIP_BYTES}


def test_a_look_ahead_that_has_no_room_for_all_decodes_nothing_twice(
    make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `megalong cache-embeddings`."""
    paths = [write_video(tmp_path / f"{at}.mp4", 8 + at, shade=9 * at) for at in range(9)]
    stage = make(frame_store_bytes=2 * CLIP_BYTES, embed_folder=str(tmp_path / "cache"))
    monkeypatch.setattr(cache_embeddings, "frame_chooser", lambda *_: CHOOSE)
    config = SimpleNamespace(data=SimpleNamespace(decode_workers=5))
    samples = [sample(path, path) for path in paths]
    done = cache_embeddings.fill(stage, config, samples, stage.layout, PhaseTimer())
    assert (done.encoded, sorted(decoded)) == (9, [str(at) for at in range(9)])


def test_a_batch_larger_than_the_frame_budget_names_its_setting(make: object, videos: dict[str, str]) -> None:
    """Frames of a trained tower are needed all at once; of a frozen one those of a video."""
    for frozen, room in ((False, CLIP_BYTES), (True, CLIP_BYTES - 1)):
        stage = make(frozen=frozen, frame_store_bytes=room)
        with pytest.raises(StoreFullError, match=r"raise video\.frame_cache_gib"):
            ready(stage, [sample("1", videos["a"], videos["b"])])


def test_embeddings_over_their_budget_name_their_setting(make: object, videos: dict[str, str]) -> None:
    stage = make(embed_host_bytes=7 * TOKENS * WIDTH * 4)
    ready(stage, [sample("1", videos["a"])])
    stage.release()
    ready(stage, [sample("1", videos["b"])])
    assert (len(stage.embeds), stage.embeds.host.num_evicted) == (1, 1)
    stage.release()
    with pytest.raises(StoreFullError, match=r"raise video\.cache_gib"):
        ready(stage, [sample("1", videos["a"], videos["b"])])


def test_a_step_of_several_batches_keeps_what_it_needs(make: object, videos: dict[str, str]) -> None:
    """Dynamic sampling: a, then b beside it, then c when b is left out. Room for two."""
    stage = make(embed_host_bytes=2 * 7 * TOKENS * WIDTH * 4)
    chosen = {}
    for name in "ab":
        selections, _ = ready(stage, [sample(name, videos[name])])
        chosen[name] = selections[videos[name]]
    with pytest.raises(StoreFullError, match=r"that the step in progress needs: raise video\.cache_gib"):
        ready(stage, [sample("c", videos["c"])])
    stage.release(keep=[chosen["a"]])
    selections, _ = ready(stage, [sample("c", videos["c"])])
    assert stage.embeddings([chosen["a"], selections[videos["c"]]]).shape == (2 * 7 * TOKENS, WIDTH)
    with pytest.raises(KeyError):
        stage.embeddings([chosen["b"]])


@pytest.mark.parametrize("frozen", [True, False])
def test_two_names_of_one_content_are_one_video(
    make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path, frozen: bool
) -> None:
    copy = shutil.copy(videos["a"], tmp_path / "copy.mp4")
    stage = make(frozen=frozen)
    batch = [sample("1", videos["a"]), sample("2", str(copy)), sample("3", str(copy), videos["a"])]
    selections, dropped = ready(stage, batch)
    assert dropped == []
    assert (len(selections), len(decoded)) == (2, 1)
    both = stage.embeddings([selections[videos["a"]], selections[str(copy)]])
    assert torch.equal(*both.chunk(2))


def test_both_names_of_a_broken_content_drop_their_samples(
    make: object, videos: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = str(shutil.copy(videos["a"], tmp_path / "copy.mp4"))

    def broken(selection: FrameSelection, **_: int) -> object:
        raise DecodeError(selection.path, "torn")

    monkeypatch.setattr(video_decoder, "decode_frames", broken)
    _, dropped = ready(make(), [sample("1", videos["a"]), sample("2", copy), sample("3")])
    assert [(drop.sample_id, drop.reason.split(": ")[0]) for drop in dropped] == [("1", videos["a"]), ("2", copy)]


# ---- the disk store


def on_disk(make: object, folder: Path, *, rank: int = 0, size: int = 1, **changes: object) -> VisionStage:
    """A stage with a disk store; of a rank of a replica, when size is more than 1, that only stores."""
    stage = make(embed_folder=str(folder), **changes)
    if size > 1:
        stage.layout = replace(stage.layout, replica_rank=rank, replica_size=size)
    return stage


def test_embeddings_of_any_split_are_read_from_disk_by_any_other(
    make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path
) -> None:
    samples = [sample(name, videos[name]) for name in "abc"]
    whole = make()
    selections, _ = ready(whole, samples)
    want = {name: whole.embeddings([selections[videos[name]]]) for name in "abc"}
    for rank in range(3):
        stage = on_disk(make, tmp_path, rank=rank, size=3)
        assert stage.prepare(samples, selections) == []
        for name in "abc":
            stage.embeds.save(stage.embed_key(selections[videos[name]]))
    decoded.clear()
    for size in (1, 2, 4):
        for rank in range(size):
            stage = on_disk(make, tmp_path, rank=rank, size=size)
            assert stage.prepare(samples, selections) == []
            assert stage.frames_encoded == 0
            for name in "abc":
                first, last = stage._share(selections[videos[name]])
                got = stage.embeds.get(stage.embed_key(selections[videos[name]]))
                torch.testing.assert_close(got, want[name][first * TOKENS : last * TOKENS], rtol=1e-6, atol=1e-6)
    assert decoded == []


def test_what_memory_has_no_room_for_is_read_back_from_disk(
    make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path
) -> None:
    stage = on_disk(make, tmp_path, embed_host_bytes=7 * TOKENS * WIDTH * 4)
    selections, _ = stage.select([sample(name, videos[name]) for name in "ab"], CHOOSE)
    got = []
    for name in "abab":
        stage.release()
        assert stage.prepare([sample(name, videos[name])], selections) == []
        got.append(stage.embeddings([selections[videos[name]]]))
    assert sorted(decoded) == ["a", "b"]
    assert torch.equal(got[0], got[2])
    assert torch.equal(got[1], got[3])
    assert stage.embeds.host.num_evicted == 3


def test_a_refused_file_is_made_again(make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path) -> None:
    batch = [sample("1", videos["a"]), sample("2", videos["b"])]
    first = on_disk(make, tmp_path)
    selections, _ = ready(first, batch)
    want = first.embeddings([selections[videos["a"]], selections[videos["b"]]])
    for name in "ab":
        first.embeds.save(first.embed_key(selections[videos[name]]))
    damaged = sorted(tmp_path.rglob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-4])
    decoded.clear()
    again = on_disk(make, tmp_path)
    ready(again, batch)
    torch.testing.assert_close(again.embeddings(list(selections.values())), want, rtol=1e-6, atol=1e-6)
    assert len(decoded) == 1
    assert again.embeds.disk.refused == [damaged]


def saved(make: object, folder: Path, batch: Sequence[Sample]) -> VisionStage:
    """A stage that has written the embeddings of the batch's videos to the folder."""
    stage = on_disk(make, folder)
    for selection in ready(stage, batch)[0].values():
        stage.embeds.save(stage.embed_key(selection))
    return stage


def test_another_decoder_never_reads_an_entry(
    make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path
) -> None:
    """Its pixels differ by a few grey levels."""
    batch = [sample("1", videos["a"])]
    saved(make, tmp_path, batch)
    for settings, count in (("dali", 2), ("pyav", 2), ("nvcodec, pyav up to 32000000 pixels", 3)):
        stage = on_disk(make, tmp_path)
        stage.decoder.settings = settings
        ready(stage, batch)
        assert len(decoded) == count, settings


def test_other_weights_and_other_settings_never_read_an_entry(
    make: object, videos: dict[str, str], decoded: list[str], tmp_path: Path
) -> None:
    batch = [sample("1", videos["a"])]
    first = saved(make, tmp_path, batch)
    with torch.no_grad():
        first.encoder.linear.bias[0] += 1
    first.weights_changed()
    ready(first, batch)
    other = on_disk(make, tmp_path)
    other.encoder.settings = "linear, pooled"
    other.weights_changed()
    ready(other, batch)
    assert decoded == ["a"] * 3


def test_a_trained_tower_has_no_disk_store(make: object, tmp_path: Path) -> None:
    assert on_disk(make, tmp_path, frozen=False).embeds.disk is None


class PairTower(nn.Module):
    """Two frames of any size to as many embeddings as the layout says; each names its frames and size by a sum."""

    settings = "pairs"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.batches: list[tuple[int, ...]] = []

    def forward(self, frames_FHWC: Tensor) -> Tensor:
        self.batches.append(tuple(frames_FHWC.shape))
        frames, height, width, _ = frames_FHWC.shape
        sums = frames_FHWC.float().reshape(frames // 2, -1).sum(1)
        tokens = height * width // 32
        return self.scale * sums[:, None, None] + torch.arange(tokens)[None, :, None] + torch.zeros(WIDTH * 2)


class PairLayout:
    frames_per_step = 2

    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        return (height // 2, width) if num_frames == 8 else (height // 4, width // 2)

    def tokens_per_step(self, selection: FrameSelection) -> int:
        return selection.height * selection.width // 32


@pytest.mark.parametrize("frozen", [True, False])
def test_videos_of_different_sizes_are_encoded_apart_and_in_whole_steps(
    layout: object, videos: dict[str, str], frozen: bool
) -> None:
    """a has 8 frames at 16 x 32, b and c 5 frames (the last one twice: 6) at 8 x 16."""
    choose = partial(CHOOSE, num_frames=8, layout=PairLayout())
    short = partial(CHOOSE, num_frames=5, layout=PairLayout())
    stage = VisionStage(PairTower(), layout, replace(SETTINGS, frozen=frozen), videos=PairLayout())
    batch = [sample(name, videos[name]) for name in "bac"]
    selections, dropped = stage.select(batch, lambda index: (choose if "a.mp4" in index.path else short)(index))
    assert [stage.prepare(batch, selections), dropped] == [[], []]
    shapes = {name: (len(item.frames), item.height, item.width) for name, item in selections.items()}
    assert shapes == {videos["a"]: (8, 16, 32), videos["b"]: (6, 8, 16), videos["c"]: (6, 8, 16)}
    chosen = [selections[videos[name]] for name in "bac"]
    got = stage.embeddings(chosen)
    want = torch.cat(
        [stage.encoder(torch.from_numpy(decode_frames(item).frames_FHWC)).flatten(0, 1) for item in chosen]
    )
    assert got.shape == (3 * 4 + 4 * 16 + 3 * 4, 2 * WIDTH)
    assert torch.equal(got, want)
    assert got.requires_grad is not frozen
    assert all(shape[0] == 2 for shape in stage.encoder.batches[:-3])  # 3 frames a batch: one whole step
    stage.close()


def test_a_stage_that_does_not_wait_decodes_nothing_more(
    make: object, videos: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, started, go_on = [], threading.Event(), threading.Event()

    def slow(selection: FrameSelection, **arguments: int) -> object:
        begun.append(Path(selection.path).stem)
        started.set()
        go_on.wait(60)
        return decode_frames(selection, **arguments)

    monkeypatch.setattr(video_decoder, "decode_frames", slow)
    stage = make(decode_workers=1)
    selections, _ = stage.select([sample("1", *(videos[name] for name in "abc"))], CHOOSE)
    stage.prefetch(list(selections.values()))
    started.wait(60)
    stage.close(wait=False)
    go_on.set()
    stage.close()
    assert len(begun) == 1


def test_a_family_without_vision_takes_samples_without_videos(layout: object, videos: dict[str, str]) -> None:
    stage = VisionStage(None, layout, SETTINGS, videos=None)
    assert stage.select([sample("1")], CHOOSE) == ({}, [])
    assert stage.prepare([sample("1")], {}) == []
    assert stage.embeddings([]) is None
    with pytest.raises(ValueError, match="this model family has no vision, and the sample has a video"):
        stage.select([sample("1"), sample("2", videos["a"])], CHOOSE)
    stage.close()
