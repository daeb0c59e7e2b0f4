"""What VllmEngine does around the engine's process: its files, and that neither outlives the trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import HAS_VLLM
from transformers import Qwen2Config, Qwen2ForCausalLM

from megalong.rollout import shared_memory
from megalong.rollout.engine import RolloutEngineError
from megalong.rollout.shared_memory import BucketRoom, MediaRoom, shared_tensor
from megalong.rollout.transfer import Transport
from megalong.rollout.vllm_model import write_config

TRAINER = """
import subprocess, sys, time, os
fd, folder = sys.argv[1:]
command = [sys.executable, "-m", "megalong.rollout.vllm_server", fd, str(os.getpid()), folder]
print(subprocess.Popen(command, pass_fds=[int(fd)], start_new_session=True).pid, flush=True)
time.sleep(600)
"""

HOLDER = """
import sys, time
from pathlib import Path
from megalong.rollout import shared_memory
shared_memory.memory_folder = lambda: Path(sys.argv[1])
folder, held = shared_memory.engine_folder()
(folder / "media1").write_bytes(bytes(1000))
print(folder, flush=True)
time.sleep(600)
"""


def test_what_was_left_by_a_trainer_and_an_engine_that_were_killed_at_once_is_deleted_by_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "memory_folder", lambda: tmp_path)
    (tmp_path / "megalong-engine-of-old").mkdir()  # nobody says whose it is
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        folder = Path(other.stdout.readline().strip())
        mine, held = shared_memory.engine_folder()
        assert folder.is_dir()
    finally:
        other.kill()
        other.wait()
    again, held_again = shared_memory.engine_folder()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "megalong-engine-of-old", mine, again])
    held.close()
    held_again.close()


def test_a_shared_tensor_is_the_file(tmp_path: Path) -> None:
    tensor = shared_tensor(tmp_path / "media", (3, 5), torch.bfloat16)
    tensor.copy_(torch.arange(15.0).view(3, 5))
    assert (tmp_path / "media").stat().st_size == 30
    mapped = torch.from_file(str(tmp_path / "media"), shared=True, size=15, dtype=torch.bfloat16)
    assert torch.equal(mapped.view(3, 5), tensor)


def test_no_room_for_a_shared_tensor_is_said_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(RolloutEngineError, match=r"media: 1048576.00 GiB .* --shm-size"):
        shared_tensor(tmp_path / "media", (1 << 50,), torch.uint8)


def test_buckets_by_cuda_ipc_go_through_one_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with names in the place of handles: the engine maps anew what it is told by another name."""
    shared: list[weakref.ref] = []

    def share(tensor: torch.Tensor) -> tuple[None, tuple[str]]:
        shared.append(weakref.ref(tensor))
        return None, (f"handle {len(shared)}",)

    alive_when_emptied: list[int] = []

    def look() -> None:
        alive_when_emptied.append(sum(ref() is not None for ref in shared))

    monkeypatch.setattr("megalong.rollout.shared_memory.reduce_tensor", share)
    monkeypatch.setattr(torch.cuda, "empty_cache", look)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a"))
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: waited.append(True)))
    room, places, addresses = BucketRoom(Transport.ipc, tmp_path), [], []
    for num_bytes in (100, 40, 100, 200, 150):
        packed = room.pack({"w": torch.full((num_bytes,), num_bytes, dtype=torch.uint8)}, num_bytes=num_bytes)
        assert packed.tolist() == [num_bytes] * num_bytes
        places.append(room.place(packed))
        addresses.append(packed.data_ptr())
        del packed
    assert places == [("GPU-a", (f"handle {number}",)) for number in (1, 1, 1, 2, 2)]
    assert len(set(addresses[:3])) == len(set(addresses[3:])) == 1
    assert alive_when_emptied == [0, 0], "a buffer that is too small is let go of before the next one is made"
    assert len(waited) == 5, "the bytes are there when the engine is told of them"


