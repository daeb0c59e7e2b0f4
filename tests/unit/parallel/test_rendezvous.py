"""Processes of one attempt meet, whatever the attempts before left in the store that torchrun keeps for all."""

from __future__ import annotations

import datetime
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import DistStoreError, Store, TCPStore

from megalong.parallel.rendezvous import attempt

MINUTE = datetime.timedelta(minutes=1)


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(server: TCPStore) -> Store:
    return TCPStore("127.0.0.1", server.port, is_master=False, timeout=MINUTE)


def attempts(server: TCPStore, size: int, *, late: random.Random | None = None) -> list[str]:
    """What each rank of an attempt takes for its name. late: they come in any order."""

    def join(rank: int) -> str:
        time.sleep(late.random() * 0.2 if late else 0)
        return attempt(client(server), rank, size, timeout=MINUTE)

    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(join, range(size)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_attempt_has_a_name_of_its_own_that_all_its_ranks_know(server: TCPStore, size: int) -> None:
    late = random.Random(size)
    names = [attempts(server, size, late=late) for _ in range(3)]
    assert [len(set(ranks)) for ranks in names] == [1, 1, 1]
    assert len({ranks[0] for ranks in names}) == 3


def test_what_dead_ranks_left_is_answered_and_not_taken(server: TCPStore) -> None:
    """Of attempts that ended while they met: rank 0 never came; rank 2 died before it had the answer, rank 1 after."""
    server.set("here/1", "dead")
    assert len(set(attempts(server, 3, late=random.Random(1)))) == 1
    server.set("here/2", "dead")
    server.set("answer/dead", "earlier")
    server.set("earlier/has/1", "")
    (name,) = set(attempts(server, 3, late=random.Random(2)))
    assert name != "earlier"


def test_ranks_that_do_not_come_are_named(server: TCPStore) -> None:
    server.set("here/2", "dead")
    message = re.escape("ranks [1, 2] of 3 did not come within 0:00:00.100000")
    with pytest.raises(DistStoreError, match=message):
        attempt(client(server), 0, 3, timeout=datetime.timedelta(seconds=0.1))
