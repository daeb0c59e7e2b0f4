"""The byte-bounded store and the content key of decoded frames."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalong.data.video_index import DecodeError
from megalong.records import FrameSelection
from megalong.vision.store import ByteStore, FileContents, StoreFullError, file_digest, selection_key


def store(budget: int = 10) -> ByteStore[str]:
    return ByteStore(what="embeddings", budget_bytes=budget, setting="video.cache_gib")


def test_least_recently_used_goes_first() -> None:
    kept = store()
    for name in "abc":
        kept.put(name, name.upper(), num_bytes=3)
    assert kept.get("a") == "A"  # used: b is now the oldest
    kept.put("d", "D", num_bytes=4)
    assert ("b" in kept, "a" in kept, "c" in kept, "d" in kept) == (False, True, True, True)
    assert (kept.bytes_used, kept.num_evicted, len(kept)) == (10, 1, 3)


def test_eviction_stops_as_soon_as_there_is_room() -> None:
    kept = store()
    for name in "abcde":
        kept.put(name, name, num_bytes=2)
    kept.put("f", "f", num_bytes=3)
    assert [name in kept for name in "abcdef"] == [False, False, True, True, True, True]
    assert kept.bytes_used == 9


def test_pinned_items_stay_and_no_room_beside_them_is_an_error() -> None:
    kept = store()
    kept.put("a", "A", num_bytes=5)
    kept.put("b", "B", num_bytes=4)
    kept.pin({"a"})
    kept.put("c", "C", num_bytes=5)
    assert ("a" in kept, "b" in kept, "c" in kept) == (True, False, True)
    kept.pin({"c"})  # and still a
    with pytest.raises(StoreFullError, match=r"raise video\.cache_gib \(now 0\.000\) or lower the batch size"):
        kept.put("d", "D", num_bytes=1)
    assert (kept.get("a"), kept.get("c"), kept.bytes_used) == ("A", "C", 10)
    kept.release(keep={"c"})
    kept.put("d", "D", num_bytes=1)
    assert ("a" in kept, "c" in kept, "d" in kept) == (False, True, True)
    kept.release()
    kept.put("e", "E", num_bytes=10)
    assert ("c" in kept, "e" in kept) == (False, True)


def test_an_item_over_the_budget_is_refused_and_nothing_is_thrown_out_for_it() -> None:
    kept = store()
    kept.put("a", "A", num_bytes=6)
    with pytest.raises(StoreFullError, match="do not fit"):
        kept.put("b", "B", num_bytes=11)
    assert (kept.get("a"), kept.bytes_used, kept.num_evicted) == ("A", 6, 0)


def test_entries_are_never_replaced_and_never_stand_in_for_another() -> None:
    kept = store()
    kept.put("a", "A", num_bytes=1)
    with pytest.raises(ValueError, match="a is in the store already"):
        kept.put("a", "other", num_bytes=1)
    with pytest.raises(KeyError):
        kept.get("b")
    kept.drop("a")
    assert ("a" in kept, kept.bytes_used) == (False, 0)
    kept.put("a", "again", num_bytes=10)
    kept.clear()
    assert (len(kept), kept.bytes_used) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12)), max_size=40))
def test_never_over_the_budget(operations: list[tuple[int, int]]) -> None:
    kept, held = store(12), {}
    for key, size in operations:
        name = str(key)
        if name in kept:
            assert kept.get(name) == name
        else:
            kept.put(name, name, num_bytes=size)
            held[name] = size
        assert kept.bytes_used == sum(size for name, size in held.items() if name in kept) <= 12


def key_of(selection: FrameSelection) -> str:
    """Of the file as it is now."""
    return selection_key(selection, file_digest(selection.path))


def test_key_depends_on_content_frames_and_size_and_not_on_the_name(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(bytes(range(256)) * 16)
    selection = FrameSelection(path=str(file), frames=(0, 4), seconds=(0.0, 1.0), height=32, width=32)
    key = key_of(selection)
    assert key_of(selection) == key
    copy = tmp_path / "b.mp4"
    copy.write_bytes(file.read_bytes())
    assert key_of(replace(selection, path=str(copy))) == key
    others = {
        key,
        key_of(replace(selection, height=64)),
        key_of(replace(selection, width=64)),
        key_of(replace(selection, frames=(0, 5))),
        key_of(replace(selection, frames=(0,))),
    }
    file.write_bytes(file.read_bytes()[:-1] + b"!")  # another last byte
    os.utime(file, ns=(1, 1))
    others.add(key_of(selection))
    file.write_bytes(file.read_bytes() + b"!")
    others.add(key_of(selection))
    assert len(others) == 7


@pytest.mark.parametrize("place", [0, 2_500_000, 4_999_999], ids=["start", "middle", "end"])
def test_key_of_a_long_file_sees_its_start_middle_and_end(tmp_path: Path, place: int) -> None:
    file = tmp_path / "long.mp4"
    content = bytearray(5_000_000)
    file.write_bytes(content)
    selection = FrameSelection(path=str(file), frames=(0,), seconds=(0.0,), height=32, width=32)
    before = key_of(selection)
    content[place] = 1
    file.write_bytes(content)
    os.utime(file, ns=(2, 2))
    assert key_of(selection) != before


def test_a_file_is_what_it_was_when_it_was_first_asked_for(tmp_path: Path) -> None:
    file, contents = tmp_path / "a.mp4", FileContents()
    file.write_bytes(b"one")
    before = contents[str(file)]
    file.write_bytes(b"another")
    assert contents[str(file)] == before != file_digest(str(file))
    file.unlink()
    assert contents[str(file)] == before
    with pytest.raises(DecodeError, match=r"a\.mp4: cannot be read: No such file or directory"):
        file_digest(str(file))
