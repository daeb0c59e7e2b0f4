"""Where the processes of a run meet, without meeting those of an attempt that ended.

torchrun keeps one store for all attempts of a run (RESTARTS): its port is bound before anybody is told, so no other
program can take it in between, but the keys of the attempt that ended, addresses of dead processes among them, are
still there. Each attempt therefore has a prefix of its own. Nothing that torchrun says is one: on several nodes
TORCHELASTIC_RESTART_COUNT counts a node's own failures, and differs between them. torchrun ends the ranks of an attempt
before it starts those of the next.
"""

from __future__ import annotations

import datetime
import time
import uuid

from torch.distributed import DistStoreError, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_LOOK_SECONDS = 0.02


def meet(*, timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """The store that the ranks of this attempt share and no other attempt has used; this rank, and how many there are.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the environment say where. Raises DistStoreError when a
    rank does not come within the timeout.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    return PrefixStore(attempt(store, rank, world_size, timeout=timeout), store), rank, world_size


def attempt(store: Store, rank: int, world_size: int, *, timeout: datetime.timedelta) -> str:
    """A name that rank 0 made and all ranks of this attempt return, whatever earlier attempts left in the store.

    A rank says that it is here under a name of its own, and waits for rank 0's answer to that name; rank 0 answers
    whatever it finds, the words of dead ranks too, until every rank has said that it has this attempt's answer.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/has/{rank}", "")
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while True:
        for other in sorted(missing):
            if store.check([f"{own}/has/{other}"]):
                missing.remove(other)
            elif store.check([f"here/{other}"]):
                store.set(f"answer/{store.get(f'here/{other}').decode()}", own)
        if not missing:
            return own
        if time.monotonic() > deadline:
            raise DistStoreError(f"ranks {sorted(missing)} of {world_size} did not come within {timeout}")
        time.sleep(_LOOK_SECONDS)
