"""VllmEngine when its process dies, hangs or answers with an error: tried with a program in vLLM's place."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import fake_server
import pytest
import torch
import torch.distributed as dist
from engines import make_request

from megalong.config.tree import ModelConfig
from megalong.engine.build import family_of
from megalong.records import MEDIA_TOKEN, Prompt, Sample, WeightBucket
from megalong.rollout import shared_memory, vllm_engine
from megalong.rollout.engine import RolloutEngineError, Sampling
from megalong.rollout.sampler import GroupSampler
from megalong.rollout.transfer import Transport
from megalong.rollout.vllm_engine import VllmEngine, VllmSettings

GREEDY = Sampling(group_size=1, max_tokens=4, temperature=0.0, top_p=1.0, top_k=0)
SECONDS = 2.0
"""timeout_seconds of the engines here."""

Make = Callable[..., VllmEngine]


@pytest.fixture
def make(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """An engine whose process does `fault` in `method`."""
    monkeypatch.setattr(vllm_engine, "SERVER", fake_server.__name__)
    family = family_of(ModelConfig(path=str(tiny_checkpoint)))
    made: list[VllmEngine] = []

    def engine(
        fault: str, *, method: str = "generate", transport: Transport = Transport.file, sleeps: bool = False,
        start_seconds: float = 60.0,
    ) -> VllmEngine:  # fmt: skip
        monkeypatch.setenv("FAKE_ENGINE", fault)
        monkeypatch.setenv("FAKE_METHOD", method)
        settings = VllmSettings(
            devices=(), transport=transport, max_tokens=64, prefill_tokens=64, max_sequences=4, memory_share=0.1,
            cuda_graphs=False, processed_logprobs=False, sleeps=sleeps, discard_weights=sleeps,
            start_seconds=start_seconds, timeout_seconds=SECONDS, log_file=tmp_path / "run" / "engine.log", seed=1,
        )  # fmt: skip
        with torch.device("meta"):
            model = family.sampler_model(tiny_checkpoint, torch.float32)
        made.append(VllmEngine(model, name_of=family.sampler_name, eos_id=0, settings=settings))
        return made[-1]

    yield engine
    for item in made:
        item.close()


def buckets(engine: VllmEngine) -> list[WeightBucket]:
    """Any weights of the right names and shapes."""
    tensors = {f"llm/{name}": torch.zeros(shape) for name, shape in engine.weights.shapes.items()}
    return [WeightBucket.of(tensors)]


def failure(engine: VllmEngine) -> str:
    """The message of the RolloutEngineError that generate() ends with."""
    engine.load_weights(buckets(engine), version=0)
    with pytest.raises(RolloutEngineError) as caught:
        engine.generate([make_request([1, 2, 3], None, (0,))], sampling=GREEDY)
    return str(caught.value)


def is_gone(pid: int) -> bool:
    """A process that was ended but not waited for would still be there."""
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("fault", "code"), [("exit", 7), ("kill", -9)])
def test_a_process_that_dies_is_reported_with_its_code_and_log(make: Make, fault: str, code: int) -> None:
    engine = make(fault)
    started = time.monotonic()
    message = failure(engine)
    assert time.monotonic() - started < SECONDS + 3
    assert f"process {engine._process.pid}, GPUs none, exit code {code}) ended in generate()" in message
    assert message.endswith(f"engine.log:\nline before the {fault}")
    assert is_gone(engine._process.pid)
    assert not engine._folder.exists()  # of its shared memory
    with pytest.raises(RolloutEngineError, match=r"in generate\(\)"):
        engine.generate([make_request([1, 2, 3], None, (0,))], sampling=GREEDY)


def test_a_process_that_hangs_is_ended_after_the_timeout(make: Make) -> None:
    engine = make("hang")
    started = time.monotonic()
    message = failure(engine)
    assert SECONDS <= time.monotonic() - started < SECONDS + 4
    assert "exit code -9) did not answer within 2 s; see parallel.timeout_minutes in generate()" in message
    assert "line before the hang" in message
    assert is_gone(engine._process.pid)


def test_an_engine_that_hangs_at_its_start_is_ended_with_its_log(make: Make) -> None:
    with pytest.raises(RolloutEngineError, match=r"did not answer within 2 s; .* in start\(\).*\nline before the hang"):
        make("hang", method="start", start_seconds=SECONDS)


def test_an_engine_sleeps_where_it_was_told_to(make: Make) -> None:
    awake, sleeper = (make("error", method="sleep", transport=Transport.ipc, sleeps=sleeps) for sleeps in (False, True))
    awake.release()
    assert (awake.asleep, awake.needs_weights) == (False, False)
    with pytest.raises(RolloutEngineError, match=r"no such token in sleep\(\)"):
        sleeper.release()
    sleeper = make("none", transport=Transport.ipc, sleeps=True)
    sleeper.release()
    assert (sleeper.asleep, sleeper.needs_weights) == (True, True)


def test_the_engine_lets_go_of_a_room_before_a_larger_one_is_made(make: Make) -> None:
    engine = make("error", method="close_media")
    small = engine.embeds_room(4).data_ptr()
    assert engine.embeds_room(3).data_ptr() == small
    with pytest.raises(RolloutEngineError, match=r"no such token in close_media\(\)"):
        engine.embeds_room(5)


def test_the_process_is_told_where_each_request_s_embeddings_are(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of questions about one video in the same place."""
    engine, sent = make(""), {}
    engine.load_weights(buckets(engine), version=0)
    monkeypatch.setattr(engine, "_send", lambda method, requests, **rest: sent.update(rest, requests=requests))
    one, other = engine.embeds_room(5).split([2, 3])
    places = [[4, *[MEDIA_TOKEN] * count, 5] for count in (2, 3, 0, 2)]
    embeds = [one, other, None, one]
    engine.begin([make_request(*pair, (0,)) for pair in zip(places, embeds, strict=True)], sampling=GREEDY)
    assert sent["media"] == (str(engine.media.path), 5, engine.width)
    assert sent["first_rows"] == [0, 2, None, 0]
    assert [request.embeds_ND for request in sent["requests"]] == [None] * 4