def test_embeddings_have_the_same_room_until_it_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda pointer, *_: calls.append(("pin", pointer)) or 2 * (len(calls) > 4),
        cudaHostUnregister=lambda pointer: calls.append(("unpin", pointer)),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    room = MediaRoom(tmp_path, width=3, dtype=torch.bfloat16)
    first = room.rows(8)
    where = first.data_ptr()
    assert (first.shape, first.dtype) == ((8, 3), torch.bfloat16)
    assert room.rows(5).data_ptr() == room.rows(8).data_ptr() == where
    mapped = torch.from_file(str(room.path), shared=True, size=24, dtype=torch.bfloat16)
    room.rows(8).fill_(2)
    assert mapped.tolist() == [2.0] * 24
    before = room.path
    more = room.rows(9)
    assert (len(room), len(more)) == (9, 9)
    assert room.path != before
    assert not before.exists()
    assert calls == [("pin", where), ("unpin", where), ("pin", more.data_ptr())]
    with pytest.raises(RolloutEngineError, match=r"media3: cudaHostRegister cannot pin 0.00 GiB .*CUDA error 2"):
        room.rows(100)
    room.close()
    assert calls[3:] == [("unpin", more.data_ptr()), ("pin", calls[-1][1])], "what is not pinned stays so"
    assert list(tmp_path.iterdir()) == []


def test_embeddings_are_copied_unless_they_are_in_their_place(tmp_path: Path) -> None:
    room = MediaRoom(tmp_path, width=3, dtype=torch.float32)
    rows = room.rows(6)
    rows.copy_(torch.arange(6.0)[:, None])
    (path, count, width), first_rows = room.write([rows[:2], None, rows[2:6]])
    assert (count, width) == (6, 3)
    assert first_rows == [0, None, 2]
    written = torch.from_file(path, shared=True, size=18).view(6, 3)
    assert written[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    room.write([rows[2:6], rows[:2]])  # there, and elsewhere
    assert written[:, 0].tolist() == [2, 3, 4, 5, 0, 1]
    room.write([torch.full((2, 3), 7.0), rows[:2]])
    assert written[:4, 0].tolist() == [7, 7, 2, 3]
    assert room.write([None]) == (None, [None])
    room.close()


def test_embeddings_that_come_several_times_are_written_once(tmp_path: Path) -> None:
    """Those of questions about one video, and equal ones of another."""
    room = MediaRoom(tmp_path, width=3, dtype=torch.float32)
    one, two = torch.rand(2, 3), torch.rand(4, 3)
    (path, count, _), first_rows = room.write([one, two, None, one, one.clone(), two])
    assert (count, first_rows) == (8, [0, 2, None, 0, 6, 2])
    written = torch.from_file(path, shared=True, size=24).view(8, 3)
    assert torch.equal(written, torch.cat([one, two, one]))
    room.close()


def test_responses_end_where_the_tokenizer_says_and_not_at_the_ends_of_the_checkpoint(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(
            Qwen2Config(**sizes, num_attention_heads=1, num_key_value_heads=1, eos_token_id=[3, 4])
        )
    write_config(model, tmp_path, max_tokens=8, eos_id=5)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 5


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_a_killed_trainer_leaves_no_engine_and_no_shared_memory(tmp_path: Path) -> None:
    """Though somebody else holds the trainer's end of the connection, as a forked child of it would."""
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "media").touch()
    reader, writer = os.pipe()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(reader), str(folder)], pass_fds=[reader], stdout=subprocess.PIPE, text=True
    )
    try:
        engine = int(trainer.stdout.readline())
        time.sleep(1)
        assert _runs(engine)
    finally:
        trainer.kill()
        trainer.wait()
        os.close(reader)
    limit = time.monotonic() + 120
    while (folder.exists() or _runs(engine)) and time.monotonic() < limit:
        time.sleep(0.2)
    ended = not _runs(engine)
    os.close(writer)
    if not ended:
        os.killpg(engine, signal.SIGKILL)
    assert ended
    assert not folder.exists()


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
