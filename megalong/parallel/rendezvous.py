"""Where the processes of a run meet, without meeting those of an attempt that ended.

torchrun keeps one store for all attempts of a run (RESTARTS). Its port is bound before anybody is told, so no other
program can take it in between; but what the attempt that ended has put there, addresses of dead processes and NCCL's
signals to give up, which no prefix keeps apart, is still there. So the ranks of an attempt only meet there, and rank 0
tells the others of a store of their own, whose port is bound, too. Nothing that torchrun says tells attempts apart: on
several nodes TORCHELASTIC_RESTART_COUNT counts a node's own failures, and differs between them. torchrun ends the ranks
of an attempt before it starts those of the next.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

from torch.distributed import DistStoreError, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

_LOOK_SECONDS = 0.02


def meet(*, timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """A store of this attempt's ranks alone, on rank 0; this rank, and how many there are.

    RANK, WORLD_SIZE, MASTER_ADDR (of rank 0's node) and MASTER_PORT of the environment say where to meet. Raises
    DistStoreError when a rank does not come within the timeout.
    """
    place, rank, world_size = next(rendezvous("env://", timeout=timeout))
    host = os.environ["MASTER_ADDR"]
    if rank:
        port = int(ask(place, rank))
        return TCPStore(host, port, world_size, is_master=False, timeout=timeout), rank, world_size
    store = TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, timeout=timeout)
    tell(place, str(store.port), world_size, timeout=timeout)
    return store, rank, world_size


def ask(place: Store, rank: int) -> str:
    """What rank 0 of this attempt tells, whatever is in the store of earlier ones.

    A rank says that it is here under a name of its own, and waits for an answer to that name.
    """
    own = uuid.uuid4().hex
    place.set(f"here/{rank}", own)
    attempt, word = place.get(f"answer/{own}").decode().split("/", maxsplit=1)
    place.set(f"{attempt}/has/{rank}", "")
    return word


def tell(place: Store, word: str, world_size: int, *, timeout: datetime.timedelta) -> None:
    """Tell all others, as rank 0: it answers whatever it finds, the words of dead ranks too, until every rank has said
    that it has this attempt's answer. Raises DistStoreError when one has not within the timeout."""
    attempt = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while True:
        for rank in sorted(missing):
            if place.check([f"{attempt}/has/{rank}"]):
                missing.remove(rank)
            elif place.check([f"here/{rank}"]):
                place.set(f"answer/{place.get(f'here/{rank}').decode()}", f"{attempt}/{word}")
        if not missing:
            return
        if time.monotonic() > deadline:
            raise DistStoreError(f"ranks {sorted(missing)} of {world_size} did not come within {timeout}")
        time.sleep(_LOOK_SECONDS)