def test_the_trainer_goes_on_while_the_process_samples(make: Make) -> None:
    engine = make("slow")
    engine.load_weights(buckets(engine), version=0)
    started = time.monotonic()
    engine.begin([make_request([1, 2, 3], None, (0,))], sampling=GREEDY)
    assert time.monotonic() - started < fake_server.SLOW_SECONDS / 2
    with pytest.raises(RuntimeError, match=r"start_update\(\) was asked of an engine that samples; call finish\(\)"):
        engine.load_weights(buckets(engine), version=1)
    with pytest.raises(RuntimeError, match=r"embeds_room\(\) was asked of an engine that samples"):
        engine.embeds_room(3)  # it reads those of the batch
    assert engine.finish() == [["group"]]
    assert time.monotonic() - started >= fake_server.SLOW_SECONDS
    assert engine.counts["prefilled_tokens"] == 1
    engine.load_weights(buckets(engine), version=2)
    assert engine.version == 2


def test_what_a_batch_cost_is_counted_and_an_evaluation_s_left_out(
    make: Make, layout: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process says that it had two of the three prompt tokens already."""
    monkeypatch.setattr(GroupSampler, "groups_of", lambda *_, **__: [])
    engine = make("sample")
    sampler = GroupSampler(engine, layout, decode=str, seed=9)
    sampler.load_weights(buckets(engine), version=0)

    sample = Sample(
        sample_id="a", question="q", answer="A", videos=(), problem_type="open-ended", category="c", reasoning="",
        subtitles="",
    )  # fmt: skip
    prompt = Prompt(sample=sample, ids_P=(1, 2, 3), selections=(), positions_P=torch.arange(3), next_position=3)

    def sample_batch() -> None:
        sampler.finish(sampler.begin([prompt], [None], sampling=GREEDY, step=1))

    engine.counts["handover_seconds"] = 100.0  # of batches before
    sample_batch()
    with sampler.uncounted():
        sample_batch()
    sample_batch()
    counts = sampler.take_counts()
    assert 0 < counts.pop("handover_seconds") < 50
    assert counts == {"prefilled_tokens": 2, "prompt_tokens": 6, "sampled_groups": 2}
    assert engine.counts["prefilled_tokens"] == 3
    assert sampler.take_counts() == {}


def test_a_process_that_died_meanwhile_is_found_by_who_waits_for_it(make: Make) -> None:
    engine = make("exit")
    engine.load_weights(buckets(engine), version=0)
    engine.begin([make_request([1, 2, 3], None, (0,))], sampling=GREEDY)
    engine._process.wait(timeout=10)
    with pytest.raises(RolloutEngineError, match=r"exit code 7\) ended in generate\(\)"):
        engine.finish()


def test_a_process_is_ended_while_it_samples(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make("hang")
    engine.load_weights(buckets(engine), version=0)
    engine.begin([make_request([1, 2, 3], None, (0,))], sampling=GREEDY)
    wait = engine._process.wait
    monkeypatch.setattr(engine._process, "wait", lambda timeout=None: wait(timeout and min(timeout, 1.0)))
    engine.close()
    assert is_gone(engine._process.pid)
    assert not engine._folder.exists()


def test_an_error_of_the_engine_arrives_with_its_traceback(make: Make) -> None:
    engine = make("error")
    message = failure(engine)
    assert "exit code None) failed:\nTraceback ..\nValueError: no such token in generate()" in message
    pid = engine._process.pid
    assert not is_gone(pid), "it may be asked again"
    engine.close()
    assert is_gone(pid)


@pytest.mark.parametrize("method", ["start_update", "update", "finish_update"])
def test_a_process_that_dies_in_an_update_leaves_no_weights(make: Make, method: str) -> None:
    engine = make("exit", method=method)
    with pytest.raises(RolloutEngineError, match=rf"exit code 7\) ended in {method}\(\)"):
        engine.load_weights(buckets(engine), version=0)
    assert engine.version == -1


def test_a_process_that_does_not_start_leaves_nothing_behind(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **rest: folders.append(mkdtemp(**rest)) or folders[-1])
    with pytest.raises(RolloutEngineError, match=r"exit code 7\) ended in start\(\)"):
        make("exit", method="start")
    (folder,) = folders
    assert not os.path.exists(folder)


def test_a_full_memory_folder_is_named(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shared_memory, "memory_folder", lambda: tmp_path)
    monkeypatch.setattr(vllm_engine, "write_config", full)
    with pytest.raises(RolloutEngineError, match=rf"{tmp_path}/megalong-engine-\w+: cannot be written .*No space left"):
        make("")
    assert list(tmp_path.glob("megalong-engine-*")) == []


# ---- collectives that the engine's workers take part in, over NCCL: tried with other things that wait


@dataclass(frozen=True)
class Stream:
    """A CUDA stream, as far as buckets know it; `waits` has who waited for whom, and the broadcasts between."""

    name: str
    waits: ClassVar[list[tuple[str, str | int]]] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append((self.name, other.name))

    def synchronize(self) -> None:
        self.waits.append(("host", self.name))


class Group:
    """vLLM's communicator, as far as VllmEngine knows it."""

    def __init__(self, broadcast: Callable[[], None] = lambda: None) -> None:
        self.act, self.destroyed = broadcast, False

    def broadcast(self, packed: torch.Tensor, *, src: int, stream: Stream) -> None:
        assert stream.name == "sending"
        stream.waits.append(("broadcast", len(packed)))
        self.act()

    def destroy(self) -> None:
        self.destroyed = True


def wait_for_the_engine() -> None:
    """As vLLM's trainer_init does, in a store that the engine does not come to."""
    dist.TCPStore("127.0.0.1", 0, world_size=2, is_master=True, timeout=timedelta(seconds=30), use_libuv=False)


@pytest.fixture
def make_nccl(make: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """As `make`; join: the trainer's part of making the group."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("trainer"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("sending"))
    monkeypatch.setattr(Stream, "waits", [])

    def engine(fault: str, *, method: str, join: Callable[[dict], Group]) -> VllmEngine:
        module = ModuleType("nccl_engine")
        module.NCCLWeightTransferEngine = SimpleNamespace(trainer_init=join)
        monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.nccl_engine", module)
        return make(fault, method=method, transport=Transport.nccl)

    return engine


@pytest.mark.parametrize(
    ("fault", "what"),
    [("exit", "exit code 7) ended in init_transfer()"), ("error", "failed:\nTraceback ..\nValueError: no such token")],
)
def test_an_engine_that_fails_before_it_joins_the_group_is_noticed_at_once(
    make_nccl: Make, fault: str, what: str
) -> None:
    started = time.monotonic()
    with pytest.raises(RolloutEngineError) as caught:
        make_nccl(fault, method="init_transfer", join=lambda place: wait_for_the_engine())
    assert time.monotonic() - started < 15, "the store's own limit is 30 s"
    assert what in str(caught.value)
    assert f"line before the {fault}" in str(caught.value)


@pytest.mark.parametrize("fault", ["exit", "kill"])
def test_an_engine_that_dies_in_a_broadcast_is_noticed_at_once(make_nccl: Make, fault: str) -> None:
    group = Group(lambda: time.sleep(30))
    engine = make_nccl(fault, method="update", join=lambda place: group)
    started = time.monotonic()
    with pytest.raises(RolloutEngineError, match=rf"exit code {7 if fault == 'exit' else -9}\) ended in update\(\)"):
        engine.load_weights(buckets(engine), version=0)
    assert time.monotonic() - started < SECONDS + 4
    assert group.destroyed, "kernels that wait for the engine would keep the GPU"


def test_an_error_between_a_bucket_s_announcement_and_its_broadcast_ends_the_engine(make_nccl: Make) -> None:
    """The engine waits for bytes that will not come."""

    def fail() -> None:
        raise RuntimeError("unhandled cuda error")

    engine = make_nccl("hang", method="update", join=lambda place: Group(fail))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="unhandled cuda error"):
        engine.load_weights(buckets(engine), version=0)
    assert time.monotonic() - started < SECONDS, "not after the engine's limit"
    assert is_gone(engine._process.pid)


def test_answers_that_come_before_a_collective_ends_are_not_lost(make_nccl: Make) -> None:
    engine = make_nccl("", method="", join=lambda place: time.sleep(1.2) or Group(lambda: time.sleep(1.2)))
    engine.load_weights(buckets(engine) * 2, version=3)
    assert engine.version == 3
    assert engine._answers == []


def test_a_bucket_leaves_while_the_next_is_gathered_and_only_the_largest_tensors_as_they_are(make_nccl: Make) -> None:
    """The trainer's stream waits for the sending one before it overwrites the buffer; who gathers waits for nobody."""
    group = Group()
    engine = make_nccl("", method="", join=lambda place: group)
    (bucket,) = buckets(engine)
    names = list(bucket.tensors)
    large = max(names, key=lambda name: bucket.tensors[name].nbytes)
    few, more = names[:2], [name for name in names[2:] if name != large]

    def three() -> Iterator[WeightBucket]:
        for chosen in (few, [large], more):
            Stream.waits.append(("gathered", len(chosen)))
            yield WeightBucket.of({name: bucket.tensors[name] for name in chosen})

    engine.load_weights(three(), version=0)
    sizes = [size for what, size in Stream.waits if what == "broadcast"]
    assert sizes[1] == bucket.tensors[large].nbytes
    assert sizes[2] > sizes[0] >= sum(bucket.tensors[name].nbytes for name in few)
    written, packed = ("trainer", "sending"), ("sending", "trainer")
    assert Stream.waits == [
        ("gathered", 2), written, packed, ("broadcast", sizes[0]),
        ("gathered", 1), packed, ("broadcast", sizes[1]), ("host", "sending"),
        ("gathered", len(more)), written, packed, ("broadcast", sizes[2]),
        written,  # the end of the update
    ]  # fmt: skip
    assert engine._room._buffer is None


def test_a_bucket_is_gone_when_the_next_one_is_made(make: Make) -> None:
    engine = make("")
    alive: list[weakref.ref] = []

    def one_by_one() -> Iterator[WeightBucket]:
        for name, shape in engine.weights.shapes.items():
            assert [ref() for ref in alive] == [None] * len(alive)
            tensors = {f"llm/{name}": torch.zeros(shape)}
            alive.append(weakref.ref(tensors[f"llm/{name}"]))
            bucket = WeightBucket.of(tensors)
            del tensors
            yield bucket
            del bucket

    engine.load_weights(one_by_one(), version=0)
    assert len(alive) > 10
