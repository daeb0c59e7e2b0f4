"""Processes of one attempt meet, whatever the attempts before left in the store that torchrun keeps for all."""

from __future__ import annotations

import datetime
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import run_world
from torch.distributed import DistStoreError, Store, TCPStore

from megalong.parallel.rendezvous import ask, meet, tell

MINUTE = datetime.timedelta(minutes=1)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server: TCPStore) -> Store:
    return TCPStore("127.0.0.1", server.port, is_master=False, timeout=MINUTE)


def told(server: TCPStore, word: str, size: int, *, late: random.Random) -> list[str]:
    """What the ranks of an attempt, which come in any order, are told."""

    def join(rank: int) -> str:
        time.sleep(late.random() * 0.2)
        if rank:
            return ask(client(server), rank)
        tell(client(server), word, size, timeout=MINUTE)
        return word

    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(join, range(size)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_ranks_are_told_what_rank_0_of_their_attempt_tells(server: TCPStore, size: int) -> None:
    late = random.Random(size)
    for word in ("1234", "1234", "5/6"):
        assert told(server, word, size, late=late) == [word] * size


def test_what_dead_ranks_left_is_answered_and_not_taken(server: TCPStore) -> None:
    """Of attempts that ended while they met: rank 0 never came; rank 2 died before it had the answer, rank 1 after."""
    server.set("here/1", "dead")
    assert told(server, "1", 3, late=random.Random(1)) == ["1"] * 3
    server.set("here/2", "dead")
    server.set("answer/dead", "earlier/0")
    server.set("earlier/has/1", "")
    assert told(server, "2", 3, late=random.Random(2)) == ["2"] * 3


def test_ranks_that_do_not_come_are_named(server: TCPStore) -> None:
    server.set("here/2", "dead")
    message = re.escape("ranks [1, 2] of 3 did not come within 0:00:00.100000")
    with pytest.raises(DistStoreError, match=message):
        tell(client(server), "", 3, timeout=datetime.timedelta(seconds=0.1))


def meet_twice() -> list[tuple[int, int, bool, str]]:
    """Of each meeting: rank and size, whether the store holds what the first attempt left, what rank 0 wrote."""
    seen = []
    for attempt in range(2):
        store, rank, size = meet(timeout=MINUTE)
        stale = store.check(["exception_dump"])  # NCCL writes it past all prefixes
        store.set(f"looked/{rank}", "")
        store.wait([f"looked/{other}" for other in range(size)])
        if rank == 0:
            store.set("exception_dump", str(attempt))
        seen.append((rank, size, stale, store.get("exception_dump").decode()))
        store.set(f"done/{rank}", "")
        store.wait([f"done/{other}" for other in range(size)])
        time.sleep(0.2 if rank == 0 else 0)  # it serves the others' last words
    return seen


def test_an_attempt_finds_nothing_of_the_one_before_in_its_store(tmp_path: Path) -> None:
    results = run_world(3, meet_twice, folder=tmp_path)
    assert results == [[(rank, 3, False, "0"), (rank, 3, False, "1")] for rank in range(3)]
